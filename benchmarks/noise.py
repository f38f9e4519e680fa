"""Honest under noise: plans made from noisy tables, judged on the clean one. And how few clocks are enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.common import GPT3, print_table, require_published
from perseus_core.planning.baselines import all_max
from perseus_core.planning.execution import execute
from perseus_core.planning.fitting import fit_profile
from perseus_core.planning.plan import make_plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.solver import solve

NUM_MICROBATCHES = 24
NUM_SEEDS = 20


def noisy(profile: Profile, sigma: float, seed: int) -> Profile:
    """Independent relative noise on every time and every energy."""
    draw = np.random.default_rng(seed)
    return Profile(
        tuple(
            replace(m, time_s=m.time_s * draw.normal(1, sigma), energy_j=m.energy_j * draw.normal(1, sigma))
            for m in profile.measurements
        )
    )


def judge(plan_profile: Profile, clean: PipelineProblem) -> tuple[float, float]:
    """Slowdown and saving, on the clean table, of the plan made from another one."""
    plan = make_plan(solve(GPT3.problem(NUM_MICROBATCHES, plan_profile)))
    clocks = [plan.instructions[i].clock_mhz for i in clean.schedule.instructions]
    really, baseline = execute(clean, clocks), all_max(clean)
    return really.iteration_time_s / baseline.iteration_time_s - 1, 1 - really.energy_j / baseline.energy_j


def with_clocks(profile: Profile, num_clocks: int) -> Profile:
    """Only so many clocks, evenly spread, the highest and the lowest among them."""
    clocks = sorted({m.clock_mhz for m in profile.measurements}, reverse=True)
    kept = {clocks[i] for i in np.linspace(0, len(clocks) - 1, num_clocks).round().astype(int)}
    return Profile(tuple(m for m in profile.measurements if m.clock_mhz in kept))


def main() -> None:
    require_published()
    clean_profile, clean = GPT3.profile, GPT3.problem(NUM_MICROBATCHES)
    rows = []
    for sigma in (0.0, 0.01, 0.02, 0.04):
        for title, prepare in (("as it is", lambda p: p), ("fitted", fit_profile)):
            seeds = range(NUM_SEEDS if sigma else 1)
            judged = np.array([judge(prepare(noisy(clean_profile, sigma, seed)), clean) for seed in seeds])
            slowdown, saving = judged.T
            rows.append(
                (f"{sigma:.0%}", title, f"{slowdown.mean():+.2%}", f"{slowdown.max():+.2%}", f"{saving.mean():.2%}")
            )
    headings = ("noise", "table", "mean slowdown", "worst slowdown", f"mean saving ({NUM_SEEDS} seeds)")
    print_table(headings, rows)

    all_clocks = [m.clock_mhz for m in clean_profile.measurements]
    rows = []
    for num_clocks in (38, 16, 8, 5):
        few = fit_profile(with_clocks(clean_profile, num_clocks), clocks_mhz=sorted(set(all_clocks)))
        slowdown, saving = judge(few, clean)
        rows.append((num_clocks, f"{slowdown:+.2%}", f"{saving:.2%}"))
    print_table(("clocks measured", "slowdown", "saving"), rows)


if __name__ == "__main__":
    main()
