"""Tables for the terminal: comparisons, frontiers and plans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from perseus_core.planning.execution import Execution
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.plan import Granularity, Plan, PlannedInstruction
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.schedule import Kind
from perseus_core.planning.switching import changes_per_iteration
from perseus_core.report.titles import schedule_title
from perseus_core.report.units import NONE, Scale, percent, quantity


@dataclass(frozen=True)
class ComparisonRow:
    """What one method reaches. None where there is no such number.

    Attributes:
        name: the method.
        iteration_time_s, energy_j: of one iteration, one GPU for each stage.
        slowdown, saving: shares, against the baseline.
        note: whatever must be said beside the numbers.
    """

    name: str
    iteration_time_s: float | None
    energy_j: float | None
    slowdown: float | None
    saving: float | None
    note: str = ""


def comparison_table(rows: Sequence[ComparisonRow], *, title: str | None = None) -> Table:
    """Methods below each other, in one unit for each column."""
    time = Scale.of([row.iteration_time_s for row in rows], "s")
    energy = Scale.of([row.energy_j for row in rows], "J")
    has_notes = any(row.note for row in rows)
    table = _table(title, "Method", f"Time [{time.unit}]", f"Energy [{energy.unit}]", "Slowdown", "Saving")
    if has_notes:
        table.add_column("Note", style="dim", overflow="fold")
    for row in rows:
        cells = [
            time.number(row.iteration_time_s),
            energy.number(row.energy_j),
            percent(row.slowdown),
            percent(row.saving),
        ]
        notes = [Text(row.note)] if has_notes else []
        table.add_row(Text(row.name), *cells, *notes)
    return table


def frontier_table(
    frontier: Frontier[PipelineProblem], baseline: Execution, plan: Plan | None = None, solve_s: float | None = None
) -> Table:
    """The frontier's ends, the baseline and a plan; what was solved, and how long that took, below."""

    def row(name: str, time_s: float, energy_j: float, note: str = "") -> ComparisonRow:
        return ComparisonRow(
            name, time_s, energy_j, time_s / baseline.iteration_time_s - 1, 1 - energy_j / baseline.energy_j, note
        )

    rows = [
        row("All clocks at maximum", baseline.iteration_time_s, baseline.energy_j, "the baseline"),
        row("Fastest point", frontier.fastest_time_s, float(frontier.energies_j[0])),
        row("Minimum-energy point, T*", frontier.min_energy_time_s, float(frontier.energies_j[-1])),
    ]
    if plan is not None:
        rows.append(row("Plan", plan.iteration_time_s, plan.energy_j, f"within {_gap(plan)} of the proved bound"))
    schedule = frontier.problem.schedule
    table = comparison_table(rows, title=schedule_title(schedule))
    solved = f", solved in {quantity(solve_s, 's', 3)}" if solve_s is not None else ""
    table.caption = (
        f"{frontier.problem.dag.num_instructions:,} instructions, {len(frontier.times_s):,} vertices{solved}; "
        "energy of one GPU per stage"
    )
    return table


def plan_table(plan: Plan) -> Table:
    """Each stage of a plan: clocks of each kind, how long it works, what it costs; the promise below."""
    kinds = [kind for kind in Kind if any(p.instruction.kind is kind for order in plan.stages for p in order)]
    energies_j = [sum(p.energy_j for p in order) for order in plan.stages]
    energy = Scale.of(energies_j, "J")
    columns = [f"{_words(kind)} [MHz]" for kind in kinds]
    table = _table(
        schedule_title(plan.schedule), "Stage", *columns, "Clock changes", "Working", f"Energy, working [{energy.unit}]"
    )
    for stage, (order, energy_j) in enumerate(zip(plan.stages, energies_j, strict=True)):
        changes = changes_per_iteration([p.clock_mhz for p in order])
        working = sum(p.duration_s for p in order) / plan.iteration_time_s
        clocks = [_clock_range(order, kind) for kind in kinds]
        table.add_row(str(stage), *clocks, str(changes), percent(working, 1), energy.number(energy_j))
    table.caption = (
        f"{quantity(plan.iteration_time_s, 's')} (slowdown {percent(plan.slowdown)}), {quantity(plan.energy_j, 'J')} "
        f"with waiting (saving {percent(plan.saving)}), within {_gap(plan)} of the proved bound"
    )
    if not plan.switching.is_free:
        table.caption += (
            f"; {_GRANULARITY[plan.granularity]}, if clocks changed at once {percent(plan.lost_to_switching)} more"
        )
    return table


_GRANULARITY = {
    Granularity.STAGE: "one clock for each stage",
    Granularity.PHASE: "clocks by phases of the iteration",
    Granularity.INSTRUCTION: "clocks by instructions",
}


def _table(title: str | None, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", header_style="bold")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(Text(name), justify="right")  # Text: [s] is a unit, no markup
    return table


def _clock_range(order: Iterable[PlannedInstruction], kind: Kind) -> str:
    clocks = {p.clock_mhz for p in order if p.instruction.kind is kind}
    if not clocks:
        return NONE
    lowest, highest = min(clocks), max(clocks)
    return str(lowest) if lowest == highest else f"{lowest}–{highest}"


def _words(kind: Kind) -> str:
    return kind.value.replace("_", " ").capitalize()


def _gap(plan: Plan) -> str:
    return percent(max(plan.gap, 0.0))
