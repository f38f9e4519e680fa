"""Waits until a training framework is imported, then lets the adapter for it look at it.

torch calls `autoload` at the end of `import torch` (entry-point group `torch.backends`, torch 2.5 and newer) and turns
whatever fails there into a failed `import torch`. So this module stands alone at the top level under a name that
nothing shadows, raises nothing, and imports nothing of this package until a framework that it waits for has been
imported. `PERSEUS_DISABLE=1` switches it off.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

DISABLING_VARIABLE = "PERSEUS_DISABLE"

# Module of a framework -> our module, whose `activate(module)` is called once the framework's module is complete.
_AWAITED = {
    "deepspeed.runtime.pipe.engine": "perseus_ds.activation",
    "megatron.training.arguments": "perseus_megatron.activation",
}
# Megatron ends a job that has flags it does not know. It is told of ours even where they are to do nothing.
_REFUSES_UNKNOWN_FLAGS = "megatron.training.arguments"


def is_disabled() -> bool:
    """Whether the environment switches this package off."""
    return os.environ.get(DISABLING_VARIABLE, "0") not in ("", "0")


def autoload() -> None:
    """Starts waiting for all frameworks. What torch calls."""
    try:
        for framework_module in _AWAITED:
            await_import(framework_module)
    except Exception as error:
        say_not_active(error)


def await_import(framework_module: str) -> None:
    """Has a framework's module looked at: now, if it is imported already, else as soon as it is.

    An adapter may be asked more than once, and activates itself once.
    """
    if is_disabled() and framework_module != _REFUSES_UNKNOWN_FLAGS:
        return
    if framework_module in sys.modules:
        _activate(framework_module)
        return
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    _Watcher.awaited.add(framework_module)


def _activate(framework_module: str) -> None:
    try:
        adapter = importlib.import_module(_AWAITED[framework_module])
        adapter.activate(sys.modules[framework_module])
    except Exception as error:  # the framework must be imported, whatever happens here
        say_not_active(error)


def say_not_active(error: Exception) -> None:
    """The one line about something of ours that failed so early that nothing else of ours can be relied on."""
    if os.environ.get("RANK", "0") == "0":
        print(f"perseus: not active, training is untouched: {type(error).__name__}: {error}", file=sys.stderr)


class _Watcher:
    """A finder that finds nothing itself: it lets the others find what is awaited, and hears when that is complete."""

    awaited: ClassVar[set[str]] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called for every import; leaves all but the awaited alone."""
        if fullname not in self.awaited:
            return None
        self.awaited.discard(fullname)
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec and finder is not self else None
            if spec is not None:
                _call_when_executed(spec.loader, fullname)
                return spec
        return None


def _call_when_executed(loader: Any, fullname: str) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module  # the loader is again what it was
        execute(module)
        _activate(fullname)

    loader.exec_module = exec_module
