"""Each step finds the fault that was put in, and none where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from perseus_core.commands.measurement.bench import Bench, open_bench
from perseus_core.commands.measurement.load import MATRIX_PRODUCTS, Load, Pulse
from perseus_core.commands.measurement.results import NotMeasured, Spread, Standing
from perseus_core.commands.measurement.step_list import STEPS, STEPS_BY_NAME, Step
from perseus_core.commands.measurement.steps.call_price import Price, harmless_rate, measure_prices
from perseus_core.commands.measurement.steps.counter import measure_counter
from perseus_core.commands.measurement.steps.holding import measure_holding
from perseus_core.commands.measurement.steps.latency import jitter_s, measure_latency
from perseus_core.commands.measurement.steps.lateness import Lateness, measure_lateness
from perseus_core.commands.measurement.steps.lock_call import measure_lock_calls
from perseus_core.commands.measurement.steps.plateau import measure_plateau
from perseus_core.commands.measurement.steps.reads import measure_reads
from perseus_core.commands.measurement.steps.two_clocks import TwoClocks, measure_two_clocks
from perseus_core.commands.measurement.steps.unlocked import measure_as_before, measure_unlocked
from perseus_core.commands.measurement.steps.waiting_power import measure_waiting_power
from perseus_core.gpu import simulated
from perseus_core.gpu.simulated import SimulatedNode, read_clock_requests
from perseus_core.runtime.side_threads import OwnThreads, SideThread
from perseus_core.runtime.side_threads import Step as SideStep
from tests.runtime.simulated_machine import locked_range

Machine = Callable[..., SimulatedNode]

NEEDS_CUDA = ("marks", "anchors", "captures")
STEP_S = 0.4
# A machine that is busy with other things makes a step differ now and then, but not every time.
TRIES = 4
Test = TypeVar("Test", bound=Callable[..., None])
# As a share of all cores' time that was idle; a core that is free while another is taken leaves half.
BUSY = 0.15


def cpu_times() -> tuple[int, int]:
    """What all cores were idle until now, and all they were (`cpu` of /proc/stat); nothing where that is not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0, 0
    times = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return times[3] + times[4], sum(times)


def idle_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Of the time between, as a share of all cores' time; 1 where that is not known."""
    idle, passed = after[0] - before[0], after[1] - before[1]
    return idle / passed if passed else 1.0


def where_there_is_time(test: Test) -> Test:
    """Tries a test again where a step was disturbed, and skips it where the machine is busy with other things."""

    @wraps(test)
    def tried(*arguments: Any, **named: Any) -> None:
        idle = []
        while True:
            before = cpu_times()
            try:
                return test(*arguments, **named)
            except (AssertionError, NotMeasured) as error:
                idle.append(idle_share(before, cpu_times()))
                if len(idle) == TRIES and min(idle) < BUSY:
                    pytest.skip(f"this machine is busy, at times only {min(idle):.0%} of it was idle: {error}")
                if len(idle) == TRIES:
                    raise

    return cast(Test, tried)


def bench(step_s: float = STEP_S) -> Bench:
    return open_bench(step_s, {})


@pytest.mark.parametrize("step", [step for step in STEPS if step.name not in NEEDS_CUDA], ids=lambda step: step.name)
@where_there_is_time
def test_a_machine_as_is_assumed(machine: Machine, step: Step) -> None:
    """Nothing differs, and clocks are the driver's afterwards."""
    node = machine()
    verdict = step.measure(bench()).verdict
    assert locked_range(node) == []
    assert "assumed" in verdict.sentence
    assert verdict.standing is Standing.AS_ASSUMED, verdict.sentence


def test_what_is_assumed_of_a_side_thread() -> None:
    """A millisecond beside training, ten beside Python; how late it comes alone does not matter."""

    def standing(alone_s: float, beside_python_s: float, beside_training_s: float) -> Standing:
        spreads = (Spread(s / 2, 0.0, s, 1.0, 100) for s in (alone_s, beside_python_s, beside_training_s))
        return Lateness(*spreads).verdict.standing

    assert standing(0.02, 0.0099, 0.00099) is Standing.AS_ASSUMED
    assert standing(0.0, 0.0101, 0.0) is Standing.DIFFERS
    assert standing(0.0, 0.0, 0.00101) is Standing.DIFFERS


