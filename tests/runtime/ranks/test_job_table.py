"""What rank 0 knows of all ranks, from their records."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.job_table import JobTable
from perseus_core.runtime.ranks.records import RankState, RecordKind, StateFlag, as_records

Complete = list[tuple[int, list[Any]]]


def time_of(rank: int, iteration: int) -> bytes:
    return records.iteration_time(rank, iteration, 8, iteration + rank / 64, rank, 0.5, rank == 1)


def iteration_of(record: bytes) -> int:
    return int(as_records(record)["iteration"][0])


def is_time(record: bytes) -> bool:
    return bool(as_records(record)["kind"][0] == RecordKind.TIME)


def take_in(table: JobTable, *told: bytes, now_s: float = 0.0) -> None:
    table.take_in(as_records(b"".join(told)), now_s)


def complete(table: JobTable) -> tuple[Complete, Complete]:
    return (
        [(iteration, times.tolist()) for iteration, times in table.times.complete()],
        [(iteration, energies.tolist()) for iteration, energies in table.energies_j.complete()],
    )


@st.composite
def _tellings(draw: st.DrawFn) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """What each rank tells in order, some iterations left out by some; and the same as rounds, in one of many ways."""
    num_ranks = draw(st.integers(1, 4))
    num_iterations = draw(st.integers(1, 12))
    by_rank = []
    for rank in range(num_ranks):
        told: list[bytes] = []
        for iteration in range(num_iterations):
            told += [time_of(rank, iteration)] if draw(st.integers(0, 9)) else []
            told += (
                [records.iteration_energy(rank, iteration, 10 * iteration + rank)] if draw(st.integers(0, 9)) else []
            )
        by_rank.append(told)
    # Each rank sends in parts; one that cannot be sure to have been heard sends the last part with the next one again.
    rounds: list[list[bytes]] = [[] for _ in range(draw(st.integers(1, 6)))]
    for told in by_rank:
        cuts = sorted(draw(st.integers(0, len(told))) for _ in rounds[1:])
        begins = [0, *cuts]
        for number, (begin, end) in enumerate(zip(begins, [*cuts, len(told)], strict=True)):
            if number and draw(st.booleans()):
                begin = begins[number - 1]
            rounds[number] += told[begin:end]
    return by_rank, rounds


@given(_tellings(), st.randoms(use_true_random=False))
def test_however_records_come_the_same_iterations_are_complete(
    tellings: tuple[list[list[bytes]], list[list[bytes]]], numbers: random.Random
) -> None:
    """Any split into rounds, in any order between the ranks, some of it twice: once each, in order, as it was told."""
    by_rank, rounds = tellings
    table = JobTable(len(by_rank))
    times: Complete = []
    energies: Complete = []
    for told in rounds:
        of_rank: dict[int, list[bytes]] = {}
        for record in told:
            of_rank.setdefault(int(as_records(record)["rank"][0]), []).append(record)
        mixed: list[bytes] = []
        while of_rank:
            rank = numbers.choice(sorted(of_rank))
            mixed.append(of_rank[rank].pop(0))
            if not of_rank[rank]:
                del of_rank[rank]
        take_in(table, *mixed)
        of_round = complete(table)
        times += of_round[0]
        energies += of_round[1]

    at_once = JobTable(len(by_rank))
    take_in(at_once, *(record for told in by_rank for record in told))
    assert (times, energies) == complete(at_once)
    timed = [{iteration_of(record) for record in told if is_time(record)} for told in by_rank]
    told_by_all = set.intersection(*timed)
    assert [iteration for iteration, _ in times] == sorted(told_by_all)
    for iteration, values in times:
        assert [value[2] for value in values] == [iteration + rank / 64 for rank in range(len(by_rank))]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 9)), max_size=20), st.data())
def test_the_last_word_of_a_rank_counts(words: list[tuple[int, bool, int]], data: st.DataObject) -> None:
    """Also where it has told more than one state in a round."""
    table = JobTable(4)
    told = [records.state(rank, RankState(swept=swept, received=received)) for rank, swept, received in words]
    while told:
        size = data.draw(st.integers(1, len(told)))
        take_in(table, *told[:size])
        told = told[size:]
    last = {rank: (swept, received) for rank, swept, received in words}
    for rank in range(4):
        swept, received = last.get(rank, (False, 0))
        assert (table.which(StateFlag.SWEPT)[rank], table.received[rank]) == (swept, received)


def test_a_rank_is_absent_until_it_says_hello_in_our_version() -> None:
    """One that understands us otherwise is of no use."""
    table = JobTable(3)
    assert table.absent_ranks() == (0, 1, 2)
    other = as_records(records.hello(1, 1, 0)).copy()
    other["b"] += 1
    take_in(table, records.hello(0, 0, 0), other.tobytes(), records.state(2, RankState(ready=True)))
    assert table.absent_ranks() == (1, 2)
    assert table.present.tolist() == [True, True, False]
    take_in(table, records.hello(2, 1, 0))
    assert table.absent_ranks() == (1,)
    assert table.stage.tolist() == [0, 1, 1]


def test_ranks_are_found_by_what_is_true_of_them() -> None:
    """And by what is not."""
    table = JobTable(3)
    take_in(table, records.state(0, RankState(ready=True, can_lock=True)), records.state(2, RankState(can_lock=True)))
    assert (table.ranks_with(StateFlag.CAN_LOCK), table.ranks_without(StateFlag.CAN_LOCK)) == ((0, 2), (1,))
    assert (table.ranks_with(StateFlag.READY), table.ranks_with(StateFlag.FAILED)) == ((0,), ())


def test_it_is_known_when_a_rank_was_heard_of_and_how_far_it_is() -> None:
    """Whatever it said last; what is told again moves nothing back."""
    table = JobTable(3)
    take_in(table, time_of(0, 5), time_of(1, 7), now_s=10.0)
    take_in(table, time_of(1, 6), records.iteration_energy(0, 4, 1.0), now_s=20.0)
    assert table.heard_s.tolist() == [20.0, 20.0, 0.0]
    assert table.newest_iteration.tolist() == [5, 7, -1]


def test_ranks_that_the_job_does_not_have_are_passed_over() -> None:
    """As from a store that another job used before."""
    table = JobTable(2)
    take_in(table, time_of(0, 0), time_of(1, 0), time_of(2, 0), records.state(2**32 - 1, RankState(failed=True)))
    assert [iteration for iteration, _ in complete(table)[0]] == [0]
    assert table.ranks_with(StateFlag.FAILED) == ()


def test_records_of_an_unknown_kind_are_passed_over() -> None:
    """They are nobody's times."""
    table = JobTable(1)
    strange = as_records(time_of(0, 3)).copy()
    strange["kind"] = 77
    take_in(table, strange.tobytes())
    assert complete(table) == ([], [])
    assert table.newest_iteration.tolist() == [-1]


