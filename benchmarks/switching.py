"""Plans when a change of clock takes time: saving at no slowdown with instructions of 60 to 3 ms."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common import print_table
from perseus_core.planning.baselines import all_max
from perseus_core.planning.plan import make_plan
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.planning.solver import solve
from perseus_core.planning.switching import USUAL_JITTER_S, Switching

PROFILES = Path(__file__).resolve().parent.parent / "configs" / "profiles"
MICROBATCHES = 32
MAX_CHANGES_PER_S = 10.0
# How much shorter instructions are than in the profile; how long changes take.
SHORTER = ((1.0, (0.015, 0.1)), (0.25, (0.015, 0.05)), (0.1, (0.015,)), (0.05, (0.015, 0.1)))


@dataclass(frozen=True)
class Pipeline:
    """A profile of `configs/profiles`, and what its GPUs draw while they wait."""

    title: str
    file: str
    waiting_w: float

    def problem(self, scale: float) -> PipelineProblem:
        """With instructions so much shorter, at the same power."""
        profile = Profile.load(PROFILES / self.file)
        scaled = [replace(m, time_s=scale * m.time_s, energy_j=scale * m.energy_j) for m in profile.measurements]
        schedule = one_f_one_b(profile.num_stages, MICROBATCHES)
        return PipelineProblem.of(Profile(tuple(scaled)), schedule, self.waiting_w)


PIPELINES = (
    Pipeline("H100, 4 stages", "gpt3-6.7b_h100_4stages.csv", 120.0),
    Pipeline("A100, 4 stages", "gpt3-6.7b_a100_4stages.csv", 83.5),
    Pipeline("A100 175B, 8 stages", "gpt3-175b_a100_8stages.csv", 83.5),
)


def table_of(pipeline: Pipeline) -> None:
    """One row for each length of instructions and latency."""
    rows = []
    for scale, latencies_s in SHORTER:
        problem = pipeline.problem(scale)
        frontier, baseline = solve(problem), all_max(problem)
        forwards_s = [
            ms[0].time_s for t, ms in zip(problem.types, problem.measurements, strict=True) if t.kind == "forward"
        ]
        for latency_s in latencies_s:
            switching = Switching(latency_s, latency_s, max_changes_per_s=MAX_CHANGES_PER_S)
            begin_s = time.perf_counter()
            plan = make_plan(frontier, baseline=baseline, switching=switching)
            took_s = time.perf_counter() - begin_s
            uncertain = make_plan(frontier, baseline=baseline, switching=replace(switching, jitter_s=USUAL_JITTER_S))
            assert max(plan.slowdown, uncertain.slowdown) < 1e-9
            assert plan.changes_per_iteration <= MAX_CHANGES_PER_S * plan.iteration_time_s
            rows.append(
                (
                    f"{1000 * min(forwards_s):.1f} to {1000 * max(forwards_s):.1f} ms",
                    f"{1000 * latency_s:.0f} ms",
                    f"{plan.saving:.2%}",
                    f"{uncertain.saving:.2%}",
                    f"{plan.saving + plan.lost_to_switching:.2%}",
                    f"{1 - plan.bound_energy_j / plan.baseline_energy_j:.2%}",
                    plan.changes_per_iteration,
                    f"{plan.changes_per_iteration / plan.iteration_time_s:.1f}",
                    plan.granularity.value,
                    f"{1000 * took_s:.0f} ms",
                )
            )
    headings = (
        f"{pipeline.title}: forward", "a change takes", "saving", "with 1 ms of jitter", "if at once", "bound",
        "changes an iteration", "a second", "granularity", "plan made in",
    )  # fmt: skip
    print_table(headings, rows)


if __name__ == "__main__":
    for each in PIPELINES:
        table_of(each)
