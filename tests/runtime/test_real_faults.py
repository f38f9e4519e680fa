"""Whole jobs to which something happens that no session has a say in. Training goes on, or ends by its own rules."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.description import Description
from tests.conftest import REPOSITORY
from tests.runtime.faulty_job import FaultyJob, RunningJob, may_have_namespaces, start

pytest.importorskip("torch")

QUICK: dict[str, Any] = {
    "enabled": True,
    "warmup_iterations": 1,
    "baseline_iterations": 2,
    "profile_clocks": 3,
    "profile_iterations": 1,
    "watch_iterations": 4,
    "tolerance": 0.5,
    "slow_gpu": 0.3,
    "switch_latency_s": 0.002,
    "profile_cache": "off",
}
# "About a second", on a machine that may be busy.
LONGEST_CALL_S = 1.5
ABSENCE_IS_SAID_AFTER_S = 10.0
PLAIN_ITERATIONS = 500
# So many iterations more show that training goes on.
MORE = 5

Start = Callable[..., RunningJob]


@pytest.fixture(scope="module")
def start_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    started: list[RunningJob] = []
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path_factory.mktemp("nodes")
    nodes: list[Path] = []

    def begin(settings: dict[str, Any] | None = None, **options: Any) -> RunningJob:
        node = base / f"perseus-test-faults-{time.monotonic_ns()}"
        node.mkdir()
        nodes.append(node)
        description = dataclasses.replace(
            Description.load(REPOSITORY / "configs" / "gpus" / "a100.json"),
            time_scale=0.1,
            clock_latency_s=0.0015,
            energy_counter_period_s=0.01,
        )
        simulated.create_node(description, node)
        out = tmp_path_factory.mktemp("job")
        running = start(FaultyJob(str(node), str(out), {**QUICK, **(settings or {})}, **options))
        started.append(running)
        return running

    yield begin
    for running in started:
        running.kill()
    for node in nodes:
        shutil.rmtree(node, ignore_errors=True)


@pytest.fixture(scope="module")
def plain(start_job: Start) -> RunningJob:
    """The job without us, and with work that takes no time: what the losses must be."""
    running = start_job({"enabled": False}, iterations=PLAIN_ITERATIONS, works=False)
    assert running.statuses() == [0, 0, 0]
    return running


def assert_unharmed(running: RunningJob, plain: RunningJob) -> None:
    """Every rank has ended well, with the losses of the job without us, and no call took long."""
    for rank in range(running.job.num_ranks):
        losses = running.losses(rank)
        assert losses == plain.losses(rank)[: len(losses)] != []
    assert running.longest_call_s() < LONGEST_CALL_S


def locked_gpus(running: RunningJob, patience_s: float = 30.0) -> list[int]:
    """GPUs whose clock is still locked, after the watchdog has had its time."""
    node = simulated.open_node(running.job.node)
    end_s = time.monotonic() + patience_s
    while True:
        locked = [gpu.identity.index for gpu in node.gpus if gpu.state().locked_mhz]
        if not locked or time.monotonic() > end_s:
            return locked
        time.sleep(0.05)


def test_with_eight_descriptors_left_training_keeps_its_own(start_job: Start, plain: RunningJob) -> None:
    """The limit holds on all ranks, also where the store is; each iteration opens a file."""
    running = start_job(spare_descriptors=8)
    running.wait_until(
        lambda: running.now(0)["plan"] > 0 or running.now(0)["phase"] in ("measure only", "stepped aside"),
        "a plan runs, or the session says why not",
    )
    running.wait_for_iterations(MORE)
    assert running.stop() == [0, 0, 0]
    assert_unharmed(running, plain)
    assert len(running.warnings()) <= 1, running.warnings()
    assert locked_gpus(running) == []


@pytest.mark.skipif(not may_have_namespaces(), reason="no right to make namespaces")
def test_hosts_whose_names_are_loopback_addresses(start_job: Start) -> None:
    """Two networks joined by a cable; what a host's own name says is of no use to the other."""
    alone = start_job({"enabled": False}, num_ranks=2, iterations=PLAIN_ITERATIONS, works=False)
    assert alone.statuses() == [0, 0]
    running = start_job(num_ranks=2, has_networks=True)
    running.wait_for_plan()
    running.wait_for_iterations(MORE)
    assert running.stop() == [0, 0]
    assert_unharmed(running, alone)
    assert running.warnings() == []


def test_a_rank_without_a_session_is_named_soon(start_job: Start, plain: RunningJob) -> None:
    """In one line, and nobody waits for it."""
    running = start_job(absent_ranks=[2])
    running.wait_until(lambda: running.now(0)["iteration"] >= 2, "training does not wait")
    assert running.warnings() == []
    running.wait_until(running.warnings, "the absent rank is named")
    said_after_s = time.monotonic() - running.now(0)["opened_s"]
    running.wait_for_iterations(MORE)
    assert running.stop() == [0, 0, 0]
    assert [line.split(" WARNING ")[1].split(":")[0] for line in running.warnings()] == [
        "rank 2 has no session of this version"
    ]
    assert said_after_s < ABSENCE_IS_SAID_AFTER_S + 3
    assert_unharmed(running, plain)


