"""Measurements kept in files, so that a restarted job need not profile again."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from perseus_core.documents import load_document, save_document
from perseus_core.errors import InputError
from perseus_core.runtime.measure.stage_measurements import JobMeasurements

_FORMAT = "perseus profile cache"
_VERSION = 4
_log = logging.getLogger("perseus")


@dataclass(frozen=True)
class ProfileKey:
    """Everything that changes the answer. Two jobs with equal keys have equal profiles, but for noise.

    Attributes:
        model: what tells the model from others: a hash of its layers' names and shapes, or of its configuration.
        schedule: name of the schedule.
        num_stages: pipeline stages.
        num_chunks: model chunks of a stage.
        tensor_parallel: GPUs that share each layer.
        data_parallel: replicas of the pipeline.
        microbatch_size: samples.
        gpu_name: product name; empty until it is known.
        power_limit_w: power limit in force; 0 until it is known.
        details: (name, value) of anything else: sequence length, precision, recomputation, expert parallelism, ...
        versions: (package, version) of framework, CUDA, driver and this package.
    """

    model: str
    schedule: str
    num_stages: int
    num_chunks: int
    tensor_parallel: int
    data_parallel: int
    microbatch_size: int
    gpu_name: str = ""
    power_limit_w: float = 0.0
    details: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    def as_text(self) -> str:
        """The same text for equal keys."""
        values = asdict(self)
        values["details"], values["versions"] = sorted(self.details), sorted(self.versions)
        return json.dumps(values, sort_keys=True)

    def file_name(self) -> str:
        """The name of this key's file."""
        return f"profile-{hashlib.sha256(self.as_text().encode()).hexdigest()[:16]}.json"


class ProfileCache:
    """A folder with one file for each key. It never fails: what cannot be read is measured again."""

    def __init__(self, folder: str | Path) -> None:
        """Uses a folder, which is made when the first file is written."""
        self._folder = Path(folder)
        self._has_complained = False

    def load(self, key: ProfileKey) -> JobMeasurements | None:
        """The measurements of a key, or None; one log line says why a file that is there was of no use."""
        path = self._folder / key.file_name()
        try:
            path.stat()
            fields = load_document(path, _FORMAT, _VERSION)
            if fields.text("key") != key.as_text():
                raise InputError(f"{path}: belongs to another job")
            measurements = JobMeasurements.from_document(fields.section("job"))
            if len(measurements.blocking) != key.num_stages or measurements.profile.num_stages != key.num_stages:
                raise InputError(f"{path}: holds another number of stages than {key.num_stages}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, OverflowError) as error:
            _log.warning("profile cache not used, profiling again: %s", error)
            self._has_complained = True
            return None
        return measurements

    def save(self, key: ProfileKey, measurements: JobMeasurements) -> None:
        """Writes the file as a whole or not at all; where that cannot be, one log line says so."""
        path = self._folder / key.file_name()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_document(path, _FORMAT, _VERSION, {"key": key.as_text(), "job": measurements.to_document()})
        except (OSError, ValueError) as error:
            if not self._has_complained:
                _log.warning("profile not cached, the next start will profile again: %s", error)
