"""What figures, pages and tables say about a schedule and a plan, in the same words."""

from __future__ import annotations

from perseus_core.planning.plan import Plan
from perseus_core.planning.schedule import Schedule
from perseus_core.report.units import percent, quantity

_SCHEDULE_NAMES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved 1F1B", "zb-h1": "ZB-H1"}


def schedule_title(schedule: Schedule) -> str:
    """For example `1F1B, 8 stages × 24 microbatches`."""
    counts = [_count(schedule.num_stages, "stage"), _count(schedule.num_microbatches, "microbatch", "es")]
    if schedule.num_chunks > 1:
        counts.append(_count(schedule.num_chunks, "chunk"))
    return f"{_SCHEDULE_NAMES.get(schedule.name, schedule.name)}, {' × '.join(counts)}"


def time_and_energy(time_s: float, energy_j: float) -> str:
    """For example `2.837 s, 6.169 kJ`."""
    return f"{quantity(time_s, 's')}, {quantity(energy_j, 'J')}"


def plan_heading(plan: Plan) -> str:
    """What a plan promises, and how good it can be at best."""
    return (
        f"{time_and_energy(plan.iteration_time_s, plan.energy_j)};  saving {percent(plan.saving)}, slowdown "
        f"{percent(plan.slowdown)}, within {percent(max(plan.gap, 0.0))} of the proved bound"
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"
