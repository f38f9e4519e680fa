"""The session's own checkpoint: what a restarted job needs to go on with its plan at once."""

from __future__ import annotations

import base64
from pathlib import Path

from perseus_core.documents import Fields, load_document, rows, save_document
from perseus_core.errors import InputError
from perseus_core.planning.frontier_file import read_schedule, schedule_fields
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.runtime.log import logger
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.measure.stage_gpu import StageGpu
from perseus_core.runtime.ranks.order import Baseline
from perseus_core.runtime.replan.job_planner import MeasuredJob, PlannerState
from perseus_core.runtime.replan.plan_message import PlanMessage

_FORMAT = "perseus-session"
_VERSION = 5


def save_state(path: str | Path, key: ProfileKey, state: PlannerState) -> None:
    """Writes the file as a whole or not at all; where that cannot be, one log line says so."""
    baseline = state.job.baseline
    try:
        save_document(
            path,
            _FORMAT,
            _VERSION,
            {
                "key": key.as_text(),
                "baseline": {
                    "num_microbatches": baseline.num_microbatches,
                    "time_s": baseline.time_s,
                    "energy_j": baseline.energy_j,
                },
                "blocking_power_w": list(state.job.blocking_power_w),
                "pipeline_time_s": state.job.pipeline_time_s,
                "gpus": [[gpu.kind, *gpu.supported_clocks_mhz] for gpu in state.job.gpus],
                "measured": _rows(state.job.profile),
                "fitted": _rows(state.fitted),
                "traced": None if state.traced is None else schedule_fields(state.traced),
                "plan": base64.b64encode(state.plan.encode()).decode(),
            },
        )
    except (OSError, ValueError) as error:
        logger.warning("the session's state is not saved, a restarted job will profile again: %s", error)


def load_state(path: str | Path, key: ProfileKey) -> PlannerState | None:
    """What was saved for this job, or None; where a file is of no use, one log line says why."""
    try:
        Path(path).stat()
        fields = load_document(path, _FORMAT, _VERSION)
        if fields.text("key") != key.as_text():
            raise InputError(f"{path}: belongs to a job with another model, layout or GPU")
        baseline = fields.section("baseline")
        return PlannerState(
            MeasuredJob(
                _profile(fields, "measured"),
                tuple(fields.numbers("blocking_power_w")),
                Baseline(
                    baseline.integer("num_microbatches", at_least=1),
                    baseline.number("time_s", at_least=0),
                    baseline.number("energy_j", at_least=0),
                ),
                fields.number("pipeline_time_s", at_least=0),
                _gpus(fields),
            ),
            _profile(fields, "fitted"),
            None if fields.fields.get("traced") is None else read_schedule(fields.section("traced")),
            _plan(fields),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError) as error:
        logger.warning("the session's state is not used, starting afresh: %s", error)
        return None


def _rows(profile: Profile) -> list[list[object]]:
    return [
        [m.type.stage, m.type.chunk, m.type.kind.value, m.clock_mhz, m.time_s, m.energy_j, m.samples]
        for m in profile.measurements
    ]


def _profile(fields: Fields, name: str) -> Profile:
    try:
        return Profile(
            tuple(
                Measurement(InstructionType(stage, chunk, Kind(kind)), clock_mhz, time_s, energy_j, samples)
                for stage, chunk, kind, clock_mhz, time_s, energy_j, samples in rows(
                    fields, name, (int, int, str, int, float, float, int)
                )
            )
        )
    except ValueError as error:
        raise InputError(f"{fields.where}: field {name!r} holds no profile ({error})") from None


def _gpus(fields: Fields) -> tuple[StageGpu, ...]:
    try:
        return tuple(StageGpu(int(kind), tuple(map(int, clocks_mhz))) for kind, *clocks_mhz in fields.items("gpus"))
    except (TypeError, ValueError) as error:
        raise InputError(f'{fields.where}: field "gpus" holds no GPUs ({error}); delete the file') from None


def _plan(fields: Fields) -> PlanMessage:
    try:
        return PlanMessage.decode(base64.b64decode(fields.text("plan"), validate=True))
    except ValueError as error:
        raise InputError(f'{fields.where}: field "plan" holds no plan ({error}); delete the file') from None
