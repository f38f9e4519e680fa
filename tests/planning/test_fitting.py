from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perseus_core.planning.fitting import fit_profile, monotone_interpolation
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.rounding import Rounder
from perseus_core.planning.schedule import InstructionType, Kind, one_f_one_b
from perseus_core.planning.solver import solve

A100_PROFILE = (
    Path(__file__).parents[3] / "shared" / "data" / "sosp24" / "stage_profile" / "gpt3-175b+a100_sxm_bf16.csv"
)
BLOCKING_POWER_W = 83.64
CLOCKS_MHZ = range(600, 1500, 60)

Array = NDArray[np.float64]


def smooth_profile(scales: list[float], clocks_mhz: range = CLOCKS_MHZ) -> Profile:
    """Stages of one shape and these scales: compute- and memory-bound time, static and cubic power."""
    return Profile(
        tuple(
            Measurement(
                InstructionType(stage, 0, Kind.FORWARD),
                clock,
                time_s=scale * (0.02 + 30 / clock),
                energy_j=scale * (0.02 + 30 / clock) * (80 + 300 * (clock / 1500) ** 3),
            )
            for stage, scale in enumerate(scales)
            for clock in clocks_mhz
        )
    )


def with_noise(profile: Profile, noise: float, seed: int) -> Profile:
    rng = np.random.default_rng(seed)
    return Profile(
        tuple(
            replace(
                m,
                time_s=m.time_s * (1 + noise * rng.standard_normal()),
                energy_j=m.energy_j * (1 + noise * rng.standard_normal()),
            )
            for m in profile.measurements
        )
    )


def scaled(profile: Profile, time: float = 1.0, energy: float = 1.0) -> Profile:
    return Profile(
        tuple(replace(m, time_s=m.time_s * time, energy_j=m.energy_j * energy) for m in profile.measurements)
    )


def thinned(profile: Profile, num_clocks: int) -> Profile:
    clocks = sorted({m.clock_mhz for m in profile.measurements})
    kept = {clocks[i] for i in np.linspace(0, len(clocks) - 1, num_clocks).round().astype(int)}
    return Profile(tuple(m for m in profile.measurements if m.clock_mhz in kept))


def times_s(profile: Profile) -> Array:
    return np.array([m.time_s for m in profile.measurements])


def energies_j(profile: Profile) -> Array:
    return np.array([m.energy_j for m in profile.measurements])


def relative_error(profile: Profile, truth: Profile) -> float:
    """Root mean square of the relative errors of times and energies."""
    errors = np.r_[times_s(profile) / times_s(truth), energies_j(profile) / energies_j(truth)] - 1
    return float(np.sqrt(np.mean(errors**2)))


def assert_convex(x: Array, y: Array) -> None:
    """Every inner point lies on or below the chord of its neighbours, but for rounding."""
    left, right = np.diff(x)[:-1], np.diff(x)[1:]
    chord = (y[:-2] * right + y[2:] * left) / (left + right)
    assert (y[1:-1] <= chord * (1 + 1e-4)).all()


@st.composite
def rough_profiles(draw: st.DrawFn) -> Profile:
    """Any positive table at all: random times and energies, and each stage measured at clocks of its own."""
    value = st.floats(0.1, 10.0)
    measurements = []
    for stage in range(draw(st.integers(1, 3))):
        clocks = draw(st.sets(st.integers(10, 20), min_size=1).map(lambda drawn: drawn | {20}))
        for clock in clocks:
            of_type = InstructionType(stage, 0, Kind.FORWARD)
            measurements.append(Measurement(of_type, 100 * clock, draw(value), draw(value), draw(st.integers(1, 50))))
    return Profile(tuple(measurements))


@given(profile=rough_profiles())
@settings(max_examples=60)
def test_whatever_was_measured_times_fall_with_the_clock_and_are_convex(profile: Profile) -> None:
    """Times never rise with the clock, not even by a rounding error, and are convex in it."""
    fitted = fit_profile(profile)
    for t in fitted.types:
        clocks = np.array([m.clock_mhz for m in reversed(fitted.of(t))], dtype=float)
        times = np.array([m.time_s for m in reversed(fitted.of(t))])
        assert (np.diff(times) <= 0).all()
        assert_convex(clocks, times)


@given(profile=rough_profiles())
@settings(max_examples=60)
def test_whatever_was_measured_energy_is_convex_in_time(profile: Profile) -> None:
    """Energy over time is convex where times differ, with the least energy of those that are equal."""
    fitted = fit_profile(profile)
    for t in fitted.types:
        least: dict[float, float] = {}
        for m in fitted.of(t):
            least[m.time_s] = min(m.energy_j, least.get(m.time_s, np.inf))
        times = np.array(sorted(least))
        apart = np.r_[True, np.diff(times) > 1e-3 * times[:-1]]
        assert_convex(times[apart], np.array([least[time] for time in times])[apart])


