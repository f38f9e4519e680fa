"""What the DeepSpeed adapter costs, and what real DeepSpeed jobs save on simulated GPUs beside what was promised.

    python -m benchmarks.deepspeed [--runs 3] [--time-scale 0.5] [--most-iterations 400] [--only cost|pp4|pp2xdp2]

The cost is that of a hooked pass around a session that does nothing, above the pass alone. The jobs are those of the
demonstration, in both layouts; energies are the simulated GPUs' own, exact ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar

from benchmarks.jobs import IdleSession, parse_arguments, print_runs, run_job

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 8,
    "steps_per_print": 100_000,
    "perseus": {"enabled": True, "profile_cache": "off", "log_interval": 0, "interlude_interval": 20},
}
LAYOUTS = {"pp4": 4, "pp2xdp2": 2}


def main() -> None:
    arguments = parse_arguments(__doc__, LAYOUTS)
    if arguments.only in (None, "cost"):
        print(f"hook on one pass, above the pass alone: {hook_cost_us():.2f} us")
    for layout in LAYOUTS if arguments.only is None else LAYOUTS.keys() & {arguments.only}:
        print_runs(
            layout,
            [
                run_job(
                    LAYOUTS[layout],
                    seed,
                    time_scale=arguments.time_scale,
                    config=CONFIG,
                    module="demo.train_gpt",
                    training=["--most-iterations", str(arguments.most_iterations)],
                )
                for seed in range(arguments.runs)
            ],
        )


def hook_cost_us(passes: int = 200_000, repetitions: int = 7) -> float:
    """Median over repetitions of what the hook adds to one pass [us]."""
    from deepspeed.runtime.pipe.schedule import ForwardPass

    from perseus_core.runtime.adapter import Follower, Hooks
    from perseus_ds.engine_hooks import hook_engine

    class Engine:
        _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {ForwardPass: lambda engine, buffer_id: None}

        def _exec_schedule(self, pipe_schedule: Any) -> float:
            execute: Callable[..., None] = self._INSTRUCTION_MAP[ForwardPass]
            begin_s = time.perf_counter()
            for _ in range(passes):
                execute(self, buffer_id=0)
            return time.perf_counter() - begin_s

        def destroy(self) -> None: ...

    def cost_s(engine: Engine) -> float:
        return statistics.median(engine._exec_schedule(None) for _ in range(repetitions + 1)) / passes

    hooks = Hooks()
    hooked = Engine()
    hook_engine(hooked, Follower(lambda _: IdleSession(), hooks), hooks)
    hooked._exec_schedule(None)  # the first batch is not followed
    return 1e6 * (cost_s(hooked) - cost_s(Engine()))


if __name__ == "__main__":
    main()
