"""The session's plan goes into DeepSpeed's checkpoints, so that a resumed job goes on with it at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from perseus_core.runtime.adapter import Hooks
from perseus_core.runtime.log import logger
from perseus_core.runtime.settings import Settings

FILE = "perseus_session.json"


class CheckpointedState:
    """Where one engine's session keeps its state, on rank 0.

    Attributes:
        settings: the user's, with a file for the state: the user's own, or a temporary one.
    """

    def __init__(self, settings: Settings) -> None:
        """Finds a place for the state."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not settings.state_file:
            self._folder = tempfile.TemporaryDirectory(prefix="perseus-")
            settings = replace(settings, state_file=str(Path(self._folder.name) / FILE))
        self.settings = settings

    def hook_engine(self, engine: Any, hooks: Hooks) -> None:
        """Has the state saved and loaded with the engine's checkpoints."""
        if engine.global_rank == 0:
            hooks.put(engine, "save_checkpoint", self._saving(engine, engine.save_checkpoint))
            hooks.put(engine, "load_checkpoint", self._loading(engine.load_checkpoint))

    def _saving(self, engine: Any, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def save(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            result = save_checkpoint(save_dir, tag, *args, **kwargs)
            # The name that DeepSpeed gives by default.
            folder = Path(save_dir) / str(tag or f"global_step{engine.global_steps}")
            _copy(Path(self.settings.state_file), folder / FILE)
            return result

        return save

    def _loading(self, load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **kwargs: Any) -> Any:
            result = load_checkpoint(*args, **kwargs)
            loaded_file = result[0] if isinstance(result, tuple) else None
            state_file = Path(self.settings.state_file)
            if isinstance(loaded_file, str) and not state_file.exists():
                _copy(Path(loaded_file).parent / FILE, state_file)
            return result

        return load


def _copy(source: Path, target: Path) -> None:
    """Where that cannot be, a resumed job profiles again, and no more."""
    try:
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        logger.warning("the session's state is not copied into or out of a checkpoint: %s", error)
