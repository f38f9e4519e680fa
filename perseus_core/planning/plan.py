"""Plans: one clock for every instruction of one iteration, with what it promises and how good it can be at best."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path

from perseus_core.documents import Fields, load_document, rows, save_document
from perseus_core.errors import InputError
from perseus_core.planning.baselines import all_max
from perseus_core.planning.choice import choose_clocks
from perseus_core.planning.execution import Execution
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.policy import Policy, no_slowdown
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.schedule import Instruction, Kind, Placement, Schedule
from perseus_core.planning.switching import AT_ONCE, Switching, changes_per_iteration

FORMAT = "perseus-plan"
VERSION = 2
_COLUMNS = {
    "kind": str,
    "chunk": int,
    "microbatch": int,
    "clock_mhz": int,
    "start_s": float,
    "duration_s": float,
    "energy_j": float,
}


class Granularity(str, Enum):
    """How finely a plan changes clocks."""

    STAGE = "stage"
    """One clock for each stage."""
    PHASE = "phase"
    """At most three clocks for each stage, one after the other: as many as an iteration has phases."""
    INSTRUCTION = "instruction"
    """Finer."""

    @classmethod
    def of(cls, changes_per_iteration: int) -> Granularity:
        """That of a plan whose stages change clocks so often at most."""
        if changes_per_iteration == 0:
            return cls.STAGE
        return cls.PHASE if changes_per_iteration <= 3 else cls.INSTRUCTION


@dataclass(frozen=True)
class PlannedInstruction:
    """One instruction of a plan.

    Attributes:
        instruction: what runs.
        clock_mhz: at which clock.
        start_s: when, counted from the first instruction of the iteration.
        duration_s: for how long.
        energy_j: at which energy, one GPU of its stage.
    """

    instruction: Instruction
    clock_mhz: int
    start_s: float
    duration_s: float
    energy_j: float


@dataclass(frozen=True)
class Plan:
    """One clock for every instruction of one iteration.

    Energies count one GPU for each stage, waiting included.

    Attributes:
        schedule: the schedule it is for.
        stages: for each stage its instructions in schedule order.
        iteration_time_s, energy_j: what the plan promises: what executing it takes, changes of clock included.
        bound_energy_j: proved: no choice of clocks costs less in as much time as this plan was allowed.
        baseline_time_s, baseline_energy_j: the same iteration with all clocks at maximum.
        switching: what changes of clock take, and how many there may be.
        instant_energy_j: the least found that a plan would take in as much time if clocks changed at once, as often as
            one likes.

    Raises:
        InputError: if a stage's instructions are not those of the schedule, or a promise is not positive.
    """

    schedule: Schedule
    stages: tuple[tuple[PlannedInstruction, ...], ...]
    iteration_time_s: float
    energy_j: float
    bound_energy_j: float
    baseline_time_s: float
    baseline_energy_j: float
    switching: Switching
    instant_energy_j: float

    def __post_init__(self) -> None:
        if tuple(tuple(p.instruction for p in order) for order in self.stages) != self.schedule.stages:
            raise InputError("plan does not hold the instructions of its schedule, in their order")
        for name in (
            "iteration_time_s",
            "energy_j",
            "bound_energy_j",
            "baseline_time_s",
            "baseline_energy_j",
            "instant_energy_j",
        ):
            if not getattr(self, name) > 0:
                raise InputError(f"plan has {name} {getattr(self, name)}; it must be above 0")

    @property
    def clocks_mhz(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, the clock of each instruction in schedule order."""
        return tuple(tuple(p.clock_mhz for p in order) for order in self.stages)

    @cached_property
    def instructions(self) -> dict[Instruction, PlannedInstruction]:
        """What is planned for each instruction."""
        return {p.instruction: p for order in self.stages for p in order}

    @property
    def saving(self) -> float:
        """Share of the baseline's energy that is saved."""
        return 1 - self.energy_j / self.baseline_energy_j

    @property
    def slowdown(self) -> float:
        """Share by which the iteration takes longer than the baseline; negative when it is faster."""
        return self.iteration_time_s / self.baseline_time_s - 1

    @property
    def gap(self) -> float:
        """Share by which the plan costs more than the proved bound: it is at most so far from the best possible."""
        return self.energy_j / self.bound_energy_j - 1

    @property
    def changes_per_iteration(self) -> int:
        """Changes of clock in an iteration, of the stage that has most; the one back to its first clock included."""
        return max(changes_per_iteration(clocks) for clocks in self.clocks_mhz)

    @property
    def granularity(self) -> Granularity:
        """How finely it changes clocks."""
        return Granularity.of(self.changes_per_iteration)

    @property
    def lost_to_switching(self) -> float:
        """Share of the baseline's energy that would be saved besides if clocks changed at once."""
        return (self.energy_j - self.instant_energy_j) / self.baseline_energy_j

    def save(self, path: str | Path) -> None:
        """Writes `plan.json`."""
        save_document(
            path,
            FORMAT,
            VERSION,
            {
                "schedule": {
                    "name": self.schedule.name,
                    "num_chunks": self.schedule.num_chunks,
                    "num_microbatches": self.schedule.num_microbatches,
                    "placement": self.schedule.placement.value,
                },
                "iteration_time_s": self.iteration_time_s,
                "energy_j": self.energy_j,
                "bound_energy_j": self.bound_energy_j,
                "baseline_time_s": self.baseline_time_s,
                "baseline_energy_j": self.baseline_energy_j,
                "switching": asdict(self.switching),
                "instant_energy_j": self.instant_energy_j,
                "columns": list(_COLUMNS),
                "stages": [
                    [
                        [
                            p.instruction.kind.value,
                            p.instruction.chunk,
                            p.instruction.microbatch,
                            p.clock_mhz,
                            p.start_s,
                            p.duration_s,
                            p.energy_j,
                        ]
                        for p in order
                    ]
                    for order in self.stages
                ],
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads `plan.json`.

        Raises:
            InputError: naming the file, the field and the value that cannot be.
        """
        fields = load_document(path, FORMAT, VERSION)
        if fields.items("columns") != list(_COLUMNS):
            raise fields.error("columns", fields.items("columns"), f"must be {list(_COLUMNS)}")
        stages = tuple(_read_stage(fields, stage, order) for stage, order in enumerate(fields.items("stages")))
        about = fields.section("schedule")
        try:
            schedule = Schedule(
                about.text("name"),
                about.integer("num_chunks", at_least=1),
                about.integer("num_microbatches", at_least=1),
                tuple(tuple(p.instruction for p in order) for order in stages),
                placement=about.choice("placement", Placement),
            )
            return cls(
                schedule,
                stages,
                fields.number("iteration_time_s"),
                fields.number("energy_j"),
                fields.number("bound_energy_j"),
                fields.number("baseline_time_s"),
                fields.number("baseline_energy_j"),
                _read_switching(fields.section("switching")),
                fields.number("instant_energy_j"),
            )
        except InputError as error:
            message = str(error)
            raise InputError(message if message.startswith(fields.where) else f"{fields.where}: {message}") from None


def make_plan(
    frontier: Frontier[PipelineProblem],
    policy: Policy = no_slowdown,
    *,
    baseline: Execution | None = None,
    switching: Switching = AT_ONCE,
) -> Plan:
    """The plan for the point of the frontier that a policy picks.

    Args:
        frontier: the solved pipeline.
        policy: picks the iteration time that the plan must keep.
        baseline: what to compare with; by default all clocks at maximum.
        switching: what changes of clock take; the promise counts it.

    Raises:
        InputError: if the policy asks for what cannot be.
    """
    problem = frontier.problem
    baseline = baseline or all_max(problem)
    target_s = policy(frontier, baseline.iteration_time_s)
    chosen = choose_clocks(problem, frontier, target_s, switching=switching)
    instant_energy_j = chosen.energy_j
    if not switching.is_free:
        instant_energy_j = min(instant_energy_j, choose_clocks(problem, frontier, target_s).energy_j)
    start_s = problem.dag.start_times_s(chosen.durations_s)
    planned = (
        PlannedInstruction(instruction, int(clock), float(start), float(duration), float(energy))
        for instruction, clock, start, duration, energy in zip(
            problem.schedule.instructions,
            chosen.clocks_mhz,
            start_s,
            chosen.durations_s,
            chosen.energies_j,
            strict=True,
        )
    )
    return Plan(
        schedule=problem.schedule,
        stages=tuple(tuple(next(planned) for _ in order) for order in problem.schedule.stages),
        iteration_time_s=chosen.iteration_time_s,
        energy_j=chosen.energy_j,
        bound_energy_j=frontier.energy_j(min(max(target_s, chosen.iteration_time_s), frontier.min_energy_time_s)),
        baseline_time_s=baseline.iteration_time_s,
        baseline_energy_j=baseline.energy_j,
        switching=switching,
        instant_energy_j=instant_energy_j,
    )


def _read_switching(fields: Fields) -> Switching:
    most = None if fields.fields.get("max_changes_per_s") is None else fields.number("max_changes_per_s")
    call_s = fields.number("call_s") if "call_s" in fields.fields else 0.0  # before it was known
    return Switching(fields.number("up_s"), fields.number("down_s"), fields.number("jitter_s"), most, call_s)


def _read_stage(fields: Fields, stage: int, order: object) -> tuple[PlannedInstruction, ...]:
    here = Fields(f"{fields.where}, stage {stage}", {"stages": order})
    planned = []
    for kind, chunk, microbatch, clock_mhz, start_s, duration_s, energy_j in rows(
        here, "stages", tuple(_COLUMNS.values())
    ):
        if kind not in set(Kind):
            raise here.error("kind", kind, f"must be one of {', '.join(Kind)}")
        if clock_mhz < 1 or min(start_s, duration_s, energy_j) < 0:
            raise here.error(
                "stages", [kind, chunk, microbatch, clock_mhz, start_s, duration_s, energy_j], "must not be negative"
            )
        instruction = Instruction(stage, chunk, microbatch, Kind(kind))
        planned.append(PlannedInstruction(instruction, clock_mhz, start_s, duration_s, energy_j))
    return tuple(planned)
