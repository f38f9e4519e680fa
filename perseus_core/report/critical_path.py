"""The chain of instructions that makes an iteration as long as it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from perseus_core.planning.dag import ComputationDag

# Starts are sums of durations, taken in another order perhaps: this share of the iteration is no gap.
_TOUCHING = 1e-9


def critical_path(
    dag: ComputationDag, start_s: NDArray[np.float64], duration_s: NDArray[np.float64]
) -> NDArray[np.int64]:
    """One chain through the iteration, start to end, in which each instruction starts when the one before lets it.

    Where several are critical, the chain stays on a stage as long as it can. Transfer latencies need not be known: an
    instruction that does not start with the end of its predecessor on the stage waited for the last transfer to come.

    Args:
        dag: the instructions and their order.
        start_s: of shape (N,), earliest starts.
        duration_s: of shape (N,).

    Returns:
        Places of the chain's instructions in the DAG, first to last.
    """
    end_s = start_s + duration_s
    instructions = dag.instructions
    predecessors: list[list[int]] = [[] for _ in instructions]
    for before, after in zip(dag.predecessor.tolist(), dag.successor.tolist(), strict=True):
        predecessors[after].append(before)
    touching_s = _TOUCHING * float(end_s.max())

    last = int(np.argmax(end_s))
    chain = [last]
    while predecessors[last]:
        stage = instructions[last].stage
        by_stage = {instructions[p].stage == stage: p for p in sorted(predecessors[last], key=lambda p: end_s[p])}
        same_stage = by_stage.get(True)
        if same_stage is not None and (end_s[same_stage] >= start_s[last] - touching_s or False not in by_stage):
            last = same_stage
        else:
            last = by_stage[False]
        chain.append(last)
    return np.array(chain[::-1])
