"""What the ranks send to rank 0 when measurements are collected, and what it makes of all of it at once.

A report is a number of rows of one width, the first of which says whose it is, so reports can be appended to each other
in any order. Rank 0 reads those of many thousand ranks as arrays: no step of it is taken for each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.planning.schedule import InstructionType
from perseus_core.planning.switching import NOTHING_SEEN, SeenChanges
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.recorder import Step
from perseus_core.runtime.measure.stage_gpu import UNKNOWN_GPU, StageGpu, kind_of_all
from perseus_core.runtime.measure.stage_measurements import (
    CLOCK_ROW,
    INSTRUCTION_ROW,
    KINDS,
    StageMeasurements,
    SweepRows,
    by_type_and_clock,
)
from perseus_core.runtime.measure.stretch import Stretch
from perseus_core.runtime.replan.correction import Stretches
from perseus_core.runtime.replan.packed_steps import PACKED_STEP, pack_steps, unpack_steps

# An instruction that ran so rarely says nothing.
_MIN_EXECUTIONS = 4
_STEPS_IN_A_ROW = 5
_CLOCKS_IN_A_ROW = 9
_MAGIC = int.from_bytes(b"PRS1", "little")


class _Row(IntEnum):
    """What a row holds: its first byte."""

    REPORT = 1
    """Whose rows follow, and how many the report has with this one."""
    CLOCK = 2
    """One clock of the sweep; the instructions measured at it follow."""
    INSTRUCTION = 3
    STRETCH = 4
    TRACED = 5
    """The next few steps of the order that was executed."""
    GPU = 6
    """What the GPU is, and the next few of the clocks that it supports."""


_COLUMNS: Mapping[_Row, np.dtype[Any]] = {
    _Row.REPORT: np.dtype(
        [
            *(("magic", "<u4"), ("rank", "<u4"), ("num_rows", "<u4"), ("pipeline_time_s", "<f4"), ("stage", "<u2")),
            *(("up_s", "<f2"), ("down_s", "<f2"), ("call_s", "<f2")),
        ]
    ),
    _Row.GPU: np.dtype([("gpu_kind", "<u4"), ("num_clocks", "<u2"), ("clocks_mhz", "<u2", (_CLOCKS_IN_A_ROW,))]),
    _Row.CLOCK: CLOCK_ROW,
    _Row.INSTRUCTION: INSTRUCTION_ROW,
    _Row.STRETCH: np.dtype(
        [
            *(("chunk", "<u2"), ("kind", "<u2"), ("clock_mhz", "<u2"), ("held_down", "<u2")),
            *(("executions", "<u4"), ("factor", "<f4")),
        ]
    ),
    _Row.TRACED: np.dtype([("num_steps", "<u4"), ("steps", PACKED_STEP, (_STEPS_IN_A_ROW,))]),
}
_ROW_BYTES = 4 + max(columns.itemsize for columns in _COLUMNS.values())


def _whole_row(columns: np.dtype[Any]) -> np.dtype[Any]:
    """A row with these columns after the byte that says what it holds."""
    fields: Mapping[str, tuple[Any, ...]] = columns.fields or {}
    return np.dtype(
        {
            "names": ["holds", *fields],
            "formats": ["u1", *(columns[name] for name in fields)],
            "offsets": [0, *(4 + fields[name][1] for name in fields)],
            "itemsize": _ROW_BYTES,
        }
    )


_DTYPES = {holds: _whole_row(columns) for holds, columns in _COLUMNS.items()}


@dataclass(frozen=True)
class RankReport:
    """One rank's share of what is collected.

    Attributes:
        rank: of the job.
        measurements: of its stage, by its sweep; without clocks if it made none.
        stretches: how much longer than planned instructions took under the plan that runs.
        traced: what it executed, if that is not what its schedule says.
        pipeline_time_s: from its first instruction's begin to its last one's end in an iteration of the baseline.
        changes: what changes of clock were seen to take on its GPU.
        gpu: its own; clocks where this rank speaks for its stage.
    """

    rank: int
    measurements: StageMeasurements
    stretches: tuple[Stretch, ...] = ()
    traced: tuple[Step, ...] = ()
    pipeline_time_s: float = 0.0
    changes: SeenChanges = NOTHING_SEEN
    gpu: StageGpu = UNKNOWN_GPU

    def encode(self) -> bytes:
        """As bytes, which may be appended to those of other ranks.

        Raises:
            InputError: if the traced order has more chunks or microbatches than can be sent.
        """
        sweep = SweepRows.of([self.measurements])
        stretches = np.array(
            [
                (s.type.chunk, KINDS.index(s.type.kind), s.clock_mhz, s.held_down, s.executions, s.factor)
                for s in self.stretches
            ],
            _COLUMNS[_Row.STRETCH],
        )
        content = [
            _encoded(_Row.GPU, _gpu_rows(self.gpu)),
            _encoded(_Row.STRETCH, stretches),
            _encoded(_Row.TRACED, _traced_rows(self.traced)),
        ]
        for place in range(len(sweep.clocks)):
            content.append(_encoded(_Row.CLOCK, sweep.clocks[place : place + 1]))
            content.append(_encoded(_Row.INSTRUCTION, sweep.instructions[sweep.clock_of_instruction == place]))
        num_rows = 1 + sum(map(len, content)) // _ROW_BYTES
        stage = self.measurements.stage
        head = (_MAGIC, self.rank, num_rows, self.pipeline_time_s, stage, *astuple(self.changes))
        return b"".join([_encoded(_Row.REPORT, np.array([head], _COLUMNS[_Row.REPORT])), *content])


@dataclass(frozen=True, eq=False)
class JobReport:
    """The reports of all ranks.

    Attributes:
        num_ranks: how many ranks have reported.
        sweeps: what their sweeps have found.
        stretches: of what ran under the plan: of a stage's ranks the slowest, and nothing that ran a few times only.
        traced: what a stage executed, for those where some rank found that it is not what the schedule says.
        pipeline_time_s: of the rank with the longest one: a stage that begins first and ends last sees all of the
            pipeline.
        changes: what changes of clock were seen to take, on the GPU where they take longest.
        gpus: of each stage.
    """

    num_ranks: int
    sweeps: SweepRows
    stretches: Stretches
    traced: Mapping[int, tuple[Step, ...]]
    pipeline_time_s: float
    changes: SeenChanges
    gpus: tuple[StageGpu, ...]

    @classmethod
    def decode(cls, contents: Sequence[bytes]) -> JobReport:
        """From the bytes that ranks made by `RankReport.encode`; of two reports of one rank the first counts.

        Args:
            contents: each holds the reports of any number of ranks, one after another.

        Raises:
            InputError: if that is not what they hold.
        """
        rows = _ReportRows.of(contents)
        return cls(
            len(rows.reports),
            rows.sweeps(),
            rows.usual_stretches(),
            rows.traced(),
            float(rows.reports["pipeline_time_s"].max()),
            SeenChanges(*(float(rows.reports[name].max()) for name in ("up_s", "down_s", "call_s"))),
            rows.gpus(),
        )

    @property
    def num_stages(self) -> int:
        """How many stages have reported."""
        return int(self.sweeps.stages.max()) + 1


@dataclass(frozen=True, eq=False)
class _ReportRows:
    """The rows of many reports.

    Attributes:
        content: all rows' bytes.
        holds: what each row holds, shape (rows,).
        reports: one `_Row.REPORT` for each report.
        report_of_row: a place in `reports`, shape (rows,).
    """

    content: bytes
    holds: NDArray[np.uint8]
    reports: NDArray[Any]
    report_of_row: NDArray[np.int64]

    @classmethod
    def of(cls, contents: Sequence[bytes]) -> _ReportRows:
        """Finds the reports, and leaves out those of ranks that have reported before."""
        for content in contents:
            if len(content) % _ROW_BYTES:
                raise _malformed(f"reports of {len(content)} bytes are not whole rows of {_ROW_BYTES} bytes")
        rows = cls._divided(b"".join(contents))
        _, first = np.unique(rows.reports["rank"], return_index=True)
        if len(first) == len(rows.reports):
            return rows
        is_kept = np.isin(np.arange(len(rows.reports)), first)[rows.report_of_row]
        table = np.frombuffer(rows.content, np.uint8).reshape(-1, _ROW_BYTES)
        return cls._divided(table[is_kept].tobytes())

    @classmethod
    def _divided(cls, content: bytes) -> _ReportRows:
        holds = np.frombuffer(content, np.uint8)[::_ROW_BYTES]
        begins = np.flatnonzero(holds == _Row.REPORT)
        reports = np.frombuffer(content, _DTYPES[_Row.REPORT])[begins]
        if not len(begins) or begins[0] != 0 or (reports["magic"] != _MAGIC).any():
            raise _malformed("what was collected does not begin with a report")
        num_rows = np.diff(begins, append=len(holds))
        rows = cls(content, holds, reports, np.repeat(np.arange(len(reports)), num_rows))
        rows._refuse_rows(num_rows != reports["num_rows"], np.arange(len(reports)), "is not whole")
        rows._refuse_rows((holds == 0) | (holds > max(_Row)), rows.report_of_row, "has a row of unknown kind")
        return rows

    def of_kind(self, holds: _Row) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The rows that hold one kind of thing, and the report of each."""
        places = np.flatnonzero(self.holds == holds)
        rows, report = np.frombuffer(self.content, _DTYPES[holds])[places], self.report_of_row[places]
        for name in rows.dtype.names or ():
            if rows.dtype[name].kind == "f":
                self._refuse_rows(~np.isfinite(rows[name]), report, f"has a {name} that is not finite")
            elif name == "kind":
                self._refuse_rows(rows["kind"] >= len(KINDS), report, "has an instruction of unknown kind")
        return rows, report

    def sweeps(self) -> SweepRows:
        """What `merge` takes."""
        clocks, report_of_clock = self.of_kind(_Row.CLOCK)
        instructions, report_of_instruction = self.of_kind(_Row.INSTRUCTION)
        clock_of_row = np.cumsum(self.holds == _Row.CLOCK) - 1
        clock_of_instruction = clock_of_row[self.holds == _Row.INSTRUCTION]
        report_of_their_clock = np.append(report_of_clock, -1)[clock_of_instruction]
        self._refuse_rows(
            report_of_their_clock != report_of_instruction, report_of_instruction, "has an instruction without a clock"
        )
        return SweepRows(
            self.reports["stage"].astype(np.int64), clocks, report_of_clock, instructions, clock_of_instruction
        )

    def usual_stretches(self) -> Stretches:
        """Of a stage's ranks the slowest counts, and what ran a few times only does not."""
        rows, report = self.of_kind(_Row.STRETCH)
        often = rows["executions"] >= _MIN_EXECUTIONS
        rows, stage = rows[often], self.reports["stage"][report[often]]
        order, begins = by_type_and_clock(stage, rows["chunk"], rows["kind"], rows["clock_mhz"], rows["factor"])
        slowest = order[begins]
        found = [
            Stretch(InstructionType(stage, chunk, KINDS[kind]), clock_mhz, factor, executions, bool(held_down))
            for stage, (_, chunk, kind, clock_mhz, held_down, executions, factor) in zip(
                stage[slowest].tolist(), rows[slowest].tolist(), strict=True
            )
        ]
        return {(stretch.type, stretch.clock_mhz): stretch for stretch in found}

    def gpus(self) -> tuple[StageGpu, ...]:
        """Of each stage; its clocks are those that the first of its ranks tells which tells any."""
        rows, report = self.of_kind(_Row.GPU)
        stage_of_row = self.reports["stage"][report]
        gpus = []
        for stage in range(int(self.reports["stage"].max()) + 1):
            of_stage = stage_of_row == stage
            told = of_stage & (rows["num_clocks"] > 0)
            of_first = rows[told & (report == report[told.argmax()])] if told.any() else rows[:0]
            is_clock = np.arange(_CLOCKS_IN_A_ROW) < of_first["num_clocks"][:, None]
            clocks_mhz = tuple(of_first["clocks_mhz"][is_clock].tolist())
            gpus.append(StageGpu(kind_of_all(rows["gpu_kind"][of_stage].tolist() or [0]), clocks_mhz))
        return tuple(gpus)

    def traced(self) -> dict[int, tuple[Step, ...]]:
        """For each stage what the first of its ranks executed that says so."""
        rows, report = self.of_kind(_Row.TRACED)
        begins = np.flatnonzero(np.diff(report, prepend=-1))
        ends = np.append(begins[1:], len(rows))
        stages, first = np.unique(self.reports["stage"][report[begins]], return_index=True)
        orders = {}
        for stage, begin, end in zip(stages.tolist(), begins[first], ends[first], strict=True):
            of_rank = rows[begin:end]
            is_step = np.arange(_STEPS_IN_A_ROW) < of_rank["num_steps"][:, None]
            orders[stage] = unpack_steps(of_rank["steps"][is_step])
        return orders

    def _refuse_rows(self, is_wrong: NDArray[np.bool_], report: NDArray[np.int64], what: str) -> None:
        if is_wrong.any():
            raise _malformed(f"the report of rank {self.reports['rank'][report[is_wrong.argmax()]]} {what}")


