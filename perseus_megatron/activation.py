"""Makes Megatron's argument parser know the `--perseus` flags. Nothing else is touched until one is given.

Only argparse is imported here: a job without the flag meets no more than seven more lines in `--help`.
"""

from __future__ import annotations

import argparse
import functools
from types import ModuleType
from typing import Any, NoReturn

import perseus_autoload


def activate(arguments_module: ModuleType) -> None:
    """Adds the flags to every parser that Megatron makes.

    `parse_args` refuses what it does not know, scripts bind it by name, and `pretrain_gpt.py` leaves no place for
    arguments of others; but `add_megatron_arguments` is looked up when it is called, from 0.12 to the newest.

    Args:
        arguments_module: `megatron.training.arguments`.
    """
    add_megatron_arguments: Any = arguments_module.add_megatron_arguments
    if hasattr(add_megatron_arguments, "of_perseus"):
        return

    @functools.wraps(add_megatron_arguments)
    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        add_flags(parser)
        return parser

    add_arguments.of_perseus = True  # type: ignore[attr-defined]
    arguments_module.add_megatron_arguments = add_arguments  # type: ignore[attr-defined]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags as a group of their own, checked as soon as they are parsed."""
    group = parser.add_argument_group(title="perseus", description="less energy at the same speed")
    group.add_argument("--perseus", action="store_true", help="Set the GPU clock for every pipeline instruction.")
    group.add_argument("--perseus-config", metavar="FILE", help="JSON file with the keys of the perseus block.")
    group.add_argument(
        "--perseus-max-slowdown",
        type=float,
        metavar="SHARE",
        help="How much slower an iteration may become to save more, 0.05 for 5 %%. Default: 0.",
    )
    group.add_argument(
        "--perseus-profile-cache", metavar="FOLDER", help='Where measured profiles are kept; "off" for nowhere.'
    )
    group.add_argument("--perseus-measure-only", action="store_true", help="Measure time and energy, set no clock.")
    parse_known_args = parser.parse_known_args

    @functools.wraps(parse_known_args)
    def parse_and_check(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse_known_args(*args, **kwargs)
        _follow_if_asked(parser, namespace)
        return namespace, rest

    parser.parse_known_args = parse_and_check  # type: ignore[method-assign]


def _follow_if_asked(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    # A namespace that somebody else has filled need not have our flags.
    asked = getattr(namespace, "perseus", False)
    others = ("config", "max_slowdown", "profile_cache", "measure_only")
    given = [name for name in others if getattr(namespace, f"perseus_{name}", None) not in (None, False)]
    if not asked and given:
        _refuse(parser, f"--perseus-{given[0].replace('_', '-')} does nothing without --perseus; add it")
    if asked and not perseus_autoload.is_disabled():
        from perseus_core.errors import InputError
        from perseus_megatron.flags import settings_of
        from perseus_megatron.training_hooks import hook_training

        try:
            settings = settings_of(namespace)
        except InputError as error:
            _refuse(parser, str(error))
        if settings.enabled:
            hook_training(settings)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """As `parser.error` does, without Megatron's usage of several hundred lines before it."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
