"""End to end: what the session promises and what simulated GPUs really draw, and what the session itself costs.

    python -m benchmarks.session [--runs 3] [--time-scale 1.0] [--description configs/gpus/a100.json] [--latency 0.015]

Four processes (torch.distributed, gloo, no framework) execute 1F1B with eight microbatches on simulated GPUs, through
the real `pynvml`. Energy and time of an iteration are the simulated GPUs' own (exact energy, not the counter), under
the plan and at the driver's clocks, before and after. The cost is that of the same job with and without the session.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perseus_core.gpu import simulated
from perseus_core.gpu.simulated.description import Description
from tests.runtime.pipeline import PipelineJob, log_of, run

ROOT = Path(__file__).resolve().parents[1]
UNDER_PLAN = 24
AFTER = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--latency", type=float, metavar="S", help="what a change of clock takes")
    parser.add_argument("--told-latency", type=float, metavar="S", help="what the settings say that it takes")
    parser.add_argument("--description", default=str(ROOT / "configs" / "gpus" / "a100.json"))
    parser.add_argument("--iterations", type=int, default=90, help="until the session is closed")
    parser.add_argument("--data-parallel", type=int, default=1)
    parser.add_argument("--show-log", action="store_true")
    arguments = parser.parse_args()
    rows = [_one_run(arguments, seed) for seed in range(arguments.runs)]
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:58s} {'  '.join(f'{v:9.4g}' for v in values)}   median {statistics.median(values):.4g}")


def _one_run(arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    description = dataclasses.replace(
        Description.load(arguments.description),
        time_scale=arguments.time_scale,
        num_gpus=4 * arguments.data_parallel,
        seed=seed,
    )
    if arguments.latency is not None:
        description = dataclasses.replace(description, clock_latency_s=arguments.latency)
    settings: dict[str, Any] = {"enabled": True, "profile_cache": "off", "log_interval": 8}
    if arguments.told_latency is not None:
        settings["switch_latency_s"] = arguments.told_latency
    results, job = _train(description, settings, arguments.iterations + AFTER, arguments.iterations, arguments)
    if arguments.show_log:
        print("\n".join(log_of(job)))
    status = results[0]["status"]
    times_s = _times_s(results[0])
    energies_j = _energies_j(results, arguments.data_parallel)
    unlocked = [*range(2, 8), *range(arguments.iterations + 1, arguments.iterations + AFTER)]
    last = range(arguments.iterations - UNDER_PLAN, arguments.iterations)
    planned = [i for i in last if all(results[0]["follows_plan"][i - 1 : i + 1])]  # not in interludes
    saved = 1 - _mean(energies_j, planned) / _mean(energies_j, unlocked)
    slowdown = _median(times_s, planned) / _median(times_s, unlocked) - 1
    plain, _ = _train(description, {"enabled": False}, 24, -1, arguments)
    watched, _ = _train(description, {**settings, "measure_only": True}, 24, -1, arguments)
    steady = range(4, 24)
    return {
        "iteration at the driver's clocks [s]": _median(times_s, unlocked),
        "iteration under the plan [s]": _median(times_s, planned),
        "slowdown, measured [%]": 100 * slowdown,
        "slowdown, promised [%]": 100 * status["promised_slowdown"],
        "saving, measured on the GPUs [%]": 100 * saved,
        "saving, as the session measured it [%]": 100 * (1 - status["energy_j"] / status["baseline_energy_j"]),
        "saving, promised [%]": 100 * status["promised_saving"],
        "measured minus promised saving [points]": 100 * (saved - status["promised_saving"]),
        "plans made": status["plan"],
        "profiling iterations": status["profiling_iterations"],
        "solving [ms]": 1e3 * status["solve_s"],
        "at the iteration's two boundaries, median [ms]": 1e3
        * statistics.median(results[0]["hook_s"][i] for i in planned),
        "the job without us [s]": _median(_times_s(plain[0]), steady),
        "the job measured only [s]": _median(_times_s(watched[0]), steady),
        "CPU of a rank without us [s per iteration]": statistics.fmean(r["cpu_s"] for r in plain) / 24,
        "CPU of a rank measured only [s per iteration]": statistics.fmean(r["cpu_s"] for r in watched) / 24,
        "loss unchanged (1: yes)": float(
            all(a["losses"][:24] == b["losses"][:24] for a, b in zip(results, plain, strict=True))
        ),
    }


def _train(
    description: Description, settings: dict[str, Any], iterations: int, close_at: int, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], PipelineJob]:
    with tempfile.TemporaryDirectory(prefix="perseus-bench-", dir="/dev/shm") as node:
        simulated.create_node(description, node)
        job = PipelineJob(
            node,
            tempfile.mkdtemp(prefix="perseus-bench-"),
            settings,
            iterations,
            data_parallel=arguments.data_parallel,
            close_at=close_at,
        )
        results = run(job, timeout_s=1800)
    missing = [rank for rank, result in enumerate(results) if result is None]
    if missing:
        raise SystemExit(f"ranks {missing} did not finish; see {job.out}")
    return [result for result in results if result is not None], job


def _times_s(result: dict[str, Any]) -> list[float]:
    begins_s = result["begins_s"]
    return [after - before for before, after in itertools.pairwise(begins_s)]


def _energies_j(results: Sequence[dict[str, Any]], data_parallel: int) -> list[float]:
    cumulative = [sum(of_rank) / data_parallel for of_rank in zip(*(r["energies_j"] for r in results), strict=True)]
    return [after - before for before, after in itertools.pairwise(cumulative)]


def _mean(values: Sequence[float], places: Sequence[int]) -> float:
    return statistics.fmean(values[i] for i in places)


def _median(values: Sequence[float], places: Sequence[int]) -> float:
    return statistics.median(values[i] for i in places)


if __name__ == "__main__":
    main()
