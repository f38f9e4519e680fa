"""What the session says while it works: few lines, each with what a user can do something with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from perseus_core.runtime.log import Announcer
from perseus_core.runtime.measure.sweep import Progress
from perseus_core.runtime.ranks.comparison import Interval
from perseus_core.runtime.ranks.decisions import Conclusions, Decisions
from perseus_core.runtime.ranks.order import Baseline, Order, Phase, Reason
from perseus_core.runtime.ranks.plan_summary import PlanSummary
from perseus_core.runtime.ranks.plan_watch import Verdict
from perseus_core.runtime.ranks.speed_watch import SlowRank

# A GPU that comes and goes is not reported every time.
_SAY_AGAIN_AFTER = 50
_MOST_ITERATIONS = 1000
# What would be saved besides is told from here on, as a share.
_TOLD = 0.002
_FASTER_WITHOUT = "without a plan iterations are faster"
_OUT_OF_REACH = "no plan keeps what is allowed with what was seen"


@dataclass(frozen=True)
class Figures:
    """What was measured under a plan. Energies count one GPU for each stage.

    Attributes:
        iteration_time_s, energy_j: of an iteration; 0 while not known.
        saving: share of the energy that is saved; 0 while not known.
        slowdown: share by which an iteration takes longer; 0 while not known.
        saving_between, slowdown_between: between what they lie with a confidence of 95 %, once iterations under the
            plan have been compared with iterations without it of the same minutes; both 0 before.
        iterations: measured iterations under any plan.
        slow_ranks: ranks that were last seen slower than their profile.
    """

    iteration_time_s: float = 0.0
    energy_j: float = 0.0
    saving: float = 0.0
    slowdown: float = 0.0
    saving_between: tuple[float, float] = (0.0, 0.0)
    slowdown_between: tuple[float, float] = (0.0, 0.0)
    iterations: int = 0
    slow_ranks: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """As bytes."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, content: bytes) -> Figures:
        """From the bytes that `encode` made."""
        fields: dict[str, Any] = json.loads(content)
        for name in ("saving_between", "slowdown_between", "slow_ranks"):
            fields[name] = tuple(fields[name])
        return cls(**fields)

    def metrics(self) -> dict[str, float]:
        """What goes to a framework's own metrics."""
        known = {"iteration_time_s": self.iteration_time_s, "energy_j": self.energy_j, "saving": self.saving}
        return {name: value for name, value in known.items() if value}


NO_FIGURES = Figures()