def test_what_is_assumed_of_a_plan_of_two_clocks() -> None:
    """Time within a per cent, and most of each part at its clock."""

    def standing(slower: float, share_at_lower: float, share_at_higher: float) -> Standing:
        found = TwoClocks((1000, 800), 1.0, 1 + slower, share_at_lower, share_at_higher, 6.0, 10)
        return found.verdict.standing

    assert standing(0.0099, 0.86, 0.86) is Standing.AS_ASSUMED
    assert standing(-0.0099, 1.0, 1.0) is Standing.AS_ASSUMED
    assert standing(0.0101, 1.0, 1.0) is Standing.DIFFERS
    assert standing(0.0, 0.84, 1.0) is Standing.DIFFERS
    assert standing(0.0, 1.0, 0.84) is Standing.DIFFERS


@pytest.mark.parametrize("step", [step for step in STEPS if step.name in NEEDS_CUDA], ids=lambda step: step.name)
def test_what_needs_cuda_says_so(machine: Machine, step: Step) -> None:
    """A simulated GPU has none."""
    machine()
    with pytest.raises(NotMeasured, match="has no CUDA"):
        step.measure(bench())


@where_there_is_time
def test_lock_calls_that_take_long(machine: Machine) -> None:
    """And hold up reads."""
    machine(lock_call_s=0.05)
    found = measure_lock_calls(bench())
    assert found.idle.median_s >= 0.05
    assert found.reads_beside.longest_s >= 0.03
    assert found.verdict.standing is Standing.DIFFERS


def test_lock_calls_that_fail(machine: Machine) -> None:
    """They are counted, and the others timed."""
    machine(driver_errors=[{"function": "nvmlDeviceSetGpuLockedClocks", "error": "TIMEOUT", "every": 3}])
    found = measure_lock_calls(bench())
    assert found.num_failed >= 2
    assert "failed and passed" in found.verdict.sentence
    assert found.verdict.standing is Standing.DIFFERS


@pytest.mark.parametrize("name", ["unlocked", "latency", "holding", "two_clocks", "call_price", "plateau", "counter"])
@where_there_is_time
def test_errors_that_pass_end_no_step(machine: Machine, name: str) -> None:
    """Where they are not what is measured."""
    functions = ("SetGpuLockedClocks", "GetClockInfo", "GetCurrentClocksEventReasons", "GetTotalEnergyConsumption")
    machine(
        driver_errors=[
            {"function": f"nvmlDevice{one}", "error": "TIMEOUT", "first": 2, "every": 7} for one in functions
        ]
    )
    assert "assumed" in STEPS_BY_NAME[name].measure(bench()).verdict.sentence


@where_there_is_time
def test_latencies_that_nobody_would_guess(machine: Machine) -> None:
    """Up and down each for itself, with their jitter, whatever the register tells."""
    machine(clock_latency_s=0.09, clock_latency_down_s=0.04, clock_latency_jitter_s=0.02, clock_register={"lag_s": 0.1})
    found = measure_latency(bench())
    assert found.up.median_s == pytest.approx(0.1, abs=0.01)
    assert found.down.median_s == pytest.approx(0.05, abs=0.01)
    assert 0.004 < found.jitter_s < 0.02
    assert found.register_lag_s == pytest.approx(0.1, abs=0.02)
    assert found.verdict.standing is Standing.DIFFERS


def test_changes_that_are_seen_much_too_late_are_no_jitter() -> None:
    """As on a busy machine, one in five."""
    times_s = [0.09 + 0.02 * i / 40 for i in range(41)]
    assert jitter_s(times_s) == pytest.approx(0.009)
    assert jitter_s([*times_s, *[0.7] * 10]) < 0.015


@where_there_is_time
def test_a_register_that_tells_what_was_asked_for(machine: Machine) -> None:
    """It is sooner than the GPU."""
    machine(clock_latency_s=0.03, clock_register={"reports": "clock asked for"})
    found = measure_latency(bench())
    assert found.register_lag_s == pytest.approx(-0.03, abs=0.01)
    assert found.verdict.standing is Standing.DIFFERS


def test_no_change_shows_where_no_clock_is_obeyed(machine: Machine) -> None:
    """That is not a latency."""
    machine(disobeyed_clocks_mhz=[1000, 900, 800, 700, 600])
    with pytest.raises(NotMeasured, match="not obeyed"):
        measure_latency(bench(0.1))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"disobeyed_clocks_mhz": [800]}, "800 MHz is not: the GPU counts at "),
        ({"clock_register": {"offset_mhz": -60}}, "the register tells "),
        ({"power_limit_w": 270}, "900 MHz is not: the GPU counts at 800 MHz (power cap)"),
    ],
)
@where_there_is_time
def test_clocks_that_are_not_what_they_seem(machine: Machine, fault: dict[str, Any], words: str) -> None:
    """By counting, and beside it what the register tells."""
    machine(**fault)
    verdict = measure_holding(bench()).verdict
    assert words in verdict.sentence
    assert verdict.standing is Standing.DIFFERS


