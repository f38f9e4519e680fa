"""The file of a first contact: what a session takes from it, what the user says instead, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perseus_core.errors import InputError
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.planning.switching import MOST_JITTER_S, USUAL_JITTER_S, Switching
from perseus_core.runtime.gpu_measurements import GpuMeasurements
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.opening import prepare
from perseus_core.runtime.settings import Settings
from perseus_core.runtime.side_threads import OwnThreads

from .simulated_machine import device_of, simulated_machine

MEASURED = GpuMeasurements(
    "Test GPU",
    is_simulated=True,
    up_s=0.09,
    down_s=0.04,
    jitter_s=0.01,
    call_s=0.02,
    harmless_calls_per_s=5,
    counter_period_s=0.1,
    counter_window_s=0.025,
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "gpu.json"
    MEASURED.save(path, about={"date": "today"}, steps=[])
    return str(path)


def job(rank: int = 0) -> Job:
    key = ProfileKey("test", "1f1b", 1, 1, 1, 1, 1, "none", 1.0)
    return Job(0, 1, 2, rank, 2, 0, lambda m: one_f_one_b(1, m), key)


def test_what_is_written_is_read(path: str) -> None:
    """All of it."""
    assert GpuMeasurements.load(path) == MEASURED


def test_what_was_measured_stands_for_auto() -> None:
    """Latencies, jitter, what a call takes, and the rate where it is lower than the usual one."""
    assert MEASURED.switching(Settings()) == Switching(0.09, 0.04, 0.01, 5, 0.02)
    quick = replace(MEASURED, harmless_calls_per_s=50)
    assert quick.switching(Settings()).max_changes_per_s == 10
    without = GpuMeasurements("Test GPU")
    assert without.switching(Settings()) == Settings().switching


@pytest.mark.parametrize(("window_s", "partial_s"), [(0.025, 0.025), (0.0975, 0.0), (0.0, 0.0)])
def test_a_counter_that_measures_nearly_all_the_time_measures_all_of_it(window_s: float, partial_s: float) -> None:
    """And one that is not known as well."""
    assert replace(MEASURED, counter_window_s=window_s).partial_window_s == partial_s


def test_what_the_user_says_counts() -> None:
    """Each key for itself."""
    settings = Settings(switch_latency_s=0.03, max_clock_changes_per_s=20)
    assert MEASURED.switching(settings) == Switching(0.03, 0.03, USUAL_JITTER_S, 20, 0.02)
    assert MEASURED.switching(Settings(max_clock_changes_per_s=20)).up_s == 0.09
    assert MEASURED.switching(Settings(switch_latency_s=0.03)).max_changes_per_s == 5


def test_a_session_takes_it(path: str, tmp_path: Path) -> None:
    """On every rank."""
    settings = Settings(enabled=True, gpu_measurements=path, profile_cache="off")
    with simulated_machine(tmp_path) as node:
        for rank in (0, 1):
            prepared = prepare(settings, job(rank), lambda: device_of(node), OwnThreads())
            assert prepared.switching == Switching(0.09, 0.04, 0.01, 5, 0.02)
            assert prepared.counter_window_s == 0.025


def test_what_a_busy_machine_measured_is_not_believed(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Plans that reckon with a jitter of a third of a second save nothing; rank 0 says so."""
    replace(MEASURED, jitter_s=0.318).save(path, about={}, steps=[])
    settings = Settings(enabled=True, gpu_measurements=path, profile_cache="off")
    with simulated_machine(tmp_path) as node, caplog.at_level(logging.WARNING):
        for rank in (0, 1):
            prepared = prepare(settings, job(rank), lambda: device_of(node), OwnThreads())
            assert prepared.switching is not None
            assert prepared.switching.jitter_s == MOST_JITTER_S
    (line,) = [record.getMessage() for record in caplog.records]
    assert "318 ms too early or too late" in line
    assert MEASURED.doubt == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu_name": "NVIDIA H100"}, "was measured on NVIDIA H100, and this GPU is Test GPU; run `perseus doctor"),
        ({"up_s": -1}, 'field "up_s" is -1; it must be 0 or more'),
        ({"up_s": None}, 'field "up_s" is null; it must be a finite number'),
        ({"harmless_calls_per_s": "many"}, 'field "harmless_calls_per_s" is "many"'),
    ],
)
def test_another_file_is_refused_in_one_sentence_and_training_goes_on(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], words: str
) -> None:
    """As if none had been given; rank 0 alone says so."""
    document = json.loads(Path(path).read_text())
    document["session"].update(change)
    Path(path).write_text(json.dumps(document))
    settings = Settings(enabled=True, gpu_measurements=path, profile_cache="off")
    with simulated_machine(tmp_path) as node, caplog.at_level(logging.WARNING):
        for rank in (0, 1):
            prepared = prepare(settings, job(rank), lambda: device_of(node), OwnThreads())
            assert prepared.device is not None
            assert prepared.switching == settings.switching
    (line,) = [record.getMessage() for record in caplog.records]
    assert words in line
    assert line.endswith("it is not used")


def test_what_simulated_gpus_do_is_no_matter_for_real_ones() -> None:
    """Their names may be the same."""
    MEASURED.require("Test GPU", "gpu.json", {"PERSEUS_SIMULATED_GPUS": "/somewhere"})
    with pytest.raises(InputError, match="measured on a simulated GPU"):
        MEASURED.require("Test GPU", "gpu.json", {})
