"""Whole jobs: four processes over gloo, simulated GPUs behind the real `pynvml`, every fault while training runs."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.description import Description
from tests.conftest import REPOSITORY
from tests.runtime.pipeline import PipelineJob, log_of, run

pytest.importorskip("torch")

TIME_SCALE = 0.1
# Wide tolerances: on a busy machine processes run late, and these tests are about what the session does, not how well.
QUICK = {
    "enabled": True,
    "warmup_iterations": 1,
    "baseline_iterations": 3,
    "profile_clocks": 4,
    "profile_iterations": 1,
    "watch_iterations": 4,
    "tolerance": 0.5,
    "slow_gpu": 0.2,
    "switch_latency_s": 0.002,
}
# A job ends when what it is for has happened. This ends one in which it does not.
MOST_ITERATIONS = 200
SET_CLOCKS = "nvmlDeviceSetGpuLockedClocks"

MakeNode = Callable[..., Path]


@pytest.fixture(scope="module")
def make_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeNode]:
    """Fresh GPUs for each job, in memory where there is room."""
    shared_memory = Path("/dev/shm")
    base = Path(tmp_path_factory.mktemp("nodes")) if not shared_memory.is_dir() else shared_memory
    folders: list[Path] = []

    def make(time_scale: float = TIME_SCALE) -> Path:
        folder = base / f"perseus-test-session-{time.monotonic_ns()}"
        folder.mkdir()
        folders.append(folder)
        description = dataclasses.replace(
            Description.load(REPOSITORY / "configs" / "gpus" / "a100.json"),
            time_scale=time_scale,
            clock_latency_s=0.015 * TIME_SCALE,
            energy_counter_period_s=0.1 * TIME_SCALE,
        )
        simulated.create_node(description, folder, log=True)
        return folder

    yield make
    for folder in folders:
        shutil.rmtree(folder)


@dataclasses.dataclass
class Ran:
    """A job that has run."""

    job: PipelineJob
    ranks: list[dict[str, Any] | None]

    @property
    def finished(self) -> list[dict[str, Any]]:
        assert all(rank is not None for rank in self.ranks), f"a rank did not finish, see {self.job.out}"
        return [rank for rank in self.ranks if rank is not None]

    @property
    def warnings(self) -> list[str]:
        """Without those that a busy machine causes: instructions that take longer than they should."""
        lines = [line for rank in range(4) for line in log_of(self.job, rank) if " WARNING " in line]
        return [line for line in lines if "slower than its profile" not in line or "power or heat" in line]

    def locked_gpus(self, out_of_reach: tuple[int, ...] = (), patience_s: float = 30.0) -> list[int]:
        """GPUs whose clock is still locked, after the watchdog has had its time; without those nobody can reset."""
        node = simulated.open_node(self.job.node)
        end_s = time.monotonic() + patience_s
        while True:
            locked = [gpu.identity.index for gpu in node.gpus if gpu.state().locked_mhz]
            locked = [index for index in locked if index not in out_of_reach]
            if not locked or time.monotonic() > end_s:
                return locked
            time.sleep(0.05)


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def run_job(make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> Run:
    def run_it(iterations: int, settings: dict[str, Any], time_scale: float = TIME_SCALE, **options: Any) -> Ran:
        out = tmp_path_factory.mktemp("job")
        job = PipelineJob(str(make_node(time_scale)), str(out), settings, iterations, **options)
        return Ran(job, run(job, timeout_s=120))

    return run_it


@pytest.fixture(scope="module")
def plain(run_job: Run) -> Ran:
    """The job without us, and with work that takes no time: what the losses must be."""
    return run_job(MOST_ITERATIONS, {"enabled": False}, time_scale=TIME_SCALE / 100, tail_s=0.0)


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "session.json"


@pytest.fixture(scope="module")
def planned(run_job: Run, state_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The job under the session from the first iteration until its plan was judged."""
    settings = {
        **QUICK,
        "state_file": str(state_file),
        "profile_cache": str(state_file.parent),
        "frontier_file": str(state_file.parent / "frontier.json"),
    }
    return run_job(MOST_ITERATIONS, settings, iterations_under_plan=12)