def test_reads_that_fail_now_and_then(machine: Machine) -> None:
    """Each is counted."""
    error = {"function": "nvmlDeviceGetTotalEnergyConsumption", "error": "TIMEOUT", "first": 4, "every": 5}
    machine(driver_errors=[error])
    found = measure_reads(bench())
    counter = found.kinds["energy counter"]
    assert counter.num_failed == pytest.approx(counter.num_reads / 5, rel=0.2)
    assert found.kinds["clock"].num_failed == 0
    assert found.verdict.standing is Standing.DIFFERS


@where_there_is_time
def test_reads_that_take_long_or_are_not_to_be_had(machine: Machine) -> None:
    """Only these are named."""
    node = machine()
    simulated.faults.hang(node.gpus[0], "nvmlDeviceGetClockInfo", 0.01)
    simulated.faults.remove_support(node.gpus[0], "nvmlDeviceGetCurrentClocksThrottleReasons")
    simulated.faults.remove_support(node.gpus[0], "nvmlDeviceGetCurrentClocksEventReasons")
    found = measure_reads(bench())
    assert found.kinds["clock"].idle.median_s > 0.01
    assert found.kinds["power"].idle.median_s < 0.01
    assert list(found.not_supported) == ["throttle reasons"]
    assert found.num_processes == 8
    assert found.verdict.standing is Standing.DIFFERS


@pytest.mark.parametrize(("period_s", "window_s"), [(0.1, 0.025), (0.04, 0.02), (0.2, 0.2)])
@where_there_is_time
def test_a_counter_that_looks_away(machine: Machine, period_s: float, window_s: float) -> None:
    """How much of its period it measures, and the period."""
    machine(energy_counter_period_s=period_s, energy_counter_window_s=window_s)
    found = measure_counter(bench(3.0))
    assert found.period.median_s == pytest.approx(period_s, rel=0.1)
    assert found.window_s == pytest.approx(window_s, rel=0.25)
    assert found.idle_w == pytest.approx(50, abs=15)
    assert found.loaded_w == pytest.approx(300, abs=30)
    assert found.verdict.standing is Standing.DIFFERS


def test_a_gpu_without_a_counter(machine: Machine) -> None:
    """Says what there is instead."""
    node = machine()
    simulated.faults.remove_support(node.gpus[0], "nvmlDeviceGetTotalEnergyConsumption")
    with pytest.raises(NotMeasured, match="no energy counter"):
        measure_counter(bench())


class _LateThreads(OwnThreads):
    """In virtual time: each step of the first thread comes later than asked for by the first number, and so on."""

    def __init__(self, *late_s: float) -> None:
        super().__init__()
        self._late_s, self._now_s = iter(late_s), 0.0

    def now_s(self) -> float:
        return self._now_s

    def start(self, name: str, step: SideStep) -> SideThread:
        late_s = next(self._late_s)
        while (wait := step()) is not None:
            assert isinstance(wait, float)
            self._now_s += wait + late_s
        return super().start(name, lambda: None)


def test_how_late_a_side_thread_comes(machine: Machine) -> None:
    """Exactly, however busy this machine is: alone, beside Python and beside training, each for itself."""
    machine()
    found = measure_lateness(replace(bench(), threads=_LateThreads(0.001, 0.02, 0.0005)))
    assert found.alone.p95_s == pytest.approx(0.001)
    assert found.beside_python.p95_s == pytest.approx(0.02)
    assert found.beside_training.p95_s == pytest.approx(0.0005)
    assert found.verdict.standing is Standing.DIFFERS


@where_there_is_time
def test_a_thread_that_keeps_the_interpreter(machine: Machine) -> None:
    """One call in C that lasts."""
    machine()
    found = measure_lateness(bench(1.0), compute=lambda: sum(range(3_000_000)))
    assert found.beside_python.p95_s > 0.015
    assert found.verdict.standing is Standing.DIFFERS


@where_there_is_time
def test_waiting_that_is_not_cheap(machine: Machine) -> None:
    """As a share of what work draws."""
    machine(blocking_power_w=250)
    found = measure_waiting_power(bench())
    assert found.waiting_w == pytest.approx(250, abs=5)
    assert found.loaded_w > 280
    assert found.verdict.standing is Standing.DIFFERS


@where_there_is_time
def test_a_plan_that_goes_by_a_register_that_lags(machine: Machine) -> None:
    """Where the GPU cannot count: changes are asked for too early by as much as the register is late."""
    machine(clock_register={"lag_s": 0.08})
    found = measure_two_clocks(replace(bench(4.0), slices=None))
    assert found.share_at_higher < 0.85
    assert found.verdict.standing is Standing.DIFFERS


