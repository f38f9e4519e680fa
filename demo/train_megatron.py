"""An ordinary program on megatron-core: a small GPT learns the bytes of a text. Every rank runs this script.

One line makes Perseus follow it, `perseus_megatron.enable`; a job of `pretrain_gpt.py` needs only the flag `--perseus`.
The script is started by `demo/run_megatron.py`, or by any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from megatron.core import parallel_state

import perseus_megatron
from demo.laps import Laps
from demo.megatron_gpt import Sizes, Training


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the perseus block")
    parser.add_argument("--text", type=Path, required=True, help="what to learn")
    parser.add_argument("--laps", type=Path, required=True, help="folder for what each iteration took")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=1, help="model chunks of a stage; 2 and more interleave")
    parser.add_argument("--expert-parallel", type=int, default=1, help="GPUs that share experts; needs several chunks")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--most-iterations", type=int, default=400)
    arguments = parser.parse_args()

    on_cpu = not torch.cuda.is_available()
    torch.distributed.init_process_group("gloo" if on_cpu else "nccl")
    if on_cpu:
        run_on_cpu()
    training = Training(
        Sizes(arguments.stages, arguments.chunks, expert_parallel=arguments.expert_parallel), arguments.text
    )
    if "PERSEUS_SIMULATED_GPUS" in os.environ:
        from perseus_megatron.simulated_work import occupy_simulated_gpus

        occupy_simulated_gpus()
    followed = perseus_megatron.enable(json.loads(arguments.config.read_text(encoding="utf-8")), training.model)

    laps = Laps(
        arguments.laps,
        lambda: followed.session,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline=parallel_state.get_data_parallel_rank(),
    )
    while not laps.are_enough(arguments.most_iterations):
        with followed.step():
            loss = training.step(arguments.microbatches)
        laps.add(mean_of_last_stage(loss))
    laps.close()
    followed.close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def mean_of_last_stage(loss: float) -> float:
    """Only the last stage knows the loss; all ranks shall."""
    total = torch.tensor([loss])
    torch.distributed.all_reduce(total)
    return float(total) / (parallel_state.get_data_parallel_world_size())


def run_on_cpu() -> None:
    """What Megatron wants on a machine without a GPU."""
    from tests.megatron import cpu_megatron

    torch.set_num_threads(1)
    cpu_megatron.install()


if __name__ == "__main__":
    main()
