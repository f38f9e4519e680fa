"""Runs a function in the ranks of a real DeepSpeed job, each a process of its own, and brings back what they return.

`launch` starts one process that imports torch and DeepSpeed once and forks the ranks, which saves most of a launch's
CPU time. As a program (`python -m tests.deepspeed.launcher`) it is that process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
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
    timeout_s: float = 170,
    scenarios: str = "tests.deepspeed.scenarios",
    **arguments: Any,
) -> Finished:
    """Runs a function on every rank.

    Args:
        scenario: its name.
        world_size: number of ranks.
        folder: an empty one for results and output.
        environment: added to this process's.
        timeout_s: after which everything is killed and the test fails.
        scenarios: the module that holds the function.
        arguments: of the function, as JSON can hold them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.deepspeed.launcher", f"{scenarios}:{scenario}", str(world_size), str(folder)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"{scenario} did not end:\n{(folder / 'output.txt').read_text()}") from None
    results = [folder / f"result{rank}.json" for rank in range(world_size)]
    statuses = folder / "statuses.json"
    return Finished(
        json.loads(statuses.read_text()) if statuses.exists() else [process.returncode] * world_size,
        [json.loads(path.read_text()) if path.exists() else None for path in results],
        (folder / "output.txt").read_text(),
    )


def _main(scenario: str, world_size: int, folder: Path) -> None:
    module, _, name = scenario.partition(":")
    function = getattr(importlib.import_module(module), name)
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
            _run(function, folder, rank)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "statuses.json").write_text(json.dumps(statuses))


def _run(function: Any, folder: Path, rank: int) -> None:
    """Ends the process as a Python program would end, atexit included."""
    try:
        result = function(**json.loads((folder / "arguments.json").read_text()))
        (folder / f"result{rank}.json").write_text(json.dumps(result))
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
