"""The records as they go through the store."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_core.runtime.ranks import records
from perseus_core.runtime.ranks.records import RECORD, VERSION, RankState, RecordKind, StateFlag, as_records

RANKS = st.integers(0, 2**32 - 1)
ITERATIONS = st.integers(0, 2**31 - 1)
SECONDS = st.floats(0, 1e6, width=32)


@given(RANKS, st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_hello_says_who_where_and_which_version(rank: int, stage: int, data_parallel_rank: int) -> None:
    """The version survives a 32-bit float."""
    (record,) = as_records(records.hello(rank, stage, data_parallel_rank))
    assert (record["rank"], record["kind"], record["iteration"], record["a"]) == (
        rank, RecordKind.HELLO, stage, data_parallel_rank,
    )  # fmt: skip
    assert int(record["b"]) == VERSION


@given(
    RANKS,
    st.builds(
        RankState,
        *[st.booleans()] * 5,
        reported=st.integers(0, 2**24),
        received=st.integers(0, 2**24),
        straggler_slowdown=st.floats(1, 100, width=32),
    ),
)
def test_a_state_arrives_as_it_was_told(rank: int, state: RankState) -> None:
    """Each flag for itself, and the numbers of reports and plans exactly."""
    (record,) = as_records(records.state(rank, state))
    flags = StateFlag(int(record["flags"]))
    assert RankState(
        StateFlag.READY in flags,
        StateFlag.CAN_LOCK in flags,
        StateFlag.FAILED in flags,
        StateFlag.LEFT in flags,
        StateFlag.SWEPT in flags,
        int(record["a"]),
        int(record["b"]),
        float(record["c"]),
    ) == state  # fmt: skip
    assert (record["rank"], record["kind"]) == (rank, RecordKind.STATE)


def test_all_combinations_of_flags_differ() -> None:
    """None is told as another."""
    num_flags = sum(field.type == "bool" for field in fields(RankState))
    assert len({int(RankState(*values).flags) for values in product([False, True], repeat=num_flags)}) == 2**num_flags


@pytest.mark.parametrize("slowdown", [1e300, float("inf")])
def test_a_slowdown_beyond_all_measure_can_be_told(slowdown: float) -> None:
    """What the user says must not break the conversation."""
    (record,) = as_records(records.state(0, RankState(straggler_slowdown=slowdown)))
    assert np.isfinite(record["c"]) and record["c"] > 1e29


@given(RANKS, ITERATIONS, st.integers(0, 2**16 - 1), SECONDS, SECONDS, SECONDS, st.booleans())
def test_times_arrive_in_single_precision(
    rank: int, iteration: int, num_microbatches: int, span_s: float, seen_s: float, expected_s: float, throttled: bool
) -> None:
    """To the nearest 32-bit float, which is a microsecond in ten seconds."""
    (record,) = as_records(
        records.iteration_time(rank, iteration, num_microbatches, span_s, seen_s, expected_s, throttled)
    )
    assert record["kind"] == RecordKind.TIME
    assert (record["rank"], record["iteration"], record["count"]) == (rank, iteration, num_microbatches)
    assert (record["a"], record["b"], record["c"], record["flags"]) == (span_s, seen_s, expected_s, throttled)


@given(RANKS, ITERATIONS, SECONDS)
def test_an_energy_arrives_in_single_precision(rank: int, iteration: int, energy_j: float) -> None:
    """With its rank and iteration."""
    (record,) = as_records(records.iteration_energy(rank, iteration, energy_j))
    assert (record["rank"], record["kind"], record["iteration"]) == (rank, RecordKind.ENERGY, iteration)
    assert record["a"] == energy_j


@given(st.lists(RANKS, max_size=20), st.integers(0, RECORD.itemsize - 1))
def test_records_of_many_are_one_array_and_a_broken_end_is_passed_over(ranks: list[int], rest: int) -> None:
    """As when somebody died while telling."""
    content = b"".join(records.iteration_energy(rank, 1, 2.0) for rank in ranks)
    assert as_records(content + b"\xff" * rest)["rank"].tolist() == ranks


def test_every_record_has_the_same_size() -> None:
    """Or those after it could not be read."""
    told = [
        records.hello(1, 2, 3),
        records.state(1, RankState()),
        records.iteration_time(1, 2, 3, 4.0, 5.0, 6.0, True),
        records.iteration_energy(1, 2, 3.0),
    ]
    assert {len(record) for record in told} == {RECORD.itemsize}
