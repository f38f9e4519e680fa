"""Waiting that comes from transfers: against a simulation of the stages, and by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.dag import ComputationDag, fitted_latency_s
from perseus_core.planning.schedule import Instruction, Kind, Schedule, one_f_one_b
from perseus_core.planning.transfers import StageProgram, waits

A, B = (Instruction(0, 0, m, Kind.FORWARD) for m in (0, 1))
X, Y = (Instruction(1, 0, m, Kind.FORWARD) for m in (0, 1))


def two_stages(*, blocking: bool) -> list[StageProgram]:
    """Stage 0 runs A and B and sends both on to stage 1, which runs X and Y."""
    first, second = StageProgram(), StageProgram()
    for made, needed in ((A, X), (B, Y)):
        first.run(made)
        sent = first.begin(needed)
        if blocking:
            first.wait(sent)
        second.exchange(needed)
        second.run(needed)
    return [first, second]


def test_data_are_waited_for() -> None:
    """Nothing else where sends do not block."""
    assert waits(two_stages(blocking=False)) == ((A, X), (B, Y))


def test_a_blocking_send_waits_for_the_receiver() -> None:
    """The third forward begins when the receiver has come to receive what the second has made, after its first."""
    first, second = two_stages(blocking=True)
    c, z = A._replace(microbatch=2), X._replace(microbatch=2)
    first.run(c)
    first.exchange(z)
    second.exchange(z)
    second.run(z)
    assert set(waits([first, second])) == {(A, X), (B, Y), (c, z), (X, c)}


def test_waiting_for_two_at_once_is_waiting_for_both() -> None:
    """The middle stage begins when both neighbours are ready, though it needs only one of them."""
    left, middle, right = (Instruction(stage, 0, 0, Kind.FORWARD) for stage in range(3))
    programs = [StageProgram(), StageProgram(), StageProgram()]
    programs[0].run(left)
    programs[0].exchange(middle)
    programs[1].exchange(middle, middle._replace(kind=Kind.BACKWARD))
    programs[1].run(middle)
    programs[2].run(right)
    programs[2].exchange(middle._replace(kind=Kind.BACKWARD))
    assert set(waits(programs)) == {(left, middle), (right, middle)}


def test_a_transfer_with_one_side_is_refused() -> None:
    """Nobody sends what the stage waits for."""
    program = StageProgram()
    program.exchange(X)
    program.run(X)
    with pytest.raises(InputError, match="has not one sender and one receiver"):
        waits([program])


def test_transfers_that_wait_for_each_other_are_refused() -> None:
    """Both stages wait for their receive before they begin to send."""
    programs = [StageProgram(), StageProgram()]
    for program, received, sent in ((programs[0], A, X), (programs[1], X, A)):
        program.exchange(received)
        program.exchange(sent)
        program.run(received)
    with pytest.raises(InputError, match="wait for ever"):
        waits(programs)


def test_a_wait_for_what_is_not_there_is_refused() -> None:
    """The schedule says which instruction."""
    with pytest.raises(InputError, match="which no stage holds"):
        Schedule("mine", 1, 1, ((A,), (X,)), waits=((B, X),))


def test_waits_are_edges_of_the_dag() -> None:
    """With the latency of a transfer."""
    schedule = Schedule("mine", 1, 2, ((A, B), (X, Y)))
    durations_s = [1.0, 1.0, 5.0, 1.0]
    assert ComputationDag.of(schedule, 0.5).start_times_s(durations_s).tolist() == [0, 1, 1.5, 6.5]
    held_up = dataclasses.replace(schedule, waits=((X, B),))
    assert ComputationDag.of(held_up, 0.5).start_times_s(durations_s).tolist() == [0, 7, 1.5, 8.5]


def test_latency_is_found_again() -> None:
    """From durations and the time of an iteration; none where the iteration is no longer than without."""
    schedule, rng = one_f_one_b(4, 8), np.random.default_rng(0)
    durations_s = rng.uniform(0.04, 0.1, len(schedule.instructions))
    time_s = ComputationDag.of(schedule, 0.003, 0.003).iteration_time_s(durations_s)
    without = ComputationDag.of(schedule)
    assert fitted_latency_s(without, durations_s, time_s) == pytest.approx(0.003, abs=1e-6)
    assert fitted_latency_s(without, durations_s, 0.9 * without.iteration_time_s(durations_s)) == 0
    assert fitted_latency_s(without, durations_s, 10 * time_s) == pytest.approx(0.2 * durations_s.mean())
