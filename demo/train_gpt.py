"""An ordinary DeepSpeed pipeline job: a small GPT learns the bytes of a text. Every rank runs this script.

There is no line about Perseus in the training itself: the block in the config does it. The script is started by
`demo/run.py`, or by any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

from demo.gpt import cross_entropy, gpt_layers, microbatches
from demo.laps import Laps
from perseus_ds import session_of

SEQUENCE_LENGTH = 64


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="DeepSpeed config, with or without a perseus block")
    parser.add_argument("--text", type=Path, required=True, help="what to learn")
    parser.add_argument("--laps", type=Path, required=True, help="folder for what each iteration took")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--most-iterations", type=int, default=400)
    arguments = parser.parse_args()

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        run_on_cpu()
    deepspeed.init_distributed("gloo" if on_cpu else "nccl")
    torch.manual_seed(1234)
    model = PipelineModule(
        gpt_layers(2 * arguments.stages - 2, arguments.width, heads=2, sequence_length=SEQUENCE_LENGTH),
        num_stages=arguments.stages,
        loss_fn=cross_entropy,
        partition_method="uniform",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=str(arguments.config))
    data = microbatches(
        arguments.text, engine.train_micro_batch_size_per_gpu(), SEQUENCE_LENGTH, engine.grid.data_parallel_id
    )

    pipeline = engine.grid.get_data_parallel_id()
    laps = Laps(arguments.laps, lambda: session_of(engine), stage=engine.stage_id, pipeline=pipeline)
    while not laps.are_enough(arguments.most_iterations):
        laps.add(engine.train_batch(data).item())
    laps.close()

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_on_cpu() -> None:
    """What DeepSpeed wants on the CPU; and where simulated GPUs are (`perseus simulate`), they do the work."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    torch.set_num_threads(1)
    if "PERSEUS_SIMULATED_GPUS" in os.environ:
        from perseus_ds.simulated_work import occupy_simulated_gpus

        occupy_simulated_gpus()


if __name__ == "__main__":
    main()
