"""A job whose adapter fails on one rank. The sessions of several ranks take turns in this thread, on one store."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import NoDriver
from perseus_core.planning.schedule import Kind, one_f_one_b
from perseus_core.runtime.adapter import Follower, Hooks
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.opening import open_session
from perseus_core.runtime.ranks.order import Phase
from perseus_core.runtime.ranks.store import LocalStore, StoreError
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings

from .simulated_machine import wait_until

NUM_RANKS = 3
SETTINGS = Settings(enabled=True, warmup_iterations=10**6, profile_cache="off")


class WatchedStore(LocalStore):
    """A store that counts what is appended, and fails when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.num_appended = 0
        self.error: Exception | None = None

    def append(self, key: str, value: bytes) -> None:
        self.num_appended += 1
        super().append(key, value)

    def read(self, key: str) -> bytes | None:
        if self.error is not None:
            raise self.error
        return super().read(key)


class Ranks:
    """All ranks' sessions; one that has failed or left trains on."""

    def __init__(self, num_ranks: int = NUM_RANKS, settings: Settings = SETTINGS) -> None:
        self.store = WatchedStore()
        self._settings = settings
        self.sessions = [self._open(rank, num_ranks) for rank in range(num_ranks)]
        self.until(lambda: Phase.OPENING not in self.phases())

    def _open(self, rank: int, num_ranks: int) -> Session | InertSession:
        def no_gpu() -> Device:
            raise NoDriver("no driver")

        key = ProfileKey("test", "1f1b", num_ranks, 1, 1, 1, 1, "none", 1.0)
        job = Job(rank, num_ranks, 1, rank, num_ranks, 0, lambda m: one_f_one_b(num_ranks, m), key)
        return open_session(self._settings, job, device=no_gpu, store=self.store)

    def phases(self) -> set[Phase]:
        return {session.status().phase for session in self.sessions}

    def iterate(self) -> None:
        for session in self.sessions:
            iterate(session)

    def until(self, condition: Callable[[], bool]) -> None:
        """All train until something has happened."""

        def trained() -> bool:
            self.iterate()
            return condition()

        wait_until(trained)

    def close(self) -> None:
        for session in self.sessions:
            session.close()


def iterate(session: Session | InertSession) -> None:
    session.begin_iteration(1)
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        session.begin_instruction(0, 0, kind)
        session.end_instruction()
    session.end_iteration()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("failing", range(NUM_RANKS))
def test_all_ranks_step_aside_when_the_adapter_of_one_fails(failing: int, caplog: pytest.LogCaptureFixture) -> None:
    """Soon, whichever it is; it is said once, where it is known; and before long nobody tells anything any more."""
    ranks = Ranks()
    caplog.clear()
    broken = ranks.sessions[failing]
    broken.begin_iteration(1)
    broken.fail(RuntimeError("broken on purpose"))
    broken.close()
    assert broken.status().phase is Phase.STEPPED_ASIDE
    ranks.until(lambda: ranks.phases() == {Phase.STEPPED_ASIDE})
    (line,) = warnings(caplog)
    assert line == f"rank {failing}: RuntimeError: broken on purpose; training goes on without perseus"
    told = ranks.store.num_appended
    for _ in range(100):
        ranks.iterate()
    assert ranks.store.num_appended < told + 10
    ranks.close()


def test_gpus_that_are_missing_are_one_line_of_all_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """Said by one that knows why. All go on measuring time."""
    ranks = Ranks(settings=Settings(enabled=True, warmup_iterations=1, baseline_iterations=2, profile_cache="off"))
    ranks.until(lambda: ranks.phases() == {Phase.MEASURE_ONLY})
    ranks.close()
    assert warnings(caplog) == ["no driver; all GPUs go on at the clocks the driver chooses, measuring only"]


def test_an_error_of_ours_is_an_adapters_failure_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not reach training, and ends it on all ranks."""
    ranks = Ranks()
    caplog.clear()
    session = ranks.sessions[1]
    assert isinstance(session, Session)

    def broken() -> None:
        raise ZeroDivisionError("an error of ours")

    monkeypatch.setattr(session._meter, "take_in", broken)
    ranks.until(lambda: ranks.phases() == {Phase.STEPPED_ASIDE})
    assert warnings(caplog) == ["rank 1: ZeroDivisionError: an error of ours; training goes on without perseus"]
    ranks.close()


def test_a_follower_that_gives_up_tells_all_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """As an adapter does it: the hooks come off, and nothing is passed on any more."""

    class Framework:
        def step(self) -> str:
            return "trained"

    ranks = Ranks()
    caplog.clear()
    hooks = Hooks()
    hooks.put(Framework, "step", lambda self: "followed")
    follower = Follower(lambda: ranks.sessions[2], hooks)
    for _ in range(2):
        follower.begin_iteration(1, training=True)
        follower.end_iteration()
    follower.give_up(RuntimeError("the framework has changed"))
    assert (follower.is_finished, Framework().step()) == (True, "trained")
    ranks.until(lambda: ranks.phases() == {Phase.STEPPED_ASIDE})
    assert warnings(caplog) == ["rank 2: RuntimeError: the framework has changed; training goes on without perseus"]
    ranks.close()


def test_a_rank_that_leaves_well_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """The others go on for some iterations, in which they will have left as well, and say nothing."""
    ranks = Ranks()
    caplog.clear()
    ranks.sessions[1].close()
    ranks.until(lambda: ranks.sessions[0].status().phase is Phase.STEPPED_ASIDE)
    ranks.close()
    assert warnings(caplog) == []


def test_a_store_that_goes_away_ends_it_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    """In one line, by the rank that does not end with it: rank 0 hosts it here, so rank 1 speaks for all."""
    ranks = Ranks()
    caplog.clear()
    ranks.store.error = StoreError("the job's rendezvous store cannot be reached any more (Broken pipe)")
    ranks.until(lambda: ranks.phases() == {Phase.STEPPED_ASIDE})
    ranks.close()
    lines = warnings(caplog)
    assert [line.split(":")[0] for line in lines] == ["rank 1"]
    assert all("cannot be reached any more (Broken pipe); training goes on" in line for line in lines)


def test_whoever_fails_while_closing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And training ends well."""
    ranks = Ranks(1)
    session = ranks.sessions[0]
    assert isinstance(session, Session)

    def broken(_: object) -> None:
        raise ZeroDivisionError("an error of ours")

    monkeypatch.setattr(session._conversation, "leave", broken)
    session.close()
    session.close()