@given(time=st.sampled_from([1e-3, 1e3]), energy=st.sampled_from([1e-6, 1e3]), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_units_do_not_matter(time: float, energy: float, seed: int) -> None:
    """Milliseconds or kilojoules give the same curves as seconds and joules."""
    profile = with_noise(smooth_profile([1.0, 1.1, 1.0]), 0.02, seed)
    assert relative_error(fit_profile(scaled(profile, time, energy)), scaled(fit_profile(profile), time, energy)) < 1e-6


def test_one_clock_is_returned_as_it_is() -> None:
    """With one clock for every type there is nothing to smooth."""
    profile = with_noise(smooth_profile([1.0, 1.1, 1.0], range(1410, 1411)), 0.1, seed=0)
    assert relative_error(fit_profile(profile), profile) < 1e-12


@pytest.mark.parametrize("num_clocks", [2, 5, 15, 90])
def test_clean_measurements_are_not_distorted(num_clocks: int) -> None:
    """Smooth, noise-free curves of stages of all sizes come back as they went in."""
    profile = smooth_profile([1.0, 1.001, 1.3], range(600, 1500, 900 // num_clocks))
    assert relative_error(fit_profile(profile), profile) < 1e-6


def test_a_stage_of_another_shape_keeps_it_when_measurements_are_clean() -> None:
    """Likeness is assumed only where noise hides the truth: a memory-bound stage among compute-bound ones stays so."""
    profile = smooth_profile([1.0, 1.0, 1.0, 1.0])
    memory_bound = tuple(
        replace(m, time_s=0.05 + 3 / m.clock_mhz) if m.type.stage == 3 else m for m in profile.measurements
    )
    assert relative_error(fit_profile(Profile(memory_bound)), Profile(memory_bound)) < 1e-6


def test_noise_is_reduced_several_times() -> None:
    """Eight stages of one shape, 2 % of noise: what is left is below half a per cent."""
    truth = smooth_profile([1.0] * 7 + [1.08], range(900, 1420, 15))
    errors = [relative_error(fit_profile(with_noise(truth, 0.02, seed)), truth) for seed in range(5)]
    assert np.mean(errors) < 0.005


def test_more_samples_count_more() -> None:
    """A wrong value is followed when it stands on many samples, and smoothed away when it stands on one."""
    clean = smooth_profile([1.0])
    wrong = clean.measurements[0].time_s * 1.1

    def fitted_top_time_s(samples: int) -> float:
        first, *others = (replace(m, samples=10) for m in clean.measurements)
        return fit_profile(Profile((replace(first, time_s=wrong, samples=samples), *others))).measurements[0].time_s

    assert fitted_top_time_s(1) < fitted_top_time_s(10) < fitted_top_time_s(1000) <= wrong * (1 + 1e-9)


@pytest.mark.parametrize("quantity", ["time", "energy"])
def test_wide_spread_counts_less(quantity: str) -> None:
    """A wrong value whose executions varied widely pulls the curve less than one whose executions agreed."""
    clean = smooth_profile([1.0])
    value, deviation = {"time": ("time_s", "time_std_s"), "energy": ("energy_j", "energy_std_j")}[quantity]
    place = len(clean.measurements) // 2

    def error(relative_std: float) -> float:
        measurements = [replace(m, samples=20, **{deviation: 0.01 * getattr(m, value)}) for m in clean.measurements]
        wrong = 1.1 * getattr(measurements[place], value)
        measurements[place] = replace(measurements[place], **{value: wrong, deviation: relative_std * wrong})
        fitted = fit_profile(Profile(tuple(measurements))).measurements[place]
        return getattr(fitted, value) / getattr(clean.measurements[place], value) - 1

    assert abs(error(0.2)) < 0.5 * abs(error(0.005))


def test_clocks_are_added_within_the_measured_range_only() -> None:
    """Interpolation adds the clocks between, never beyond, and leaves the measured ones alone."""
    profile = thinned(smooth_profile([1.0, 1.1]), 5)
    filled = fit_profile(profile, clocks_mhz=[300, 615, 900, 905, 3000])
    assert sorted({m.clock_mhz for m in filled.measurements} - {m.clock_mhz for m in profile.measurements}) == [
        615,
        900,
        905,
    ]
    assert set(fit_profile(profile).measurements) <= set(filled.measurements)


def test_added_clocks_are_near_the_truth() -> None:
    """Of 15 clocks, 8 tell the others within a quarter of a per cent."""
    truth = smooth_profile([1.0, 1.1])
    assert relative_error(fit_profile(thinned(truth, 8), clocks_mhz=CLOCKS_MHZ), truth) < 0.0025


@given(
    x=st.lists(st.integers(0, 1000), min_size=2, max_size=12, unique=True).map(sorted),
    steps=st.lists(st.floats(0, 10), min_size=12, max_size=12),
)
@settings(max_examples=60)
def test_interpolation_is_monotone_and_meets_its_knots(x: list[int], steps: list[float]) -> None:
    """Between falling values nothing rises or overshoots."""
    knots, values = np.array(x, dtype=float), -np.cumsum(steps)[: len(x)]
    between = monotone_interpolation(knots, values, np.linspace(knots[0], knots[-1], 200))
    assert (np.diff(between) <= 1e-9).all()
    assert monotone_interpolation(knots, values, knots) == pytest.approx(values)


def published_profile() -> Profile:
    if not A100_PROFILE.exists():
        pytest.skip(f"{A100_PROFILE} is not there")
    return Profile.load(A100_PROFILE)


def default_clocks_mhz(problem: PipelineProblem, max_clock_mhz: int) -> list[int]:
    """The clocks of least energy in no more than the all-maximum-clock time."""
    limit_s, _ = time_and_energy(problem, [max_clock_mhz] * len(problem.schedule.instructions))
    choice = Rounder(problem).choose(solve(problem), limit_s)
    return [problem.curves[curve].clocks_mhz[k] for curve, k in zip(problem.curve_of, choice, strict=True)]


def time_and_energy(problem: PipelineProblem, clocks_mhz: list[int]) -> tuple[float, float]:
    table = {(m.type, m.clock_mhz): m for of_type in problem.measurements for m in of_type}
    run = [table[i.type, clock] for i, clock in zip(problem.schedule.instructions, clocks_mhz, strict=True)]
    time_s = problem.dag.iteration_time_s(np.array([m.time_s for m in run]))
    waiting_s = problem.schedule.num_stages * time_s - sum(m.time_s for m in run)
    return time_s, sum(m.energy_j for m in run) + BLOCKING_POWER_W * waiting_s


def true_slowdown_and_saving(fitted: Profile, truth: Profile) -> tuple[float, float]:
    """What the default plan made from a fitted profile does in truth: GPT-3 175B on A100, 1F1B, 24 microbatches."""
    schedule = one_f_one_b(truth.num_stages, 24)
    clocks = default_clocks_mhz(PipelineProblem.of(fitted, schedule, BLOCKING_POWER_W), truth.measurements[0].clock_mhz)
    reality = PipelineProblem.of(truth, schedule, BLOCKING_POWER_W)
    baseline_time_s, baseline_energy_j = time_and_energy(reality, [truth.measurements[0].clock_mhz] * len(clocks))
    time_s, energy_j = time_and_energy(reality, clocks)
    return time_s / baseline_time_s - 1, 1 - energy_j / baseline_energy_j


def test_plans_from_clean_measurements_lose_nothing() -> None:
    """On the published profile smoothing costs at most 0.1 points of saving and 0.05 % of time."""
    truth = published_profile()
    _, exact_saving = true_slowdown_and_saving(truth, truth)
    slowdown, saving = true_slowdown_and_saving(fit_profile(truth), truth)
    assert slowdown < 0.0005
    assert saving > exact_saving - 0.001


def test_plans_from_eight_clocks_save_as_much() -> None:
    """Eight of the 38 published clocks lose less than 0.3 points of saving."""
    truth = published_profile()
    all_clocks = sorted({m.clock_mhz for m in truth.measurements})
    _, exact_saving = true_slowdown_and_saving(truth, truth)
    slowdown, saving = true_slowdown_and_saving(fit_profile(thinned(truth, 8), clocks_mhz=all_clocks), truth)
    assert slowdown < 0.001
    assert saving > exact_saving - 0.003


def test_plans_from_noisy_measurements_keep_their_promise() -> None:
    """With 2 % of noise on the published profile a plan is hardly slower than it says, and saves as much."""
    truth = published_profile()
    outcomes = [true_slowdown_and_saving(fit_profile(with_noise(truth, 0.02, seed)), truth) for seed in range(4)]
    slowdowns, savings = np.array(outcomes).T
    assert slowdowns.mean() < 0.005
    assert slowdowns.max() < 0.012
    assert abs(savings.mean() - 0.146) < 0.012
