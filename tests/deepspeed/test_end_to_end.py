"""One whole job through real DeepSpeed, real `pynvml` and four processes, looked at from outside."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perseus_core.gpu.simulated import Description, ExecutedInstruction
from tests.conftest import REPOSITORY
from tests.deepspeed.conftest import MakeNode, executed_iterations, on
from tests.deepspeed.launcher import launch
from tests.planned_clocks import NO_POWER_CAP, not_at_their_clocks

MICROBATCHES = 4
UNDER_PLAN = 8
WAITING_W = Description.load(REPOSITORY / "configs" / "gpus" / "a100.json").blocking_power_w.at_highest_clock
BLOCK = {
    "enabled": True,
    "profile_cache": "off",
    "warmup_iterations": 1,
    "baseline_iterations": 3,
    "profile_clocks": 4,
    "profile_iterations": 1,
    "watch_iterations": 3,
    # One plan is looked at, whatever a busy machine makes of it.
    "tolerance": 0.5,
    "slow_gpu": 0.95,
}


@dataclass(frozen=True)
class Job:
    """What the ranks returned, and what their GPUs executed: for each rank and iteration its instructions in order.

    DeepSpeed's CSV monitor has written into a folder.
    """

    ranks: list[dict[str, Any]]
    executed: list[list[list[ExecutedInstruction]]]
    monitored: Path

    @property
    def settled(self) -> list[int]:
        """Iterations under the last plan, on all ranks, without the first."""
        last = self.ranks[0]["status"]["plan"]
        under = [i for i in range(self.iterations) if all(rank["plans"][i] == last for rank in self.ranks)]
        return under[1:]

    @property
    def unlocked(self) -> list[int]:
        """Iterations without us."""
        return [i for i in range(self.iterations) if all(rank["phases"][i] == "warm up" for rank in self.ranks)]

    @property
    def iterations(self) -> int:
        """How many there were."""
        return len(self.ranks[0]["plans"])

    def energy_j(self, iterations: list[int], time_s: float) -> float:
        """Median over iterations, all stages together, from the GPUs' own log: as if each iteration took `time_s`.

        How long they really took is left out: on a busy machine processes come late, and their GPUs wait longer.
        """
        waiting_j = len(self.executed) * WAITING_W * time_s
        return waiting_j + statistics.median(
            sum(e.energy_j - WAITING_W * (e.end_s - e.start_s) for of_rank in self.executed for e in of_rank[i])
            for i in iterations
        )


@pytest.fixture(scope="module")
def job(make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> Job:
    node = make_node(0.5, clock_latency_s=0.01, energy_counter_period_s=0.05, **NO_POWER_CAP)
    folder = tmp_path_factory.mktemp("job")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROBATCHES,
        "steps_per_print": 10_000,
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "monitored"},
        "perseus": BLOCK,
    }
    finished = launch(
        "train_under_a_plan",
        4,
        folder,
        environment=on(node),
        config=config,
        stages=4,
        under_plan=UNDER_PLAN,
        monitored=str(folder / "monitored" / "Perseus_saving.csv"),
    )
    ranks = finished.results_of_all()
    return Job(ranks, executed_iterations(node, ranks), folder / "monitored")


def test_energy_is_saved_as_promised(job: Job) -> None:
    """The GPUs' own exact energies confirm the promised saving, within two points; on a busy machine it may be more."""
    time_s = job.ranks[0]["status"]["baseline_time_s"]
    saving = 1 - job.energy_j(job.settled, time_s) / job.energy_j(job.unlocked, time_s)
    promised = job.ranks[0]["status"]["promised_saving"]
    assert saving > 0.08
    assert -0.02 < saving - promised < 0.05


def test_instructions_run_at_their_planned_clocks(job: Job) -> None:
    """Each in most iterations: see `not_at_their_clocks`."""
    assert len(job.settled) > 5
    for rank, executed in zip(job.ranks, job.executed, strict=True):
        assert not not_at_their_clocks([executed[i] for i in job.settled], rank["planned_mhz"]), rank["stage"]


def test_figures_reach_deepspeeds_monitor(job: Job) -> None:
    """Time, energy and saving stand beside DeepSpeed's own figures, over the samples trained, as the session says."""
    samples = {2 * MICROBATCHES * (iteration + 1) for iteration in range(job.iterations)}
    status = job.ranks[0]["status"]
    last = {}
    for name in ("iteration_time_s", "energy_j", "saving"):
        with (job.monitored / f"Perseus_{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", name]
        assert {int(step) for step, _ in rows} < samples
        last[name] = float(rows[-1][1])
    assert last["iteration_time_s"] == pytest.approx(status["iteration_time_s"])
    assert last["saving"] == pytest.approx(1 - last["energy_j"] / status["baseline_energy_j"])
    assert (job.monitored / "Train_Samples_train_loss.csv").exists()
