"""The clock controller in virtual time: which clocks instructions really run at, and what following costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from perseus_core.planning.schedule import Kind
from perseus_core.runtime.clock.controller import ClockController
from perseus_core.runtime.clock.planned_clock import PlannedClock
from tests.cluster.cluster import Cluster, Surroundings
from tests.planned_clocks import without_gaps

SLOW, FAST = 990, 1410


class Follower:
    """A session that does nothing but follow a plan."""

    def __init__(self, rank: Surroundings, plan: Sequence[PlannedClock] | None) -> None:
        self.plan = plan
        self.controller = ClockController(rank.gpu, threads=rank.threads, guard=rank.guard)
        self.controller.start()
        self._record = rank.events.record

    def begin_iteration(self, num_microbatches: int, *, training: bool = True) -> None:
        if self.plan is not None:
            self.controller.begin_iteration(self.plan)

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        self.controller.instruction_begins(self._record())

    def end_instruction(self) -> None:
        self.controller.instruction_ends(self._record())

    def end_iteration(self) -> None:
        if self.plan is not None:
            self.controller.end_iteration()

    def fail(self, error: Exception) -> None:
        raise error

    def close(self) -> None:
        self.controller.stop()


def one_stage(plan_of: Callable[[Surroundings], Sequence[PlannedClock] | None], *, tail_share: float = 0.05) -> Cluster:
    """One GPU that runs four microbatches one after another: forward, backward, forward, ..."""

    def make_session(rank: Surroundings) -> Follower:
        return Follower(rank, plan_of(rank))

    return Cluster(
        seed=1,
        stages=1,
        microbatches=4,
        make_session=make_session,
        time_scale=1.0,
        time_noise=0.0,
        tail_share=tail_share,
    )


def planned(rank: Surroundings, forward_mhz: int, backward_mhz: int) -> list[PlannedClock]:
    """Forwards at one clock and backwards at another, with the durations that they really have there."""
    model = rank.gpu.model
    durations_s = {
        (kind, clock): model.times_s[model.clocks_mhz.index(clock)][kind] for kind in (0, 1) for clock in (SLOW, FAST)
    }
    forward, backward = (forward_mhz, durations_s[1, forward_mhz]), (backward_mhz, durations_s[0, backward_mhz])
    return without_gaps(*[forward, backward] * 4)


def follower_of(cluster: Cluster) -> Follower:
    session = cluster.ranks[0].session
    assert isinstance(session, Follower)
    return session


@pytest.mark.parametrize(("forward_mhz", "backward_mhz"), [(SLOW, FAST), (FAST, SLOW), (SLOW, SLOW)])
def test_instructions_run_at_their_planned_clocks(forward_mhz: int, backward_mhz: int) -> None:
    """With 15 ms for each change, an iteration takes what the plan says to within a few milliseconds a change."""
    with one_stage(lambda rank: planned(rank, forward_mhz, backward_mhz), tail_share=0.0) as cluster:
        cluster.run_iterations(12)
        plan = follower_of(cluster).plan
        assert plan is not None
        promised_s = sum(instruction.duration_s for instruction in plan)
        late_s = cluster.iteration_times_s()[-1] - promised_s
        assert -0.02 < late_s / promised_s < 0.005
        switching = follower_of(cluster).controller.switching
        assert switching.down_s == pytest.approx(0.015, abs=0.002)
        assert switching.up_s == pytest.approx(0.016, abs=0.002)


def test_a_plan_at_one_clock_is_one_lock_and_hardly_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a step of the side thread for each instruction: as long as nothing changes nothing has to be looked at."""
    with one_stage(lambda rank: planned(rank, SLOW, SLOW)) as cluster:
        cluster.run_iterations(4)
        controller = follower_of(cluster).controller
        num_steps = 0

        def count_step(take: Callable[[], bool] = controller._take_what_was_reached) -> bool:
            nonlocal num_steps
            num_steps += 1
            return take()

        monkeypatch.setattr(controller, "_take_what_was_reached", count_step)
        cluster.run_iterations(10)
        assert controller.num_lock_calls == 1
        assert num_steps <= 4 * 10


def test_nothing_is_locked_before_it_is_guarded() -> None:
    """The side thread goes on meanwhile, and locks as soon as it may."""
    with one_stage(lambda rank: planned(rank, SLOW, FAST)) as cluster:
        cluster.run_for(0.3)
        controller = follower_of(cluster).controller
        assert controller.num_lock_calls == 0
        cluster.run_for(1.0)
        assert controller.num_lock_calls > 0
        assert controller.failure is None


def test_what_is_held_stays_until_it_is_given_back() -> None:
    """At the end the clock is the driver's again, at once."""
    with one_stage(lambda rank: None) as cluster:
        cluster.run_for(1.0)
        controller = follower_of(cluster).controller
        controller.hold(SLOW)
        cluster.run_for(3.0)
        assert cluster.ranks[0].gpu.sm_clock_mhz() == SLOW
        assert controller.num_lock_calls == 1
    cluster.run_for(0.1)
    assert cluster.ranks[0].gpu.sm_clock_mhz() == FAST
