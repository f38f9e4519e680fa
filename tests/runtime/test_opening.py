"""Sessions of one rank in this process, where something is missing or strange."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import NoDriver
from perseus_core.planning.schedule import Kind, Schedule, one_f_one_b
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.opening import open_session
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings

QUICK = Settings(enabled=True, warmup_iterations=1, baseline_iterations=2, profile_cache="off")


def _job(schedule: Any = lambda m: one_f_one_b(1, m)) -> Job:
    return Job(0, 1, 1, 0, 1, 0, schedule, ProfileKey("test", "1f1b", 1, 1, 1, 1, 1, "none", 1.0))


def _no_gpu() -> Device:
    raise NoDriver("no NVIDIA driver is loaded; install it")


def _iterate(session: Session | InertSession, count: int, schedule: Schedule) -> None:
    for _ in range(count):
        session.begin_iteration(schedule.num_microbatches)
        for instruction in schedule.stages[0]:
            session.begin_instruction(0, instruction.microbatch, instruction.kind)
            session.end_instruction()
        session.end_iteration()


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_job_that_did_not_ask_for_us_hears_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Not a line."""
    session = open_session(Settings(), _job())
    assert isinstance(session, InertSession)
    _iterate(session, 2, one_f_one_b(1, 2))
    session.close()
    assert caplog.records == []


def test_without_a_gpu_time_is_measured_and_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on."""
    session = open_session(QUICK, _job(), device=_no_gpu)
    _iterate(session, 8, one_f_one_b(1, 2))
    status = session.status()
    session.close()
    assert (status.phase.value, status.baseline_time_s > 0) == ("measure only", True)
    assert [line.startswith("no NVIDIA driver is loaded") for line in _warnings(caplog)] == [True]


def test_an_iteration_left_by_an_exception_and_odd_calls_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """The training's own exceptions are the training's own."""
    session = open_session(QUICK, _job(), device=_no_gpu)
    session.end_iteration()
    session.end_instruction()
    session.begin_iteration(2)
    session.begin_instruction(0, 0, Kind.FORWARD)
    session.begin_iteration(2)
    session.end_instruction()
    session.end_iteration()
    _iterate(session, 8, one_f_one_b(1, 2))
    assert session.status().phase.value == "measure only"
    session.close()
    session.close()


def test_what_fails_while_opening_is_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a session that does nothing."""

    def broken(*_: Any, **__: Any) -> Any:
        raise InputError("the profile cache is a fish")

    monkeypatch.setattr("perseus_core.runtime.opening.Background", broken)
    session = open_session(QUICK, _job(), device=_no_gpu)
    _iterate(session, 2, one_f_one_b(1, 2))
    assert [("is a fish" in line, "training goes on without perseus" in line) for line in _warnings(caplog)] == [
        (True, True)
    ]
