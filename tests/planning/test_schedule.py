from __future__ import annotations

import re

import networkx as nx
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.schedule import Instruction, Kind, Schedule, gpipe, interleaved, one_f_one_b, zb_h1
from tests.planning.framework_orders import deepspeed_order, megatron_order

SIZES = [(stages, microbatches) for stages in (1, 2, 3, 4, 7) for microbatches in (1, 2, 3, 5, 8, 17)]
INTERLEAVED_SIZES = [
    # stages, microbatches, chunks, group
    (2, 2, 2, None),
    (2, 4, 2, None),
    (2, 5, 2, 3),
    (2, 7, 4, 5),
    (3, 11, 2, 4),
    (4, 8, 2, None),
    (4, 12, 3, 8),
    (4, 17, 3, 6),
    (8, 16, 4, None),
]
SCHEDULES = [
    *(make(*size) for make in (gpipe, one_f_one_b, zb_h1) for size in SIZES),
    *(interleaved(*size) for size in INTERLEAVED_SIZES),
]


def name_of(schedule: Schedule) -> str:
    return f"{schedule.name}-S{schedule.num_stages}-M{schedule.num_microbatches}-V{schedule.num_chunks}"


def dependencies(schedule: Schedule) -> nx.DiGraph:
    """Order within each stage and transfers between stages, written here anew so that nothing tested is trusted."""
    graph = nx.DiGraph()
    graph.add_nodes_from(schedule.instructions)
    for order in schedule.stages:
        nx.add_path(graph, order)
    num_parts = schedule.num_stages * schedule.num_chunks
    for i in schedule.instructions:
        part = i.chunk * schedule.num_stages + i.stage  # place in the model, from the first layers on
        if i.kind is Kind.FORWARD and part + 1 < num_parts:
            chunk, stage = divmod(part + 1, schedule.num_stages)
            graph.add_edge(i, Instruction(stage, chunk, i.microbatch, Kind.FORWARD))
        elif i.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            if part + 1 < num_parts:
                chunk, stage = divmod(part + 1, schedule.num_stages)
                graph.add_edge(Instruction(stage, chunk, i.microbatch, i.kind), i)
            else:
                graph.add_edge(i._replace(kind=Kind.FORWARD), i)
        elif i.kind is Kind.BACKWARD_WEIGHT:
            graph.add_edge(i._replace(kind=Kind.BACKWARD_INPUT), i)
    return graph


def iteration_time(schedule: Schedule, duration: dict[Kind, float]) -> float:
    graph = dependencies(schedule)
    end: dict[Instruction, float] = {}
    for i in nx.topological_sort(graph):
        end[i] = duration[i.kind] + max((end[before] for before in graph.predecessors(i)), default=0)
    return max(end.values())


def most_in_flight(order: tuple[Instruction, ...], until: Kind) -> int:
    """Most microbatches of a stage at once between their forward and their instruction of kind `until`."""
    in_flight = most = 0
    for i in order:
        in_flight += (i.kind is Kind.FORWARD) - (i.kind is until)
        most = max(most, in_flight)
    return most


def shorthand(order: tuple[Instruction, ...]) -> str:
    """`F1.0` is the forward of microbatch 0 through chunk 1; B, I, W: backward, its input part, its weight part."""
    letter = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.BACKWARD_INPUT: "I", Kind.BACKWARD_WEIGHT: "W"}
    with_chunk = any(i.chunk for i in order)
    return " ".join(f"{letter[i.kind]}{f'{i.chunk}.' if with_chunk else ''}{i.microbatch}" for i in order)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_runs_every_instruction_exactly_once(schedule: Schedule) -> None:
    """Every microbatch passes every chunk of every stage once in each direction."""
    directions = {Kind.FORWARD, Kind.BACKWARD}
    if schedule.name == "zb-h1":
        directions = {Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
    expected = {
        Instruction(stage, chunk, microbatch, kind)
        for stage in range(schedule.num_stages)
        for chunk in range(schedule.num_chunks)
        for microbatch in range(schedule.num_microbatches)
        for kind in directions
    }
    assert len(schedule.instructions) == len(expected)
    assert set(schedule.instructions) == expected


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_never_waits_for_itself(schedule: Schedule) -> None:
    """The order within stages and the transfers between them form no cycle and name no unknown instruction."""
    graph = dependencies(schedule)
    assert graph.number_of_nodes() == len(schedule.instructions)
    assert nx.is_directed_acyclic_graph(graph)


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_zero_bubble_holds_no_more_activations_than_1f1b(stages: int, microbatches: int) -> None:
    """Before the input part as many as 1F1B on every stage; up to the weight part never more than 1F1B's stage 0."""
    plain, zero_bubble = one_f_one_b(stages, microbatches), zb_h1(stages, microbatches)
    for stage, (before, after) in enumerate(zip(plain.stages, zero_bubble.stages, strict=True)):
        assert most_in_flight(before, Kind.BACKWARD) == min(stages - stage, microbatches)
        assert most_in_flight(after, Kind.BACKWARD_INPUT) == min(stages - stage, microbatches)
        assert most_in_flight(after, Kind.BACKWARD_WEIGHT) <= min(stages, microbatches)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("forward", "to_input", "to_weight"), [(1, 1, 1), (3, 3, 2), (5, 4, 3), (2, 4, 1)])
