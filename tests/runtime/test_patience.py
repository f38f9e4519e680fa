"""Errors that come and go are borne, and those that stay are not."""

from __future__ import annotations

import pytest

from perseus_core.gpu.errors import CallFailed, GpuLost
from perseus_core.runtime.patience import RETRY_S, Patience, patiently


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_calls_may_fail_for_so_long_and_no_longer() -> None:
    """Counted from the first failure since something succeeded."""
    patience, error = Patience(limit_s=2.0), CallFailed("timeout")
    assert patience.bear(error, 10.0) == RETRY_S
    assert patience.bear(error, 11.9) == RETRY_S
    patience.succeeded()
    assert patience.bear(error, 12.5) == RETRY_S
    with pytest.raises(CallFailed, match="timeout"):
        patience.bear(error, 14.5)


def test_a_call_is_made_again_until_it_succeeds() -> None:
    """Whatever it returns is handed on."""
    clock, num_calls = Clock(), 0

    def call() -> str:
        nonlocal num_calls
        num_calls += 1
        if num_calls < 4:
            raise CallFailed("timeout")
        return "done"

    assert patiently(call, now_s=lambda: clock.now_s, sleep=clock.sleep) == "done"
    assert clock.now_s == pytest.approx(100 + 3 * RETRY_S)


@pytest.mark.parametrize(("error", "least_s", "most_s"), [(CallFailed, 3.0, 3.1), (GpuLost, 0.0, 0.0)])
def test_what_does_not_pass_is_raised(error: type[Exception], least_s: float, most_s: float) -> None:
    """At once where it cannot pass."""
    clock = Clock()

    def call() -> None:
        raise error("no")

    with pytest.raises(error):
        patiently(call, limit_s=3.0, now_s=lambda: clock.now_s, sleep=clock.sleep)
    assert least_s <= clock.now_s - 100 <= most_s
