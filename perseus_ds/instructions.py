"""DeepSpeed's names of what a stage does (`deepspeed.runtime.pipe.schedule`), so that no DeepSpeed is needed."""

from __future__ import annotations

from perseus_core.planning.schedule import Kind

KIND_OF = {"ForwardPass": Kind.FORWARD, "BackwardPass": Kind.BACKWARD}
"""What is computed, and so is an instruction of ours."""

RECEIVED_FOR = {"RecvActivation": Kind.FORWARD, "RecvGrad": Kind.BACKWARD}
"""What is received, and the kind of pass that needs it."""

SENT_FOR = {"SendActivation": Kind.FORWARD, "SendGrad": Kind.BACKWARD}
"""What is sent, and the kind of pass that needs it."""

TRANSFER_WHAT_IS_QUEUED = "CommitP2P"
"""DualPipeV queues what it sends and receives, and transfers it with this."""


def chunk_of(command: object) -> int:
    """The model chunk that a command is for: DualPipeV's `phase`."""
    chunk: int = getattr(command, "kwargs", {}).get("phase", 0)
    return chunk
