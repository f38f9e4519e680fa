"""A plan on its way to the ranks, and into the file of a session."""

from __future__ import annotations

import random
import zlib

import pytest

from perseus_core.errors import InputError
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import make_plan
from perseus_core.planning.policy import max_slowdown
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import Kind, interleaved
from perseus_core.planning.solver import solve
from perseus_core.runtime.clock.planned_clock import PlannedClock
from perseus_core.runtime.replan.plan_message import PlanMessage, StagePlan


@pytest.fixture(scope="module")
def message(own_profile: Profile) -> PlanMessage:
    """Of two chunks and 64 microbatches: 256 instructions on each stage."""
    profile = own_profile.divided_into_chunks(2)
    frontier: Frontier[PipelineProblem] = solve(PipelineProblem.of(profile, interleaved(4, 64, 2), 83.5))
    return PlanMessage.of(make_plan(frontier, max_slowdown(0.02)), number=3, limit_time_s=9.5, solve_s=0.25)


def test_every_rank_has_the_plan_that_was_made(message: PlanMessage) -> None:
    """To the last digit, so that what rank 0 compares is what the others do."""
    for stage in message.stages:
        assert StagePlan.decode(stage.encode()) == stage
    assert PlanMessage.decode(message.encode()) == message


def test_a_message_says_what_the_plan_promises(message: PlanMessage) -> None:
    """Durations have seven digits."""
    summary = message.summary
    assert (summary.number, summary.num_microbatches, summary.limit_time_s, summary.solve_s) == (3, 64, 9.5, 0.25)
    assert 0 < summary.saving < 1
    assert 0 < summary.slowdown < 0.021
    assert message.numbered(1).summary.number == 1
    assert message.numbered(1).stages == message.stages


def test_a_stage_of_256_instructions_is_about_a_kilobyte(message: PlanMessage) -> None:
    """All ranks of a stage fetch it at the same time."""
    for stage in message.stages:
        assert len(stage.steps) == 256
        assert len(stage.encode()) < 1100


def test_more_microbatches_than_can_be_sent_are_refused() -> None:
    """Before anything is sent."""
    with pytest.raises(InputError, match="microbatch 65536"):
        StagePlan(((0, 65536, Kind.FORWARD),), (PlannedClock(1410, 0.0, 0.05),)).encode()


ONE = StagePlan(
    ((0, 0, Kind.FORWARD), (0, 0, Kind.BACKWARD)), (PlannedClock(1410, 0.0, 0.05), PlannedClock(900, 0.06, 0.1))
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not packed",
        ONE.encode()[:-3],
        ONE.encode() + b"more",
        zlib.compress(b"01234567890123" * 2 + b"0"),
        zlib.compress(b"\0\0\0\x09" + b"\1\1" + b"\0\0\0\0" * 2),
        zlib.compress(b"\0\0\0\0" + b"\1\1" + b"\0\0\xc0\x7f" * 2),
        zlib.compress(bytes(2**26)),
    ],
    ids=["nothing", "else", "cut off", "too much", "half a row", "no kind", "no number", "a bomb"],
)
def test_what_is_no_plan_is_refused(content: bytes) -> None:
    """With one sentence."""
    with pytest.raises(InputError):
        StagePlan.decode(content)


def test_whatever_arrives_is_read_or_refused(message: PlanMessage) -> None:
    """Never another error."""
    draw = random.Random(1)
    whole = PlanMessage(message.summary, (ONE, ONE)).encode()
    for _ in range(500):
        content = bytearray(whole[: draw.choice((len(whole), draw.randrange(len(whole))))])
        for _ in range(draw.randint(1, 3)):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            PlanMessage.decode(bytes(content))
        except InputError as error:
            assert str(error)
