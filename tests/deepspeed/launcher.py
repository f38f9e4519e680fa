"""Runs a function in the ranks of a real job, each a process of its own, and brings back what they return.

`launch` has a server fork the ranks: a process that has imported torch and the framework once, for all jobs of a test
run, which saves most of a launch's time. As a program (`python -m tests.deepspeed.launcher MODULE`) it is that process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """A job that has ended.

    Attributes:
        statuses: exit status of each rank, negative for a signal.
        results: what each rank's function returned; None where it did not.
        output: everything printed.
    """

    statuses: list[int]
    results: list[Any]
    output: str = field(repr=False)

    def results_of_all(self) -> list[Any]:
        """What each rank returned, if all ended well."""
        assert all(status == 0 for status in self.statuses), f"ranks ended with {self.statuses}:\n{self.output}"
        return self.results


def launch(
    scenario: str,
    world_size: int,
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    timeout_s: float = 400,
    scenarios: str = "tests.deepspeed.scenarios",
    **arguments: Any,
) -> Finished:
    """Runs a function on every rank.

    Args:
        scenario: its name.
        world_size: number of ranks.
        folder: an empty one for results and output.
        environment: added to this process's; folders in front of PYTHONPATH are where the ranks look for modules first.
        timeout_s: after which everything is killed and the test fails.
        scenarios: the module that holds the function.
        arguments: of the function, as JSON can hold them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "scenario": scenario,
        "world_size": world_size,
        "folder": str(folder),
        "environment": environment or {},
        "arguments": arguments,
    }
    server = _server(scenarios)
    try:
        status, is_late = server.run(job, timeout_s)
    except BaseException:
        server.end()
        _server.cache_clear()
        raise
    assert not is_late, f"{scenario} did not end in {timeout_s} s:\n{(folder / 'output.txt').read_text()}"
    results = [folder / f"result{rank}.json" for rank in range(world_size)]
    statuses = folder / "statuses.json"
    return Finished(
        json.loads(statuses.read_text()) if statuses.exists() else [status] * world_size,
        [json.loads(path.read_text()) if path.exists() else None for path in results],
        (folder / "output.txt").read_text(),
    )


class _Server:
    """A process that has imported a module of scenarios and forks one job after the other."""

    def __init__(self, scenarios: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.deepspeed.launcher", scenarios],
            cwd=REPOSITORY,
            # Megatron compiles small functions at import unless it is told not to: 13 s of CPU time.
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._job = 0  # process group
        atexit.register(self.end)

    def run(self, job: dict[str, Any], timeout_s: float) -> tuple[int, bool]:
        """Exit status of the job's first process, and whether it had to be killed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._job = self._hear()
        killed: list[bool] = []
        patience = threading.Timer(timeout_s, lambda: killed.append(self._kill_job()))
        patience.start()
        try:
            return self._hear(), bool(killed)
        finally:
            patience.cancel()
            self._job = 0

    def end(self) -> None:
        """Kills the server and the job that runs."""
        self._kill_job()
        self._process.kill()
        self._process.wait()
        atexit.unregister(self.end)

    def _hear(self) -> int:
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said, "the server of jobs has ended, see above"
        return int(said)

    def _kill_job(self) -> bool:
        if self._job:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._job, signal.SIGKILL)
        return True


@functools.cache
def _server(scenarios: str) -> _Server:
    return _Server(scenarios)


def _serve(scenarios: ModuleType) -> None:
    """Reads jobs from stdin, forks each into a session of its own, prints its process number and its exit status."""
    for module in scenarios.IMPORTED_LATER:
        with contextlib.suppress(ImportError):  # another release of the framework has no such module
            importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        with (Path(job["folder"]) / "output.txt").open("w") as output:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                _run_ranks(scenarios, job)
                return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run_ranks(scenarios: ModuleType, job: dict[str, Any]) -> None:
    function, folder, world_size = getattr(scenarios, job["scenario"]), Path(job["folder"]), job["world_size"]
    _enter(job["environment"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size))
    children = []
    for rank in range(world_size):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _run(function, job["arguments"], folder / f"result{rank}.json")
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "statuses.json").write_text(json.dumps(statuses))


def _enter(environment: dict[str, str]) -> None:
    """What Python does at its start in this environment, for a process that has started already."""
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    sys.modules.pop("pynvml", None)  # torch has looked for it
    if "PERSEUS_SIMULATED_GPUS" in environment:
        from perseus_core.gpu import simulated

        simulated.install()


def _run(function: Any, arguments: dict[str, Any], result_file: Path) -> None:
    """Ends the process as a Python program would end, atexit included."""
    try:
        result = function(**arguments)
        result_file.write_text(json.dumps(result))
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _serve(importlib.import_module(sys.argv[1]))
