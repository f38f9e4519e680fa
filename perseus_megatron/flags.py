"""From the flags of a Megatron command line to the same checked settings that the DeepSpeed block gives."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from perseus_core.errors import InputError
from perseus_core.files import write_bytes
from perseus_core.runtime.adapter import is_first_rank
from perseus_core.runtime.settings import Settings

STATE_FILE = "perseus_session.json"


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the flags ask for. A flag counts more than the file.

    Raises:
        InputError: naming the flag or the file's key, its value and the remedy.
    """
    block = {"enabled": True}
    if arguments.perseus_config is not None:
        block |= _read(Path(arguments.perseus_config))
    settings = Settings.from_mapping(block, where="perseus")
    flags: dict[str, Any] = {
        "max_slowdown": arguments.perseus_max_slowdown,
        "profile_cache": arguments.perseus_profile_cache,
        "measure_only": arguments.perseus_measure_only or None,
    }
    for name, value in flags.items():
        if value is not None:
            try:
                settings = replace(settings, **{name: value})
            except InputError as error:
                flag = f"--perseus-{name.replace('_', '-')}"
                raise InputError(str(error).replace(f'config "perseus.{name}"', flag, 1)) from None
    return settings


def with_state_in_checkpoint(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """Has the session's state kept beside the checkpoints, so that a resumed job goes on with its plan at once.

    Where the checkpoints come from another folder than they go to, the state that lies there is read first.
    """
    if settings.state_file or not getattr(arguments, "save", None):
        return settings
    kept = Path(arguments.save) / STATE_FILE
    found = Path(getattr(arguments, "load", None) or arguments.save) / STATE_FILE
    if is_first_rank():
        kept.parent.mkdir(parents=True, exist_ok=True)  # as Megatron does with its first checkpoint
        if not kept.exists() and found.exists():
            write_bytes(kept, found.read_bytes())
    return replace(settings, state_file=str(kept))


def _read(path: Path) -> dict[str, Any]:
    try:
        block = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--perseus-config: {path} cannot be read ({error.strerror}); name a JSON file") from None
    except ValueError as error:
        raise InputError(f"--perseus-config: {path} is not JSON: {error}") from None
    if not isinstance(block, dict):
        raise InputError(f'--perseus-config: {path} holds no object; write {{"max_slowdown": 0.05}}, for example')
    return block
