"""What all tests share: the measured data beside the repository, and small problems made of it."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest

from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.planning.solver import solve

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Programs started in the background by a shell ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = REPOSITORY.parent / "shared" / "data" / "sosp24"
OWN_PROFILE = REPOSITORY / "configs" / "profiles" / "gpt3-6.7b_a100_4stages.csv"

BLOCKING_POWER_W = {"gpt3-175b+a100_sxm": 83.64, "bloom+a40": 70.38}

# What these find out, they find out in real time: they run one after another, in one process, from the first moment on.
IN_REAL_TIME = (
    "tests/runtime/",
    "tests/measurement/",
    "tests/deepspeed/test_end_to_end.py",
    "tests/deepspeed/test_dualpipev.py",
    "tests/megatron/test_planned_clocks.py",
)
# Beside them another process runs the rest, file by file: first what takes long.
TAKES_LONG = (
    "tests/megatron/test_training.py",
    "tests/deepspeed/test_numerics.py",
    "tests/megatron/",
    "tests/deepspeed/",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Says which tests go together where several processes run them (`pytest -n 2`).

    Marks for xdist's own groups have no effect: pytest 9.2 does not read where xdist 3.8 writes them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "real time" if nodeid.startswith(IN_REAL_TIME) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order in which several processes take the files."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (not item.nodeid.startswith(IN_REAL_TIME), _place_among(item, TAKES_LONG)))


def _place_among(item: pytest.Item, beginnings: Sequence[str]) -> int:
    return next((i for i, each in enumerate(beginnings) if item.nodeid.startswith(each)), len(beginnings))


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """An adapter's tests are skipped where its framework is absent."""
    adapter = module_path.parent.name
    if adapter in ("deepspeed", "megatron") and importlib.util.find_spec(adapter) is None:
        return _OfAbsentFramework.from_parent(parent, path=module_path)
    return None


class _OfAbsentFramework(pytest.Module):
    def collect(self) -> NoReturn:
        adapter = self.path.parent.name
        pytest.skip(f"{adapter} is not installed; `pip install .[{adapter}]`", allow_module_level=True)


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of measured data of the Perseus paper; tests that need it skip where it is absent."""
    if not PUBLISHED.is_dir():
        pytest.skip(f"the measured data of the Perseus paper is not at {PUBLISHED}")
    return PUBLISHED


@pytest.fixture(scope="session")
def own_profile() -> Profile:
    """The project's own profile of four stages."""
    return Profile.load(OWN_PROFILE)


@pytest.fixture(scope="session")
def problem(own_profile: Profile) -> PipelineProblem:
    """A pipeline of four stages and eight microbatches."""
    return PipelineProblem.of(own_profile, one_f_one_b(4, 8), 83.5)


@pytest.fixture(scope="session")
def frontier(problem: PipelineProblem) -> Frontier[PipelineProblem]:
    """Its frontier."""
    return solve(problem)
