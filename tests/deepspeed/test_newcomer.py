"""A newcomer's walk: from `pip install` to the first saving, by what the README says and nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import threading
import venv
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PATIENCE_S = 500.0
NOT_CLONED = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "demo-output")

# A job as it may have been before there was Perseus, but for the one line that the README wants on simulated GPUs.
SCRIPT = """
import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.pipe import LayerSpec, PipelineModule
{line}

__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
model = PipelineModule([LayerSpec(torch.nn.Linear, 8, 8) for _ in range(8)], num_stages=4, loss_fn=torch.nn.MSELoss())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config="ds_config.json")
data = iter(lambda: (torch.randn(2, 8), torch.randn(2, 8)), None)
while True:
    engine.train_batch(data)
"""


def in_readme(pattern: str) -> str:
    found = re.search(pattern, README, re.MULTILINE | re.DOTALL)
    assert found, f"the README does not say {pattern}"
    return found.group(1)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a newcomer has it; simulated GPUs made eight times faster, for a short walk."""
    folder = tmp_path_factory.mktemp("newcomer") / "perseus"
    shutil.copytree(REPOSITORY, folder, ignore=NOT_CLONED)
    gpus = folder / "configs" / "gpus" / "a100.json"
    description = json.loads(gpus.read_text())
    faster = {"time_scale": 0.12, "clock_latency_s": 0.003, "energy_counter_period_s": 0.02}
    gpus.write_text(json.dumps({**description, **faster}))
    return folder


@pytest.fixture(scope="module")
def environment(clone: Path) -> dict[str, str]:
    """A new virtual environment, active, in which the README's command has installed the package.

    What the package depends on is not downloaded: the environment sees what the tests' own holds, as if pip had just
    installed it. The package itself is built and installed as for anybody.
    """
    folder = clone.parent / "venv"
    venv.create(folder, with_pip=True)
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way of saying: not isolated
        "XDG_CACHE_HOME": str(clone.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    site_packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(site_packages, "downloaded.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = in_readme(r"^(pip install [^\n]*deepspeed[^\n]*)$")
    # Where Python puts an old setuptools into a new environment, it would stand before the one that torch wants.
    for command in ("pip uninstall --yes setuptools", install):
        done = subprocess.run(
            shlex.split(command), cwd=clone, env=variables, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return variables


def config() -> dict[str, Any]:
    """The README's, for a smaller batch."""
    shown: dict[str, Any] = json.loads(in_readme(r"```json\n(.*?)```"))
    return {**shown, "gradient_accumulation_steps": 4, "steps_per_print": 10_000}


def test_first_saving(clone: Path, environment: dict[str, str]) -> None:
    """The log says that energy is saved."""
    job = clone.parent / "my job"
    job.mkdir()
    (job / "ds_config.json").write_text(json.dumps(config()))
    line = in_readme(r"`([^`]*occupy_simulated_gpus\(\))`")
    (job / "train.py").write_text(SCRIPT.format(line=f"import {line.rpartition('.')[0]}\n{line}"))
    simulate = in_readme(r"`(perseus simulate [^`]*) COMMAND`").split()
    simulate = [word.replace("configs/", f"{clone}/configs/") for word in simulate]
    command = [*simulate, "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    printed, saving = printed_until(
        r"\[perseus\] measured in iterations .*?(-?[\d.]+) % less energy", [*command, "train.py"], job, environment
    )
    assert saving, printed
    assert float(saving.group(1)) > 0


def printed_until(
    pattern: str, command: list[str], folder: Path, environment: dict[str, str]
) -> tuple[str, re.Match[str] | None]:
    """What a command prints until a line matches, and the match; the command is then ended, as it is after a while."""
    job = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = threading.Timer(PATIENCE_S, end, [job])
    deadline.start()
    printed, found = "", None
    try:
        assert job.stdout is not None
        for line in job.stdout:
            printed += line
            found = re.search(pattern, line)
            if found:
                break
    finally:
        deadline.cancel()
        end(job)
    return printed, found


def end(job: subprocess.Popen[str]) -> None:
    """Asks a job to end, as a user does, and kills what is left of it; its ranks have sessions of their own."""
    if job.poll() is not None:
        return
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    job.terminate()
    for process in psutil.wait_procs(processes, timeout=60)[1]:
        process.kill()
    job.wait()
