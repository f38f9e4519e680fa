"""Policies: which point of the frontier each one picks."""

from __future__ import annotations

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning import policy
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem

AnyFrontier = Frontier[PipelineProblem]


def test_no_slowdown_takes_the_baseline_time(frontier: AnyFrontier) -> None:
    """Least energy in no more than the baseline's time, and never slower than T*."""
    between = (frontier.fastest_time_s + frontier.min_energy_time_s) / 2
    assert policy.no_slowdown(frontier, between) == between
    assert policy.no_slowdown(frontier, 10 * between) == frontier.min_energy_time_s


def test_straggler_stops_at_the_minimum_energy_point(frontier: AnyFrontier) -> None:
    """The point at min(T', T*)."""
    fastest = frontier.fastest_time_s
    assert policy.straggler(1.02)(frontier, fastest) == pytest.approx(1.02 * fastest)
    assert policy.straggler(9.0)(frontier, fastest) == frontier.min_energy_time_s


def test_max_slowdown_and_time_and_fastest(frontier: AnyFrontier) -> None:
    """Each is the point its name says."""
    fastest = frontier.fastest_time_s
    assert policy.max_slowdown(0.05)(frontier, fastest) == pytest.approx(1.05 * fastest)
    assert policy.iteration_time(1.01 * fastest)(frontier, 1.0) == pytest.approx(1.01 * fastest)
    assert policy.fastest(frontier, 99.0) == fastest


def test_zeus_cost_goes_from_fastest_to_least_energy(frontier: AnyFrontier) -> None:
    """It ends at the frontier's ends, rises with eta, and no time costs less than the pick."""
    times = [policy.zeus_cost(eta, 1600.0)(frontier, 1.0) for eta in np.linspace(0, 1, 21)]
    assert times[0] == frontier.fastest_time_s
    assert times[-1] == pytest.approx(frontier.min_energy_time_s)
    assert (np.diff(times) >= 0).all()
    assert len(set(times)) > 3
    grid = np.linspace(frontier.fastest_time_s, frontier.min_energy_time_s, 500)
    costs = [0.6 * frontier.energy_j(t) + 0.4 * 1600 * t for t in grid]
    picked = policy.zeus_cost(0.6, 1600.0)(frontier, 1.0)
    assert 0.6 * frontier.energy_j(picked) + 0.4 * 1600 * picked <= min(costs) + 1e-9


def test_carbon_cost_is_zeus_cost_at_the_reference_intensity(frontier: AnyFrontier) -> None:
    """Dirtier electricity moves the point towards less energy, cleaner towards less time."""
    zeus = policy.zeus_cost(0.65, 1600.0)(frontier, 1.0)
    dirty, same, clean = (policy.carbon_cost(0.65, 1600.0, now, 400.0)(frontier, 1.0) for now in (440.0, 400.0, 0.0))
    assert clean == frontier.fastest_time_s
    assert same == zeus
    assert dirty > same > clean


def test_power_cap_is_the_fastest_point_within_it(frontier: AnyFrontier) -> None:
    """At the picked time the average power is the cap; just before it is above."""
    powers_w = frontier.energies_j / frontier.times_s
    cap_w = float(powers_w[0] + powers_w[-1]) / 2
    picked = policy.power_cap(cap_w)(frontier, 1.0)
    assert frontier.energy_j(picked) / picked == pytest.approx(cap_w)
    assert frontier.energy_j(0.999 * picked) / (0.999 * picked) > cap_w
    assert policy.power_cap(2 * powers_w[0])(frontier, 1.0) == frontier.fastest_time_s


def test_impossible_wishes_are_refused_with_the_remedy(frontier: AnyFrontier) -> None:
    """Out of range, unreachable, or below what the GPUs draw at the least."""
    for wish, words in [
        (lambda: policy.max_slowdown(1.2), "not in"),
        (lambda: policy.straggler(0.9), "below 1"),
        (lambda: policy.zeus_cost(1.5, 100.0), "eta"),
        (lambda: policy.carbon_cost(0.5, 100.0, -1.0, 400.0), "carbon intensity"),
        (lambda: policy.iteration_time(0.5 * frontier.fastest_time_s)(frontier, 1.0), "the fastest is"),
        (lambda: policy.power_cap(1.0)(frontier, 1.0), "minimum-energy point"),
    ]:
        with pytest.raises(InputError, match=words):
            wish()
