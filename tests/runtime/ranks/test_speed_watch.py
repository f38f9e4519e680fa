"""Is a GPU slower than its profile, or fast again?"""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_core.runtime.ranks.speed_watch import SlowRank, SpeedWatch


class Watched:
    """Ranks of two stages, two of each, of which every iteration 1 s is expected."""

    def __init__(self) -> None:
        self.watch = SpeedWatch(np.array([0, 0, 1, 1], np.int32), threshold=0.05)
        self._iterations = count()

    def note(self, *seen_s: float, held: int | None = None, expected_s: float = 1.0) -> SlowRank | None:
        throttled = [rank == held for rank in range(4)]
        return self.watch.note(next(self._iterations), seen_s, [expected_s] * 4, throttled)

    def until_changed(self, *seen_s: float, held: int | None = None) -> int:
        """How many iterations it takes."""
        for number in range(1, 1000):
            self.note(*seen_s, held=held)
            if self.watch.has_changed:
                return number
        raise AssertionError("it never changed")


def test_the_slowest_rank_is_named_with_what_it_took() -> None:
    """All that a line in the log needs."""
    slow = Watched().note(1.0, 1.06, 1.0, 1.25, held=3)
    assert slow == SlowRank(rank=3, stage=1, iteration=0, seen_s=1.25, expected_s=1.0, throttled=True)
    assert slow.slowness == 0.25


def test_a_slow_rank_is_named_once_until_it_was_fast_again() -> None:
    """One that comes back is worth another line."""
    job = Watched()
    assert job.note(1.3, 1.0, 1.0, 1.0) is not None
    assert job.note(1.3, 1.0, 1.0, 1.0) is None
    assert job.watch.slow_ranks == (0,)
    assert job.note(1.0, 1.0, 1.0, 1.0) is None
    assert job.watch.slow_ranks == ()
    assert job.note(1.3, 1.0, 1.0, 1.0) is not None


def test_a_second_slow_rank_is_named_when_it_is_the_slowest() -> None:
    """Both are slow then."""
    job = Watched()
    job.note(1.3, 1.0, 1.0, 1.0)
    second = job.note(1.3, 1.0, 1.4, 1.0)
    assert second is not None and second.rank == 2
    assert job.watch.slow_ranks == (0, 2)


def test_of_ranks_that_are_as_slow_as_each_other_the_one_whose_gpu_says_why_is_named() -> None:
    """The others of its stage wait for it in each instruction, and a measurement's noise must not accuse them."""
    slow = Watched().note(1.0, 1.0, 1.31, 1.3, held=3)
    assert slow is not None and (slow.rank, slow.throttled) == (3, True)
    slow = Watched().note(1.0, 1.0, 1.36, 1.3, held=3)
    assert slow is not None and slow.rank == 2, "that one is slower than heat explains"
    slow = Watched().note(1.3, 1.0, 1.31, 1.0, held=0)
    assert slow is not None and slow.rank == 2, "the other one is of another stage"


def test_where_nothing_is_expected_nobody_is_slow() -> None:
    """Without a plan there is nothing to compare with. What was known before stays known."""
    job = Watched()
    job.note(1.3, 1.0, 1.0, 1.0)
    assert job.note(9.0, 9.0, 9.0, 9.0, expected_s=0.0) is None
    assert job.watch.slow_ranks == (0,)
    assert not job.watch.has_changed


def test_three_iterations_in_a_row_are_enough_where_the_gpu_says_why() -> None:
    """Nine where anything may have disturbed it, but not where that costs too much."""
    assert Watched().until_changed(1.0, 1.0, 1.1, 1.0, held=2) == 3
    assert Watched().until_changed(1.0, 1.0, 1.1, 1.0) == 9
    assert Watched().until_changed(1.0, 1.0, 1.1, 1.0, held=0) == 9, "that one is of another stage"
    assert Watched().until_changed(1.0, 1.0, 1.3, 1.0) == 3


def test_a_stage_that_is_faster_than_expected_changes_plans_too() -> None:
    """It has become fast again; one rank that is fast alone is no sign, since the slowest is what is expected."""
    assert Watched().until_changed(0.9, 0.9, 1.0, 1.0) == 9
    job = Watched()
    for _ in range(50):
        job.note(0.8, 1.0, 1.0, 1.0)
        assert not job.watch.has_changed


@pytest.mark.parametrize("between", ["as expected", "nothing to tell"])
def test_what_comes_between_begins_the_row_anew(between: str) -> None:
    """Only what lasts is planned for."""
    job = Watched()
    for _ in range(20):
        for _ in range(2):
            job.note(1.3, 1.0, 1.0, 1.0, held=0)
            assert not job.watch.has_changed
        if between == "as expected":
            job.note(1.0, 1.0, 1.0, 1.0)
        else:
            job.watch.skip()


