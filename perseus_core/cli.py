"""The `perseus` program."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from perseus_core import __version__
from perseus_core.commands import compare, doctor, plan, plot, simulate, solve
from perseus_core.errors import InputError, PerseusError

_COMMANDS = {
    "solve": solve,
    "plan": plan,
    "compare": compare,
    "plot": plot,
    "doctor": doctor,
    "simulate": simulate,
}

_DESCRIPTION = """\
Perseus removes energy bloat from pipeline-parallel training: most instructions of a
pipeline run faster than they need to, and a GPU that runs faster than it needs to wastes
energy. From a measured profile (time and energy of each stage's forward and backward at
each GPU clock) it computes the whole frontier of iteration time and energy, exactly, and
hands out plans: one clock for every instruction of an iteration.
"""

_EPILOG = """\
A first walk:

  perseus solve configs/profiles/gpt3-6.7b_a100_4stages.csv -m 16 --blocking-power 83.5 -o frontier.json
  perseus plan frontier.json -o plan.json                      no slowdown, least energy
  perseus plan frontier.json --max-slowdown 0.1                up to 10 % slower, less energy
  perseus plan frontier.json --straggler 1.2                   another pipeline is 20 % slower
  perseus plot frontier.json -o frontier.html                  hover a point: its plan
  perseus plot plan.json -o plan.png --colour power
  perseus compare configs/profiles/gpt3-6.7b_a100_4stages.csv -m 16 --blocking-power 83.5 -o figures

Files: a profile is a CSV with the columns stage,instruction,frequency,time,energy (MHz,
seconds, joules of one GPU) and optionally chunk,samples,time_std,energy_std. Frontiers
and plans are JSON, versioned and checked when they are read.

Exit codes: 0 done; 2 bad input, told in one sentence on standard error.
`perseus COMMAND --help` tells more of each command.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every other error of ours."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="perseus", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"perseus {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP.capitalize() + ".")
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except InputError as error:
        print(f"perseus: {error}", file=sys.stderr)
        return 2
    except PerseusError as error:
        print(f"perseus: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("perseus: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone. Nothing is left to say, nor anybody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