@dataclass(frozen=True)
class SessionStatus:
    """Where a session stands. Energies count one GPU for each stage. What was measured under plans rank 0 knows.

    Attributes:
        phase: what it does.
        iterations: how many have begun.
        progress: of profiling, in words.
        baseline_time_s, baseline_energy_j: of an iteration without us; 0 while not known.
        plan: number of the plan in force, 0 for none.
        follows_plan: whether the iteration that began last runs at its clocks: not in an interlude.
        promised_saving: share of the energy it should save.
        promised_slowdown: share by which it should be slower.
        gap: how far it is from the best possible at most.
        solve_s: how long the planner took.
        iteration_time_s, energy_j, saving, slowdown: measured under it, see `Figures`.
        saving_between, slowdown_between: likewise.
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
    follows_plan: bool = False
    promised_saving: float = 0.0
    promised_slowdown: float = 0.0
    gap: float = 0.0
    solve_s: float = 0.0
    iteration_time_s: float = 0.0
    energy_j: float = 0.0
    saving: float = 0.0
    slowdown: float = 0.0
    saving_between: tuple[float, float] = (0.0, 0.0)
    slowdown_between: tuple[float, float] = (0.0, 0.0)
    iterations_under_plan: int = 0
    profiling_iterations: int = 0
    slow_ranks: tuple[int, ...] = ()


class Reporter:
    """Tells the user, on rank 0.

    Attributes:
        figures: what was measured under plans.
    """

    def __init__(self, announcer: Announcer, log_interval: int) -> None:
        """Nothing happened yet.

        Args:
            announcer: what is said is said through it.
            log_interval: iterations between lines of what was measured; 0 for the first one only.
        """
        self.figures = Figures()
        self._announcer = announcer
        self._log_interval = log_interval
        self._verdict_iterations: list[int] = []
        self._num_verdicts_told = 0
        self._last_told = 0
        self._sweep_clocks_done = -1
        self._baseline_told = False
        self._slow_told: dict[int, int] = {}

    # In rank 0's side thread

    def tell(self, decisions: Decisions, conclusions: Conclusions, order: Order) -> None:
        """What follows from what the ranks have told.

        Args:
            decisions: the job's state.
            conclusions: what has just followed.
            order: the newest.
        """
        say, warn = self._announcer.say, self._announcer.warn
        baseline, plan = decisions.baseline, order.plan_for(order.usual_microbatches)
        if conclusions.phase_changed and baseline is not None:
            if decisions.phase in (Phase.PROFILE, Phase.COLLECT) and not self._baseline_told and not order.plans:
                self._baseline_told = True
                say("baseline: %s", _in_words(baseline))
            elif decisions.phase is Phase.MEASURE_ONLY and decisions.measures_only:
                say("measuring only: %s", _in_words(baseline))
            elif decisions.phase is Phase.MEASURE_ONLY and not conclusions.aside:
                why = _OUT_OF_REACH if conclusions.out_of_reach else _FASTER_WITHOUT
                warn("%s: clocks are left to the driver from now on", why)
        if conclusions.slow_rank is not None:
            self._tell_slow(conclusions.slow_rank)
        if conclusions.disobeying is not None:
            self._tell_disobeying(conclusions.disobeying)
        for verdict in conclusions.verdicts:
            self._judge(decisions, verdict, plan)
        if conclusions.phase_changed and decisions.phase is Phase.COLLECT and order.plans:
            if decisions.reason is Reason.SPEED_CHANGED:
                say("planning anew for the speed that the GPUs have now")
            elif decisions.reason is Reason.RECOVERED:
                say("planning anew: the GPU that was slow may have recovered")
            elif decisions.reason is Reason.RESIZED and baseline is not None:
                say("planning anew; baseline: %d microbatches, %s", baseline.num_microbatches, _in_words(baseline))
            elif decisions.reason is Reason.SLOWER and plan is not None:
                say(
                    "iterations take %s time beside those without a plan, allowed are %+.2f %%: correcting the plan by "
                    "what was seen",
                    decisions.time_ratio(),
                    100 * (plan.limit_time_s / plan.baseline_time_s - 1),
                )

    def _tell_slow(self, slow: SlowRank) -> None:
        if slow.iteration < self._slow_told.get(slow.rank, -_SAY_AGAIN_AFTER) + _SAY_AGAIN_AFTER:
            return
        self._slow_told[slow.rank] = slow.iteration
        self._announcer.warn(
            "stage %d (rank %d) is %.0f %% slower than its profile: its instructions of iteration %d took %.4g s, "
            "expected %.4g s%s",
            slow.stage,
            slow.rank,
            100 * slow.slowness,
            slow.iteration,
            slow.seen_s,
            slow.expected_s,
            "; power or heat holds its clock down" if slow.throttled else "",
        )

    def _tell_disobeying(self, slow: SlowRank) -> None:
        self._announcer.warn_once(
            f"disobeying {slow.rank}",
            "stage %d (rank %d) does not run at the clocks that it is asked for, or is disturbed there: its "
            "instructions take %.0f %% longer than expected, and no longer than before where the driver chooses",
            slow.stage,
            slow.rank,
            100 * slow.slowness,
        )

    def _judge(self, decisions: Decisions, verdict: Verdict, plan: PlanSummary | None) -> None:
        baseline = decisions.baseline
        self._verdict_iterations = (self._verdict_iterations + list(verdict.iterations))[-_MOST_ITERATIONS:]
        if baseline is None or plan is None:
            return
        energy_j = decisions.iteration_energy_j(verdict.iterations)
        figures = Figures(
            verdict.time_s,
            decisions.iteration_energy_j(self._verdict_iterations) or 0.0,
            1 - energy_j / baseline.energy_j if energy_j and baseline.energy_j else 0.0,
            verdict.time_s / baseline.time_s - 1,
            iterations=len(self._verdict_iterations),
            slow_ranks=decisions.slow_ranks,
        )
        self.figures = _beside_interludes(figures, decisions.time_ratio(), decisions.energy_ratio())
        due = self._log_interval and verdict.iterations[-1] - self._last_told >= self._log_interval
        if self._num_verdicts_told == 0 or due:
            self._num_verdicts_told += 1
            self._last_told = verdict.iterations[-1]
            self._announcer.say(
                "measured in iterations %d to %d: %s",
                verdict.iterations[0],
                verdict.iterations[-1],
                _measured_in_words(self.figures),
            )

    # On rank 0's training thread

    def plan_applied(self, plan: PlanSummary, iteration: int, usual_microbatches: int) -> None:
        """A plan is in force."""
        self._num_verdicts_told = 0
        self._verdict_iterations = []
        self._announcer.say(
            "plan%s applied from iteration %d: %.1f %% less energy, %+.1f %% time promised, within %.2f %% of the "
            "bound; %d clock changes an iteration%s (solved in %.2g s)",
            "" if plan.num_microbatches == usual_microbatches else f" for {plan.num_microbatches} microbatches",
            iteration,
            100 * plan.saving,
            100 * plan.slowdown,
            100 * max(0.0, plan.gap),  # below 0 by rounding only
            plan.changes_per_iteration,
            f", {100 * plan.lost_to_switching:.1f} % more if they took no time"
            if plan.lost_to_switching >= _TOLD
            else "",
            plan.solve_s,
        )

    def sweeping(self, progress: Progress | None, notes: tuple[str, ...]) -> None:
        """How far profiling is."""
        if progress is None or progress.clocks_done == self._sweep_clocks_done:
            return
        self._sweep_clocks_done = progress.clocks_done
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

    def not_followed(self, iteration: int, why: str) -> None:
        """An iteration could not be marked on the compute stream."""
        self._announcer.warn_once(
            "not followed",
            "iteration %d is not followed (%s); such run at the clocks the driver chooses, and are not measured",
            iteration,
            why,
        )

    def order_differs(self) -> None:
        """An iteration ran in another order than planned."""
        self._announcer.warn_once(
            "order", "an iteration ran in another order than planned; such run at the clocks the driver chooses"
        )

    def end(self, order: Order) -> None:
        """The session ends."""
        plan, figures = order.plan_for(order.usual_microbatches), self.figures
        if plan is not None and figures.saving:
            self._announcer.say(
                "under the plan: %s an iteration (promised %.1f %% and %+.2f %%)",
                _measured_in_words(figures),
                100 * plan.saving,
                100 * plan.slowdown,
            )


def _beside_interludes(figures: Figures, time: Interval | None, energy: Interval | None) -> Figures:
    """With what iterations without a plan of the same minutes say, once there were some."""
    if time is not None:
        figures = replace(figures, slowdown=time.middle - 1, slowdown_between=(time.low - 1, time.high - 1))
    if energy is not None:
        figures = replace(figures, saving=1 - energy.middle, saving_between=(1 - energy.high, 1 - energy.low))
    return figures


def _measured_in_words(figures: Figures) -> str:
    saving, slowdown = (
        f" ({100 * low:{form}} to {100 * high:{form}})" if low or high else ""
        for (low, high), form in ((figures.saving_between, ".1f"), (figures.slowdown_between, "+.2f"))
    )
    energy = f"{100 * figures.saving:.1f} %{saving} less energy, " if figures.saving else ""
    return f"{energy}{100 * figures.slowdown:+.2f} %{slowdown} time"


def _in_words(baseline: Baseline) -> str:
    energy = f", {baseline.energy_j:.4g} J" if baseline.energy_j else ""
    return f"{baseline.time_s:.4g} s an iteration{energy}"
