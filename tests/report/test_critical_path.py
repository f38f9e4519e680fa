"""The critical path is a chain without gaps from the start to the end of the iteration."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from perseus_core.planning.baselines import all_max
from perseus_core.planning.schedule import gpipe, interleaved, one_f_one_b, zb_h1
from perseus_core.report.critical_path import critical_path
from perseus_core.report.timeline import Timeline
from tests.report.conftest import make_profile

CASES = {
    "1f1b": (one_f_one_b(4, 6), make_profile(4)),
    "gpipe": (gpipe(3, 5), make_profile(3)),
    "interleaved": (interleaved(2, 4, 2), make_profile(2).divided_into_chunks(2)),
    "zb-h1": (zb_h1(4, 6), make_profile(4).with_split_backward()),
}


@pytest.mark.parametrize("latency_s", [0.0, 0.003])
@pytest.mark.parametrize("name", CASES)
def test_every_instruction_of_the_chain_is_critical(solved, name, latency_s):
    """All of the chain has no slack, follows the DAG, and its lengths and latencies add up to the iteration."""
    schedule, profile = CASES[name]
    problem = solved(schedule, profile=profile, transfer_latency_s=latency_s).problem
    execution = all_max(problem)
    timeline = Timeline.of_execution(problem, execution)
    chain = timeline.critical_path
    latency_of = dict(
        zip(zip(problem.dag.predecessor, problem.dag.successor, strict=True), problem.dag.latency_s, strict=True)
    )
    assert problem.dag.critical(execution.durations_s)[chain].all()
    latencies_s = [latency_of[pair] for pair in pairwise(chain)]
    assert timeline.duration_s[chain].sum() + sum(latencies_s) == pytest.approx(execution.iteration_time_s)
    assert timeline.start_s[chain[0]] == 0


def test_chain_goes_through_the_slowest_stage(solved):
    """With one stage twice as slow as the others in the middle, its work is what the iteration waits for."""
    problem = solved(one_f_one_b(3, 8)).problem
    slow = np.where(problem.stage_of == 1, 2.0, 1.0)
    start_s = problem.dag.start_times_s(slow)
    chain = critical_path(problem.dag, start_s, slow)
    assert np.count_nonzero(problem.stage_of[chain] == 1) == 2 * 8
