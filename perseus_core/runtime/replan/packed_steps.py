"""Executed instructions in four bytes each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseus_core.errors import InputError
from perseus_core.runtime.measure.recorder import Step
from perseus_core.runtime.measure.stage_measurements import KINDS

PACKED_STEP = np.dtype([("microbatch", "<u2"), ("chunk", "u1"), ("kind", "u1")])


def pack_steps(steps: Sequence[Step]) -> NDArray[Any]:
    """Steps as an array of `PACKED_STEP`.

    Raises:
        InputError: if there are more chunks or microbatches than it can hold.
    """
    for chunk, microbatch, _ in steps:
        if chunk >= 2**8 or microbatch >= 2**16:
            raise InputError(
                f"an iteration has chunk {chunk}, microbatch {microbatch}; 256 and 65536 of them are the most"
            )
    return np.array([(microbatch, chunk, KINDS.index(kind)) for chunk, microbatch, kind in steps], PACKED_STEP)


def unpack_steps(packed: NDArray[Any]) -> tuple[Step, ...]:
    """Undoes `pack_steps`.

    Raises:
        InputError: if a kind is none.
    """
    if (packed["kind"] >= len(KINDS)).any():
        raise InputError(f"{packed['kind'].max()} is no kind of instruction; run the same version on all ranks")
    return tuple((chunk, microbatch, KINDS[kind]) for microbatch, chunk, kind in packed.tolist())
