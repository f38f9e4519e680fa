"""Sessions of one rank in this process, where something is missing or strange."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import NoDriver
from perseus_core.planning.schedule import Kind, Schedule, one_f_one_b
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.opening import cache_folder, open_session, tell_failed
from perseus_core.runtime.ranks.conversation import NEWS, round_key
from perseus_core.runtime.ranks.order import News, Phase
from perseus_core.runtime.ranks.records import RecordKind, StateFlag, as_records
from perseus_core.runtime.ranks.store import LocalStore, Store
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings
from tests.cluster.cluster import Cluster
from tests.runtime.time_limit import within

from .simulated_machine import wait_until

QUICK = Settings(enabled=True, warmup_iterations=1, baseline_iterations=2, profile_cache="off")
# What does not come back within this has hung.
HANGS_S = 60.0


def _job(schedule: Any = lambda m: one_f_one_b(1, m), world_size: int = 1) -> Job:
    return Job(0, 1, 1, 0, world_size, 0, schedule, ProfileKey("test", "1f1b", 1, 1, 1, 1, 1, "none", 1.0))


def _no_gpu() -> Device:
    raise NoDriver("no NVIDIA driver is loaded; install it")


def _iterate(session: Session | InertSession, count: int, schedule: Schedule) -> None:
    for _ in range(count):
        session.begin_iteration(schedule.num_microbatches)
        for instruction in schedule.stages[0]:
            session.begin_instruction(0, instruction.microbatch, instruction.kind)
            session.end_instruction()
        session.end_iteration()


def _train_until(session: Session | InertSession, phase: Phase) -> None:
    def has_come() -> bool:
        _iterate(session, 1, one_f_one_b(1, 2))
        return session.status().phase is phase

    wait_until(has_come)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_job_that_did_not_ask_for_us_hears_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Not a line, and no thread."""
    before = threading.active_count()
    session = open_session(Settings(), _job())
    assert isinstance(session, InertSession)
    _iterate(session, 2, one_f_one_b(1, 2))
    session.close()
    assert caplog.records == []
    assert threading.active_count() == before


def test_a_session_that_does_nothing_has_all_that_a_session_has() -> None:
    """Adapters and users need not know which one they have."""
    public = {name for name in vars(Session) if not name.startswith("_")}
    assert public == {name for name in vars(InertSession) if not name.startswith("_")}
    session = open_session(Settings(), _job())
    session.set_straggler(1.5)
    session.fail(RuntimeError("ignored"))
    assert session.status().phase is Phase.STEPPED_ASIDE


def test_without_a_gpu_time_is_measured_and_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on."""
    session = open_session(QUICK, _job(), device=_no_gpu)
    _train_until(session, Phase.MEASURE_ONLY)
    status = session.status()
    session.close()
    assert status.baseline_time_s > 0
    assert [line.startswith("no NVIDIA driver is loaded") for line in _warnings(caplog)] == [True]


def test_an_iteration_left_by_an_exception_and_odd_calls_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """The training's own exceptions are the training's own."""
    session = open_session(QUICK, _job(), device=_no_gpu)
    _train_until(session, Phase.WARM_UP)
    session.end_iteration()
    session.end_instruction()
    session.begin_iteration(2)
    session.begin_instruction(0, 0, Kind.FORWARD)
    session.begin_iteration(2)
    session.end_instruction()
    session.end_iteration()
    _train_until(session, Phase.MEASURE_ONLY)
    session.close()
    session.close()
    _iterate(session, 2, one_f_one_b(1, 2))
    assert len(_warnings(caplog)) == 1, "of the GPU that is missing"


@pytest.mark.parametrize("broken", ["OwnThreads", "Session", "HostEvents"])
def test_what_fails_while_opening_is_one_line(
    broken: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a session that does nothing."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise InputError("the profile cache is a fish")

    monkeypatch.setattr(f"perseus_core.runtime.opening.{broken}", fail)
    session = open_session(QUICK, _job(), device=_no_gpu)
    assert isinstance(session, InertSession)
    _iterate(session, 2, one_f_one_b(1, 2))
    assert [("is a fish" in line, "training goes on without perseus" in line) for line in _warnings(caplog)] == [
        (True, True)
    ]


def test_a_job_of_many_without_a_store_is_one_line_of_all_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """All have the same reason; rank 0 says it."""
    for rank in (0, 1):
        job = Job(0, 1, 1, rank, 2, rank, lambda m: one_f_one_b(1, m), _job().key)
        assert isinstance(open_session(QUICK, job, device=_no_gpu), InertSession)
    (line,) = _warnings(caplog)
    assert "no rendezvous store" in line
    assert line.endswith("training goes on without perseus")


def test_a_search_for_the_gpu_that_fails_in_a_way_nobody_thought_of_is_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said when it is found out; nothing reaches training."""

    def broken() -> NoReturn:
        raise OSError("libcuda is a fish")

    session = open_session(QUICK, _job(), device=broken)
    _train_until(session, Phase.STEPPED_ASIDE)
    session.close()
    assert _warnings(caplog) == ["rank 0: OSError: libcuda is a fish; training goes on without perseus"]