@where_there_is_time
def test_a_plan_of_a_clock_that_is_not_obeyed(machine: Machine) -> None:
    """No plan can be made of it."""
    machine(disobeyed_clocks_mhz=[800])
    with pytest.raises(NotMeasured, match="as long at 800 MHz as at 1000 MHz"):
        measure_two_clocks(bench())


@where_there_is_time
def test_more_calls_than_the_driver_takes(machine: Machine) -> None:
    """They are slow, and on all GPUs together they wait for each other."""
    machine(lock_call_s=0.03)
    found = measure_prices(bench())
    assert {price.num_gpus for price in found.prices} == {1, 2}
    assert found.harmless_per_s <= 5
    assert found.verdict.standing is Standing.DIFFERS


class _HeldUpByCalls:
    """A load that each lock call delays by 3 ms, as NCCL's were."""

    kinds = (MATRIX_PRODUCTS,)

    def __init__(self, load: Load, node: SimulatedNode) -> None:
        self._load, self._node, self._num_calls = load, node, 0
        self.waiting = load.waiting

    def pulse(self, kind: str = MATRIX_PRODUCTS) -> Pulse:
        begin_s, end_s = self._load.pulse(kind)
        num_calls = len(read_clock_requests(self._node.folder))
        end_s += 0.003 * min(4, num_calls - self._num_calls)
        self._num_calls = num_calls
        return Pulse(begin_s, end_s)


@where_there_is_time
def test_calls_that_hold_up_work(machine: Machine) -> None:
    """However quick they are."""
    node = machine()
    normal = bench(4.0)
    found = measure_prices(replace(normal, devices=normal.devices[:1], load=_HeldUpByCalls(normal.load, node)))
    worst = found.prices[-1]
    assert worst.asked_per_s == 50
    assert worst.slower > 0.08 or not worst.is_kept_up, "3 ms in each 20 ms, where this machine has time for the calls"
    assert found.harmless_per_s < 50


def prices_of(slower: dict[int, tuple[float, float]], **changes: float) -> list[Price]:
    """By rate: how much slower work was, and the standard error of that."""
    return [
        replace(Price("products", 1, rate, float(rate), 0.0, *found), **(changes if rate == max(slower) else {}))
        for rate, found in slower.items()
    ]


def test_calls_are_harmless_only_where_that_is_shown() -> None:
    """Noise is no proof, and one long delay in a few pulses is no noise; what many calls cost tells of few."""
    quiet = {1: (0.0, 0.001), 10: (0.001, 0.001), 50: (0.004, 0.001)}
    assert harmless_rate(prices_of(quiet)) == 50
    assert harmless_rate(prices_of({**quiet, 1: (0.01, 0.025)})) == 50
    assert harmless_rate(prices_of({**quiet, 50: (0.03, 0.002)})) == 10
    assert harmless_rate(prices_of({**quiet, 50: (0.113, 0.112), 10: (0.0, 0.02)})) == 1
    assert harmless_rate(prices_of({1: (0.03, 0.02), 10: (0.1, 0.1)})) == 0
    assert harmless_rate(prices_of(quiet, called_per_s=30.0)) == 10
    assert harmless_rate(prices_of(quiet, calling_share=0.6)) == 10


@where_there_is_time
def test_a_clock_that_was_not_given_back(machine: Machine) -> None:
    """The GPU is slower than before."""
    node = machine()
    node.gpus[0].reset_clocks()
    before = measure_unlocked(bench())
    now = open_bench(STEP_S, {"unlocked": {"pulse_s": before.pulse_s}})
    assert measure_as_before(now).verdict.standing is Standing.AS_ASSUMED
    node.gpus[0].lock_clocks(700, 700)
    found = measure_as_before(now)
    assert found.pulse_s > 1.15 * found.before_s
    assert found.verdict.standing is Standing.DIFFERS


@where_there_is_time
def test_a_power_limit_makes_a_plateau(machine: Machine) -> None:
    """From 800 MHz on the clock is held there."""
    machine(power_limit_w=265)
    found = measure_plateau(bench())
    assert found.plateau_from_mhz == 800
    assert found.capped_from_mhz == 900
    assert found.verdict.standing is Standing.DIFFERS


@where_there_is_time
def test_a_clock_that_depends_on_the_one_before(machine: Machine) -> None:
    """One that is not obeyed is another from above than from below."""
    machine(disobeyed_clocks_mhz=[800])
    found = measure_plateau(bench())
    assert found.hysteresis > 0.05
    assert found.verdict.standing is Standing.DIFFERS
