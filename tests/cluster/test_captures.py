"""Training captures CUDA graphs, now and then: no mark can be put on the stream meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.order import Phase
from perseus_core.runtime.session import _MOST_UNMARKED, Session
from tests.cluster.cluster import Surroundings
from tests.cluster.test_whole_jobs import Job

WARNING = "is not followed"


class CapturingJob(Job):
    """A job in which ranks capture.

    Attributes:
        captures_at: of a rank, an iteration and an instruction's place in it (-1: the iteration's begin), whether the
            stream is captured there.
        lost_at: in which iterations nobody knows the host's time of what the GPUs do.
    """

    def __init__(
        self, captures_at: Callable[[int, int, int], bool], lost_at: Callable[[int], bool] = lambda _: False
    ) -> None:
        self.captures_at, self.lost_at = captures_at, lost_at
        self.sessions: dict[int, Session] = {}
        super().__init__(pipelines=1, tensor_parallel=1)

    def _watched(self, surroundings: Surroundings) -> Session:
        session = super()._watched(surroundings)
        rank, events = surroundings.job.rank, surroundings.events
        self.sessions[rank] = session
        begin_iteration, begin_instruction = session.begin_iteration, session.begin_instruction
        place = -1

        def begin_captured(num_microbatches: int, *, training: bool = True) -> None:
            nonlocal place
            place = -1
            events.is_captured = self.captures_at(rank, session._iteration, place)
            events.is_lost = self.lost_at(session._iteration)
            begin_iteration(num_microbatches, training=training)

        def instruction_captured(chunk: int, microbatch: int, kind: Kind) -> None:
            nonlocal place
            place += 1
            events.is_captured = self.captures_at(rank, session._iteration - 1, place)
            begin_instruction(chunk, microbatch, kind)

        session.begin_iteration = begin_captured  # type: ignore[method-assign]
        session.begin_instruction = instruction_captured  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize(
    "captures_at",
    [
        lambda rank, iteration, place: iteration % 7 == 3 and place == -1,
        lambda rank, iteration, place: iteration % 7 == 3 and place == 5,
        lambda rank, iteration, place: rank == 2 and iteration % 5 == 0 and place >= 3,
    ],
    ids=["whole iterations", "in the middle", "one rank"],
)
def test_a_job_that_captures_now_and_then_is_planned_all_the_same(captures_at: Callable[[int, int, int], bool]) -> None:
    """Those iterations are left out, the others measured and followed, and one line says so."""
    job = CapturingJob(captures_at)
    job.run_until_plan(1)
    assert not job.said("training goes on without perseus"), job.cluster.log_text
    assert job.said(WARNING) == (captures_at(0, 3, 5) or captures_at(0, 3, -1))
    assert {session.status().phase for session in job.sessions.values()} <= {Phase.RUN, Phase.INTERLUDE}


def test_an_iteration_that_cannot_be_followed_runs_at_the_drivers_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment on at which that is known; the next one follows the plan again."""
    captured: set[int] = set()
    job = CapturingJob(lambda rank, iteration, place: iteration in captured and place >= 5)
    job.run_until_plan(1)
    session = job.sessions[0]
    controller = session._clocks._controller
    assert controller is not None
    lookahead = controller._lookahead
    hold, taken = lookahead.hold, list[int | None]()
    monkeypatch.setattr(lookahead, "hold", lambda clock_mhz: taken.append(clock_mhz) or hold(clock_mhz))
    captured.add(session._iteration + 1)
    job.cluster.run_iterations(1)
    job.cluster.run_iterations(3)  # the host runs ahead of the GPU
    assert taken == [None]
    job.cluster.run_iterations(2)
    assert lookahead.follows_plan
    assert taken == [None]


def test_a_stream_that_is_captured_for_good_ends_our_part() -> None:
    """Said once, and nobody waits for the rank any more."""
    job = CapturingJob(lambda rank, iteration, place: rank == 1 and iteration > 20)
    job.cluster.run_iterations(20 + _MOST_UNMARKED + 40)
    assert job.said("rank 1: NotRecorded: a CUDA graph is captured there; training goes on without perseus") == 1
    assert job.sessions[1].status().phase is Phase.STEPPED_ASIDE
    controllers = [session._clocks._controller for session in job.sessions.values()]
    assert all(controller is None or controller.clock_in_force_mhz is None for controller in controllers)


def test_marks_that_do_not_tell_the_hosts_time_give_durations_and_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Energies of such iterations are unknown, their times count; and the job is planned all the same."""
    times, energies = dict[int, float](), dict[int, float]()
    tell_time, tell_energy = records.iteration_time, records.iteration_energy

    def note_time(rank: int, iteration: int, num_microbatches: int, span_s: float, *others: Any) -> bytes:
        times[iteration] = span_s
        return tell_time(rank, iteration, num_microbatches, span_s, *others)

    def note_energy(rank: int, iteration: int, energy_j: float) -> bytes:
        energies[iteration] = energy_j
        return tell_energy(rank, iteration, energy_j)

    monkeypatch.setattr(records, "iteration_time", note_time)
    monkeypatch.setattr(records, "iteration_energy", note_energy)
    job = CapturingJob(lambda rank, iteration, place: False, lost_at=lambda iteration: iteration % 4 == 2)
    job.run_until_plan(1)
    known = [iteration for iteration in energies if 4 <= iteration < max(energies) - 4]
    assert len(known) > 20
    assert {iteration % 4 for iteration in known if energies[iteration] == 0} == {2}
    assert {iteration % 4 for iteration in known if energies[iteration] > 0} == {0, 1, 3}
    assert all(times[iteration] > 0 for iteration in known)
