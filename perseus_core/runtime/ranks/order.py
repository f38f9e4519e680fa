"""What rank 0 tells all ranks: the state in which the job shall be, and from which iteration on.

An order holds everything, not what has changed: whoever missed some goes on with the newest.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from enum import Enum
from typing import NamedTuple

from perseus_core.runtime.ranks.plan_summary import PlanSummary


class Phase(Enum):
    """What the job does."""

    OPENING = "opening"
    WARM_UP = "warm up"
    PROFILE = "profile"
    COLLECT = "collect"
    SOLVE = "solve"
    RUN = "run"
    INTERLUDE = "interlude"
    MEASURE_ONLY = "measure only"
    STEPPED_ASIDE = "stepped aside"


class Reason(Enum):
    """Why measurements are collected."""

    PROFILED = "profiled"
    SLOWER = "slower than allowed"
    SPEED_CHANGED = "a GPU changed its speed"
    RECOVERED = "a GPU may be as fast as before"
    RESIZED = "iterations have another number of microbatches"


@dataclass(frozen=True)
class Baseline:
    """The job without us: clocks left to the driver.

    Attributes:
        num_microbatches: of one iteration.
        time_s: of one iteration.
        energy_j: of one iteration, one GPU for each stage; 0 while not known.
    """

    num_microbatches: int
    time_s: float
    energy_j: float = 0.0


@dataclass(frozen=True)
class Order:
    """The state in which all ranks shall be.

    Attributes:
        number: orders are numbered from 1.
        phase: what the job does.
        from_iteration: phase and plans hold from this iteration on.
        plans: those that run, each for its number of microbatches.
        offered: number of the newest plan, to be fetched; 0 for none.
        collection: how often measurements were collected, the one under way included.
        reason: what the newest collection is for.
        baseline: of the job, once it is measured.
        speaker: the rank that knows why all step aside, and says it; -1 for none.
        store_speaker: the rank that says so when the store is gone: not the one with which it goes.
        interlude_until: in an interlude, the iteration from which plans run again.
        iterations_of_step: while profiling, how many iterations each clock is held; the first is discarded.
        unlocked_mhz: the highest clock that a GPU of the job held at unlocked clocks; 0 if that is not known.
    """

    number: int = 0
    phase: Phase = Phase.OPENING
    from_iteration: int = 0
    plans: tuple[PlanSummary, ...] = ()
    offered: int = 0
    collection: int = 0
    reason: Reason = Reason.PROFILED
    baseline: Baseline | None = None
    speaker: int = -1
    store_speaker: int = 1
    iterations_of_step: int = 0
    unlocked_mhz: int = 0
    interlude_until: int = 0

    def plans_run_in(self, iteration: int) -> bool:
        """Whether an iteration runs a plan if there is one for it, as far as this order goes."""
        return self.phase is not Phase.INTERLUDE or not self.from_iteration <= iteration < self.interlude_until

    @property
    def usual_microbatches(self) -> int:
        """Microbatches of an iteration of the baseline; -1 while there is none."""
        return -1 if self.baseline is None else self.baseline.num_microbatches

    def plan_for(self, num_microbatches: int) -> PlanSummary | None:
        """The plan that iterations of so many microbatches run, if there is one."""
        return next((plan for plan in self.plans if plan.num_microbatches == num_microbatches), None)

    def encode(self) -> bytes:
        """As bytes."""
        fields = asdict(self)
        fields.update(phase=self.phase.value, reason=self.reason.value)
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, content: bytes) -> Order:
        """From the bytes that `encode` made, by a rank of the same version."""
        fields = json.loads(content)
        fields.update(
            phase=Phase(fields["phase"]),
            reason=Reason(fields["reason"]),
            plans=tuple(PlanSummary(**plan) for plan in fields["plans"]),
            baseline=None if fields["baseline"] is None else Baseline(**fields["baseline"]),
        )
        return cls(**fields)


class News(NamedTuple):
    """The few bytes that every rank looks at again and again.

    Attributes:
        round: number of the key to which records are appended now.
        order: number of the newest order.
        figures: how often measured figures were published.
    """

    round: int = 0
    order: int = 0
    figures: int = 0

    def encode(self) -> bytes:
        """As bytes."""
        return _NEWS.pack(*self)

    @classmethod
    def decode(cls, content: bytes) -> News:
        """From the bytes that `encode` made."""
        return cls(*_NEWS.unpack(content))


_NEWS = struct.Struct("<III")
