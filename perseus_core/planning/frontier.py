"""The frontier: least energy of an iteration for every iteration time, and the durations that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.planning.problem import Problem

AnyProblem = TypeVar("AnyProblem", bound=Problem, covariant=True)


@dataclass(frozen=True, eq=False)
class Frontier(Generic[AnyProblem]):
    """A convex, falling polyline of iteration energy over iteration time, from the fastest to the minimum-energy point.

    Times and energies are exact at every vertex and between. Durations are stored at some vertices; interpolated
    between these they keep the iteration time and cost hardly more energy (see `solver.solve`).

    Attributes:
        problem: what was solved.
        times_s: float64 of shape (V,), ascending: iteration time, time outside the pipeline included.
        energies_j: float64 of shape (V,), not ascending: energy of the iteration, one GPU for each stage.
        stored: int64 of shape (K,), ascending: the vertices at which durations are stored; first and last are always.
        positions: float32 of shape (K, N): where on the hull of its tradeoff curve each instruction stands, as the
            number of a knot plus the share of the way to the next slower one.
    """

    problem: AnyProblem
    times_s: NDArray[np.float64]
    energies_j: NDArray[np.float64]
    stored: NDArray[np.int64]
    positions: NDArray[np.float32]

    @property
    def fastest_time_s(self) -> float:
        """The shortest iteration time there is."""
        return float(self.times_s[0])

    @property
    def min_energy_time_s(self) -> float:
        """T*: the iteration time of least energy. Longer only costs more."""
        return float(self.times_s[-1])

    @cached_property
    def marginal_power_w(self) -> NDArray[np.float64]:
        """float64 of shape (V - 1,): energy saved per second of lengthening, on each segment; 0 at least."""
        return -np.diff(self.energies_j) / np.diff(self.times_s)

    def energy_j(self, iteration_time_s: float) -> float:
        """Energy until this time: the least there is up to T*; beyond, the pipeline runs at T* and waits.

        Raises:
            InputError: if the iteration cannot be that fast.
        """
        self._require_reachable(iteration_time_s)
        waiting_s = max(0.0, iteration_time_s - self.min_energy_time_s)
        on_frontier = np.interp(iteration_time_s, self.times_s, self.energies_j)
        return float(on_frontier) + self.problem.blocking_power_w * waiting_s

    def durations_s(self, iteration_time_s: float) -> NDArray[np.float64]:
        """Duration of every instruction, shape (N,), with which the iteration takes no longer than this.

        Raises:
            InputError: if the iteration cannot be that fast.
        """
        self._require_reachable(iteration_time_s)
        stored_times_s = self.times_s[self.stored]
        after = int(np.clip(np.searchsorted(stored_times_s, iteration_time_s), 1, len(self.stored) - 1))
        if len(self.stored) == 1:
            return self._stored_durations_s(0)
        before_s, after_s = stored_times_s[after - 1], stored_times_s[after]
        share = float(np.clip((iteration_time_s - before_s) / (after_s - before_s), 0.0, 1.0))
        if share == 1.0:
            return self._stored_durations_s(after)
        return (1 - share) * self._stored_durations_s(after - 1) + share * self._stored_durations_s(after)

    def _stored_durations_s(self, k: int) -> NDArray[np.float64]:
        durations = np.empty(self.positions.shape[1])
        for i, curve in enumerate(self.problem.curves):
            members = self.problem.curve_of == i
            knots_s = np.asarray(curve.times_s)[curve.hull]
            durations[members] = np.interp(self.positions[k, members], np.arange(len(knots_s)), knots_s)
        return durations

    def _require_reachable(self, iteration_time_s: float) -> None:
        if not iteration_time_s >= self.fastest_time_s * (1 - 1e-9):
            raise InputError(
                f"iteration time {iteration_time_s} s cannot be reached; the fastest is {self.fastest_time_s:.6g} s"
            )