def test_zero_bubble_loses_as_little_as_the_paper_says(
    stages: int, forward: int, to_input: int, to_weight: int
) -> None:
    """Bubbles are (S-1)(tF+tB-tW) for ZB-H1 and (S-1)(tF+tB+tW) for 1F1B (arXiv 2401.10241, table 2)."""
    duration = {
        Kind.FORWARD: forward,
        Kind.BACKWARD_INPUT: to_input,
        Kind.BACKWARD_WEIGHT: to_weight,
        Kind.BACKWARD: to_input + to_weight,
    }
    for microbatches in (stages, 2 * stages, 3 * stages + 1):
        work = microbatches * (forward + to_input + to_weight)
        assert iteration_time(zb_h1(stages, microbatches), duration) - work == (stages - 1) * (
            forward + to_input - to_weight
        )
        assert iteration_time(one_f_one_b(stages, microbatches), duration) - work == (stages - 1) * (
            forward + to_input + to_weight
        )


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 12, 3)])
def test_interleaving_divides_the_bubble_by_the_chunks(stages: int, microbatches: int, chunks: int) -> None:
    """The bubble of V chunks is 1/V of plain 1F1B's (Narayanan et al., SC 2021, section 2.2.2)."""
    part = {Kind.FORWARD: 1, Kind.BACKWARD: 2}
    whole = {kind: chunks * duration for kind, duration in part.items()}
    work = microbatches * chunks * 3
    plain = iteration_time(one_f_one_b(stages, microbatches), whole) - work
    assert chunks * (iteration_time(interleaved(stages, microbatches, chunks), part) - work) == plain


def test_gpipe_order() -> None:
    """All forwards, then all backwards."""
    assert {shorthand(order) for order in gpipe(2, 3).stages} == {"F0 F1 F2 B0 B1 B2"}


