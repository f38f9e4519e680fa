"""Tables say the numbers with their units, aligned, and a dash where there is none."""

from __future__ import annotations

from rich.console import Console

from perseus_core.planning.baselines import all_max
from perseus_core.report.tables import ComparisonRow, comparison_table, frontier_table, plan_table


def text(table):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(table)
    return console.export_text()


def test_columns_have_one_unit_and_dashes():
    """Joules in thousands become kJ for the whole column; what is not known is a dash."""
    shown = text(
        comparison_table(
            [ComparisonRow("A", 2.8368, 7338.7, 0.0, 0.0), ComparisonRow("B [x]", 2.9, None, -0.00001, None)]
        )
    )
    assert "Time [s]" in shown
    assert "Energy [kJ]" in shown
    assert "7.339" in shown
    assert "2.837" in shown
    assert "B [x]" in shown
    assert "—" in shown
    assert "−0.00" not in shown


def test_notes_only_where_there_are_some():
    """The column of notes is there when somebody has one."""
    assert "Note" not in text(comparison_table([ComparisonRow("A", 1.0, 1.0, 0.0, 0.0)]))
    assert "as printed" in text(comparison_table([ComparisonRow("A", 1.0, 1.0, 0.0, 0.0, "as printed")]))


def test_frontier_table_names_both_ends(frontier, plan):
    """The fastest point, T*, the baseline and the plan, with what was solved below."""
    shown = text(frontier_table(frontier, all_max(frontier.problem), plan, 0.0123))
    for words in ("Fastest point", "T*", "All clocks at maximum", "Plan", "16 instructions", "12.3 ms"):
        assert words in shown


def test_plan_table_shows_the_clocks_of_each_stage(plan):
    """For each stage the range of its clocks, by kind."""
    shown = text(plan_table(plan))
    assert "Forward [MHz]" in shown
    assert "Backward [MHz]" in shown
    for stage, order in enumerate(plan.clocks_mhz):
        (line,) = (row for row in shown.splitlines() if row.startswith(f"│ {stage} "))
        assert str(max(order)) in line
