"""Looks at every DeepSpeed engine that is made, and follows the pipeline engines whose config asks for it.

All that a job without a `perseus` block ever meets is one look into its config when its engine has been made. Whatever
follows, follows on that one engine, never on DeepSpeed's classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from perseus_autoload import say_not_active
from perseus_ds.block import BLOCK


def activate(engine_module: ModuleType) -> None:
    """Has engines looked at when they are made.

    Args:
        engine_module: `deepspeed.runtime.pipe.engine`.
    """
    pipeline_engine, any_engine = engine_module.PipelineEngine, engine_module.DeepSpeedEngine

    def look_at_other(engine: Any) -> None:
        if not isinstance(engine, pipeline_engine):  # else it is not complete yet
            _look_at(engine, has_pipeline=False)

    _look_after(pipeline_engine, functools.partial(_look_at, has_pipeline=True))
    _look_after(any_engine, look_at_other)


def _look_after(engine_class: type, look: Callable[[Any], None]) -> None:
    """Calls `look(engine)` at the end of a class's `__init__`."""
    initialise: Any = engine_class.__init__  # type: ignore[misc]
    if hasattr(initialise, "of_perseus"):
        return

    @functools.wraps(initialise)
    def initialise_and_look(engine: Any, *args: Any, **kwargs: Any) -> None:
        initialise(engine, *args, **kwargs)
        look(engine)

    initialise_and_look.of_perseus = True  # type: ignore[attr-defined]
    engine_class.__init__ = initialise_and_look  # type: ignore[misc]


def _look_at(engine: Any, *, has_pipeline: bool) -> None:
    block = _block_of(engine)
    if block is None:
        return
    try:
        from perseus_ds.config import read_block
        from perseus_ds.start import follow, leave_alone
    except Exception as error:
        say_not_active(error)
        return
    # A block that is wrong ends the job here, as DeepSpeed's own blocks do; whatever comes after does not.
    settings = read_block(block)
    if has_pipeline:
        follow(engine, settings)
    else:
        leave_alone(settings)


def _block_of(engine: Any) -> Any:
    """The block as the user wrote it: DeepSpeed keeps keys that it does not know (`DeepSpeedConfig._param_dict`)."""
    return getattr(getattr(engine, "_config", None), "_param_dict", {}).get(BLOCK)
