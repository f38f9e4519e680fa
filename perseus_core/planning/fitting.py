"""Fitting: from noisy measurements to times and energies a solver can trust.

A solver fed with raw measurements picks their luckiest errors, and its plans are slower than they promise. Three
things that are known beforehand take most of the noise away:

1. Physics. Time falls with the clock, ever more slowly, so it is a decreasing convex function of the clock. Energy is a
   convex function of time, and so is effective energy at any blocking power, which differs by a straight line.
2. Likeness. Stages of one model hold the same layers: their curves of one kind of instruction share a shape, and mostly
   the scale too. Every curve is fitted alone and together with its family, and the two are blended.
3. Honesty about noise. The blend believes a curve's own deviation only so far as it exceeds what noise does by chance.
   Noise is what stages do not share of the scatter around their curves, so a clean table is followed as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import Kind

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
# Takes x, y and weights; returns the fitted y and how many parameters the fit has used.
Regression = Callable[[Array, Array, Array], tuple[Array, int]]

# A standard deviation from few samples is itself uncertain: it is averaged with the typical one, which counts so many.
_TYPICAL_SPREAD_SAMPLES = 4
# Relative distance put between equal times, so that the energies of clocks that are equally fast keep their order.
_TIE_BREAK = 1e-9
_FLAT = 1e-9


def fit_profile(profile: Profile, *, clocks_mhz: Sequence[int] | Mapping[int, Sequence[int]] = ()) -> Profile:
    """Smooths a measured profile.

    Measurements count by their samples and, where given, their standard deviations, relative to the measured value.

    Args:
        profile: measurements, as they are.
        clocks_mhz: clocks to add by monotone interpolation, the same for all stages or by stage; those outside a type's
            measured range are left out.

    Returns:
        The profile with, for each type, times that never rise with the clock and are convex in it, and energies
        convex in time. A profile of one clock comes back unchanged.
    """
    times, time_weights = _table(profile, [(m.time_s, m.time_std_s) for m in profile.measurements])
    energies, energy_weights = _table(profile, [(m.energy_j, m.energy_std_j) for m in profile.measurements])
    families = _families(profile)

    clocks = np.broadcast_to(_clocks(profile), times.shape)
    fitted_times = _fit_together(clocks, times, time_weights, families, _decreasing_convex_regression)
    untied_times = fitted_times * (1 - _TIE_BREAK * np.arange(times.shape[1]))
    fitted_energies = _fit_together(untied_times, energies, energy_weights, families, _convex_regression)

    def of_stage(stage: int) -> Sequence[int]:
        return clocks_mhz.get(stage, ()) if isinstance(clocks_mhz, Mapping) else clocks_mhz

    fitted: list[Measurement] = []
    for row, instruction_type in enumerate(profile.types):
        measured = [
            replace(m, time_s=float(time), energy_j=float(energy))
            for m, time, energy in zip(
                reversed(profile.of(instruction_type)),
                fitted_times[row][time_weights[row] > 0],
                fitted_energies[row][energy_weights[row] > 0],
                strict=True,
            )
        ]
        fitted += measured + _interpolated(measured, of_stage(instruction_type.stage))
    return Profile(tuple(fitted))


def _families(profile: Profile) -> list[Rows]:
    """Rows of types that are alike: of one kind, on stages with the same GPUs, as their highest clock tells."""
    top_mhz: dict[int, int] = {}
    for m in profile.measurements:
        top_mhz[m.type.stage] = max(m.clock_mhz, top_mhz.get(m.type.stage, 0))
    members: dict[tuple[Kind, int], list[int]] = {}
    for row, t in enumerate(profile.types):
        members.setdefault((t.kind, top_mhz[t.stage]), []).append(row)
    return [np.array(rows) for rows in members.values()]


def _clocks(profile: Profile) -> Array:
    return np.array(sorted({m.clock_mhz for m in profile.measurements}), dtype=float)


def _table(profile: Profile, values_and_deviations: list[tuple[float, float | None]]) -> tuple[Array, Array]:
    """Values and weights as arrays of types x clocks (ascending); value 1 and weight 0 where nothing was measured.

    A weight is proportional to the inverse relative variance of the mean.
    """
    relative_variances = [None if std is None else (std / value) ** 2 for value, std in values_and_deviations]
    known = [variance for variance in relative_variances if variance]
    typical = float(np.median(known)) if known else 1.0

    rows = {t: row for row, t in enumerate(profile.types)}
    clocks = _clocks(profile)
    values, weights = np.ones((len(rows), len(clocks))), np.zeros((len(rows), len(clocks)))
    for m, (value, _), own in zip(profile.measurements, values_and_deviations, relative_variances, strict=True):
        variance = typical
        if own is not None:
            prior = _TYPICAL_SPREAD_SAMPLES
            variance = (prior * typical + m.samples * own) / (prior + m.samples)
        cell = rows[m.type], np.searchsorted(clocks, m.clock_mhz)
        values[cell], weights[cell] = value, m.samples / variance
    return values, weights


def _fit_together(x: Array, y: Array, weights: Array, families: list[Rows], fit: Regression) -> Array:
    """Fits y over x for every row alone and with its family, and blends the two. All arrays are types x clocks."""
    alone, parameters = y.copy(), np.zeros(len(y))
    for row in range(len(y)):
        measured = weights[row] > 0
        alone[row, measured], parameters[row] = fit(x[row, measured], y[row, measured], weights[row, measured])
    noise = _noise_variance(np.log(y / alone), weights, parameters, families)

    fitted: Array = alone.copy()
    for rows in families:
        shape = _shared_shape(x[rows], y[rows], weights[rows], fit)
        log_scales = np.average(np.log(y[rows] / shape), axis=1, weights=weights[rows])
        centre = np.median(log_scales)
        for row, log_scale in zip(rows, log_scales, strict=True):
            w, own_shape = weights[row], alone[row] / np.exp(log_scale)
            shape_share = _trusted_share(w @ np.log(own_shape / shape) ** 2, noise, parameters[row] - 1)
            scale_share = _trusted_share(w.sum() * (log_scale - centre) ** 2, noise, 1)
            scale = np.exp(centre + scale_share * (log_scale - centre))
            blend = scale * (shape_share * own_shape + (1 - shape_share) * shape)
            # The family's curve is convex over the family's x, which is not quite this row's.
            measured = w > 0
            fitted[row, measured], _ = fit(x[row, measured], blend[measured], w[measured])
    return fitted


def _noise_variance(log_residuals: Array, weights: Array, parameters: Array, families: list[Rows]) -> float:
    """Variance of a measurement of weight 1, from the residuals that the types of a family do not share.

    What they share is no noise, but where the truth is not quite convex. Families of one type tell nothing; without any
    scatter to learn from the answer is 0.
    """
    square_sum = freedom = 0.0
    for rows in families:
        w, residuals = weights[rows], log_residuals[rows]
        clock_weights = np.maximum(w.sum(axis=0), np.finfo(float).tiny)
        unshared = residuals - (w * residuals).sum(axis=0) / clock_weights
        # Taking away the shared part takes away as much freedom as each measurement has weight in it.
        left = np.where(w > 0, 1 - w / clock_weights, 0).sum(axis=1)
        num_clocks = (w > 0).sum(axis=1)
        square_sum += float((w * unshared**2).sum())
        freedom += float((left * (1 - parameters[rows] / num_clocks)).sum())
    return square_sum / freedom if freedom > 0 else 0.0


def _shared_shape(x: Array, y: Array, weights: Array, fit: Regression) -> Array:
    """The curve (one value a clock) that all rows are multiples of, as nearly as they are."""
    clock_weights = weights.sum(axis=0)
    measured = clock_weights > 0
    shape: Array = np.ones_like(clock_weights)
    shape[measured], _ = fit(_column_effects(x, weights), _column_effects(y, weights), clock_weights[measured])
    return shape


def _column_effects(values: Array, weights: Array) -> Array:
    """Least squares of log(value) = row + column: returns exp(column), for the columns with any weight."""
    rows, columns = np.nonzero(weights)
    used = np.unique(columns)
    design = np.hstack([rows[:, None] == np.arange(len(values)), columns[:, None] == used]).astype(float)
    root = np.sqrt(weights[rows, columns])
    effects = np.linalg.lstsq(design * root[:, None], np.log(values[rows, columns]) * root, rcond=None)[0]
    effect: Array = np.exp(effects[len(values) :])
    return effect


def _trusted_share(deviation: float, noise_variance: float, freedom: float) -> float:
    """How much of a deviation (a weighted sum of squares) to believe: 0 where noise explains it, towards 1 far beyond.

    James and Stein's positive-part estimator (1961), with Breiman's caution (the non-negative garrote, 1995): noise is
    granted the mean and two standard deviations of the chi-square distribution with so many degrees of freedom.
    """
    by_chance = noise_variance * (freedom + 2 * np.sqrt(2 * freedom))
    return float(1 - by_chance / deviation) if deviation > by_chance else 0.0


def _decreasing_convex_regression(x: Array, y: Array, weights: Array) -> tuple[Array, int]:
    """Weighted least-squares fit of relative errors by a decreasing convex function of x."""
    knots = np.unique(x)
    return _regression(np.maximum(knots[1:] - x[:, None], 0), y, weights)


def _convex_regression(x: Array, y: Array, weights: Array) -> tuple[Array, int]:
    """Weighted least-squares fit of relative errors by a convex function of x (Hildreth, 1954)."""
    knots = np.unique(x)
    falling, rising = np.maximum(knots[1:] - x[:, None], 0), np.maximum(x[:, None] - knots[:-1], 0)
    return _regression(np.hstack([falling, rising]), y, weights)


def _regression(hinges: Array, y: Array, weights: Array) -> tuple[Array, int]:
    """Fits y by a constant and non-negative multiples of hinges; returns the fit and how many terms it took."""
    basis = np.hstack([np.ones((len(y), 1)), hinges])
    root = np.sqrt(weights) / y
    coefficients = _non_negative_least_squares(basis * root[:, None], y * root)
    # What rises by less than this is flat: equal times must come out equal, not apart by a rounding error.
    coefficients[coefficients * basis.max(axis=0) < _FLAT * y.max()] = 0
    fitted: Array = basis @ coefficients
    return fitted, int(np.count_nonzero(coefficients))


def _non_negative_least_squares(matrix: Array, target: Array) -> Array:
    """Lawson and Hanson's active-set algorithm (Solving Least Squares Problems, 1974, chapter 23)."""
    norms = np.linalg.norm(matrix, axis=0)
    matrix = matrix / norms
    tolerance = 1e-12 * float(np.linalg.norm(target))
    solution = np.zeros(matrix.shape[1])
    active = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(3 * matrix.shape[1]):
        gradient = np.where(active, -np.inf, matrix.T @ (target - matrix @ solution))
        if gradient.max() <= tolerance:
            break
        active[gradient.argmax()] = True
        while True:
            trial = np.zeros_like(solution)
            trial[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            leaving = active & (trial <= 0)
            if not leaving.any():
                break
            steps = solution[leaving] / (solution[leaving] - trial[leaving])
            solution += steps.min() * (trial - solution)
            active[np.flatnonzero(leaving)[steps <= steps.min()]] = False
            solution[~active] = 0
        solution = trial
    coefficients: Array = solution / norms
    return coefficients


def _interpolated(measured: list[Measurement], clocks_mhz: Sequence[int]) -> list[Measurement]:
    """Measurements of one type (ascending clocks) at those of `clocks_mhz` that lie strictly between its own."""
    known = [m.clock_mhz for m in measured]
    wanted = sorted(clock for clock in set(clocks_mhz) - set(known) if known[0] < clock < known[-1])
    if not wanted:
        return []
    x, at = np.array(known, dtype=float), np.array(wanted, dtype=float)
    times = monotone_interpolation(x, np.array([m.time_s for m in measured]), at)
    energies = monotone_interpolation(x, np.array([m.energy_j for m in measured]), at)
    return [
        Measurement(measured[0].type, clock, float(time), float(energy))
        for clock, time, energy in zip(wanted, times, energies, strict=True)
    ]


def monotone_interpolation(x: Array, y: Array, at: Array) -> Array:
    """Cubic Hermite interpolation that is monotone wherever the data are (PCHIP).

    Fritsch and Carlson (1980); slopes by Fritsch and Butland (1984), one-sided at the ends.

    Args:
        x: knots, ascending, two or more.
        y: values at the knots.
        at: where to interpolate, within the knots' range.
    """
    widths, secants = np.diff(x), np.diff(y) / np.diff(x)
    slopes = np.empty_like(y)
    slopes[0], slopes[-1] = secants[0], secants[-1]
    before, after = secants[:-1], secants[1:]
    weight_before, weight_after = 2 * widths[1:] + widths[:-1], widths[1:] + 2 * widths[:-1]
    same_sign = before * after > 0
    slopes[1:-1] = 0
    slopes[1:-1][same_sign] = (weight_before + weight_after)[same_sign] / (
        weight_before[same_sign] / before[same_sign] + weight_after[same_sign] / after[same_sign]
    )

    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    h = widths[left]
    u = (at - x[left]) / h
    value: Array = (
        y[left]
        + u**2 * (3 - 2 * u) * (y[left + 1] - y[left])
        + u * (1 - u) * h * ((1 - u) * slopes[left] - u * slopes[left + 1])
    )
    return value