def test_a_rank_that_dies_before_its_first_iteration(start_job: Start) -> None:
    """The pipeline ends with an error of its own. What becomes of ranks that train on is tested in virtual time."""
    running = start_job(pauses_after_opening=[2])
    running.wait_until(lambda: running.now(2).get("opened_s"), "rank 2 has opened its session")
    os.kill(running.pid("rank2"), signal.SIGKILL)
    assert [os.waitstatus_to_exitcode(status) for status in running.statuses()] == [1, 1, -signal.SIGKILL]
    assert len(running.warnings()) <= 1, running.warnings()
    assert running.longest_call_s() < LONGEST_CALL_S


def test_a_rank_that_is_stopped_for_long_goes_on_under_the_plan(start_job: Start, plain: RunningJob) -> None:
    """Until its watchdog has given the clock back, or longer. All others wait for it, as a pipeline does."""
    running = start_job()
    running.wait_for_plan()
    pid = running.pid("rank1")
    os.kill(pid, signal.SIGSTOP)
    gpu = simulated.open_node(running.job.node).gpus[1]
    running.wait_until(lambda: not gpu.state().locked_mhz, "the watchdog has given the clock back")
    time.sleep(float(os.environ.get("PERSEUS_TEST_STOP_S", "0")))
    os.kill(pid, signal.SIGCONT)
    running.wait_for_iterations(2 * MORE)
    running.wait_for_plan()
    assert running.stop() == [0, 0, 0]
    assert_unharmed(running, plain)
    assert len(running.warnings()) <= 1, running.warnings()
    assert locked_gpus(running) == []


def test_rank_zero_is_killed(start_job: Start) -> None:
    """With it goes the store. The pipeline ends with an error of its own, soon, and clocks are given back."""
    running = start_job()
    running.wait_for_plan()
    os.kill(running.pid("rank0"), signal.SIGKILL)
    killed_s = time.monotonic()
    exits = [os.waitstatus_to_exitcode(status) for status in running.statuses()]
    assert exits == [-signal.SIGKILL, 1, 1], running.log()
    assert max(running.ended_at_s()) - killed_s < 10
    assert len(running.warnings()) <= 1, running.warnings()
    assert running.longest_call_s() < LONGEST_CALL_S
    assert locked_gpus(running) == []


@pytest.mark.parametrize("time_", range(int(os.environ.get("PERSEUS_TEST_TIMES", "1"))))
def test_the_store_is_gone(start_job: Start, plain: RunningJob, time_: int) -> None:
    """Training needs it no more. One line, clocks given back, and an ordinary end."""
    running = start_job(has_own_store=True)
    running.wait_for_plan()
    os.kill(running.pid("store"), signal.SIGKILL)
    running.wait_until(running.warnings, "it is said")
    running.wait_for_iterations(2 * MORE)
    assert locked_gpus(running, 5.0) == []
    assert {running.now(rank)["phase"] for rank in range(3)} == {"stepped aside"}
    assert running.stop() == [0, 0, 0]
    assert_unharmed(running, plain)
    assert ["store cannot be reached" in line for line in running.warnings()] == [True], running.warnings()
    # Each has torch write a long warning of its own. On rank 0 two threads may be at it at the same time.
    assert [running.num_calls_of_dead_store(rank) for rank in (1, 2)] == [1, 1]
    assert running.num_calls_of_dead_store(0) <= 2


def test_the_store_hangs(start_job: Start, plain: RunningJob) -> None:
    """Calls of side threads do not come back, and training ends as if nothing were."""
    running = start_job(has_own_store=True)
    running.wait_for_plan()
    os.kill(running.pid("store"), signal.SIGSTOP)
    running.wait_for_iterations(4 * MORE)
    assert running.stop() == [0, 0, 0]
    assert_unharmed(running, plain)
    assert len(running.warnings()) <= 1, running.warnings()
    assert locked_gpus(running) == []


def test_no_home_folder(start_job: Start, plain: RunningJob) -> None:
    """Profiles are not kept."""
    running = start_job({"profile_cache": "auto"}, has_no_home=True)
    _assert_plan_in_spite(running, plain)


def test_files_of_rank_zero_that_cannot_be_used(start_job: Start, plain: RunningJob, tmp_path: Path) -> None:
    """A plan is made all the same, with a line for each; in virtual time more of them are tried (`test_opening`)."""
    (tmp_path / "broken").write_text('{"version": 1, "profile": [')
    settings = {"profile_cache": str(tmp_path / "broken"), "state_file": str(tmp_path / "broken")}
    _assert_plan_in_spite(start_job(settings), plain, num_lines=2)


def _assert_plan_in_spite(running: RunningJob, plain: RunningJob, *, num_lines: int = 1) -> None:
    running.wait_for_plan()
    running.wait_for_iterations(MORE)
    assert running.stop() == [0, 0, 0]
    assert_unharmed(running, plain)
    assert len(running.warnings()) == num_lines, running.warnings()
