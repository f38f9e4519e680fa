"""The computation DAG: edges, longest paths, and what is no DAG."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.dag import ComputationDag, Dag, data_dependencies
from perseus_core.planning.schedule import (
    Instruction,
    Kind,
    Placement,
    Schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    zb_h1,
)
from tests.planning.fused import fused_with_expert_overlap

SCHEDULES = [gpipe(3, 5), one_f_one_b(4, 7), interleaved(4, 8, 2), zb_h1(4, 6), one_f_one_b(1, 3)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_times_equal_networkx(schedule: Schedule) -> None:
    """Start times and iteration time are longest paths of the networkx graph, latencies included."""
    dag = ComputationDag.of(schedule, transfer_latency_s=0.01)
    durations = np.random.default_rng(1).uniform(0.1, 1.0, dag.num_instructions)
    graph = dag.to_networkx(durations)
    weighted = nx.DiGraph()
    for before, after, latency in graph.edges(data="latency_s"):
        weighted.add_edge(before, after, weight=graph.nodes[before]["duration_s"] + latency)
    for i in graph:
        weighted.add_edge(i, "end", weight=graph.nodes[i]["duration_s"])
    assert dag.iteration_time_s(durations) == pytest.approx(nx.dag_longest_path_length(weighted))
    for before, after, latency in graph.edges(data="latency_s"):
        ready = graph.nodes[before]["start_s"] + graph.nodes[before]["duration_s"] + latency
        assert graph.nodes[after]["start_s"] >= ready - 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_latest_starts_keep_the_iteration_time(schedule: Schedule) -> None:
    """Nothing starts after its latest start, and what is critical starts exactly then."""
    dag = ComputationDag.of(schedule)
    durations = np.random.default_rng(2).uniform(0.1, 1.0, dag.num_instructions)
    time_s = dag.iteration_time_s(durations)
    slack = dag.latest_start_times_s(durations, time_s) - dag.start_times_s(durations)
    assert slack.min() == pytest.approx(0, abs=1e-12)
    lengthened = durations.copy()
    roomiest = int(np.argmax(slack))
    lengthened[roomiest] += slack[roomiest]
    assert dag.iteration_time_s(lengthened) == pytest.approx(time_s)
    critical = dag.critical(durations)
    assert critical.any()
    tightened = np.where(critical, durations * 1.1, durations)
    assert dag.iteration_time_s(tightened) > time_s


def test_1f1b_iteration_time_is_the_known_formula() -> None:
    """With equal stages 1F1B takes (M + S - 1)(f + b)."""
    dag = ComputationDag.of(one_f_one_b(4, 8))
    durations = np.array([1.0 if i.kind is Kind.FORWARD else 2.0 for i in dag.instructions])
    assert dag.iteration_time_s(durations) == pytest.approx((8 + 4 - 1) * 3.0)


def test_transfer_latency_counts_between_stages_only() -> None:
    """One microbatch through two stages crosses twice, once forward and once backward."""
    dag = ComputationDag.of(one_f_one_b(2, 1), transfer_latency_s=0.25)
    assert dag.iteration_time_s(np.ones(4)) == pytest.approx(4.5)


def a_v() -> Schedule:
    """Two chunks in a V over two stages: stage 1 turns two microbatches round, and they end on stage 0."""
    # Direction, chunk and microbatch
    orders = ["F00 F01 F10 B10 F11 B11 B00 B01", "F00 F10 F01 F11 B10 B00 B11 B01"]
    kinds = {"F": Kind.FORWARD, "B": Kind.BACKWARD}
    stages = tuple(
        tuple(Instruction(stage, int(chunk), int(microbatch), kinds[kind]) for kind, chunk, microbatch in order.split())
        for stage, order in enumerate(orders)
    )
    return Schedule("by hand", 2, 2, stages, placement=Placement.V)


def test_start_times_in_a_v() -> None:
    """Worked out by hand, for forwards of 1 s and backwards of 2 s."""
    dag = ComputationDag.of(a_v())
    durations = [1.0 if i.kind is Kind.FORWARD else 2.0 for i in dag.instructions]
    assert dag.start_times_s(durations).tolist() == [0, 1, 3, 4, 6, 7, 10, 14, 1, 2, 3, 4, 6, 8, 10, 12]
    assert dag.iteration_time_s(durations) == 16


def test_a_v_turns_round_without_a_transfer() -> None:
    """One microbatch crosses between two stages twice in each direction, not three times as in a loop."""
    kinds = [(0, Kind.FORWARD), (1, Kind.FORWARD), (1, Kind.BACKWARD), (0, Kind.BACKWARD)]
    stages = tuple(tuple(Instruction(stage, chunk, 0, kind) for chunk, kind in kinds) for stage in range(2))
    loop = Schedule("by hand", 2, 1, stages)
    for schedule, crossings in ((loop, 6), (replace(loop, placement=Placement.V), 4)):
        dag = ComputationDag.of(schedule, transfer_latency_s=0.25)
        assert dag.iteration_time_s(np.ones(8)) == pytest.approx(8 + 0.25 * crossings)


def test_an_order_for_a_v_is_a_circle_in_a_loop() -> None:
    """Chunks taken to lie otherwise than they do make instructions wait for each other."""
    with pytest.raises(InputError, match="cycle"):
        ComputationDag.of(replace(a_v(), placement=Placement.LOOP))


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), [(2, 4, 2), (4, 8, 2), (2, 6, 3), (3, 9, 2), (1, 5, 1)])
def test_fused_passes_take_the_time_of_a_simulation(stages: int, microbatches: int, chunks: int) -> None:
    """Whatever they take, a `forward_backward` waits for what both of its passes need, and passes on what both make."""
    plain = interleaved(stages, microbatches, chunks) if chunks > 1 else one_f_one_b(stages, microbatches)
    schedule, passes = fused_with_expert_overlap(plain)
    dag = ComputationDag.of(schedule)
    durations = np.random.default_rng(3).uniform(0.1, 1.0, dag.num_instructions)
    took_s = dict(zip(schedule.instructions, durations.tolist(), strict=True))
    ended_s: dict[Instruction, float] = {}
    free_s = [0.0] * stages
    waiting = [list(order) for order in schedule.stages]
    while any(waiting):
        waited_for = [
            (order, [needed for each in passes[order[0]] for needed in what_a_pass_needs(each, plain)])
            for order in waiting
            if order
        ]
        order, needed = next(
            (order, needed)
            for order, needed in waited_for
            if all(each in ended_s or each in passes[order[0]] for each in needed)
        )
        instruction = order.pop(0)
        start_s = max([free_s[instruction.stage], *(ended_s.get(each, 0.0) for each in needed)])
        free_s[instruction.stage] = start_s + took_s[instruction]
        ended_s.update(dict.fromkeys(passes[instruction], free_s[instruction.stage]))
    assert dag.iteration_time_s(durations) == pytest.approx(max(free_s))


def what_a_pass_needs(a_pass: Instruction, plain: Schedule) -> list[Instruction]:
    """The pass before it in the loop of chunks, and for a backward its forward."""
    loop = [(stage, chunk) for chunk in range(plain.num_chunks) for stage in range(plain.num_stages)]
    if a_pass.kind is Kind.BACKWARD:
        loop.reverse()
    before = {after: before for before, after in pairwise(loop)}.get((a_pass.stage, a_pass.chunk))
    needed = [] if before is None else [a_pass._replace(stage=before[0], chunk=before[1])]
    return needed + ([a_pass._replace(kind=Kind.FORWARD)] if a_pass.kind is Kind.BACKWARD else [])


def test_a_circle_is_refused() -> None:
    """A schedule whose first stage wants the gradient before it sends the activation cannot run."""
    backwards_first = (Instruction(0, 0, 0, Kind.BACKWARD), Instruction(0, 0, 0, Kind.FORWARD))
    other = (Instruction(1, 0, 0, Kind.FORWARD), Instruction(1, 0, 0, Kind.BACKWARD))
    with pytest.raises(InputError, match="cycle"):
        ComputationDag.of(Schedule("broken", 1, 1, (backwards_first, other)))


@pytest.mark.parametrize(
    ("predecessor", "successor", "latency"),
    [([0], [5], [0.0]), ([-1], [1], [0.0]), ([0], [1], [-1.0]), ([0], [1], [float("nan")]), ([0, 1], [1], [0.0])],
)
def test_broken_edges_are_refused(predecessor: list[int], successor: list[int], latency: list[float]) -> None:
    """Edges that lead nowhere, and latencies that cannot be."""
    with pytest.raises(InputError, match="DAG edge"):
        Dag(2, np.array(predecessor), np.array(successor), np.array(latency))


def dual_pipe_v_of_torch(num_stages: int, num_microbatches: int) -> Schedule:
    """The order in which PyTorch's DualPipeV computes; its fused steps as the two passes that they are."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules", reason="PyTorch is not installed")
    kinds = {
        "FORWARD": Kind.FORWARD,
        "FULL_BACKWARD": Kind.BACKWARD,
        "BACKWARD_INPUT": Kind.BACKWARD_INPUT,
        "BACKWARD_WEIGHT": Kind.BACKWARD_WEIGHT,
    }
    order_of = schedules.ScheduleDualPipeV.__new__(schedules.ScheduleDualPipeV)
    order_of.pp_group_size, order_of._n_microbatches = num_stages, num_microbatches
    stages = []
    for rank in range(num_stages):
        actions = [a for a in order_of._calculate_single_rank_operations(rank) if a is not None]
        passes = [a for action in actions for a in (action.sub_actions or (action,))]
        stages.append(
            tuple(
                Instruction(rank, int(a.stage_index != rank), a.microbatch_index, kinds[a.computation_type.name])
                for a in passes
            )
        )
    return Schedule("DualPipeV", 2, num_microbatches, tuple(stages), placement=Placement.V)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 4), (4, 10), (4, 24), (8, 16)])
def test_a_gradient_arrives_however_a_backward_is_divided(num_stages: int, num_microbatches: int) -> None:
    """Where one stage runs it whole and the next one in two parts, as DualPipeV does: on all of a microbatch's way."""
    schedule = dual_pipe_v_of_torch(num_stages, num_microbatches)
    backward = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
    assert {i.kind for i in schedule.instructions} == {Kind.FORWARD, *backward, Kind.BACKWARD_WEIGHT}
    gradients = [
        (before, after)
        for before, after in data_dependencies(schedule)
        if before.kind in backward and after.kind in backward
    ]
    steps_back = [((a.stage, a.chunk), (b.stage, b.chunk)) for a, b in gradients]
    way_back = list(pairwise(reversed(schedule.path)))
    assert len(gradients) == num_microbatches * len(way_back) == num_microbatches * (2 * num_stages - 1)
    assert all(steps_back.count(step) == num_microbatches for step in way_back)
    ComputationDag.of(schedule)
