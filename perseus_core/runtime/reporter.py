"""What the session says while it works: few lines, each with what a user can do something with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perseus_core.runtime.log import Announcer
from perseus_core.runtime.ranks.decisions import Coordination, Orders, Phase, Reason

if TYPE_CHECKING:
    from perseus_core.runtime.measure.sweep import Progress
    from perseus_core.runtime.replan.plan_message import PlanMessage
    from perseus_core.runtime.settings import Settings


# A GPU that comes and goes is not reported every time.
_SAY_AGAIN_AFTER = 50


@dataclass(frozen=True)
class SessionStatus:
    """Where a session stands. Energies count one GPU for each stage.

    Attributes:
        phase: what it does.
        iterations: how many have begun.
        progress: of profiling, in words.
        baseline_time_s, baseline_energy_j: of an iteration without us; 0 while not known.
        plan: number of the plan in force, 0 for none.
        promised_saving: share of the energy it should save.
        promised_slowdown: share by which it should be slower.
        gap: how far it is from the best possible at most.
        solve_s: how long the planner took.
        iteration_time_s, energy_j: measured under it; 0 while not known.
        iterations_under_plan: measured iterations under any plan.
        profiling_iterations: how many iterations profiling took.
        slow_ranks: ranks that were last seen slower than their profile.
    """

    phase: Phase
    iterations: int = 0
    progress: str = ""
    baseline_time_s: float = 0.0
    baseline_energy_j: float = 0.0
    plan: int = 0
    promised_saving: float = 0.0
    promised_slowdown: float = 0.0
    gap: float = 0.0
    solve_s: float = 0.0
    iteration_time_s: float = 0.0
    energy_j: float = 0.0
    iterations_under_plan: int = 0
    profiling_iterations: int = 0
    slow_ranks: tuple[int, ...] = ()

    @property
    def saving(self) -> float:
        """Share of the baseline's energy that is saved, as measured; 0 while not known."""
        return 1 - self.energy_j / self.baseline_energy_j if self.energy_j and self.baseline_energy_j else 0.0

    @property
    def slowdown(self) -> float:
        """Share by which an iteration takes longer than the baseline, as measured."""
        return self.iteration_time_s / self.baseline_time_s - 1 if self.iteration_time_s else 0.0


