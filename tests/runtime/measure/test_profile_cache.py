"""The file that spares a restarted job the profiling."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from perseus_core.runtime.measure.profile_cache import ProfileCache, ProfileKey
from perseus_core.runtime.measure.stage_measurements import JobMeasurements, StageMeasurements, SweepRows, merge

from .test_stage_measurements import at_clock

KEY = ProfileKey(
    model="5f2c",
    schedule="1f1b",
    num_stages=2,
    num_chunks=1,
    tensor_parallel=1,
    data_parallel=4,
    microbatch_size=8,
    gpu_name="NVIDIA A100-SXM4-80GB",
    power_limit_w=400.0,
    details=(("sequence_length", "2048"), ("precision", "bf16")),
    versions=(("torch", "2.13.0"),),
)


@pytest.fixture
def measurements() -> JobMeasurements:
    clocks = (at_clock(1000, time_s=0.0625), at_clock(900))
    return merge(SweepRows.of(StageMeasurements(stage, clocks) for stage in (0, 1)))


@pytest.fixture
def cache(tmp_path: Path) -> ProfileCache:
    return ProfileCache(tmp_path / "made when needed")


def file_of(cache: ProfileCache, tmp_path: Path) -> Path:
    (path,) = (tmp_path / "made when needed").iterdir()
    return path


def test_what_was_saved_is_loaded(cache: ProfileCache, measurements: JobMeasurements) -> None:
    """Every number is the same."""
    cache.save(KEY, measurements)
    assert cache.load(KEY) == measurements
    assert cache.load(replace(KEY, details=KEY.details[::-1])) == measurements


def test_an_empty_cache_is_a_miss_without_a_word(cache: ProfileCache, caplog: pytest.LogCaptureFixture) -> None:
    """The usual case at the first start."""
    assert cache.load(KEY) is None
    assert caplog.records == []


@pytest.mark.parametrize("name", [field.name for field in fields(ProfileKey)])
def test_whatever_changes_in_the_key_is_a_miss(cache: ProfileCache, measurements: JobMeasurements, name: str) -> None:
    """Every field counts."""
    cache.save(KEY, measurements)
    old: Any = getattr(KEY, name)
    new: Any = old + "x" if isinstance(old, str) else old + 1 if isinstance(old, (int, float)) else ()
    assert cache.load(replace(KEY, **{name: new})) is None


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[]"),
        lambda path: change(path, version=0),
        lambda path: change(path, key="of another job"),
        lambda path: change(path, job={}),
        lambda path: change(path, job=[1]),
        lambda path: path.write_text(path.read_text().replace('"forward"', '"sideways"')),
        lambda path: path.write_text(path.read_text().replace('"forward"', '"backward"')),
        lambda path: path.write_text(path.read_text().replace("0.0625,", '"fast",')),
    ],
)
def test_a_spoilt_file_is_a_miss_with_one_log_line(
    cache: ProfileCache, measurements: JobMeasurements, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    """Cut off, not text, an old version, another job's, impossible values: profiled again, and replaced."""
    cache.save(KEY, measurements)
    spoil(file_of(cache, tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cache.load(KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path) in caplog.text
    cache.save(KEY, measurements)
    assert cache.load(KEY) == measurements


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def under_a_name_that_is_too_long(folder: Path) -> Path:
    return folder / ("long" * 100)


def with_a_folder_for_a_file(folder: Path) -> Path:
    (folder / KEY.file_name()).mkdir()
    return folder


def that_nobody_may_enter(folder: Path) -> Path:
    (folder / "closed").mkdir(mode=0o000)
    return folder / "closed"


@pytest.mark.parametrize(
    "make", [a_file, under_a_name_that_is_too_long, with_a_folder_for_a_file, that_nobody_may_enter]
)
def test_a_folder_of_no_use_is_said_and_no_error(
    tmp_path: Path, measurements: JobMeasurements, caplog: pytest.LogCaptureFixture, make: Callable[[Path], Path]
) -> None:
    """Training does not depend on it, and neither does the plan: it is said once."""
    folder = make(tmp_path)
    if make is that_nobody_may_enter and os.access(folder, os.X_OK):
        pytest.skip("root enters every folder")
    cache = ProfileCache(folder)
    assert cache.load(KEY) is None
    assert len(caplog.records) == 1
    cache.save(KEY, measurements)
    assert len(caplog.records) == 1


def test_a_drive_that_is_gone_is_said_and_no_error(
    tmp_path: Path,
    cache: ProfileCache,
    measurements: JobMeasurements,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network file system may fail at any call."""
    cache.save(KEY, measurements)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for call in ("stat", "read_text", "mkdir", "write_bytes"):
        with monkeypatch.context() as broken:
            broken.setattr(Path, call, fail)
            caplog.clear()
            restarted = ProfileCache(tmp_path / "made when needed")
            if call in ("stat", "read_text"):
                assert restarted.load(KEY) is None
            else:
                restarted.save(KEY, measurements)
            assert len(caplog.records) == 1
    assert cache.load(KEY) == measurements
