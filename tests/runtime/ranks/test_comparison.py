"""What a plan costs and saves, beside iterations without one: the interval holds the truth, whatever else moves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from perseus_core.runtime.ranks.comparison import Interval, Pair, ratio

TRUTH = 0.87
SEEDS = 1000
INTERVAL, WINDOW, INTERLUDE = 200, 8, 2

Drift = Callable[[int, random.Random], float]


def steady(iteration: int, numbers: random.Random) -> float:
    return 1.0


def swinging(iteration: int, numbers: random.Random) -> float:
    """Slower and faster by 5 %, every 300 iterations."""
    return 1 + 0.05 * math.sin(2 * math.pi * iteration / 300)


def growing(iteration: int, numbers: random.Random) -> float:
    """A per cent slower in 100 iterations."""
    return 1 + 0.0001 * iteration


def disturbed(iteration: int, numbers: random.Random) -> float:
    """One in fifty takes ten times as long."""
    return 10.0 if numbers.random() < 0.02 else 1.0


def pairs_of(seed: int, noise: float, drift: Drift, num_interludes: int) -> list[Pair]:
    """What a job measures with as many interludes."""
    numbers = random.Random(seed)

    def measured(iteration: int, share: float) -> float:
        return share * drift(iteration, numbers) * numbers.gauss(1, noise)

    pairs = []
    for begin in range(100, 100 + num_interludes * INTERVAL, INTERVAL):
        end = begin + INTERLUDE
        planned = [
            measured(i, TRUTH) for i in (*range(begin - WINDOW - 1, begin - 1), *range(end + 1, end + 1 + WINDOW))
        ]
        pairs.append((planned, [measured(i, 1.0) for i in range(begin, end)]))
    return pairs


@pytest.mark.parametrize("num_interludes", [1, 2, 8])
@pytest.mark.parametrize("drift", [steady, swinging, growing, disturbed])
@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_the_interval_holds_the_truth_in_95_of_100_seeds(noise: float, drift: Drift, num_interludes: int) -> None:
    """Counted on a thousand, give or take what a thousand do; and it is as narrow as the noise allows."""
    found = [ratio(pairs_of(seed, noise, drift, num_interludes)) for seed in range(SEEDS)]
    intervals = [each for each in found if each is not None]
    assert len(intervals) >= 0.99 * SEEDS
    held = sum(each.low <= TRUTH <= each.high for each in intervals)
    assert held >= 0.94 * len(intervals)
    typical = noise * math.sqrt((1 / (2 * WINDOW) + 1 / INTERLUDE) / num_interludes)
    widths = sorted((each.high - each.low) / 2 / TRUTH for each in intervals)
    assert widths[len(widths) // 2] < 4 * typical + (0.01 if drift in (swinging, growing) else 0)


def test_of_too_little_nothing_is_said() -> None:
    """One iteration each way, or none of one kind."""
    assert ratio([]) is None
    assert ratio([([1.0], [1.0])]) is None
    assert ratio([([1.0] * 8, [])]) is None
    assert ratio([([], [1.0] * 8)]) is None
    assert ratio([([1.0] * 8, []), ([0.5] * 4, [1.0] * 4)]) == Interval(0.5, 0.5, 0.5)


def test_it_is_said_in_per_cent() -> None:
    """As a change."""
    assert str(Interval(0.99, 1.0, 1.021)) == "+0.00 % (-1.00 to +2.10)"