@pytest.fixture
def restarted(run_job: Run, planned: Ran, state_file: Path, tmp_path: Path) -> Run:
    """Jobs that go on from the state of `planned`."""

    def go_on(iterations: int, *, changed: Mapping[str, Any] | None = None, **options: Any) -> Ran:
        copy = tmp_path / "session.json"
        shutil.copy(state_file, copy)
        settings = {**QUICK, "state_file": str(copy), "profile_cache": "off", **(changed or {})}
        return run_job(iterations, settings, **options)

    return go_on


def _same_losses(ran: Ran, plain: Ran) -> bool:
    """Bit for bit, on every rank, in every iteration."""
    return all(
        rank["losses"] == of_plain["losses"][: len(rank["losses"])]
        for rank, of_plain in zip(ran.finished, plain.finished, strict=True)
    )


def _instruction_energies_j(ran: Ran) -> list[float]:
    """Of each iteration, waiting left out: on a busy machine processes come late, and their GPUs wait longer."""
    energies_j: dict[int, float] = {}
    for executed in simulated.read_executed(Path(ran.job.node)):
        iteration = executed.label["iteration"]
        energies_j[iteration] = energies_j.get(iteration, 0.0) + executed.energy_j
    return [energies_j[iteration] for iteration in sorted(energies_j)]


def test_a_job_is_profiled_planned_and_saves_what_was_promised(planned: Ran) -> None:
    """Read from the simulated GPUs' own log; how closely is the benchmark's business."""
    status = planned.finished[0]["status"]
    assert status["plan"] >= 1
    assert status["promised_saving"] > 0.01
    energies_j = _instruction_energies_j(planned)
    saved = 1 - statistics.median(energies_j[-8:]) / statistics.median(energies_j[1:6])
    assert saved > 0.6 * status["promised_saving"]


def test_the_numbers_of_training_are_the_same(planned: Ran, plain: Ran) -> None:
    """Bit for bit, on every rank."""
    assert _same_losses(planned, plain)


def test_the_clocks_are_given_back_at_the_end(planned: Ran) -> None:
    """On every GPU."""
    assert planned.locked_gpus() == []


def test_the_log_is_short_and_rank_0s(planned: Ran) -> None:
    """Progress, the plan, what was measured: nothing else and nobody else."""
    assert [line for line in planned.warnings if "slower than its profile" not in line] == []
    assert [log_of(planned.job, rank) for rank in (1, 2, 3)] == [[], [], []]
    lines = log_of(planned.job)
    assert any("profiling clock 2 of 4" in line for line in lines)
    assert any("plan applied from iteration" in line and "% less energy" in line for line in lines)
    assert any("measured in iterations" in line for line in lines)
    assert len([line for line in lines if " INFO " in line]) < 20


def test_the_frontier_is_written_for_other_tools(planned: Ran, state_file: Path) -> None:
    """`perseus` commands read it."""
    from perseus_core.planning.frontier_file import load_frontier

    assert load_frontier(state_file.parent / "frontier.json").problem.schedule.num_stages == 4


def test_a_cached_profile_is_not_measured_again(run_job: Run, planned: Ran, state_file: Path) -> None:
    """The baseline is, and a plan follows."""
    settings = {**QUICK, "profile_cache": str(state_file.parent)}
    status = run_job(MOST_ITERATIONS, settings, iterations_under_plan=1).finished[0]["status"]
    assert status["profiling_iterations"] == 0
    assert status["plan"] >= 1


