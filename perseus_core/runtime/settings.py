"""What a user can set: the `perseus` block of a configuration, validated. Most users write only `enabled`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from perseus_core.errors import InputError
from perseus_core.planning import policy as policies
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.policy import Policy
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.switching import USUAL_JITTER_S, Switching

PolicyName = Literal["no_slowdown", "max_slowdown", "min_energy", "zeus", "carbon", "power_cap"]

USUAL_LATENCY_S = 0.015
USUAL_CHANGES_PER_S = 10.0
_NEEDED_BY = {
    "max_slowdown": ("max_slowdown",),
    "zeus": ("eta",),
    "carbon": ("eta", "carbon_intensity_g_per_kwh", "reference_carbon_intensity_g_per_kwh"),
    "power_cap": ("power_cap_w",),
}


@dataclass(frozen=True)
class Settings:
    """The block's keys.

    Attributes:
        enabled: whether anything is done at all.
        policy: which point of the frontier to run at; where it is left out, `max_slowdown` or `no_slowdown`.
        max_slowdown: how much slower an iteration may become, as a share (policy `max_slowdown`).
        eta: weight of energy against time, 0 to 1 (policies `zeus` and `carbon`).
        power_cap_w: average power that all GPUs of a pipeline together may draw [W] (policy `power_cap`).
        carbon_intensity_g_per_kwh: of the electricity now (policy `carbon`).
        reference_carbon_intensity_g_per_kwh: at which `carbon` is `zeus`.
        straggler_slowdown: T'/T, how much slower than this job's baseline a pipeline elsewhere is, 1 for none.
        measure_only: measure time and energy, never set a clock.
        tolerance: by which share an iteration may be slower than allowed before the plan is corrected.
        warmup_iterations: iterations at the start that are not measured.
        baseline_iterations: iterations after them, at the clocks the job had without us, that are the baseline.
        profile_clocks: how many clocks are measured.
        profile_iterations: iterations measured at each clock, after one that is discarded.
        watch_iterations: iterations under a plan, before an interlude and after it, that are compared with its own.
        slow_gpu: by which share a GPU must be slower than its profile to be reported, and planned for.
        profile_cache: folder of measured profiles; "auto" for the user's cache folder, "off" for none.
        state_file: where the session keeps its plan, so that a restarted job goes on with it; empty for nowhere.
        frontier_file: where `frontier.json` is written after each solve; empty for nowhere.
        switch_latency_s: how long a clock change takes, until it has been measured; "auto" for 15 ms.
        interlude_interval, interlude_iterations: after so many iterations under a plan, so many are measured without it
            (one more is discarded), since a job drifts.
        max_clock_changes_per_s: how often a GPU may change its clock; 0 for one clock on each stage; "auto" for 10.
        gpu_measurements: file that `perseus doctor --measure --lock` has written on this model of GPU: what stands for
            "auto" in the two keys above, a lower rate of changes only; empty for none.
        log_interval: iterations between log lines of what was measured under the plan; 0 for none.

    Raises:
        InputError: naming the key, the value and the remedy.
    """

    enabled: bool = False
    policy: str = ""
    max_slowdown: float = 0.0
    eta: float | None = None
    power_cap_w: float | None = None
    carbon_intensity_g_per_kwh: float | None = None
    reference_carbon_intensity_g_per_kwh: float | None = None
    straggler_slowdown: float = 1.0
    measure_only: bool = False
    tolerance: float = 0.005
    warmup_iterations: int = 2
    baseline_iterations: int = 6
    profile_clocks: int = 8
    profile_iterations: int = 3
    watch_iterations: int = 8
    slow_gpu: float = 0.05
    profile_cache: str = "auto"
    state_file: str = ""
    frontier_file: str = ""
    switch_latency_s: float | Literal["auto"] = "auto"
    max_clock_changes_per_s: float | Literal["auto"] = "auto"
    gpu_measurements: str = ""
    interlude_interval: int = 200
    interlude_iterations: int = 2
    log_interval: int = 100

    def __post_init__(self) -> None:
        for name in ("enabled", "measure_only"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "must be true or false")
        for name in ("profile_cache", "state_file", "frontier_file", "policy", "gpu_measurements"):
            if not isinstance(getattr(self, name), str):
                raise _error(name, getattr(self, name), "must be text")
        self._check_number("max_slowdown", 0, 1, excluded_end=True, remedy="is not in [0, 1); 0.05 means 5 %")
        self._check_number("tolerance", 0, 1, excluded_end=True, remedy="is not in [0, 1); 0.005 means 0.5 %")
        self._check_number("slow_gpu", 0.01, 1, remedy="is not in [0.01, 1]; 0.05 means 5 %")
        self._check_number("straggler_slowdown", 1, math.inf, remedy="is below 1; 1.2 means 20 % slower than this job")
        for name in ("eta", "power_cap_w", "carbon_intensity_g_per_kwh", "reference_carbon_intensity_g_per_kwh"):
            if getattr(self, name) is not None:
                self._check_number(name, 0, 1 if name == "eta" else math.inf)
        if self.switch_latency_s != "auto":
            self._check_number("switch_latency_s", 0, 1, remedy='must be "auto" or seconds from 0 to 1')
        if self.max_clock_changes_per_s != "auto":
            remedy = 'must be "auto" or a number, 0 or more'
            self._check_number("max_clock_changes_per_s", 0, math.inf, remedy=remedy)
        for name, least in (
            ("warmup_iterations", 1),
            ("baseline_iterations", 2),
            ("profile_clocks", 2),
            ("profile_iterations", 1),
            ("watch_iterations", 2),
            ("interlude_interval", 20),
            ("interlude_iterations", 1),
            ("log_interval", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _error(name, value, f"must be a whole number, {least} or more")
        self._check_policy()

    @property
    def switching(self) -> Switching:
        """What changes of clock take until it has been measured, and how many there may be."""
        latency_s = USUAL_LATENCY_S if self.switch_latency_s == "auto" else self.switch_latency_s
        changes_per_s = self.max_clock_changes_per_s
        most = USUAL_CHANGES_PER_S if changes_per_s == "auto" else changes_per_s
        return Switching(latency_s, latency_s, USUAL_JITTER_S, most)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "perseus") -> Settings:
        """Reads the block as a configuration file holds it.

        Args:
            mapping: the keys and values.
            where: what the file calls the block, for messages.

        Raises:
            InputError: naming an unknown key and the nearest known one, or the value that cannot be.
        """
        known = [f.name for f in fields(cls)]
        for key in mapping:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                remedy = f'did you mean "{near[0]}"?' if near else f"the keys are {', '.join(known)}"
                raise InputError(f'config "{where}.{key}" is not known; {remedy}')
        try:
            return cls(**mapping)
        except InputError as error:
            raise InputError(str(error).replace('config "perseus.', f'config "{where}.', 1)) from None

    @property
    def policy_name(self) -> str:
        """The policy, as named or as the other keys imply."""
        return self.policy or ("max_slowdown" if self.max_slowdown else "no_slowdown")

    @property
    def pick(self) -> Policy:
        """The policy itself."""
        name = self.policy_name
        if name == "max_slowdown":
            return policies.max_slowdown(self.max_slowdown)
        if name == "min_energy":
            return lambda frontier, baseline_time_s: frontier.min_energy_time_s
        if name == "power_cap":
            assert self.power_cap_w is not None, "checked when made"
            return policies.power_cap(self.power_cap_w)
        if name in ("zeus", "carbon"):
            return self._pick_by_cost
        return policies.no_slowdown

    def _pick_by_cost(self, frontier: Frontier[PipelineProblem], baseline_time_s: float) -> float:
        """Zeus's cost needs the highest power, which only the measured problem knows."""
        assert self.eta is not None, "checked when made"
        max_power_w = frontier.problem.max_power_w
        if self.policy == "zeus":
            return policies.zeus_cost(self.eta, max_power_w)(frontier, baseline_time_s)
        intensity, reference = self.carbon_intensity_g_per_kwh, self.reference_carbon_intensity_g_per_kwh
        assert intensity is not None and reference is not None, "checked when made"
        return policies.carbon_cost(self.eta, max_power_w, intensity, reference)(frontier, baseline_time_s)

    def _check_policy(self) -> None:
        names = get_args(PolicyName)
        if self.policy and self.policy not in names:
            near = difflib.get_close_matches(self.policy, names, 1)
            hint = f'did you mean "{near[0]}"?' if near else f"use one of {', '.join(names)}"
            raise InputError(f'config "perseus.policy": {json.dumps(self.policy)} is not a policy; {hint}')
        for key in _NEEDED_BY.get(self.policy, ()):
            if getattr(self, key) is None:
                raise InputError(f'config "perseus.{key}" is missing; policy "{self.policy}" needs it')
        for key in ("eta", "power_cap_w", "carbon_intensity_g_per_kwh", "reference_carbon_intensity_g_per_kwh"):
            users = [name for name, keys in _NEEDED_BY.items() if key in keys]
            if getattr(self, key) is not None and self.policy not in users:
                raise InputError(
                    f'config "perseus.{key}" is set, but policy "{self.policy_name}" does not use it; set "policy" to '
                    f"{' or '.join(users)}"
                )
        if self.max_slowdown and self.policy not in ("", "max_slowdown"):
            raise InputError(
                f'config "perseus.max_slowdown" is set, but policy "{self.policy}" does not use it; leave one out'
            )

    def _check_number(
        self, name: str, least: float, most: float, *, excluded_end: bool = False, remedy: str = ""
    ) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not least <= value <= most or (excluded_end and value == most):
            span = f"from {least:g} to {most:g}" if math.isfinite(most) else f"{least:g} or more"
            raise _error(name, value, remedy or f"must be a number {span}")


def _error(name: str, value: object, remedy: str) -> InputError:
    return InputError(f'config "perseus.{name}": {json.dumps(value, default=str)} {remedy}')
