"""`perseus doctor`: what is here, what is missing, what to do; with `--measure`, whether it is as is assumed."""

from __future__ import annotations

import argparse
import math
import os
from contextlib import suppress

from perseus_core.commands.inputs import answers, print_json, remarks
from perseus_core.errors import InputError

HELP = "say what this machine has and lacks for Perseus, or measure it; sets nothing but with --lock"

_STYLES = {
    "ok": "green",
    "limited": "yellow",
    "missing": "red",
    "as assumed": "green",
    "differs": "yellow",
    "not measured": "bright_black",
}
_FILE = "perseus-gpu.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print the answer for machines")
    measuring = parser.add_argument_group("first contact with a GPU")
    measuring.add_argument(
        "--measure", action="store_true", help="measure the first visible GPU under a load of its own; sets no clock"
    )
    measuring.add_argument(
        "--lock", action="store_true", help="with --measure: lock clocks, too, and give them back; only on free GPUs"
    )
    measuring.add_argument(
        "--seconds-per-step",
        type=float,
        default=8.0,
        metavar="S",
        help="about how long each step measures (default: 8)",
    )
    measuring.add_argument(
        "--output",
        "-o",
        default=_FILE,
        metavar="FILE.json",
        help='the figures; a session reads them with "gpu_measurements" (default: %(default)s)',
    )


def run(args: argparse.Namespace) -> int:
    """Prints a line for each finding; exit code 1 if something is missing without which nothing can be saved."""
    if args.lock and not args.measure:
        raise InputError("--lock is for --measure; give both, or none")
    if args.measure:
        return _measure(args)
    from perseus_core.commands.examination import Verdict, examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not args.json:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            _print_line(finding.verdict.value, 8, f"{finding.subject}: {finding.fact}{remedy}")
    if args.json:
        print_json(
            {
                "findings": [
                    {"verdict": f.verdict.value, "subject": f.subject, "fact": f.fact, "remedy": f.remedy}
                    for f in findings
                ]
            }
        )
    return 1 if any(f.verdict is Verdict.MISSING for f in findings) else 0


def _print_line(word: str, width: int, text: str) -> None:
    answers.print(f"[{_STYLES[word]}]{word:>{width}}[/]  {text}", highlight=False, soft_wrap=True)


def _measure(args: argparse.Namespace) -> int:
    """Measures, prints the page and writes the file; exit code 1 if a clock was not given back."""
    from perseus_core.commands.measurement.admission import busy_gpus, refuse_to_lock
    from perseus_core.commands.measurement.page import About, document_of, line_of, save
    from perseus_core.commands.measurement.results import Standing
    from perseus_core.commands.measurement.supervisor import GIVEN_BACK, Measured, TimeLimits, measure
    from perseus_core.gpu.discovery import visible_devices
    from perseus_core.gpu.errors import GpuError
    from perseus_core.gpu.nvml import driver_version
    from perseus_core.gpu.simulated import ENVIRONMENT_VARIABLE

    step_s = args.seconds_per_step
    if not (math.isfinite(step_s) and 0.2 <= step_s <= 60):
        raise InputError(f"--seconds-per-step is {step_s:g}; give 0.2 to 60")
    devices = visible_devices()
    if not devices:
        raise InputError("no GPU is visible to this process; look at CUDA_VISIBLE_DEVICES")
    if args.lock:
        refuse_to_lock(devices)
    others: list[int] = []
    with suppress(GpuError):  # not every driver tells
        others = sorted({pid for pids in busy_gpus(devices[:1]).values() for pid in pids})
    about = About.now(
        devices[0].name,
        len(devices),
        driver_version(),
        is_simulated=ENVIRONMENT_VARIABLE in os.environ,
        shared_with=others,
    )

    def tell(measured: Measured) -> None:
        if not args.json:
            _print_line(measured.standing.value, 12, line_of(measured))

    if not args.json:
        answers.print(str(about), highlight=False, soft_wrap=True)
    done = measure(devices, TimeLimits.for_steps_of(step_s), lock=args.lock, tell=tell)
    save(args.output, about, done)
    if args.json:
        print_json({"steps": [document_of(measured) for measured in done]})
    else:
        remarks.print(f'{args.output} is written; a session reads it: "gpu_measurements": "{args.output}"')
    is_locked = any(one.name == GIVEN_BACK and one.standing is not Standing.AS_ASSUMED for one in done)
    return 1 if is_locked else 0
