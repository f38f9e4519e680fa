"""When a clock changed, from slices of cycles: made up from a clock and disturbed as work beside does."""

from __future__ import annotations

import random

import pytest

from perseus_core.gpu.slices import Slice
from perseus_core.runtime.clock.seen_change import NUM_BEFORE, NUM_LASTING, change_seen

CYCLES = 100_000
ASKED_S = 50.0


def slices_of(
    clocks_mhz: tuple[int, int],
    latency_s: float,
    *,
    every_s: float = 0.001,
    until_s: float = 0.05,
    cycles: int = CYCLES,
    noise: float = 0.0,
    disturbed: float = 0.0,
    seed: int = 0,
) -> list[Slice]:
    """Five slices before asking, then one every so often (0: back to back), until so long after the change.

    Args:
        clocks_mhz: before and after.
        latency_s: from asking to the change.
        noise: standard deviation of what a slice takes, relative.
        disturbed: so many of them, as a share, take up to three times as long.
    """
    draw = random.Random(seed)
    changes_s = ASKED_S + latency_s
    begin_s = ASKED_S - NUM_BEFORE * cycles / (clocks_mhz[0] * 1e6)
    slices: list[Slice] = []
    while begin_s < changes_s + until_s:
        before = max(0.0, min(cycles, (changes_s - begin_s) * clocks_mhz[0] * 1e6))
        length_s = before / (clocks_mhz[0] * 1e6) + (cycles - before) / (clocks_mhz[1] * 1e6)
        length_s *= draw.gauss(1.0, noise)
        if draw.random() < disturbed:
            length_s *= draw.uniform(1.0, 3.0)
        slices.append(Slice(begin_s, begin_s + length_s))
        begin_s += length_s if len(slices) < NUM_BEFORE else max(length_s, every_s)
    return slices


@pytest.mark.parametrize("clocks_mhz", [(1980, 1200), (1200, 1980), (1410, 1335), (1335, 1410), (210, 1980)])
@pytest.mark.parametrize("latency_s", [0.002, 0.0151, 0.09, 0.3])
def test_one_look_a_millisecond_finds_it_to_a_millisecond(clocks_mhz: tuple[int, int], latency_s: float) -> None:
    """Up and down, between near and far clocks, from 2 to 300 ms; never too short."""
    seen = change_seen(slices_of(clocks_mhz, latency_s), ASKED_S, clocks_mhz[1] / clocks_mhz[0])
    assert seen is not None
    assert seen.is_up == (clocks_mhz[1] > clocks_mhz[0])
    assert latency_s - 1e-9 <= seen.after_s <= latency_s + 0.0011


@pytest.mark.parametrize("cycles", [CYCLES, 1_500_000])
def test_back_to_back_it_is_found_within_a_slice(cycles: int) -> None:
    """The slice in which it happened tells how much of it was counted at which clock."""
    for seed in range(50):
        latency_s = 0.01 + 0.1 * random.Random(seed).random()
        seen = change_seen(slices_of((1980, 1200), latency_s, every_s=0, cycles=cycles), ASKED_S)
        assert seen is not None
        assert seen.after_s == pytest.approx(latency_s, abs=0.16 * cycles / 1200e6)


@pytest.mark.parametrize("clocks_mhz", [(1980, 1200), (1200, 1980)])
def test_slices_that_work_beside_makes_longer_do_not_mislead(clocks_mhz: tuple[int, int]) -> None:
    """One in twenty, on top of noise: either the change is found, or none."""
    found = 0
    for seed in range(200):
        slices = slices_of(clocks_mhz, 0.025, noise=0.005, disturbed=0.05, seed=seed)
        seen = change_seen(slices, ASKED_S, clocks_mhz[1] / clocks_mhz[0])
        if seen is not None:
            found += 1
            assert seen.after_s == pytest.approx(0.025, abs=0.0025)
    assert found > 180


def test_looking_at_every_moment_finds_the_same() -> None:
    """It is not found too early, when the first slices after it are there; and soon."""
    slices = slices_of((1980, 1200), 0.02, noise=0.005)
    first_after = next(i for i, one in enumerate(slices) if one.begin_s >= ASKED_S + 0.02)
    seen = [change_seen(slices[:end], ASKED_S) for end in range(len(slices))]
    first_seen = next(i for i, one in enumerate(seen) if one is not None)
    assert first_seen == first_after + NUM_LASTING
    assert all(one is not None and one.after_s == pytest.approx(0.02, abs=0.0011) for one in seen[first_seen:])


def test_no_change_is_seen_where_there_is_none() -> None:
    """Without one, with one that does not last, with one that is not the one asked for, or with noise alone."""
    for seed in range(100):
        assert change_seen(slices_of((1500, 1500), 0.02, noise=0.01, disturbed=0.05, seed=seed), ASKED_S) is None
    changed, back = slices_of((1980, 1200), 0.02), slices_of((1200, 1980), 0.075)
    between = [one for one in back if one.begin_s > changed[-1].end_s]
    assert change_seen([*changed, *between], ASKED_S) is None
    assert change_seen(changed, ASKED_S, 1980 / 1200) is None  # the other way
    assert change_seen(changed, ASKED_S, 1900 / 1980) is None  # by far more
    assert change_seen(changed, ASKED_S, 300 / 1980) is None  # by far less
    assert change_seen(changed, ASKED_S + 10.0) is None  # before it was asked for
    assert change_seen(changed[: NUM_BEFORE + NUM_LASTING - 1], ASKED_S) is None
    assert change_seen([], ASKED_S) is None


@pytest.mark.parametrize("clocks_mhz", [(1980, 1200), (1200, 1980)])
def test_a_clock_that_goes_to_and_fro_has_no_one_change(clocks_mhz: tuple[int, int]) -> None:
    """As where power lets it rise only now and then, before it is at last where it should be."""
    changed = slices_of(clocks_mhz, 0.02)
    before_s = changed[0].end_s - changed[0].begin_s
    wavering = [
        Slice(one.begin_s, one.begin_s + before_s) if i % 3 == 0 and i < len(changed) - 5 else one
        for i, one in enumerate(changed)
    ]
    assert change_seen(changed, ASKED_S) is not None
    assert change_seen(wavering, ASKED_S) is None


def test_slices_that_come_when_all_is_over_tell_nothing() -> None:
    """As where they wait behind a backlog: the clock before is not among them."""
    slices = slices_of((1980, 1200), 0.02, until_s=0.1)
    late = [one for one in slices if one.begin_s > ASKED_S + 0.03]
    assert len(late) > NUM_BEFORE + NUM_LASTING
    assert change_seen(late, ASKED_S) is None
