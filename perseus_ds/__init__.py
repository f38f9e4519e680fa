"""Perseus for DeepSpeed: removes energy bloat from pipeline-parallel training.

Nothing needs to be imported: with the package installed, `"perseus": {"enabled": true}` in the DeepSpeed config is
enough. Where entry points are switched off (`TORCH_DEVICE_BACKEND_AUTOLOAD=0`) or torch is older than 2.5, one line,
before or after `import deepspeed`, does the same:

    import perseus_ds
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perseus_autoload import await_import

if TYPE_CHECKING:
    from perseus_core.runtime.session import Session

__all__ = ["session_of"]

await_import("deepspeed.runtime.pipe.engine")


def session_of(engine: Any) -> Session | None:
    """The session that follows an engine, to ask for its status or to change its policy while it runs.

    None before the second training batch, and where nothing is followed.
    """
    follower = getattr(engine, "perseus", None)
    session: Session | None = getattr(follower, "session", None)
    return session
