"""`perseus simulate`: runs a command on simulated GPUs."""

from __future__ import annotations

import argparse

from perseus_core.errors import InputError

HELP = "run a command on simulated GPUs, to try Perseus without a cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--gpus", required=True, metavar="DESCRIPTION.json", help="which GPUs, for example configs/gpus/a100.json"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit code is ours."""
    from perseus_core.gpu.simulated.command import run_command

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise InputError("perseus simulate has no command to run; give it behind --, for example -- python train.py")
    return run_command(args.gpus, command)
