from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest

from perseus_core.gpu.simulated import Description, ExecutedInstruction, SimulatedNode, create_node, read_executed
from perseus_core.gpu.simulated.command import environment_for
from tests.conftest import REPOSITORY

MakeNode = Callable[..., SimulatedNode]


@pytest.fixture(scope="module")
def make_node(tmp_path_factory: pytest.TempPathFactory) -> MakeNode:
    """Makes four simulated A100s, their times scaled so that jobs are short; keyword arguments replace fields."""

    def make(time_scale: float, **changes: object) -> SimulatedNode:
        description = Description.load(REPOSITORY / "configs" / "gpus" / "a100.json")
        changed = dataclasses.replace(description, time_scale=time_scale, **changes)  # type: ignore[arg-type]
        return create_node(changed, tmp_path_factory.mktemp("gpus"), log=True)

    return make


def on(node: SimulatedNode) -> dict[str, str]:
    """The environment of a job on simulated GPUs."""
    return environment_for(node.folder, os.environ)


def executed_iterations(node: SimulatedNode, ranks: list[dict[str, Any]]) -> list[list[list[ExecutedInstruction]]]:
    """What each rank's GPU executed in each iteration, in order; ranks tell their plan after each, and no more."""
    log = read_executed(node.folder)
    executed = []
    for rank, result in enumerate(ranks):
        of_rank = [instruction for instruction in log if instruction.gpu == rank]
        size, rest = divmod(len(of_rank), len(result["plans"]))
        assert rest == 0, "all iterations are alike"
        executed.append([of_rank[first : first + size] for first in range(0, len(of_rank), size)])
    return executed