def test_an_empty_round_changes_nothing() -> None:
    """Most ranks have nothing new most of the time."""
    table = JobTable(2)
    take_in(table, now_s=5.0)
    assert complete(table) == ([], [])
    assert table.heard_s.tolist() == [0.0, 0.0]


def test_iterations_that_never_become_complete_do_not_pile_up() -> None:
    """The newest are kept: as soon as all tell again, iterations are complete again."""
    table = JobTable(2)
    for iteration in range(1000):
        take_in(table, time_of(0, iteration))
        assert complete(table)[0] == []
    assert len(table.times._pending) <= 64
    take_in(table, *(time_of(1, iteration) for iteration in range(990, 1000)))
    assert [iteration for iteration, _ in complete(table)[0]] == list(range(990, 1000))
    assert not table.times._pending


def test_one_rank_that_is_slow_to_tell_finds_its_iterations_waiting() -> None:
    """For as many iterations as side threads are ever late."""
    table = JobTable(2)
    take_in(table, *(time_of(0, iteration) for iteration in range(60)))
    take_in(table, *(time_of(1, iteration) for iteration in range(60)))
    assert [iteration for iteration, _ in complete(table)[0]] == list(range(60))


def test_each_value_stands_at_its_ranks_place() -> None:
    """Also where ranks tell in another order than their numbers'."""
    table = JobTable(3)
    take_in(table, *(records.iteration_time(rank, 4, 8 + rank, 1.0, 2.0, 3.0, rank == 2) for rank in (2, 0, 1)))
    ((iteration, times),) = table.times.complete()
    assert iteration == 4
    assert times["microbatches"].tolist() == [8, 9, 10]
    assert times["throttled"].tolist() == [False, False, True]
    assert np.array_equal([times["span_s"], times["seen_s"], times["expected_s"]], [[1.0] * 3, [2.0] * 3, [3.0] * 3])