# Nothing waits


@pytest.fixture
def hanging() -> Iterator[Callable[..., Any]]:
    """A function that does not come back before the test is over."""
    over = threading.Event()

    def hang(*_: Any, **__: Any) -> NoReturn:
        over.wait()
        raise NoDriver("too late")

    yield hang
    over.set()


def test_a_driver_that_hangs_holds_up_nothing_and_one_line_says_so(
    hanging: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening, training and ending; after a while the job goes on without its GPU."""
    monkeypatch.setattr("perseus_core.runtime.session._PREPARING_LIMIT_S", 0.3)

    def train() -> None:
        session = open_session(QUICK, _job(), device=hanging)
        _train_until(session, Phase.MEASURE_ONLY)
        session.close()

    within(HANGS_S, train)
    (line,) = _warnings(caplog)
    assert line.startswith("the GPU driver has not answered for 0.3 s")


def test_a_session_is_left_at_once_while_its_driver_hangs(
    hanging: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Within the time in which a driver may still answer."""

    def train() -> Phase:
        session = open_session(QUICK, _job(), device=hanging)
        _iterate(session, 20, one_f_one_b(1, 2))
        phase = session.status().phase
        session.close()
        return phase

    assert within(HANGS_S, train) is Phase.OPENING
    assert _warnings(caplog) == []


class _HangingStore(LocalStore):
    """A store whose calls do not come back any more from some time on."""

    def __init__(self, hang: Callable[..., Any]) -> None:
        super().__init__()
        self.hangs = False
        for name in ("append", "set", "read", "delete", "is_first"):
            setattr(self, name, self._hanging(getattr(self, name), hang))

    def _hanging(self, call: Callable[..., Any], hang: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: hang() if self.hangs else call(*arguments)


@pytest.mark.parametrize("from_the_first_call", [True, False])
def test_a_store_that_hangs_holds_up_nothing(hanging: Callable[..., Any], from_the_first_call: bool) -> None:
    """Its host may have been stopped: no call fails, and none comes back. Training ends all the same."""
    store = _HangingStore(hanging)
    store.hangs = from_the_first_call

    def train() -> None:
        session = open_session(QUICK, _job(), device=_no_gpu, store=store)
        if not from_the_first_call:
            _train_until(session, Phase.MEASURE_ONLY)
            store.hangs = True
        _iterate(session, 200, one_f_one_b(1, 2))
        session.close()

    within(HANGS_S, train)


def test_another_rank_is_held_up_by_a_store_that_hangs_as_little(hanging: Callable[..., Any]) -> None:
    """It has heard nothing of rank 0."""
    store: Store = _HangingStore(hanging)
    assert isinstance(store, _HangingStore)
    store.hangs = True

    def train() -> None:
        job = Job(0, 1, 1, 1, 2, 1, lambda m: one_f_one_b(1, m), _job().key)
        session = open_session(QUICK, job, device=_no_gpu, store=store)
        _iterate(session, 200, one_f_one_b(1, 2))
        session.close()

    within(HANGS_S, train)


@pytest.fixture
def rank_3_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a rank of a torch job, as far as torch says."""
    distributed = pytest.importorskip("torch.distributed")
    for name, value in (("is_initialized", True), ("get_world_size", 4), ("get_rank", 3)):
        monkeypatch.setattr(distributed, name, lambda value=value: value)


@pytest.mark.usefixtures("rank_3_of_4")
def test_the_others_hear_of_a_session_that_could_not_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the round that is open by then."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise InputError("the profile cache is a fish")

    store = LocalStore()
    store.set(NEWS, News(round=200).encode())
    monkeypatch.setattr("perseus_core.runtime.opening.Session", fail)
    job = Job(0, 1, 1, 3, 4, 3, lambda m: one_f_one_b(1, m), _job().key)
    assert isinstance(open_session(QUICK, job, device=_no_gpu, store=store), InertSession)
    told = as_records(wait_until(lambda: store.read(round_key(200))))
    assert set(told["rank"].tolist()) == {3}
    assert StateFlag.FAILED in StateFlag(int(told[told["kind"] == RecordKind.STATE][-1]["flags"]))


@pytest.mark.usefixtures("rank_3_of_4")
def test_telling_the_others_waits_for_no_store(hanging: Callable[..., Any]) -> None:
    """And raises nothing."""
    store = _HangingStore(hanging)
    store.hangs = True
    within(HANGS_S, lambda: tell_failed(store))


# Folders and files: a whole job in virtual time


def _plan_made(settings: Settings) -> list[str]:
    """Trains until a plan runs; returns what was said."""
    with Cluster(seed=1, stages=2, microbatches=4, settings=settings) as cluster:
        cluster.run_until(lambda: cluster.session(0).status().plan > 0 or cluster.job.num_ended > 500)
        assert cluster.session(0).status().plan > 0, cluster.log_text
    return [said.text for said in cluster.log]


def _cluster_settings(**changes: Any) -> Settings:
    return Settings(
        **{"enabled": True, "profile_cache": "off", "profile_clocks": 4, "profile_iterations": 1, **changes}
    )


@pytest.mark.parametrize("broken", ["a file", "below a file", "not ours"])
def test_a_plan_is_made_though_the_cache_folder_is_broken(broken: str, tmp_path: Path) -> None:
    """One line says so, where it is found out first: in reading or, where there is nothing to read, in writing."""
    folder = tmp_path / "cache"
    if broken == "not ours":
        folder = Path("/proc/self/cache")
    else:
        folder.write_text("no folder")
    if broken == "below a file":
        folder = folder / "perseus"
    about_it = [line for line in _plan_made(_cluster_settings(profile_cache=str(folder))) if str(folder) in line]
    in_writing = broken == "not ours"
    (line,) = about_it
    assert line.startswith("profile not cached, the next" if in_writing else "profile cache not used, profiling again")


def test_without_a_home_folder_profiles_are_not_kept_and_a_plan_is_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """HOME is not set, and the user has no entry in the list of users: as in some containers."""

    def no_home() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder(_cluster_settings(profile_cache="auto")) is None
    said = _plan_made(_cluster_settings(profile_cache="auto"))
    assert [line for line in said if "home" in line] == [
        "profiles are not kept: Could not determine home directory.; set profile_cache to a folder"
    ]


def test_profiles_are_kept_where_the_user_or_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or nowhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(_cluster_settings(profile_cache="auto")) == tmp_path / "perseus"
    assert cache_folder(_cluster_settings(profile_cache=str(tmp_path / "mine"))) == tmp_path / "mine"
    assert cache_folder(_cluster_settings(profile_cache="off")) is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(_cluster_settings(profile_cache="auto")) == tmp_path / "home" / ".cache" / "perseus"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\0", b"[]", b'{"format": "perseus-session"}', b"null", None])
def test_a_broken_state_file_is_one_line_and_a_plan_is_made(content: bytes | None, tmp_path: Path) -> None:
    """As if there were none. It is written anew, unless it cannot be, which is a second line."""
    path = tmp_path / "state.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    said = _plan_made(_cluster_settings(state_file=str(path)))
    about_it = [line for line in said if "state" in line]
    assert about_it[0].startswith("the session's state is not used, starting afresh: ")
    if content is None:
        assert len(about_it) == 2 and about_it[1].startswith("the session's state is not saved")
    else:
        assert len(about_it) == 1
        assert path.stat().st_size > 1000


def test_a_state_file_that_was_written_is_used(tmp_path: Path) -> None:
    """The job that starts again neither measures its baseline nor profiles."""
    path = tmp_path / "state.json"
    assert any("baseline:" in line for line in _plan_made(_cluster_settings(state_file=str(path))))
    said = _plan_made(_cluster_settings(state_file=str(path)))
    assert not any("baseline:" in line or "profil" in line for line in said)
    assert list(tmp_path.iterdir()) == [path]