def test_a_restarted_job_follows_odd_iterations_and_sees_a_throttled_gpu(restarted: Run, plain: Ran) -> None:
    """It runs its plan without measuring anything before; heat is seen within three iterations and planned for."""
    hot = {"rank": 2, "under_plan": 6, "what": "throttle", "value": 900}
    ran = restarted(
        MOST_ITERATIONS, evaluate_every=9, short_every=7, faults=[hot], plan_to_reach=2, iterations_under_plan=12
    )
    applied = [line for line in log_of(ran.job) if "plan applied from iteration" in line]
    assert len(applied) >= 2, "a plan for the job as it is now"
    assert not any("profiling" in line or "baseline:" in line for line in log_of(ran.job))
    slow = [line for line in ran.warnings if "stage 2 (rank 2)" in line and "slower than its profile" in line]
    assert "power or heat holds its clock down" in slow[0]
    (throttled,) = ran.finished[2]["faults"]
    assert int(slow[0].split("of iteration ")[1].split(" ")[0]) <= throttled["done"] + 3
    assert sum("an evaluation has no plan" in line for line in ran.warnings) == 1
    assert sum("4 microbatches has no plan" in line for line in ran.warnings) == 1
    assert ran.locked_gpus() == []


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("deny", None, "no permission"),
        ("unsupported", SET_CLOCKS, "not supported"),
        ("hang", SET_CLOCKS, "has not answered"),
        ("lose", None, "the GPU is lost"),
    ],
)
def test_a_gpu_fault_ends_the_plan_and_not_the_training(
    restarted: Run, plain: Ran, what: str, value: Any, message: str
) -> None:
    """While a plan runs: losses unchanged, clocks reset, one log line that says why."""
    new_plan = {"rank": 0, "under_plan": 5, "what": "straggler", "value": 1.3}  # so that clocks change for certain
    faults = [{"rank": 1, "under_plan": 4, "what": what, "value": value}, new_plan]
    ran = restarted(MOST_ITERATIONS, faults=faults, phase_to_reach="measure only", iterations_under_plan=2)
    assert _same_losses(ran, plain)
    warnings = [line for line in ran.warnings if "slower than its profile" not in line]
    assert [message in line for line in warnings] == [True]
    # A driver that refuses to set a clock refuses to reset it, too, and a lost GPU hears nothing.
    assert ran.locked_gpus(out_of_reach=(1,) if what in ("deny", "lose") else ()) == []


def test_an_error_of_ours_ends_us_and_not_the_training(restarted: Run, plain: Ran) -> None:
    """The other ranks learn it and step aside; a killed watchdog before that is only replaced."""
    faults = [
        {"rank": 0, "under_plan": 2, "what": "kill_watchdog"},
        {"rank": 1, "under_plan": 8, "what": "raise"},
    ]
    ran = restarted(MOST_ITERATIONS, faults=faults, phase_to_reach="stepped aside", iterations_under_plan=2)
    assert _same_losses(ran, plain)
    assert [rank["status"]["phase"] for rank in ran.finished] == ["stepped aside"] * 4
    assert len([line for line in ran.warnings if "ZeroDivisionError" in line]) == 1
    assert ran.locked_gpus() == []


def test_a_killed_rank_leaves_no_clock_locked(restarted: Run) -> None:
    """Neither its own nor those of the ranks that die of it."""
    ran = restarted(MOST_ITERATIONS, faults=[{"rank": 2, "under_plan": 6, "what": "kill"}])
    assert ran.ranks[2] is None
    assert ran.locked_gpus() == []
    statuses = (Path(ran.job.out) / "statuses.json").read_text()
    assert str(signal.SIGKILL.value) in statuses


def test_no_clock_stays_locked_when_all_ranks_are_killed(restarted: Run) -> None:
    """Each has a watchdog of its own."""
    ran = restarted(MOST_ITERATIONS, faults=[{"rank": rank, "under_plan": 6, "what": "kill"} for rank in range(4)])
    assert ran.ranks == [None] * 4
    assert ran.locked_gpus() == []
