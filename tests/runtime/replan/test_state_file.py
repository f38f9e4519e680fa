"""The session's own checkpoint, where it cannot be read or written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_core.planning.policy import no_slowdown
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.replan.job_planner import JobPlanner, PlannerState
from perseus_core.runtime.replan.state_file import load_state, save_state

from .test_job_planner import measured

KEY = ProfileKey("model", "1f1b", 4, 1, 1, 1, 1, "GPU", 400.0)


@pytest.fixture(scope="module")
def state(own_profile: Profile) -> PlannerState:
    planner = JobPlanner(lambda microbatches: one_f_one_b(4, microbatches), no_slowdown)
    planner.take_measurements(measured(own_profile))
    return planner.state(planner.plan())


def test_what_was_saved_is_loaded(tmp_path: Path, state: PlannerState) -> None:
    """Every number is the same."""
    save_state(tmp_path / "session.json", KEY, state)
    assert load_state(tmp_path / "session.json", KEY) == state


def test_a_first_start_has_no_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And says nothing about it."""
    assert load_state(tmp_path / "session.json", KEY) is None
    assert caplog.records == []


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put_a_folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        put_a_folder_in_its_place,
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text(f"{10**400}"),
        lambda path: change(path, version=1),
        lambda path: change(path, key="of another job"),
        lambda path: change(path, pipeline_time_s=10**400),
        lambda path: change(path, plan="bm90IGEgcGxhbg=="),
        lambda path: change(path, plan="not base 64"),
    ],
)
def test_a_spoilt_file_is_said_and_no_error(
    tmp_path: Path, state: PlannerState, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    """The job starts afresh."""
    path = tmp_path / "session.json"
    save_state(path, KEY, state)
    spoil(path)
    with caplog.at_level(logging.WARNING):
        assert load_state(path, KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_path_of_no_use_is_said_and_no_error(
    tmp_path: Path, state: PlannerState, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the folder should be, and a name that is too long."""
    (tmp_path / "file").write_text("")
    for number, path in enumerate((tmp_path / "file" / "session.json", tmp_path / ("long" * 100))):
        assert load_state(path, KEY) is None
        save_state(path, KEY, state)
        assert len(caplog.records) == 2 * (number + 1)