def test_1f1b_order() -> None:
    """Four stages, five microbatches, drawn by hand."""
    assert [shorthand(order) for order in one_f_one_b(4, 5).stages] == [
        "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4",
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


def test_1f1b_with_fewer_microbatches_than_stages() -> None:
    """A stage whose warm-up takes all microbatches runs all forwards, then all backwards."""
    assert [shorthand(order) for order in one_f_one_b(4, 2).stages] == [
        "F0 F1 B0 B1",
        "F0 F1 B0 B1",
        "F0 F1 B0 B1",
        "F0 B0 F1 B1",
    ]


def test_zero_bubble_order() -> None:
    """The paper's figure of ZB-H1 on four stages: stage s delays its weight parts by s microbatches."""
    assert [shorthand(order) for order in zb_h1(4, 6).stages] == [
        "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5",
        "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5",
        "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5",
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5",
    ]


def test_zero_bubble_with_fewer_microbatches_than_stages() -> None:
    """Weight parts that are delayed beyond the last input part follow it."""
    assert [shorthand(order) for order in zb_h1(3, 2).stages] == [
        "F0 F1 I0 W0 I1 W1",
        "F0 F1 I0 I1 W0 W1",
        "F0 I0 F1 I1 W0 W1",
    ]


def test_interleaved_order_on_two_stages() -> None:
    """Both stages of PP = 2, VPP = 2, four microbatches, as Megatron-core 0.16.1 ran them."""
    assert [shorthand(order) for order in interleaved(2, 4, 2).stages] == [
        "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3",
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3",
    ]


def test_interleaved_order_on_the_first_of_four_stages() -> None:
    """Stage 0 of PP = 4, VPP = 2, eight microbatches: ten warm-up forwards, then pairs."""
    assert shorthand(interleaved(4, 8, 2).stages[0]) == (
        "F0.0 F0.1 F0.2 F0.3 F1.0 F1.1 F1.2 F1.3 F0.4 F0.5 "
        "F0.6 B1.0 F0.7 B1.1 F1.4 B1.2 F1.5 B1.3 F1.6 B0.0 F1.7 B0.1 "
        "B0.2 B0.3 B1.4 B1.5 B1.6 B1.7 B0.4 B0.5 B0.6 B0.7"
    )


def test_interleaved_order_with_uneven_groups() -> None:
    """Megatron's own example, PP = 2, VPP = 2, groups of three, five microbatches: 0 1 2 0 1 2 3 4 3 4."""
    forwards = [i for i in interleaved(2, 5, 2, 3).stages[0] if i.kind is Kind.FORWARD]
    assert [i.microbatch for i in forwards] == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert [i.chunk for i in forwards] == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((4, 8, 1), "interleaved 1F1B with 1 chunk is plain 1F1B"),
        ((1, 8, 2), "interleaved 1F1B on 1 stage is not a pipeline"),
        ((4, 8, 2, 3), "microbatch_group_size 3 is below the 4 stages; use 4 or more"),
        ((4, 6, 2, 8), "microbatch_group_size 8 is above the 6 microbatches; use 8 or more microbatches, or a group"),
        ((4, 3, 2), "microbatch_group_size 4 is above the 3 microbatches; use 4 or more microbatches"),
        ((4, 10, 2), "10 microbatches in groups of 4 leave a last group of 2, fewer than the 4 stages"),
        ((4, 0, 2), "num_microbatches is 0; it must be 1 or more"),
    ],
)
def test_interleaved_refuses_what_megatron_refuses(size: tuple[int, ...], message: str) -> None:
    """The sentence names the number and what to do instead."""
    with pytest.raises(InputError, match=re.escape(message)):
        interleaved(*size)


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zb_h1])
@pytest.mark.parametrize(("size", "name"), [((0, 4), "num_stages"), ((4, -1), "num_microbatches")])
def test_refuses_no_stage_or_no_microbatch(make, size: tuple[int, int], name: str) -> None:
    """A pipeline has at least one stage and one microbatch."""
    with pytest.raises(InputError, match=name):
        make(*size)


F0, B0 = Instruction(0, 0, 0, Kind.FORWARD), Instruction(0, 0, 0, Kind.BACKWARD)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "has no instruction"),
        (((), ()), "has no instruction"),
        (((F0, F0),), "twice"),
        (((F0,), (B0,)), "on stage 1"),
        (((F0._replace(chunk=1),),), "chunk below 1"),
        (((F0._replace(microbatch=1),),), "microbatch below 1"),
    ],
)
def test_a_schedule_refuses_what_cannot_run(stages: tuple[tuple[Instruction, ...], ...], message: str) -> None:
    """A schedule traced or written by hand is checked where it is made."""
    with pytest.raises(InputError, match=message):
        Schedule("traced", 1, 1, stages)


def test_1f1b_is_what_deepspeed_runs() -> None:
    """The order of DeepSpeed's own TrainSchedule, on every stage of a grid."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: its real order is not compared")
    for stages in range(2, 9):
        for microbatches in range(1, 21):
            for stage, order in enumerate(one_f_one_b(stages, microbatches).stages):
                assert deepspeed_order(stages, microbatches, stage) == order


@pytest.mark.filterwarnings("ignore")
def test_1f1b_is_what_megatron_runs() -> None:
    """The order in which Megatron's own schedule calls its forward and backward steps."""
    pytest.importorskip("megatron.core", reason="Megatron-core is not installed: its real order is not compared")
    for stages in range(2, 9):
        for microbatches in range(1, 21):
            for stage, order in enumerate(one_f_one_b(stages, microbatches).stages):
                assert megatron_order(stages, microbatches, stage) == order


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stages", range(2, 9))
def test_interleaved_is_what_megatron_runs_and_refuses(stages: int) -> None:
    """The same order where Megatron runs, a refusal where Megatron refuses."""
    pytest.importorskip("megatron.core", reason="Megatron-core is not installed: its real order is not compared")
    for chunks in (2, 3, 4):
        for group in (None, *range(stages - 1, 2 * stages + 1)):
            for microbatches in range(1, 3 * stages + 2):
                try:
                    ours = interleaved(stages, microbatches, chunks, group)
                except InputError:
                    with pytest.raises((ValueError, RuntimeError)):
                        megatron_order(stages, microbatches, 0, chunks, group)
                    continue
                for stage, order in enumerate(ours.stages):
                    assert megatron_order(stages, microbatches, stage, chunks, group) == order