def test_patience_doubles_with_each_reaction_up_to_a_limit() -> None:
    """A GPU that comes and goes should not keep all others busy."""
    job = Watched()
    needed = []
    for _ in range(9):
        needed.append(job.until_changed(1.3, 1.0, 1.0, 1.0, held=0))
        job.watch.react()
        assert not job.watch.has_changed
    assert needed == [3, 6, 12, 24, 48, 96, 192, 200, 200]


def test_with_another_plan_nobody_is_slow_yet() -> None:
    """What is expected has changed; patience has not."""
    job = Watched()
    job.until_changed(1.3, 1.0, 1.0, 1.0, held=0)
    job.watch.react()
    job.watch.forget()
    assert (job.watch.slow_ranks, job.watch.has_changed) == ((), False)
    assert job.until_changed(1.3, 1.0, 1.0, 1.0, held=0) == 6


@given(
    st.lists(
        st.tuples(st.lists(st.floats(0.8, 1.3), min_size=4, max_size=4, unique=True), st.integers(0, 4)), max_size=40
    ),
    st.permutations(range(4)),
)
def test_the_numbers_of_the_ranks_do_not_matter(story: list[tuple[list[float], int]], order: list[int]) -> None:
    """Renumbered, the same GPUs are slow, and the same follows at the same time."""
    stages = np.array([0, 0, 1, 1], np.int32)
    places = np.array(order)
    watch, renumbered = SpeedWatch(stages, 0.05), SpeedWatch(stages[places], 0.05)
    for iteration, (seen_s, held) in enumerate(story):
        seen, throttled = np.array(seen_s), np.arange(4) == held
        watch.note(iteration, seen, np.ones(4), throttled)
        renumbered.note(iteration, seen[places], np.ones(4), throttled[places])
        assert watch.has_changed == renumbered.has_changed
        assert set(watch.slow_ranks) == {order[rank] for rank in renumbered.slow_ranks}


def after_unlocked(before_s: float, now_s: float, *, planned_s: float, held: int | None = None) -> Watched:
    """Rank 3 at clocks of the driver's, then slower or faster at set clocks, and at the driver's again."""
    job = Watched()
    job.watch.note_unlocked([1.0, 1.0, 1.0, before_s])
    job.watch.end_unlocked()
    job.note(1.0, 1.0, 1.0, planned_s, held=held)
    for disturbed in (1.0, 1.0, 2.0):
        job.watch.note_unlocked([1.0, 1.0, 1.0, disturbed * now_s])
    job.watch.end_unlocked()
    return job


def test_a_gpu_that_is_slow_at_set_clocks_only_is_named() -> None:
    """Not one that is slower anyhow, or that says why, or that is as fast as expected."""
    slow = after_unlocked(1.0, 1.02, planned_s=1.3).watch.slow_at_set_clocks_only()
    assert slow is not None and (slow.rank, slow.slowness) == (3, pytest.approx(0.3))
    assert after_unlocked(1.0, 1.2, planned_s=1.3).watch.slow_at_set_clocks_only() is None
    assert after_unlocked(1.0, 0.8, planned_s=1.3).watch.slow_at_set_clocks_only() is None
    assert after_unlocked(1.0, 1.0, planned_s=1.3, held=3).watch.slow_at_set_clocks_only() is None
    assert after_unlocked(1.0, 1.0, planned_s=1.04).watch.slow_at_set_clocks_only() is None


def test_what_was_not_measured_without_a_plan_accuses_nobody() -> None:
    """The first time, and where no iteration can be compared."""
    job = Watched()
    job.note(1.3, 1.0, 1.0, 1.0)
    job.watch.note_unlocked([1.0] * 4)
    job.watch.end_unlocked()
    assert job.watch.slow_at_set_clocks_only() is None
    assert job.watch.may_be_faster_unlocked
    job.watch.note_unlocked([1.0] * 4)
    job.watch.forget_unlocked()
    job.watch.end_unlocked()
    assert job.watch.slow_at_set_clocks_only() is None
    job.watch.note_unlocked([1.0] * 4)
    job.watch.end_unlocked()
    assert job.watch.slow_at_set_clocks_only() is not None


@pytest.mark.parametrize(("now_s", "may_be"), [(1.0, False), (1.2, False), (0.9, True)])
def test_a_gpu_that_has_recovered_is_faster_without_a_plan(now_s: float, may_be: bool) -> None:
    """Than it was when it was slow."""
    assert after_unlocked(1.0, now_s, planned_s=1.0).watch.may_be_faster_unlocked is may_be
