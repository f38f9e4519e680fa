"""`frontier.json`: a solved pipeline, small, complete, and ready to hand out plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from perseus_core.documents import Fields, load_document, pack, rows, save_document
from perseus_core.errors import InputError
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import Instruction, InstructionType, Kind, Placement, Schedule

FORMAT = "perseus-frontier"
VERSION = 1

T = TypeVar("T")


def save_frontier(frontier: Frontier[PipelineProblem], path: str | Path) -> None:
    """Writes the frontier with the problem it belongs to.

    From one stored vertex to the next most positions stay on their knots, so the differences pack well.
    """
    problem, schedule = frontier.problem, frontier.problem.schedule
    bits = frontier.positions.view(np.int32)
    deltas = np.diff(bits, axis=0, prepend=np.zeros_like(bits[:1]))
    save_document(
        path,
        FORMAT,
        VERSION,
        {
            "schedule": schedule_fields(schedule),
            "blocking_power_w": list(problem.stage_blocking_power_w),
            "transfer_latency_s": problem.transfer_latency_s,
            "gap_s": problem.gap_s,
            "outside_time_s": problem.outside_time_s,
            "outside_energy_j": problem.outside_energy_j,
            "measurements": [
                [t.stage, t.chunk, t.kind.value, m.clock_mhz, m.time_s, m.energy_j]
                for t, of_type in zip(problem.types, problem.measurements, strict=True)
                for m in of_type
            ],
            "times_s": frontier.times_s.tolist(),
            "energies_j": frontier.energies_j.tolist(),
            "stored": frontier.stored.tolist(),
            "positions": pack(deltas.T.astype(np.int32)),
        },
    )


def load_frontier(path: str | Path) -> Frontier[PipelineProblem]:
    """Reads a frontier.

    Raises:
        InputError: naming the file, the field and the value that cannot be.
    """
    fields = load_document(path, FORMAT, VERSION)
    problem = _named(fields.where, lambda: _problem(fields))
    times_s, energies_j = np.array(fields.numbers("times_s")), np.array(fields.numbers("energies_j"))
    stored = np.array(fields.numbers("stored"), np.int64)
    if not (times_s.size and times_s.shape == energies_j.shape and (np.diff(times_s) > 0).all()):
        raise fields.error("times_s", times_s.tolist(), "must rise, with one energy for each time")
    if not (np.diff(energies_j) <= 0).all():
        raise fields.error("energies_j", energies_j.tolist(), "must not rise")
    in_order = stored.size and stored[0] == 0 and stored[-1] == times_s.size - 1 and (np.diff(stored) > 0).all()
    if not in_order:
        raise fields.error("stored", stored.tolist(), f"must rise from 0 to {times_s.size - 1}")
    num_instructions = problem.dag.num_instructions
    deltas = fields.array("positions", np.int32, (num_instructions, stored.size)).T
    positions = np.ascontiguousarray(np.cumsum(deltas, axis=0, dtype=np.int32)).view(np.float32)
    last_knot = np.array([len(curve.hull) - 1 for curve in problem.curves])[problem.curve_of]
    if not ((positions >= 0) & (positions <= last_knot)).all():
        raise fields.error("positions", fields.text("positions"), "must lie on the tradeoff curves")
    return Frontier(problem, times_s, energies_j, stored, positions)


def schedule_fields(schedule: Schedule) -> dict[str, object]:
    """The schedule as JSON: for each stage rows of kind, chunk, microbatch; waits as numbers of instructions."""
    place = {instruction: number for number, instruction in enumerate(schedule.instructions)}
    return {
        "name": schedule.name,
        "num_chunks": schedule.num_chunks,
        "num_microbatches": schedule.num_microbatches,
        "stages": [[[i.kind.value, i.chunk, i.microbatch] for i in order] for order in schedule.stages],
        "waits": [[place[before], place[after]] for before, after in schedule.waits],
        "placement": schedule.placement.value,
    }


def read_schedule(fields: Fields) -> Schedule:
    """The schedule that `schedule_fields` wrote."""
    stages = []
    for stage, order in enumerate(fields.items("stages")):
        in_order = rows(Fields(f"{fields.where}, stage {stage}", {"stages": order}), "stages", (str, int, int))
        stages.append(tuple(Instruction(stage, c, m, _kind(fields, k)) for k, c, m in in_order))
    chunks, microbatches = fields.integer("num_chunks", at_least=1), fields.integer("num_microbatches", at_least=1)
    instructions = [i for order in stages for i in order]
    waits = rows(fields, "waits", (int, int))
    for pair in waits:
        if not all(0 <= number < len(instructions) for number in pair):
            raise fields.error("waits", pair, f"must hold numbers of instructions, 0 to {len(instructions) - 1}")
    return _named(
        fields.where,
        lambda: Schedule(
            fields.text("name"),
            chunks,
            microbatches,
            tuple(stages),
            tuple((instructions[before], instructions[after]) for before, after in waits),
            fields.choice("placement", Placement),
        ),
    )


def _problem(fields: Fields) -> PipelineProblem:
    measured = rows(fields, "measurements", (int, int, str, int, float, float))
    profile = Profile(
        tuple(
            Measurement(InstructionType(stage, chunk, _kind(fields, kind)), clock_mhz, time_s, energy_j)
            for stage, chunk, kind, clock_mhz, time_s, energy_j in measured
        )
    )
    return PipelineProblem.of(
        profile,
        read_schedule(fields.section("schedule")),
        fields.numbers("blocking_power_w"),
        transfer_latency_s=fields.number("transfer_latency_s", at_least=0),
        gap_s=fields.number("gap_s", at_least=0),
        outside_time_s=fields.number("outside_time_s", at_least=0),
        outside_energy_j=fields.number("outside_energy_j", at_least=0),
    )


def _kind(fields: Fields, name: str) -> Kind:
    try:
        return Kind(name)
    except ValueError:
        raise fields.error("kind", name, f"must be one of {', '.join(Kind)}") from None


def _named(where: str, make: Callable[[], T]) -> T:
    """Runs `make`; what it refuses is refused in the name of the file."""
    try:
        return make()
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(where) else f"{where}: {message}") from None
