"""A small pipeline whose every number is known: two stages, three clocks, the second stage slower."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import Plan, make_plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind, Schedule, one_f_one_b
from perseus_core.planning.solver import solve

BLOCKING_POWER_W = 60.0
CLOCKS_MHZ = (1400, 1100, 800)

Solve = Callable[..., Frontier[PipelineProblem]]


def make_profile(num_stages: int, clocks_mhz: tuple[int, ...] = CLOCKS_MHZ) -> Profile:
    """Backwards take twice the time of forwards; the last stage is a fifth slower; energy rises with the clock."""
    return Profile(
        tuple(
            Measurement(InstructionType(stage, 0, kind), clock, time_s, time_s * (80 + 220 * (clock / 1400) ** 3))
            for stage in range(num_stages)
            for kind, work in ((Kind.FORWARD, 1.0), (Kind.BACKWARD, 2.0))
            for clock in clocks_mhz
            for time_s in (0.01 * work * (1.2 if stage == num_stages - 1 else 1.0) * 1400 / clock,)
        )
    )


@pytest.fixture
def solved() -> Solve:
    """Solves the small pipeline on a schedule."""

    def solve_schedule(
        schedule: Schedule | None = None, *, profile: Profile | None = None, **constants: float
    ) -> Frontier[PipelineProblem]:
        schedule = schedule or one_f_one_b(2, 4)
        return solve(
            PipelineProblem.of(profile or make_profile(schedule.num_stages), schedule, BLOCKING_POWER_W, **constants)
        )

    return solve_schedule


@pytest.fixture
def frontier(solved: Solve) -> Frontier[PipelineProblem]:
    """The small pipeline, 2 stages and 4 microbatches of 1F1B, solved."""
    return solved()


@pytest.fixture
def plan(frontier: Frontier[PipelineProblem]) -> Plan:
    """Its default plan."""
    return make_plan(frontier)