class Reporter:
    """Tells the user, and remembers what for `SessionStatus`."""

    def __init__(self, announcer: Announcer, settings: Settings, coordination: Coordination) -> None:
        """Nothing happened yet."""
        self._announcer = announcer
        self._settings = settings
        self._coordination = coordination
        self._verdict_iterations: list[int] = []
        self._time_s = 0.0
        self._num_verdicts_told = 0
        self._last_told = 0
        self._sweep_clocks_done = -1
        self._sweep_iterations = 0
        self._baseline_told = False
        self._slow_told: dict[int, int] = {}

    def tell(self, orders: Orders, iteration: int, plan: PlanMessage | None) -> None:
        """What follows from the heartbeats of an iteration."""
        say, warn = self._announcer.say, self._announcer.warn
        coordination = self._coordination
        baseline = coordination.baseline
        if orders.phase_changed and baseline is not None:
            if coordination.phase in (Phase.PROFILE, Phase.COLLECT) and not self._baseline_told and not plan:
                self._baseline_told = True
                say("baseline: %.4g s an iteration%s", baseline.time_s, self._in_joules(baseline.energy_j))
            elif coordination.phase is Phase.MEASURE_ONLY and self._settings.measure_only:
                say("measuring only: %.4g s an iteration%s", baseline.time_s, self._in_joules(baseline.energy_j))
            elif coordination.phase is Phase.MEASURE_ONLY and not orders.aside:
                warn("without a plan iterations are faster: clocks are left to the driver from now on")
        slow = orders.slow_rank
        if slow is not None and slow.iteration >= self._slow_told.get(slow.rank, -_SAY_AGAIN_AFTER) + _SAY_AGAIN_AFTER:
            self._slow_told[slow.rank] = slow.iteration
            stage = int(coordination.introductions[slow.rank].stage)
            warn(
                "stage %d (rank %d) is %.0f %% slower than its profile: its instructions of iteration %d took %.4g s, "
                "expected %.4g s%s",
                stage,
                slow.rank,
                100 * slow.speed.slowness,
                slow.iteration,
                slow.speed.seen_s,
                slow.speed.expected_s,
                "; power or heat holds its clock down" if slow.speed.throttled else "",
            )
        if orders.verdict is not None:
            self._judge(orders, plan)
        if orders.phase_changed and coordination.phase is Phase.COLLECT and plan is not None:
            if coordination.reason is Reason.SPEED_CHANGED:
                say("planning anew for the speed that the GPUs have now")
            elif coordination.reason is Reason.RECOVERED:
                say("planning anew: the GPU that was slow may have recovered")
            elif coordination.reason is Reason.BASELINE_CHANGED and baseline is not None:
                say("the job itself has become slower: %.4g s an iteration without a plan now", baseline.time_s)

    def _judge(self, orders: Orders, plan: PlanMessage | None) -> None:
        verdict, baseline = orders.verdict, self._coordination.baseline
        assert verdict is not None
        self._verdict_iterations = (self._verdict_iterations + list(verdict.iterations))[-1000:]
        self._time_s = verdict.time_s
        if baseline is None or plan is None:
            return
        slowdown = verdict.time_s / baseline.time_s - 1
        energy_j = self._coordination.iteration_energy_j(verdict.iterations)
        self._announcer.measure("iteration_time_s", verdict.time_s)
        if energy_j:
            self._announcer.measure("energy_j", energy_j)
            if baseline.energy_j:
                self._announcer.measure("saving", 1 - energy_j / baseline.energy_j)
        if verdict.is_slow:
            allowed = plan.limit_time_s / baseline.time_s - 1
            self._announcer.say(
                "iterations take %+.2f %% time, allowed are %+.2f %%: %s",
                100 * slowdown,
                100 * allowed,
                "after all corrections, so the job is measured without a plan again"
                if self._coordination.phase is Phase.RECHECK
                else "correcting the plan by what was seen",
            )
            return
        due = self._settings.log_interval and verdict.iterations[-1] - self._last_told >= self._settings.log_interval
        if self._num_verdicts_told == 0 or due:
            self._num_verdicts_told += 1
            self._last_told = verdict.iterations[-1]
            self._announcer.say(
                "measured in iterations %d to %d: %s%+.2f %% time",
                verdict.iterations[0],
                verdict.iterations[-1],
                f"{100 * (1 - energy_j / baseline.energy_j):.1f} % less energy, "
                if energy_j and baseline.energy_j
                else "",
                100 * slowdown,
            )

    def plan_applied(self, plan: PlanMessage, iteration: int) -> None:
        """A plan is in force."""
        self._num_verdicts_told = 0
        self._verdict_iterations = []
        self._announcer.say(
            "plan%s applied from iteration %d: %.1f %% less energy, %+.1f %% time promised, within %.2f %% of the "
            "bound (solved in %.2g s)",
            "" if plan.num_microbatches == self._usual else f" for {plan.num_microbatches} microbatches",
            iteration,
            100 * plan.saving,
            100 * plan.slowdown,
            100 * max(0.0, plan.gap),  # below 0 by rounding only
            plan.solve_s,
        )

    def sweeping(self, progress: Progress | None, notes: tuple[str, ...]) -> None:
        """How far profiling is."""
        if progress is None or progress.clocks_done == self._sweep_clocks_done:
            return
        self._sweep_clocks_done, self._sweep_iterations = progress.clocks_done, progress.iterations_done
        self._announcer.say("%s", progress)
        if progress.clock_mhz is None:
            for note in notes:
                self._announcer.warn("%s", note)

    def cannot_follow(self, num_microbatches: int) -> None:
        """An iteration comes for which there is no plan."""
        what = f"an iteration of {num_microbatches} microbatches" if num_microbatches else "an evaluation"
        self._announcer.warn_once(
            f"no plan {num_microbatches}", "%s has no plan and runs at the clocks the driver chooses", what
        )

    def order_differs(self) -> None:
        """An iteration ran in another order than planned."""
        self._announcer.warn_once(
            "order", "an iteration ran in another order than planned; such run at the clocks the driver chooses"
        )

    def end(self, plan: PlanMessage | None) -> None:
        """The session ends."""
        baseline = self._coordination.baseline
        energy_j = self._coordination.iteration_energy_j(self._verdict_iterations)
        if plan is not None and baseline is not None and baseline.energy_j and energy_j:
            self._announcer.say(
                "under the plan: %.1f %% less energy and %+.2f %% time an iteration (promised %.1f %% and %+.2f %%)",
                100 * (1 - energy_j / baseline.energy_j),
                100 * (self._time_s / baseline.time_s - 1),
                100 * plan.saving,
                100 * plan.slowdown,
            )

    def status(
        self, iterations: int, plan: PlanMessage | None, progress: Progress | None, *, failed: bool
    ) -> SessionStatus:
        """Where the session stands."""
        baseline = self._coordination.baseline
        return SessionStatus(
            Phase.STEPPED_ASIDE if failed else self._coordination.phase,
            iterations,
            "" if progress is None else str(progress),
            0.0 if baseline is None else baseline.time_s,
            0.0 if baseline is None else baseline.energy_j,
            0 if plan is None else plan.number,
            0.0 if plan is None else plan.saving,
            0.0 if plan is None else plan.slowdown,
            0.0 if plan is None else plan.gap,
            0.0 if plan is None else plan.solve_s,
            self._time_s,
            self._coordination.iteration_energy_j(self._verdict_iterations) or 0.0,
            len(self._verdict_iterations),
            self._sweep_iterations,
            self._coordination.slow_ranks,
        )

    @property
    def _usual(self) -> int:
        baseline = self._coordination.baseline
        return 0 if baseline is None else baseline.num_microbatches

    @staticmethod
    def _in_joules(energy_j: float) -> str:
        return f", {energy_j:.4g} J" if energy_j else ""
