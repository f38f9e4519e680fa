"""What stands in for a session in the adapters' tests of their hooks."""

from __future__ import annotations

from typing import Any

from perseus_core.planning.schedule import Kind


class RecordingSession:
    """Writes down what it is told, in a form that JSON can hold."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, Any]] = []
        self.closed = False

    def begin_iteration(self, num_microbatches: int, *, training: bool = True) -> None:
        self.iterations.append({"microbatches": num_microbatches, "training": training, "order": [], "ended": False})

    def begin_instruction(self, chunk: int, microbatch: int, kind: Kind) -> None:
        self.iterations[-1]["order"].append([chunk, microbatch, kind.value])

    def end_instruction(self) -> None:
        self.iterations[-1]["order"][-1].append("ended")

    def end_iteration(self) -> None:
        self.iterations[-1]["ended"] = True

    def close(self) -> None:
        self.closed = True
