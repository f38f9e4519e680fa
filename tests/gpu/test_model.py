"""The physics of the simulated GPU against closed forms."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_core.gpu.simulated import model as physics
from perseus_core.gpu.simulated.model import GpuModel, GpuState, InstructionCost

MODEL = GpuModel(
    clocks_mhz=(1000, 800, 500),
    blocking_w=(60.0, 50.0, 40.0),
    costs=(InstructionCost((1.0, 1.25, 2.0), (300.0, 300.0, 320.0)),),  # 300, 240 and 160 W
    clock_latencies_s=(0.1, 0.1, 0.0),
    counter_period_s=0.25,
)


def fresh_state(time_s: float = 0.0) -> GpuState:
    return GpuState(time_s, 1000, 400.0)


def test_work_then_waiting_costs_its_energy_and_blocking_power() -> None:
    """One second of work and three of waiting: 300 J + 3 s x 60 W."""
    state = fresh_state()
    physics.start_work(state, 0, 1.0, 1.0)
    physics.advance(MODEL, state, 4.0)
    assert state.work is not None
    assert state.work.end_s == pytest.approx(1.0)
    assert state.work.energy_j == pytest.approx(300.0)
    assert state.energy_j == pytest.approx(300 + 3 * 60)
    assert state.busy_s == pytest.approx(1.0)


def test_a_clock_change_in_the_middle_counts_in_proportion() -> None:
    """Four tenths done at 1000 MHz leave six tenths at 500 MHz, whatever is left of the latency included."""
    state = fresh_state()
    physics.start_work(state, 0, 1.0, 1.0)
    physics.advance(MODEL, state, 0.3)
    physics.request_clock(MODEL, state, 500)  # in force at 0.4
    physics.advance(MODEL, state, 10.0)
    assert state.work is not None
    assert state.work.end_s == pytest.approx(0.4 + 0.6 * 2.0)
    assert state.work.energy_j == pytest.approx(0.4 * 300 + 0.6 * 320)
    assert state.work.segments == [[1000, pytest.approx(0.4)], [500, pytest.approx(1.2)]]
    assert state.energy_j == pytest.approx(0.4 * 300 + 0.6 * 320 + (10 - 1.6) * 40)


def test_noise_factors_stretch_time_and_energy_independently() -> None:
    """An execution that takes 10 % longer and costs 5 % more draws the power that follows."""
    state = fresh_state()
    physics.start_work(state, 0, 1.1, 1.05)
    physics.advance(MODEL, state, 0.55)
    assert state.energy_j == pytest.approx(300 * 1.05 / 2)
    physics.advance(MODEL, state, 2.0)
    assert state.work is not None
    assert state.work.end_s == pytest.approx(1.1)
    assert state.work.energy_j == pytest.approx(315.0)


def test_heat_limits_whatever_is_locked() -> None:
    """A hot GPU runs at the highest supported clock below what heat allows."""
    state = fresh_state()
    state.thermal_limit_mhz = 900
    assert MODEL.clocks_mhz[physics.effective_clock_index(MODEL, state)] == 800


def test_the_power_limit_holds_the_clock_down_only_while_it_is_exceeded() -> None:
    """At 250 W work runs at 800 MHz (240 W), while waiting needs no capping."""
    state = fresh_state()
    state.power_limit_w = 250.0
    assert MODEL.clocks_mhz[physics.effective_clock_index(MODEL, state)] == 1000
    physics.start_work(state, 0, 1.0, 1.0)
    assert MODEL.clocks_mhz[physics.effective_clock_index(MODEL, state)] == 800
    physics.advance(MODEL, state, 3.0)
    assert state.work is not None
    assert state.work.end_s == pytest.approx(1.25)


def test_the_counter_shows_the_energy_at_the_last_boundary() -> None:
    """Between boundaries it stands still, even if nobody looked for many periods."""
    state = fresh_state()
    physics.start_work(state, 0, 1.0, 1.0)
    physics.advance(MODEL, state, 0.7)
    assert state.energy_j == pytest.approx(210.0)
    assert state.counter_j == pytest.approx(150.0)
    physics.advance(MODEL, state, 0.74)
    assert state.counter_j == pytest.approx(150.0)
    physics.advance(MODEL, state, 5.1)
    assert state.counter_j == pytest.approx(300 + 4 * 60)
    assert state.energy_j == pytest.approx(300 + 4.1 * 60)


def test_requests_in_quick_succession_come_into_force_one_by_one() -> None:
    """Each clock is in force one latency after its own request."""
    state = fresh_state()
    physics.request_clock(MODEL, state, 500)
    physics.advance(MODEL, state, 0.05)
    physics.request_clock(MODEL, state, 800)
    seen = []
    for time_s in (0.09, 0.11, 0.16):
        physics.advance(MODEL, state, time_s)
        seen.append(state.set_clock_mhz)
    assert seen == [1000, 500, 800]


def test_the_predicted_work_is_the_work_that_happens() -> None:
    """Looking ahead over a pending clock change gives the very end, energy and segments, and changes nothing."""
    state = fresh_state()
    physics.start_work(state, 0, 1.0, 1.0)
    physics.request_clock(MODEL, state, 500)
    before = copy.deepcopy(state)
    predicted = physics.finished_work(MODEL, state)
    assert state == before
    physics.advance(MODEL, state, 5.0)
    assert state.work is not None
    assert predicted.end_s == pytest.approx(state.work.end_s)
    assert predicted.energy_j == pytest.approx(state.work.energy_j)


@given(
    st.lists(st.floats(0.001, 0.5), min_size=1, max_size=30),
    st.sampled_from([500, 800, 1000]),
    st.sampled_from([0.0, 0.1, 0.25]),
)
def test_how_often_somebody_looks_changes_nothing(steps_s: list[float], clock_mhz: int, window_s: float) -> None:
    """Energy, counter and end are the same whether the state is advanced in one step or in many."""
    model = replace(MODEL, counter_window_s=window_s)

    def started() -> GpuState:
        state = fresh_state()
        state.power_limit_w = 250.0
        physics.start_work(state, 0, 1.0, 1.0)
        physics.request_clock(model, state, clock_mhz)
        return state

    often, once = started(), started()
    for step_s in steps_s:
        physics.advance(model, often, often.time_s + step_s)
    physics.advance(model, once, often.time_s)
    assert often.energy_j == pytest.approx(once.energy_j)
    assert often.counter_j == pytest.approx(once.counter_j)
    assert often.counter_busy_s == pytest.approx(once.counter_busy_s)
    assert often.work is not None
    assert once.work is not None
    assert often.work.remaining == pytest.approx(once.work.remaining, abs=1e-9)
    assert often.work.energy_j == pytest.approx(once.work.energy_j)


def test_clocks_between_measured_ones_are_interpolated() -> None:
    """Half way between two measured clocks, time and energy are half way; below the lowest, power stays."""
    cost = physics.interpolate_costs([1200, 1000, 900, 800, 400], [(800, 2.0, 100.0), (1000, 1.0, 200.0)], scale=1.0)
    assert cost.time_s == pytest.approx((1.0, 1.0, 1.5, 2.0, 4.0))
    assert cost.energy_j == pytest.approx((200.0, 200.0, 150.0, 100.0, 200.0))


def test_time_scale_keeps_power() -> None:
    """A tenth of the time and a tenth of the energy."""
    cost = physics.interpolate_costs([1000], [(1000, 2.0, 100.0)], scale=0.1)
    assert cost.time_s == pytest.approx((0.2,))
    assert cost.energy_j == pytest.approx((10.0,))


def test_a_change_down_takes_its_own_time_and_either_may_take_longer() -> None:
    """By chance, evenly; and no change comes before one that was asked for earlier."""
    model = replace(MODEL, clock_latencies_s=(0.1, 0.3, 0.2))
    latencies_s = {1000: [], 500: []}  # type: dict[int, list[float]]
    for start_s in range(200):
        state = fresh_state(start_s + 0.123)
        for clock_mhz in (500, 1000):
            before_s = state.time_s
            physics.request_clock(model, state, clock_mhz)
            in_force_s, asked_mhz = state.pending[-1]
            assert asked_mhz == clock_mhz
            latencies_s[clock_mhz].append(in_force_s - before_s)
            physics.advance(model, state, in_force_s)
            assert state.set_clock_mhz == clock_mhz
    for clock_mhz, least_s in ((1000, 0.1), (500, 0.3)):
        assert least_s <= min(latencies_s[clock_mhz]) < least_s + 0.02
        assert least_s + 0.18 < max(latencies_s[clock_mhz]) <= least_s + 0.2
    state = fresh_state()
    physics.request_clock(model, state, 500)
    physics.request_clock(model, state, 1000)
    assert state.pending[1][0] >= state.pending[0][0]
