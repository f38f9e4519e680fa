"""A job whose adapter fails on one rank. The sessions of two ranks take turns in this thread."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from perseus_core.runtime.ranks.exchange import InProcessExchange, Row, in_process_exchanges

from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import NoDriver
from perseus_core.planning.schedule import Kind, one_f_one_b
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.opening import open_session
from perseus_core.runtime.ranks.order import Phase
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings

SETTINGS = Settings(enabled=True, warmup_iterations=100, profile_cache="off")


class WatchedExchange:
    """Another exchange, whose waiting and sending is written down."""

    def __init__(self, exchange: InProcessExchange) -> None:
        self._exchange = exchange
        self.num_sent = 0
        self.may_wait_s: list[float] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._exchange, name)

    def send_row(self, row: Row) -> None:
        self.num_sent += 1
        self._exchange.send_row(row)

    def arrived_rows(self, wait_for: int, limit_s: float) -> list[Row]:
        self.may_wait_s.append(limit_s)
        return self._exchange.arrived_rows(wait_for, limit_s)


def open_on(exchange: WatchedExchange, rank: int) -> Session | InertSession:
    def no_gpu() -> Device:
        raise NoDriver("no driver")

    key = ProfileKey("test", "1f1b", 2, 1, 1, 1, 1, "none", 1.0)
    job = Job(rank, 2, 1, rank, 2, 0, lambda m: one_f_one_b(2, m), key)
    return open_session(SETTINGS, job, device=no_gpu, exchange=exchange)  # type: ignore[arg-type]


def iterate(session: Session | InertSession) -> None:
    session.begin_iteration(1)
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        session.begin_instruction(0, 0, kind)
        session.end_instruction()
    session.end_iteration()


def test_all_ranks_step_aside_when_the_adapter_of_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Two iterations later, without waiting for the rank that has left; and before long they stop telling it things."""
    exchanges = [WatchedExchange(exchange) for exchange in in_process_exchanges(2)]
    with ThreadPoolExecutor(2) as threads:
        staying, leaving = threads.map(open_on, exchanges, range(2))
    for _ in range(5):
        iterate(staying)
        iterate(leaving)
    assert staying.status().phase is Phase.WARM_UP
    caplog.clear()

    iterate(staying)
    leaving.begin_iteration(1)
    leaving.fail(RuntimeError("broken on purpose"))
    leaving.close()
    assert leaving.status().phase is Phase.STEPPED_ASIDE
    iterate(staying)
    iterate(staying)
    assert staying.status().phase is Phase.STEPPED_ASIDE

    exchanges[0].may_wait_s.clear()
    for _ in range(100):
        iterate(staying)
    assert max(exchanges[0].may_wait_s) == 0
    assert exchanges[0].num_sent < 40
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["broken on purpose" in line for line in warnings] == [True]
    staying.close()
