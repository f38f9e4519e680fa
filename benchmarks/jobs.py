"""What the benchmarks of both adapters do: jobs of the demonstrations on simulated GPUs, and hooks around nothing.

A job's energies are the simulated GPUs' own, exact ones.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from demo.job import REPOSITORY, train
from demo.report import without_and_under_the_plan
from perseus_core.gpu.simulated import Description, create_node
from perseus_core.planning.profile import Profile


def parse_arguments(description: str | None, layouts: Iterable[str]) -> argparse.Namespace:
    """The command line's arguments.

    Args:
        description: what is measured.
        layouts: names of the jobs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--time-scale", type=float, default=0.5)
    parser.add_argument("--most-iterations", type=int, default=400)
    parser.add_argument("--only", choices=["cost", *layouts])
    return parser.parse_args()


def run_job(
    stages: int,
    seed: int,
    *,
    time_scale: float,
    config: dict[str, Any],
    module: str,
    training: Sequence[str],
    chunks: int = 1,
) -> dict[str, float]:
    """One job; what it saved and what was promised.

    Args:
        stages: of the pipeline; what is left of four processes is data parallel.
        seed: of the GPUs' noise.
        time_scale: of the GPUs' times.
        config: of the training script.
        module: the training script.
        training: its arguments, beside those that all have.
        chunks: model chunks of a stage.
    """
    description = Description.load(REPOSITORY / "configs" / "gpus" / "a100.json")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        profile = _last_stages(description.profile, stages, output / "profile.csv")
        Profile.load(profile).divided_into_chunks(chunks).save(profile)
        changed = dataclasses.replace(description, profile=profile, time_scale=time_scale, seed=seed)
        gpus, laps = output / "gpus", output / "laps"
        gpus.mkdir()
        laps.mkdir()
        create_node(changed, gpus)
        (output / "config.json").write_text(json.dumps(config))
        common = ["--config", str(output / "config.json"), "--laps", str(laps), "--stages", str(stages)]
        if not train([*common, "--text", str(REPOSITORY / "LICENSE"), *training], gpus, module):
            raise SystemExit("the job did not end well")
        ranks = [json.loads(path.read_text()) for path in sorted(laps.glob("rank*.json"))]
    before, after = without_and_under_the_plan(ranks)
    status = ranks[0]["status"]
    return {
        "iteration before [s]": before.time_s,
        "iteration under the plan [s]": after.time_s,
        "slowdown, measured [%]": 100 * (after.time_s / before.time_s - 1),
        "slowdown, promised [%]": 100 * status["promised_slowdown"],
        "saving, measured [%]": 100 * (1 - after.energy_j / before.energy_j),
        "saving, promised [%]": 100 * status["promised_saving"],
        "plans made": status["plan"],
        "iterations under the plan": after.iterations,
        "iterations without it": before.iterations,
    }


def _last_stages(profile: Path, stages: int, target: Path) -> Path:
    """The last stages of a profile as stages 0, 1, ...: of a shorter pipeline that still has the slow last stage."""
    with profile.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = 1 + max(int(row["stage"]) for row in rows) - stages
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "stage": int(row["stage"]) - first} for row in rows if int(row["stage"]) >= first)
    return target


def print_runs(layout: str, rows: list[dict[str, float]]) -> None:
    """Every run's figures and their median."""
    for name in rows[0]:
        values = [row[name] for row in rows]
        shown = "  ".join(f"{value:8.4g}" for value in values)
        print(f"{layout:8s} {name:40s} {shown}   median {statistics.median(values):.4g}")


def _nothing(*_: Any, **__: Any) -> None:
    pass


class IdleSession:
    """Does nothing, so that a hook's own cost can be measured."""

    begin_iteration = begin_instruction = end_instruction = end_iteration = close = _nothing
