# Types of the compiled inner loops; native/*.c documents them. Arrays pass as buffers and come back as bytes.
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

def topological_order(num_nodes: int, predecessor: NDArray[Any], successor: NDArray[Any], /) -> bytes: ...
def earliest_starts(
    predecessor: NDArray[Any], successor: NDArray[Any], latency: NDArray[Any], duration: NDArray[Any], /
) -> bytes: ...
def trace_frontier(
    tail: NDArray[Any],
    head: NDArray[Any],
    curve: NDArray[Any],
    first_knot: NDArray[Any],
    length: NDArray[Any],
    steepness: NDArray[Any],
    moment: NDArray[Any],
    source: int,
    sink: int,
    until: int,
    min_value: int,
    tolerance: float,
    num_recorded: int,
    progress: Callable[[int], object] | None,
    /,
) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes]: ...
def improve_plan(
    order: NDArray[Any],
    first_predecessor: NDArray[Any],
    predecessor: NDArray[Any],
    predecessor_latency: NDArray[Any],
    first_successor: NDArray[Any],
    successor: NDArray[Any],
    successor_latency: NDArray[Any],
    curve: NDArray[Any],
    first_point: NDArray[Any],
    time: NDArray[Any],
    cost: NDArray[Any],
    point: NDArray[Any],
    limit: float,
    window: int,
    trials_per_window: int,
    /,
) -> bytes: ...
def solve_at_time(
    tail: NDArray[Any],
    head: NDArray[Any],
    curve: NDArray[Any],
    first_knot: NDArray[Any],
    length: NDArray[Any],
    steepness: NDArray[Any],
    moment: NDArray[Any],
    flow: NDArray[Any],
    source: int,
    epsilon: int,
    tolerance: float,
    progress: Callable[[int], object] | None,
    /,
) -> tuple[bytes, bytes, float]: ...
def run_with_switching(
    first_predecessor: NDArray[Any],
    predecessor: NDArray[Any],
    predecessor_latency: NDArray[Any],
    stage: NDArray[Any],
    instruction_type: NDArray[Any],
    before: NDArray[Any],
    behind: NDArray[Any],
    first_node: NDArray[Any],
    order: NDArray[Any],
    begin_of_stage: NDArray[Any],
    time: NDArray[Any],
    cost: NDArray[Any],
    measured: NDArray[Any],
    clock: NDArray[Any],
    num_clocks: int,
    up: float,
    down: float,
    call: float,
    jitter: float,
    outside: float,
    waiting_power: float,
    limit: float,
    max_changes_per_s: float,
    num_moves: int,
    warmth: float,
    /,
) -> tuple[bytes, bytes, bytes]: ...
