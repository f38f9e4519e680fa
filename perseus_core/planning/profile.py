"""Profiles: the measured time and energy of every instruction type at every clock, and the CSV file that holds them."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from perseus_core.errors import InputError
from perseus_core.files import write_text
from perseus_core.planning.schedule import InstructionType, Kind

# A profile of 1000 stages, 4 kinds and 100 clocks is some 30 MB. Whatever is larger is not a profile.
MAX_FILE_BYTES = 64 * 2**20

# What one GPU draws while it computes, in any case.
_LEAST_POWER_W, _MOST_POWER_W = 5.0, 20_000.0
_REQUIRED_COLUMNS = ("stage", "instruction", "frequency", "time", "energy")
_OPTIONAL_COLUMNS = ("chunk", "samples", "time_std", "energy_std")


@dataclass(frozen=True)
class Measurement:
    """Time and energy of one instruction type at one clock, on one GPU of its stage.

    Attributes:
        type: stage, chunk and kind.
        clock_mhz: SM clock.
        time_s: duration, mean of `samples`.
        energy_j: energy of one GPU during that time, mean of `samples`.
        samples: how many executions the means are made of.
        time_std_s: standard deviation of one execution's time, where known.
        energy_std_j: standard deviation of one execution's energy, where known.

    Raises:
        InputError: if a number is not positive and finite (a standard deviation may be 0).
    """

    type: InstructionType
    clock_mhz: int
    time_s: float
    energy_j: float
    samples: int = 1
    time_std_s: float | None = None
    energy_std_j: float | None = None

    def __post_init__(self) -> None:
        for column, value in (("time", self.time_s), ("energy", self.energy_j)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{column} is {value}; it must be a finite number above 0")
        for column, value in (("frequency", self.clock_mhz), ("samples", self.samples)):
            if value < 1:
                raise InputError(f"{column} is {value}; it must be 1 or more")
        for column, deviation in (("time_std", self.time_std_s), ("energy_std", self.energy_std_j)):
            if deviation is not None and not (math.isfinite(deviation) and deviation >= 0):
                raise InputError(f"{column} is {deviation}; it must be a finite number, 0 or more")


@dataclass(frozen=True)
class Profile:
    """All measurements of one job.

    Attributes:
        measurements: sorted by type, then from the highest clock down.

    Raises:
        InputError: if there is none, a stage or kind is missing, or two measurements of one type and clock contradict.
    """

    measurements: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        if not self.measurements:
            raise InputError("profile has no measurement; it needs at least one clock for each stage and instruction")
        kept: dict[tuple[InstructionType, int], Measurement] = {}
        for m in self.measurements:
            known = kept.setdefault((m.type, m.clock_mhz), m)
            if known != m:
                raise InputError(
                    f"{m.type} at {m.clock_mhz} MHz is given twice with different values (time {known.time_s} and "
                    f"{m.time_s} s, energy {known.energy_j} and {m.energy_j} J); keep one, or their mean"
                )
        ordered = sorted(kept.values(), key=lambda m: (m.type, -m.clock_mhz))
        object.__setattr__(self, "measurements", tuple(ordered))
        _require_complete({m.type for m in ordered})

    @property
    def types(self) -> tuple[InstructionType, ...]:
        """Every instruction type measured, sorted."""
        return tuple(self._by_type)

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return self.types[-1].stage + 1

    @property
    def num_chunks(self) -> int:
        """Number of model chunks per stage."""
        return max(t.chunk for t in self.types) + 1

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of instruction measured."""
        return frozenset(t.kind for t in self.types)

    def missing_at_top(self) -> tuple[tuple[InstructionType, int], ...]:
        """Types that were not measured at the highest clock of their stage, with that clock.

        A stage has GPUs of one kind; another one may have others, and so another highest clock.
        """
        highest: dict[int, int] = {}
        for m in self.measurements:
            highest[m.type.stage] = max(m.clock_mhz, highest.get(m.type.stage, 0))
        return tuple((t, highest[t.stage]) for t in self.types if self.of(t)[0].clock_mhz < highest[t.stage])

    def with_filled_top(self) -> Profile:
        """The same with an estimate for each type that was not measured at the highest clock of its stage.

        From the highest clock where it was measured it changes as the stage's other types do on average.
        """
        filled = list(self.measurements)
        for missing, top_mhz in self.missing_at_top():
            last = self.of(missing)[0]
            others = [{m.clock_mhz: m for m in self.of(t)} for t in self.types if t.stage == missing.stage]
            changes = [
                (of[top_mhz].time_s / of[last.clock_mhz].time_s, of[top_mhz].energy_j / of[last.clock_mhz].energy_j)
                for of in others
                if {top_mhz, last.clock_mhz} <= set(of)
            ]
            if not changes:
                raise InputError(
                    f"{missing} cannot be estimated at {top_mhz} MHz: no other instruction of its stage was measured "
                    f"there and at {last.clock_mhz} MHz; measure it"
                )
            of_time, of_energy = (statistics.fmean(column) for column in zip(*changes, strict=True))
            filled.append(Measurement(missing, top_mhz, last.time_s * of_time, last.energy_j * of_energy))
        return Profile(tuple(filled))

    def of(self, instruction_type: InstructionType) -> tuple[Measurement, ...]:
        """Measurements of one type, from the highest clock down.

        Raises:
            InputError: if the type was not measured.
        """
        try:
            return self._by_type[instruction_type]
        except KeyError:
            raise InputError(
                f"profile has no measurement of {instruction_type}; it has stages 0 to {self.num_stages - 1}, "
                f"{self.num_chunks} chunk(s) and {', '.join(sorted(self.kinds))}"
            ) from None

    def divided_into_chunks(self, num_chunks: int) -> Profile:
        """A profile of `num_chunks` equal chunks from one of whole stages: an estimate until chunks are measured."""
        if self.num_chunks != 1:
            raise InputError(f"profile already has {self.num_chunks} chunks; it cannot be divided into {num_chunks}")
        return Profile(
            tuple(
                _share(m, m.type._replace(chunk=chunk), 1 / num_chunks)
                for m in self.measurements
                for chunk in range(num_chunks)
            )
        )

    def with_split_backward(self, input_share: float = 0.5) -> Profile:
        """Splits `backward` into `backward_input` and `backward_weight`: an estimate until they are measured.

        In a transformer layer both are one matrix product for each of the forward's, hence the default of a half
        (Qi et al., ICLR 2024, table 1, leaving attention aside).
        """
        if not 0 < input_share < 1:
            raise InputError(f"input_share is {input_share}; it must lie between 0 and 1")
        shares = {Kind.BACKWARD_INPUT: input_share, Kind.BACKWARD_WEIGHT: 1 - input_share}
        return Profile(
            tuple(
                part
                for m in self.measurements
                for part in (
                    [_share(m, m.type._replace(kind=kind), share) for kind, share in shares.items()]
                    if m.type.kind is Kind.BACKWARD
                    else [m]
                )
            )
        )

    def with_fused_passes(self) -> Profile:
        """The same with a `forward_backward` for every chunk that has none: an estimate until they are measured.

        It takes the time and energy of the chunk's forward and backward one after the other.
        """
        fused = [
            Measurement(
                fused_type,
                backward.clock_mhz,
                forward.time_s + backward.time_s,
                forward.energy_j + backward.energy_j,
            )
            for t in self.types
            if t.kind is Kind.BACKWARD and (fused_type := t._replace(kind=Kind.FORWARD_BACKWARD)) not in self._by_type
            for backward in self.of(t)
            for forward in self._by_type.get(t._replace(kind=Kind.FORWARD), ())
            if forward.clock_mhz == backward.clock_mhz
        ]
        return Profile((*self.measurements, *fused))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a profile CSV: `stage,instruction,frequency,time,energy` [+ `chunk,samples,time_std,energy_std`].

        Units are MHz, seconds and joules of one GPU.

        Raises:
            InputError: naming the file, the line, the column and the value that cannot be.
        """
        path = Path(path)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a profile CSV") from None
        if size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: {size / 2**20:.0f} MiB is no profile (limit {MAX_FILE_BYTES // 2**20} MiB); "
                "give one row per stage, instruction and clock, averaged over executions"
            )
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                measurements = tuple(_read_rows(path, csv.reader(file)))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: is not a readable CSV text file ({error})") from None
        try:
            profile = cls(measurements)
            _refuse_other_units(profile)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return profile

    def save(self, path: str | Path) -> None:
        """Writes the CSV that `load` reads, with the optional columns that hold something."""
        optional = {
            "chunk": self.num_chunks > 1,
            "samples": any(m.samples != 1 for m in self.measurements),
            "time_std": any(m.time_std_s is not None for m in self.measurements),
            "energy_std": any(m.energy_std_j is not None for m in self.measurements),
        }
        columns = [*_REQUIRED_COLUMNS, *(column for column in _OPTIONAL_COLUMNS if optional[column])]
        lines = [",".join(columns)]
        for m in self.measurements:
            row = {
                "stage": m.type.stage,
                "instruction": m.type.kind.value,
                "frequency": m.clock_mhz,
                "time": m.time_s,
                "energy": m.energy_j,
                "chunk": m.type.chunk,
                "samples": m.samples,
                "time_std": "" if m.time_std_s is None else m.time_std_s,
                "energy_std": "" if m.energy_std_j is None else m.energy_std_j,
            }
            lines.append(",".join(str(row[column]) for column in columns))
        write_text(path, "\n".join(lines) + "\n")

    @cached_property
    def _by_type(self) -> dict[InstructionType, tuple[Measurement, ...]]:
        grouped: dict[InstructionType, list[Measurement]] = {}
        for m in self.measurements:
            grouped.setdefault(m.type, []).append(m)
        return {t: tuple(of_type) for t, of_type in grouped.items()}


def _share(m: Measurement, new_type: InstructionType, share: float) -> Measurement:
    return replace(
        m,
        type=new_type,
        time_s=m.time_s * share,
        energy_j=m.energy_j * share,
        time_std_s=None if m.time_std_s is None else m.time_std_s * share,
        energy_std_j=None if m.energy_std_j is None else m.energy_std_j * share,
    )


def _require_complete(types: set[InstructionType]) -> None:
    """Every stage from 0 on has every chunk, and every chunk every kind, that any other has."""
    num_stages = max(t.stage for t in types) + 1
    num_chunks = max(t.chunk for t in types) + 1
    present = {(t.stage, t.chunk) for t in types}
    if num_stages * num_chunks > len(present):
        # Looked for lazily: a stage number may be a typing error of nine digits.
        stage, chunk = next(
            place for place in ((s, c) for s in range(num_stages) for c in range(num_chunks)) if place not in present
        )
        where = f"stage {stage}" + (f", chunk {chunk}" if num_chunks > 1 else "")
        raise InputError(
            f"profile has no {where}, but has stage {num_stages - 1}; stages are numbered from 0 without gaps"
        )
    kinds = {t.kind for t in types}
    if Kind.FORWARD_BACKWARD in kinds:
        return  # then which passes run alone, and which in pairs, differs from stage to stage
    for kind in sorted(kinds):
        for stage in range(num_stages):
            for chunk in range(num_chunks):
                needed = InstructionType(stage, chunk, kind)
                if needed not in types:
                    raise InputError(
                        f"profile has no {needed}, though other stages have it; measure it at one clock at least"
                    )


def _read_rows(path: Path, rows: Iterable[list[str]]) -> Iterable[Measurement]:
    lines = enumerate(rows, start=1)
    header = [name.strip() for name in next(lines, (1, []))[1]]
    if not header:
        raise InputError(f"{path}: is empty; its first line must be {','.join(_REQUIRED_COLUMNS)}")
    _require_header(path, header)
    for number, row in lines:
        if not any(field.strip() for field in row):
            continue
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {number}: has {len(row)} fields, the header {len(header)}; give one per column"
            )
        try:
            yield _measurement(dict(zip(header, (field.strip() for field in row), strict=True)))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None


def _require_header(path: Path, header: Sequence[str]) -> None:
    if len(header) == 1 and ";" in header[0]:
        raise InputError(
            f"{path}, line 1: columns are separated by semicolons; export it with commas between columns and points in "
            "numbers"
        )
    for column in header:
        if header.count(column) > 1:
            raise InputError(f'{path}, line 1: there are {header.count(column)} columns "{column}"; leave one')
    for column in _REQUIRED_COLUMNS:
        if column not in header:
            raise InputError(
                f'{path}, line 1: column "{column}" is missing; the columns are {",".join(_REQUIRED_COLUMNS)} '
                f"and optionally {','.join(_OPTIONAL_COLUMNS)}"
            )


def _refuse_other_units(profile: Profile) -> None:
    """Energy over time is the power of one GPU at work: tens to some thousand watts, whatever the GPU."""
    power_w = statistics.median(m.energy_j / m.time_s for m in profile.measurements)
    if power_w < _LEAST_POWER_W:
        units = "times look like milliseconds" if power_w * 1000 >= _LEAST_POWER_W else "times look like microseconds"
    elif power_w > _MOST_POWER_W:
        units = "energies look like millijoules"
    else:
        return
    raise InputError(
        f"energy over time is {power_w:.3g} W, and no GPU at work draws that: {units}; give seconds, and joules of one "
        "GPU"
    )


def _measurement(row: dict[str, str]) -> Measurement:
    def integer(column: str, default: str | None = None) -> int:
        text = row.get(column) or default or row[column]
        try:
            number = float(text)
            if number != int(number):
                raise ValueError
        except (ValueError, OverflowError):
            raise InputError(f'column "{column}" is {text!r}; it must be a whole number') from None
        return int(number)

    def number(column: str) -> float:
        try:
            return float(row[column])
        except ValueError:
            raise InputError(f'column "{column}" is {row[column]!r}; it must be a number') from None

    try:
        kind = Kind(row["instruction"])
    except ValueError:
        known = ", ".join(kind.value for kind in Kind)
        raise InputError(f'column "instruction" is {row["instruction"]!r}; it must be one of {known}') from None
    stage, chunk = integer("stage"), integer("chunk", "0")
    for column, index in (("stage", stage), ("chunk", chunk)):
        if index < 0:
            raise InputError(f'column "{column}" is {index}; it is counted from 0')
    return Measurement(
        InstructionType(stage, chunk, kind),
        integer("frequency"),
        number("time"),
        number("energy"),
        integer("samples", "1"),
        number("time_std") if row.get("time_std") else None,
        number("energy_std") if row.get("energy_std") else None,
    )
