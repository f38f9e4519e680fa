"""The computation DAG: edges, longest paths, and what is no DAG."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.dag import ComputationDag, Dag
from perseus_core.planning.schedule import Instruction, Kind, Schedule, gpipe, interleaved, one_f_one_b, zb_h1

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
