"""One whole job through real DeepSpeed, real `pynvml` and four processes, looked at from outside."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perseus_core.gpu.simulated import ExecutedInstruction, read_executed
from tests.deepspeed.conftest import MakeNode, on
from tests.deepspeed.launcher import launch
from tests.planned_clocks import NO_POWER_CAP, late

MICROBATCHES = 8
ITERATIONS = 36
BLOCK = {
    "enabled": True,
    "profile_cache": "off",
    "warmup_iterations": 1,
    "baseline_iterations": 3,
    "profile_clocks": 5,
    "profile_iterations": 1,
    "watch_iterations": 4,
    "tolerance": 0.05,  # one plan is looked at, whatever a busy machine makes of it
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
        under = [i for i in range(ITERATIONS) if all(rank["laps"][i]["plan"] == last for rank in self.ranks)]
        return under[1:]

    def energy_j(self, iterations: list[int]) -> float:
        """Median over iterations, all stages together."""
        return statistics.median(sum(rank["laps"][i]["energy_j"] for rank in self.ranks) for i in iterations)


@pytest.fixture(scope="module")
def job(make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> Job:
    node = make_node(0.7, **NO_POWER_CAP)
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
        iterations=ITERATIONS,
    )
    ranks = finished.results_of_all()
    executed: list[list[list[ExecutedInstruction]]] = []
    for gpu in range(4):
        of_gpu = [e for e in read_executed(node.folder) if e.gpu == gpu]
        size = 2 * MICROBATCHES
        executed.append([of_gpu[i * size : (i + 1) * size] for i in range(ITERATIONS)])
    return Job(ranks, executed, folder / "monitored")


def test_energy_is_saved_as_promised(job: Job) -> None:
    """The GPUs' own exact energies confirm the promised saving, within two points on a busy machine."""
    unlocked = [i for i in range(ITERATIONS) if all(r["laps"][i]["phase"] == "warm up" for r in job.ranks)]
    saving = 1 - job.energy_j(job.settled) / job.energy_j(unlocked)
    assert saving > 0.08
    assert saving == pytest.approx(job.ranks[0]["status"]["promised_saving"], abs=0.02)


def test_instructions_run_at_their_planned_clocks(job: Job) -> None:
    """Each at its clock for 80 % of its time at least, for 95 % where its neighbours have the same clock."""
    found = [
        (iteration, rank["stage"], *each)
        for rank, executed in zip(job.ranks, job.executed, strict=True)
        for iteration in job.settled
        for each in late(executed[iteration], [clock for clock, _ in rank["planned"]])
    ]
    total = len(job.ranks) * len(job.settled) * 2 * MICROBATCHES
    assert total > 100
    assert len(found) <= 0.01 * total, found


def test_figures_reach_deepspeeds_monitor(job: Job) -> None:
    """Time, energy and saving stand beside DeepSpeed's own figures, over the samples trained, as the session says."""
    samples = {2 * MICROBATCHES * (iteration + 1) for iteration in range(ITERATIONS)}
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
