"""`run_command`: any program's `pynvml` sees the simulated GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.simulated.command import run_command

COUNT_GPUS = "import pynvml; pynvml.nvmlInit(); print(pynvml.nvmlDeviceGetCount())"


def test_children_of_children_see_the_same_gpus_without_knowing_of_perseus(
    describe: Callable[..., Path], tmp_path: Path
) -> None:
    """One process locks a clock of the last GPU, a process that a process started reads it."""
    output = tmp_path / "output"
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import subprocess, sys, time
import pynvml
assert not any(name.startswith("perseus_ds") for name in sys.modules)
pynvml.nvmlInit()
pynvml.nvmlDeviceSetGpuLockedClocks(pynvml.nvmlDeviceGetHandleByIndex(2), 500, 500)
time.sleep(0.05)
code = (
    "import pynvml as p; p.nvmlInit(); "
    "print(p.nvmlDeviceGetCount(), [p.nvmlDeviceGetClockInfo(p.nvmlDeviceGetHandleByIndex(i), 1) for i in range(3)])"
)
open({str(output)!r}, "w").write(subprocess.check_output([sys.executable, "-c", code], text=True))
"""
    )
    assert run_command(describe(num_gpus=3), [sys.executable, str(script)]) == 0
    assert output.read_text().strip() == "3 [1000, 1000, 500]"


def test_the_exit_status_is_the_commands(describe: Callable[..., Path]) -> None:
    """Its own, or 128 + n after signal n, as in a shell."""
    assert run_command(describe(), [sys.executable, "-c", "raise SystemExit(7)"]) == 7
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert run_command(describe(), [sys.executable, "-c", killed]) == 128 + signal.SIGKILL


def test_another_sitecustomize_still_runs(
    describe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours comes first on PYTHONPATH and hands on to the one it hides."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import os; os.environ['OTHER_RAN'] = 'yes'")
    monkeypatch.setenv("PYTHONPATH", str(other))
    check = f"{COUNT_GPUS}; import os; assert os.environ['OTHER_RAN'] == 'yes'"
    assert run_command(describe(), [sys.executable, "-c", check]) == 0


def test_nothing_is_left_behind(describe: Callable[..., Path], tmp_path: Path) -> None:
    """The folder of the shared state is gone when the command has ended."""
    output = tmp_path / "folder"
    code = f"import os; open({str(output)!r}, 'w').write(os.environ['PERSEUS_SIMULATED_GPUS'])"
    assert run_command(describe(), [sys.executable, "-c", code]) == 0
    assert output.read_text()
    assert not Path(output.read_text()).exists()


def test_a_command_that_cannot_be_started_is_named(describe: Callable[..., Path]) -> None:
    """And an empty one, and a wrong description, before anything is started."""
    with pytest.raises(InputError, match="command '/nowhere/train' cannot be started"):
        run_command(describe(), ["/nowhere/train"])
    with pytest.raises(InputError, match="no command is given"):
        run_command(describe(), [])
    with pytest.raises(InputError, match="num_gpus"):
        run_command(describe(num_gpus=-1), ["true"])


def test_sigterm_reaches_the_command_and_everything_is_cleaned_up(
    describe: Callable[..., Path], start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """The scheduler's SIGTERM is for the training, which may want to write a checkpoint."""
    child = (
        "import os, signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); "
        "print(os.environ['PERSEUS_SIMULATED_GPUS'], flush=True); time.sleep(60)"
    )
    process = start_python(
        f"""
import sys
from perseus_core.gpu.simulated.command import run_command
sys.exit(run_command({str(describe())!r}, [sys.executable, "-c", {child!r}]))
"""
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert folder.is_dir()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 5
    assert not folder.exists()


def test_a_process_whose_gpus_are_gone_still_starts(start_python: Callable[..., subprocess.Popen[str]]) -> None:
    """A process that outlives the command is told so once, and lives."""
    hook = Path(__file__).parents[2] / "perseus_core/gpu/simulated/hook"
    process = start_python("print('alive')", PYTHONPATH=str(hook), PERSEUS_SIMULATED_GPUS="/nowhere")
    assert process.communicate(timeout=60)[0] == "alive\n"
