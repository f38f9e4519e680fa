"""A session that does nothing, for jobs in which there is nothing to do or no way to do it."""

from __future__ import annotations

from perseus_core.planning.policy import Policy
from perseus_core.planning.schedule import Kind
from perseus_core.runtime.ranks.order import Phase
from perseus_core.runtime.reporter import SessionStatus


class InertSession:
    """The same methods as `session.Session`."""

    def begin_iteration(self, num_microbatches: int, *, training: bool = True) -> None:
        """Nothing."""

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        """Nothing."""

    def end_instruction(self) -> None:
        """Nothing."""

    def end_iteration(self) -> None:
        """Nothing."""

    def fail(self, error: Exception) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def set_policy(self, policy: Policy) -> None:
        """Nothing."""

    def set_straggler(self, slowdown: float) -> None:
        """Nothing."""

    def status(self) -> SessionStatus:
        """Stepped aside."""
        return SessionStatus(Phase.STEPPED_ASIDE)