def _encoded(holds: _Row, content: NDArray[Any]) -> bytes:
    rows = np.zeros(len(content), _DTYPES[holds])
    rows["holds"] = holds
    for name in content.dtype.names or ():
        rows[name] = content[name]
    return rows.tobytes()


def _gpu_rows(gpu: StageGpu) -> NDArray[Any]:
    if gpu == UNKNOWN_GPU:
        return np.zeros(0, _COLUMNS[_Row.GPU])
    clocks_mhz = np.array(gpu.supported_clocks_mhz, "<u2")
    begins = range(0, max(1, len(clocks_mhz)), _CLOCKS_IN_A_ROW)
    rows = np.zeros(len(begins), _COLUMNS[_Row.GPU])
    rows["gpu_kind"] = gpu.kind
    for row, begin in zip(rows, begins, strict=True):
        of_row = clocks_mhz[begin : begin + _CLOCKS_IN_A_ROW]
        row["num_clocks"] = len(of_row)
        row["clocks_mhz"][: len(of_row)] = of_row
    return rows


def _traced_rows(steps: Sequence[Step]) -> NDArray[Any]:
    rows = np.zeros(-(-len(steps) // _STEPS_IN_A_ROW), _COLUMNS[_Row.TRACED])
    padded = np.zeros(len(rows) * _STEPS_IN_A_ROW, PACKED_STEP)
    padded[: len(steps)] = pack_steps(steps)
    rows["steps"] = padded.reshape(-1, _STEPS_IN_A_ROW)
    rows["num_steps"] = np.minimum(len(steps) - _STEPS_IN_A_ROW * np.arange(len(rows)), _STEPS_IN_A_ROW)
    return rows


def _malformed(what: str) -> InputError:
    return InputError(f"{what}; it was cut off, or comes from another version: run the same one on all ranks")


def said_orders(job: Job, num_microbatches: int) -> list[tuple[Step, ...]]:
    """What the framework says that each stage executes; nothing where it has no schedule for so many microbatches."""
    try:
        stages = job.schedule(num_microbatches).stages
    except InputError:
        return []
    return [tuple((i.chunk, i.microbatch, i.kind) for i in order) for order in stages]


def traced_orders(report: JobReport, said: Sequence[tuple[Step, ...]]) -> list[tuple[Step, ...]] | None:
    """What each stage executed, or None where all did as the framework says.

    Args:
        report: of all ranks.
        said: what `said_orders` gives.

    Raises:
        InputError: if neither the framework nor a rank says what a stage executes.
    """
    if not report.traced:
        return None
    known = {**dict(enumerate(said)), **report.traced}
    for stage in range(report.num_stages):
        if stage not in known:
            raise InputError(f"nobody says in which order stage {stage} executes its instructions")
    return [known[stage] for stage in range(report.num_stages)]
