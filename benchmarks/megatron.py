"""What the Megatron adapter costs, and what real Megatron jobs save on simulated GPUs beside what was promised.

    python -m benchmarks.megatron [--runs 3] [--time-scale 0.5] [--most-iterations 400] [--only cost|pp4|...]

The cost is that of a hooked pass around a session that does nothing, above the pass alone. The jobs are those of the
demonstration; energies are the simulated GPUs' own, exact ones. Interleaved, a chunk's passes are half as long, so the
GPUs are slowed to twice and an iteration has half as many microbatches.
"""

from __future__ import annotations

import statistics
import time
from types import ModuleType
from typing import Any

from benchmarks.jobs import IdleSession, parse_arguments, print_runs, run_job

BLOCK = {"enabled": True, "profile_cache": "off", "log_interval": 0, "interlude_interval": 20}
# Stages, chunks, and GPUs that share experts.
LAYOUTS = {"pp4": (4, 1, 1), "pp4vpp2": (4, 2, 1), "dp2xpp2": (2, 1, 1), "pp2vpp2ep2": (2, 2, 2)}


def main() -> None:
    arguments = parse_arguments(__doc__, LAYOUTS)
    if arguments.only in (None, "cost"):
        forward_us, backward_us = hook_cost_us()
        print(f"hook on one pass, above the pass alone: forward {forward_us:.2f} us, backward {backward_us:.2f} us")
    for layout in LAYOUTS if arguments.only is None else LAYOUTS.keys() & {arguments.only}:
        stages, chunks, expert_parallel = LAYOUTS[layout]
        training = ["--most-iterations", str(arguments.most_iterations), "--chunks", str(chunks)]
        training += ["--expert-parallel", str(expert_parallel), "--microbatches", str(8 // chunks)]
        print_runs(
            layout,
            [
                run_job(
                    stages,
                    seed,
                    time_scale=arguments.time_scale * chunks,
                    config=BLOCK,
                    module="demo.train_megatron",
                    training=training,
                    chunks=chunks,
                )
                for seed in range(arguments.runs)
            ],
        )


def hook_cost_us(passes: int = 100_000, repetitions: int = 7) -> tuple[float, float]:
    """Medians over repetitions of what the hook adds to one forward and one backward [us]."""
    from perseus_core.runtime.adapter import Follower, Hooks
    from perseus_megatron.schedule_hooks import ITERATIONS, ScheduleHooks

    model, output = object(), (object(), 0)

    def forward_step(*_: Any, **__: Any) -> Any:
        return output

    def backward_step(*_: Any, **__: Any) -> None: ...

    schedules: Any = ModuleType("schedules")
    schedules.forward_step, schedules.backward_step = forward_step, backward_step

    def run(*, model: list[object], num_microbatches: int, forward_only: bool = False) -> tuple[float, float]:
        """As a schedule of Megatron calls the passes."""
        forward, backward = schedules.forward_step, schedules.backward_step
        forward_s = backward_s = 0.0
        for microbatch in range(num_microbatches):
            begin_s = time.perf_counter()
            result = forward(None, None, model[0], 1, None, None, None, current_microbatch=microbatch)
            middle_s = time.perf_counter()
            backward(None, result[0], None, None, None)
            backward_s += time.perf_counter() - middle_s
            forward_s += middle_s - begin_s
        return forward_s, backward_s

    for name in ITERATIONS:
        setattr(schedules, name, run)

    def measured_us() -> tuple[float, float]:
        function = getattr(schedules, ITERATIONS[0])
        times = [function(model=[model], num_microbatches=passes) for _ in range(repetitions)]
        forward_s, backward_s = (statistics.median(seconds) for seconds in zip(*times, strict=True))
        return 1e6 * forward_s / passes, 1e6 * backward_s / passes

    bare = measured_us()
    hooks = Hooks()
    ScheduleHooks(Follower(lambda *_: IdleSession(), hooks)).put(hooks, schedules, None)
    getattr(schedules, ITERATIONS[0])(model=[model], num_microbatches=1)  # the first iteration is not followed
    hooked = measured_us()
    hooks.take_off()
    return hooked[0] - bare[0], hooked[1] - bare[1]


if __name__ == "__main__":
    main()
