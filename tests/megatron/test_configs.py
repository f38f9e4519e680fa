"""The ready-made argument files, each run by a real job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.megatron.gpus import environment, simulated_gpus
from tests.megatron.launcher import launch

CONFIGS = sorted((REPOSITORY / "configs" / "megatron").glob("*.args"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For every file what a job of two stages made of it, as the last stage knows it."""
    folder = tmp_path_factory.mktemp("configs")
    with simulated_gpus(time_scale=0.03) as node:
        variables = {**environment(node), "XDG_CACHE_HOME": str(folder / "cache")}
        job = launch("run_argument_files", 2, folder, environment=variables, paths=list(map(str, CONFIGS)))
        return job.results_of_all()[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_argument_file_runs_and_is_followed(seen: dict[str, Any], path: Path) -> None:
    """Accepted as it is, from the repository's folder; training learns something, and a session follows it."""
    assert len(set(seen[str(path)]["losses"])) > 1
    assert seen[str(path)]["phase"] == "warm up"


def test_argument_files_mean_what_their_names_say(seen: dict[str, Any]) -> None:
    """The two that want something special get it."""
    by_name = {Path(path).stem: settings for path, settings in seen.items()}
    assert {"first_try", "cluster"} <= set(by_name)
    assert by_name["ten_percent_slower"]["max_slowdown"] == 0.1
    assert [name for name, settings in by_name.items() if settings["measure_only"]] == ["measure_only"]
