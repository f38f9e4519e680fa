"""The unmodified `pretrain_gpt.py` of a Megatron-LM checkout, where `MEGATRON_LM_DIR` names one."""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from perseus_core.gpu.simulated import SimulatedNode
from tests.conftest import REPOSITORY
from tests.megatron.gpus import environment, simulated_gpus
from tests.megatron.launcher import QUICK

CHECKOUT = os.environ.get("MEGATRON_LM_DIR", "")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="MEGATRON_LM_DIR names no Megatron-LM checkout (git tag core_v0.16.1)"
)

MODEL = (
    "--num-layers 8 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 0.001 --lr-decay-style constant --lr-decay-iters 200 "
    "--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 128 --mock-data "
    "--split 90,5,5 --num-workers 0 --eval-iters 1 --eval-interval 30 --log-interval 1 "
)
CPU = (
    "--transformer-impl local --distributed-backend gloo --ckpt-format torch --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion "
    "--no-rope-fusion "
)
ITERATIONS = 60


def pretrain(node: SimulatedNode, folder: Path, world_size: int, flags: str) -> str:
    """Runs the script in processes of its own; returns what all of them printed."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {
        **os.environ,
        **environment(node),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)},
        **{"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    }
    script = str(Path(CHECKOUT) / "pretrain_gpt.py")
    command = [sys.executable, "-m", "tests.megatron.pretrain_on_cpu", script, *(MODEL + CPU + flags).split()]
    ranks = []
    for rank in range(world_size):
        with (folder / f"{rank}.txt").open("w") as output:
            of_rank = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=of_rank, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        statuses = [rank.wait(300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    printed = "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
    assert not any(statuses), printed[-5000:]
    return printed


def losses(printed: str) -> list[str]:
    return re.findall(r"lm loss(?: value)?: (\S+)", printed)


EXPERTS = (
    "--num-experts 4 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --disable-bias-linear --bf16 "
    "--overlap-moe-expert-parallel-comm --global-batch-size 8 "
)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "--pipeline-model-parallel-size 2"),
        (4, "--pipeline-model-parallel-size 4"),
        (4, "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1"),
        (4, "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2"),
        (4, f"--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 {EXPERTS}"),
    ],
    ids=["pp2", "pp4", "pp4 vpp2", "pp2 tp2", "pp2 vpp2 ep2"],
)
def test_flag_plans_and_changes_no_loss(tmp_path: Path, world_size: int, layout: str) -> None:
    """A plan is applied, every loss of training and evaluation is as without the flag, and no clock stays locked.

    Megatron's own TensorBoard writer, on the last rank, gets what was measured under the plan.
    """
    config = tmp_path / "perseus.json"
    config.write_text(json.dumps(QUICK))
    flags = f"{layout} --train-iters {ITERATIONS} "
    chunks = 2 if "virtual" in layout else 1
    with simulated_gpus(chunks=chunks, time_scale=0.03) as node:
        without = pretrain(node, tmp_path / "without", world_size, flags)
        flags += f"--perseus --perseus-config {config} --tensorboard-dir {tmp_path}"
        within = pretrain(node, tmp_path / "with", world_size, flags)
        assert not any(gpu.state().locked_mhz for gpu in node.gpus)
    assert len(losses(within)) > ITERATIONS
    assert losses(within) == losses(without)
    assert within.count("plan applied from iteration") >= 1
    scalars = [json.loads(line) for line in (tmp_path / "scalars.jsonl").read_text().splitlines()]
    assert {name for name, _, step in scalars if step > 0} >= {"lm loss", "perseus/iteration_time_s", "perseus/saving"}


def test_resumed_job_goes_on_with_its_plan(tmp_path: Path) -> None:
    """The second job loads the first one's checkpoint and applies its plan without profiling again."""
    config = tmp_path / "perseus.json"
    config.write_text(json.dumps(QUICK))
    flags = f"--pipeline-model-parallel-size 2 --save {tmp_path / 'checkpoints'} --save-interval {ITERATIONS} "
    flags += f"--override-opt_param-scheduler --perseus --perseus-config {config} "
    with simulated_gpus(time_scale=0.03) as node:
        pretrain(node, tmp_path / "first", 2, f"{flags} --train-iters {ITERATIONS}")
        resumed = pretrain(
            node, tmp_path / "second", 2, f"{flags} --load {tmp_path / 'checkpoints'} --train-iters {ITERATIONS + 8}"
        )
    assert "plan applied from iteration" in resumed
    assert "profiling clock" not in resumed


def test_megatrons_energy_log_agrees(tmp_path: Path) -> None:
    """Megatron's own `--log-energy`, which reads the counters for itself, is within 2 % of what we say of the job."""
    config = tmp_path / "perseus.json"
    config.write_text(json.dumps({"profile_cache": "off", "warmup_iterations": 5, "baseline_iterations": 30}))
    flags = "--pipeline-model-parallel-size 2 --train-iters 45 --eval-interval 1000 --log-energy "
    flags += f"--perseus --perseus-measure-only --perseus-config {config}"
    with simulated_gpus(time_scale=0.25) as node:
        printed = pretrain(node, tmp_path / "job", 2, flags)
    (ours_j,) = re.findall(r"measuring only: \S+ s an iteration, (\S+) J", printed)
    of_a_gpu_j = [float(energy) for energy in re.findall(r"energy per GPU \(J/iter/GPU\): (\S+)", printed)]
    assert len(of_a_gpu_j) == 45
    # We follow from the second iteration on.
    assert float(ours_j) == pytest.approx(2 * statistics.fmean(of_a_gpu_j[6:36]), rel=0.02)
