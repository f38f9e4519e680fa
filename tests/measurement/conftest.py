from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from perseus_core.gpu.simulated import SimulatedNode
from perseus_core.gpu.simulated.command import environment_for
from tests.runtime.simulated_machine import simulated_machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., SimulatedNode]]:
    """Makes two simulated GPUs that this process and all that it starts see; a forward takes 4 ms at 1000 MHz.

    Once only: where a test is tried again it goes on with them.
    """
    with ExitStack() as stack:
        nodes: list[SimulatedNode] = []

        def make(**changes: Any) -> SimulatedNode:
            if nodes:
                return nodes[0]
            changes = {"time_scale": 0.1, "energy_counter_period_s": 0.04, **changes}
            node = stack.enter_context(simulated_machine(tmp_path, **changes))
            stack.enter_context(mock.patch.dict(os.environ, environment_for(node.folder, os.environ)))
            nodes.append(node)
            return node

        yield make
