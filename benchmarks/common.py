"""The cases that several benchmarks share."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import InstructionType, Schedule, one_f_one_b

PUBLISHED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "sosp24"


@dataclass(frozen=True)
class Case:
    """One profile of the paper's artifact, and what was published of it.

    Attributes:
        title: how it is called in tables.
        profile_name, frontier_name: parts of the file names.
        blocking_power_w: as used in the paper.
        table6: published saving in percent without a straggler, by number of microbatches.
    """

    title: str
    profile_name: str
    frontier_name: str
    blocking_power_w: float
    table6: dict[int, float]

    @property
    def profile(self) -> Profile:
        """The measured table."""
        return Profile.load(PUBLISHED / "stage_profile" / f"{self.profile_name}_bf16.csv")

    def problem(self, num_microbatches: int, profile: Profile | None = None) -> PipelineProblem:
        """Eight stages, 1F1B."""
        schedule = one_f_one_b(8, num_microbatches)
        return PipelineProblem.of(profile or self.profile, schedule, self.blocking_power_w)

    def published_frontier(self, num_microbatches: int) -> NDArray[np.float64] | None:
        """Rows of time and energy, fastest first; None where there is no file."""
        path = PUBLISHED / "published_frontier" / f"{self.frontier_name}_bf16_mb{num_microbatches}.csv"
        if not path.exists():
            return None
        with path.open() as file:
            return np.array(sorted((float(row["time"]), float(row["energy"])) for row in csv.DictReader(file)))


GPT3 = Case(
    "GPT-3 175B, A100 SXM",
    "gpt3-175b+a100_sxm",
    "a100_sxm_gpt3-175b",
    83.64,
    {12: 15.20, 24: 14.19, 48: 13.62, 96: 13.32},
)
BLOOM = Case("Bloom 176B, A40", "bloom+a40", "a40_bloom", 70.38, {12: 6.97, 24: 4.49, 48: 3.12, 96: 2.41})


def require_published() -> None:
    """Ends the benchmark with a message where the measured data is absent."""
    if not PUBLISHED.is_dir():
        sys.exit(f"the measured data of the Perseus paper is not at {PUBLISHED}; this benchmark needs it")


def uneven_problem(num_stages: int, num_microbatches: int, spread: float = 0.03, seed: int = 0) -> PipelineProblem:
    """GPT-3 A100 on many stages, each scaled by up to `spread` in time and energy, so that none repeats another."""
    profile, scale = GPT3.profile, np.random.default_rng(seed).uniform(1 - spread, 1 + spread, num_stages)
    last = profile.num_stages - 1
    measurements = []
    for stage in range(num_stages):
        for kind in sorted(profile.kinds):
            for m in profile.of(InstructionType(last if stage == num_stages - 1 else 0, 0, kind)):
                scaled = {"time_s": m.time_s * scale[stage], "energy_j": m.energy_j * scale[stage]}
                measurements.append(replace(m, type=InstructionType(stage, 0, kind), **scaled))
    schedule: Schedule = one_f_one_b(num_stages, num_microbatches)
    return PipelineProblem.of(Profile(tuple(measurements)), schedule, GPT3.blocking_power_w)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    print(flush=True)
