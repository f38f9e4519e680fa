"""The steps of the measurement, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perseus_core.commands.measurement.bench import Bench
from perseus_core.commands.measurement.results import Result
from perseus_core.commands.measurement.steps.call_price import measure_prices
from perseus_core.commands.measurement.steps.counter import measure_counter
from perseus_core.commands.measurement.steps.cuda_marks import measure_anchors, measure_captures, measure_marks
from perseus_core.commands.measurement.steps.holding import measure_holding
from perseus_core.commands.measurement.steps.latency import measure_latency
from perseus_core.commands.measurement.steps.lateness import measure_lateness
from perseus_core.commands.measurement.steps.lock_call import measure_lock_calls
from perseus_core.commands.measurement.steps.plateau import measure_plateau
from perseus_core.commands.measurement.steps.reads import measure_reads
from perseus_core.commands.measurement.steps.two_clocks import measure_two_clocks
from perseus_core.commands.measurement.steps.unlocked import measure_as_before, measure_unlocked
from perseus_core.commands.measurement.steps.waiting_power import measure_waiting_power


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: in the file.
        title: on the page.
        measure: does it; may raise `NotMeasured` or any error, which is told.
        locks: whether it locks clocks, or is of use only beside those that do.
    """

    name: str
    title: str
    measure: Callable[[Bench], Result]
    locks: bool = False


STEPS = (
    Step("reads", "cost of reads", measure_reads),
    Step("counter", "energy counter", measure_counter),
    Step("lateness", "lateness of side threads", measure_lateness),
    Step("waiting_power", "power while waiting", measure_waiting_power),
    Step("marks", "cost of marks", measure_marks),
    Step("anchors", "anchors beside a backlog", measure_anchors),
    Step("captures", "CUDA graphs beside our threads", measure_captures),
    Step("unlocked", "without a lock", measure_unlocked, locks=True),
    Step("lock_call", "duration of a lock call", measure_lock_calls, locks=True),
    Step("latency", "latency of a change of clock", measure_latency, locks=True),
    Step("holding", "a lock holds", measure_holding, locks=True),
    Step("two_clocks", "a plan of two clocks", measure_two_clocks, locks=True),
    Step("call_price", "price of lock calls", measure_prices, locks=True),
    Step("plateau", "plateau and hysteresis", measure_plateau, locks=True),
)
# When all clocks were given back.
LAST_STEP = Step("as_before", "as fast as before", measure_as_before, locks=True)
STEPS_BY_NAME = {step.name: step for step in (*STEPS, LAST_STEP)}
