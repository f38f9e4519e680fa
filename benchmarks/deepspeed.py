"""What the DeepSpeed adapter costs, and what real DeepSpeed jobs save on simulated GPUs beside what was promised.

    python -m benchmarks.deepspeed [--runs 3] [--time-scale 0.5] [--iterations 90] [--only cost|pp4|pp2xdp2]

The cost is that of a hooked pass around a session that does nothing, above the pass alone. The jobs are those of the
demonstration, in both layouts; energies are the simulated GPUs' own, exact ones.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo.report import SETTLING, measured
from demo.run import REPOSITORY, train
from perseus_core.gpu.simulated import Description, create_node
from perseus_core.planning.profile import Profile

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 8,
    "steps_per_print": 100_000,
    "perseus": {"enabled": True, "profile_cache": "off", "log_interval": 0},
}
LAYOUTS = {"pp4": 4, "pp2xdp2": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--time-scale", type=float, default=0.5)
    parser.add_argument("--iterations", type=int, default=90)
    parser.add_argument("--only", choices=["cost", *LAYOUTS])
    arguments = parser.parse_args()
    if arguments.only in (None, "cost"):
        print(f"hook on one pass, above the pass alone: {hook_cost_us():.2f} us")
    for layout in LAYOUTS if arguments.only is None else LAYOUTS.keys() & {arguments.only}:
        print_runs(layout, [run_job(LAYOUTS[layout], arguments, seed) for seed in range(arguments.runs)])


def print_runs(layout: str, rows: list[dict[str, float]]) -> None:
    """Every run's figures and their median."""
    for name in rows[0]:
        values = [row[name] for row in rows]
        shown = "  ".join(f"{value:8.4g}" for value in values)
        print(f"{layout:8s} {name:40s} {shown}   median {statistics.median(values):.4g}")


def _nothing(*_: Any, **__: Any) -> None:
    pass


class IdleSession:
    """Does nothing."""

    begin_iteration = begin_instruction = end_instruction = end_iteration = close = _nothing


def hook_cost_us(passes: int = 200_000, repetitions: int = 7) -> float:
    """Median over repetitions of what the hook adds to one pass [us]."""
    from deepspeed.runtime.pipe.schedule import ForwardPass

    from perseus_core.runtime.adapter import Follower, Hooks
    from perseus_ds.engine_hooks import hook_engine

    class Engine:
        _INSTRUCTION_MAP = {ForwardPass: lambda engine, buffer_id: None}  # noqa: RUF012

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


def run_job(
    stages: int,
    arguments: argparse.Namespace,
    seed: int,
    *,
    config: dict[str, Any] = CONFIG,
    module: str = "demo.train_gpt",
    chunks: int = 1,
    more: Sequence[str] = (),
) -> dict[str, float]:
    """One job; what it saved and what was promised.

    Args:
        stages: of the pipeline; what is left of four processes is data parallel.
        arguments: of the command line.
        seed: of the GPUs' noise.
        config: of the training script.
        module: the training script.
        chunks: model chunks of a stage.
        more: arguments of the training script.
    """
    description = Description.load(REPOSITORY / "configs" / "gpus" / "a100.json")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        profile = last_stages(description.profile, stages, output / "profile.csv")
        Profile.load(profile).divided_into_chunks(chunks).save(profile)
        changed = dataclasses.replace(description, profile=profile, time_scale=arguments.time_scale, seed=seed)
        gpus, laps = output / "gpus", output / "laps"
        gpus.mkdir()
        laps.mkdir()
        create_node(changed, gpus)
        (output / "config.json").write_text(json.dumps(config))
        training = ["--config", str(output / "config.json"), "--laps", str(laps), "--stages", str(stages)]
        training += ["--text", str(REPOSITORY / "LICENSE"), "--iterations", str(arguments.iterations), *more]
        if not train(training, gpus, module):
            raise SystemExit("the job did not end well")
        ranks = [json.loads(path.read_text()) for path in sorted(laps.glob("rank*.json"))]
    before = measured(ranks, lambda lap: lap["phase"] == "warm up")
    after = measured(ranks, lambda lap: lap["plan"] > 0, skip=SETTLING)
    status = ranks[0]["status"]
    return {
        "iteration before [s]": before.time_s,
        "iteration under the plan [s]": after.time_s,
        "slowdown, measured [%]": 100 * (after.time_s / before.time_s - 1),
        "slowdown, promised [%]": 100 * status["promised_slowdown"],
        "saving, measured [%]": 100 * (1 - after.energy_j / before.energy_j),
        "saving, promised [%]": 100 * status["promised_saving"],
        "iterations under a plan": after.iterations,
    }


def last_stages(profile: Path, stages: int, target: Path) -> Path:
    """The last stages of a profile as stages 0, 1, ...: of a shorter pipeline that still has the slow last stage."""
    with profile.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = 1 + max(int(row["stage"]) for row in rows) - stages
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "stage": int(row["stage"]) - first} for row in rows if int(row["stage"]) >= first)
    return target


if __name__ == "__main__":
    main()
