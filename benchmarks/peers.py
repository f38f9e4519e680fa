"""The reference solver, `lowtime` from PyPI, set up as the artifact of the Perseus paper sets it up."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import networkx as nx
from lowtime.cost_model import ExponentialModel
from lowtime.graph_utils import add_sink_node, add_source_node
from lowtime.operation import CandidateExecutionOptions, ExecutionOption, Operation, OperationSpec
from lowtime.solver import PhillipsDessouky

from perseus_core.planning.problem import PipelineProblem

UNIT_TIME_S = 0.001


def lowtime_solver(problem: PipelineProblem) -> PhillipsDessouky:
    """Pareto-optimal clocks, effective energy, an exponential fit, time steps of 1 ms."""
    logging.disable(logging.WARNING)
    specs = []
    for t, measurements in zip(problem.types, problem.measurements, strict=True):
        options = CandidateExecutionOptions(
            options=[ExecutionOption(m.time_s, UNIT_TIME_S, m.energy_j, m.clock_mhz) for m in measurements]
        )
        for option in options.options:
            option.cost -= problem.stage_blocking_power_w[t.stage] * option.quant_time * UNIT_TIME_S
        specs.append(OperationSpec(options=options, cost_model=ExponentialModel(options, search_strategy="best")))
    dag = nx.DiGraph()
    for i, curve in enumerate(problem.curve_of):
        dag.add_node(i + 2, op=Operation(specs[curve]))
    dag.add_edges_from(zip(problem.dag.predecessor + 2, problem.dag.successor + 2, strict=True))
    add_source_node(dag, 0)
    add_sink_node(dag, 1)
    dag.graph["source_node"], dag.graph["sink_node"] = 0, 1
    return PhillipsDessouky(dag)


def run(solver: PhillipsDessouky) -> Iterator[object]:
    """The full frontier, point by point."""
    return solver.run()
