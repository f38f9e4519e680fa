"""The ready-made configs, each run by a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.deepspeed.conftest import MakeNode, on
from tests.deepspeed.launcher import launch

CONFIGS = sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json"))


@pytest.fixture(scope="module")
def seen(make_node: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For every file what a job of two ranks made of it."""
    node = make_node(0.03, clock_latency_s=0.001, energy_counter_period_s=0.01)
    folder = tmp_path_factory.mktemp("configs")
    environment = {**on(node), "XDG_CACHE_HOME": str(folder / "cache"), "PERSEUS_TEST_FOLDER": str(folder)}
    job = launch("run_configs", 2, folder, environment=environment, paths=list(map(str, CONFIGS)))
    return job.results_of_all()[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_and_is_followed(seen: dict[str, Any], path: Path) -> None:
    """Training learns something under each of them, and a session follows it."""
    assert len(set(seen[str(path)]["losses"])) > 1
    assert seen[str(path)]["phase"] == "warm up"


def test_configs_mean_what_their_names_say(seen: dict[str, Any]) -> None:
    """The two that want something special get it."""
    by_name = {Path(path).stem: settings for path, settings in seen.items()}
    assert by_name["ten_percent_slower"]["max_slowdown"] == 0.1
    assert [name for name, settings in by_name.items() if settings["measure_only"]] == ["measure_only"]
