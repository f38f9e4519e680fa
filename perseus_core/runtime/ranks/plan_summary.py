"""What is said of a plan beside its clocks: all that is needed to judge it and to report it."""

from __future__ import annotations

from dataclasses import dataclass

from perseus_core.planning.switching import SeenChanges, Switching


@dataclass(frozen=True)
class PlanSummary:
    """A plan in a few numbers. Energies count one GPU for each stage.

    Attributes:
        number: plans are numbered from 1.
        num_microbatches: of the iteration it is for.
        limit_time_s: how long an iteration may take.
        promised_time_s: how long it should take.
        promised_energy_j: energy of an iteration.
        baseline_time_s, baseline_energy_j: what the planner takes for the same at unlocked clocks.
        gap: how far the plan is from the best possible at most.
        solve_s: how long the planner took.
        lost_to_switching: share of the baseline's energy that would be saved besides if clocks changed at once.
        up_s, down_s, jitter_s, call_s: what a change of clock was taken to last, see `Switching`.
        changes_per_iteration: of clocks, on the stage that has most.
    """

    number: int
    num_microbatches: int
    limit_time_s: float
    promised_time_s: float
    promised_energy_j: float
    baseline_time_s: float
    baseline_energy_j: float
    gap: float
    solve_s: float
    lost_to_switching: float = 0.0
    up_s: float = 0.0
    down_s: float = 0.0
    jitter_s: float = 0.0
    changes_per_iteration: int = 0
    call_s: float = 0.0

    @property
    def switching(self) -> Switching:
        """What changes of clock were taken to last."""
        return Switching(self.up_s, self.down_s, self.jitter_s)

    @property
    def changes(self) -> SeenChanges:
        """The same, to plan with again."""
        return SeenChanges(self.up_s, self.down_s, self.call_s)

    @property
    def saving(self) -> float:
        """Share of the energy that is promised to be saved."""
        return 1 - self.promised_energy_j / self.baseline_energy_j

    @property
    def slowdown(self) -> float:
        """Share by which an iteration is promised to take longer."""
        return self.promised_time_s / self.baseline_time_s - 1
