"""The self-check of Megatron, and the jobs that are left alone."""

from __future__ import annotations

from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
from megatron.core.pipeline_parallel import schedules

from perseus_core.runtime.adapter import Hooks
from perseus_megatron.internals import differences, why_not
from perseus_megatron.schedule_hooks import ScheduleHooks, combined_1f1b


class Scope(Enum):
    full_iteration = 1
    attn = 2


def copy_of(module: ModuleType) -> ModuleType:
    copied = ModuleType(module.__name__)
    vars(copied).update(vars(module))
    return copied


def test_installed_megatron_is_as_expected() -> None:
    """Nothing differs, with hooks in place or without."""
    assert differences(schedules, combined_1f1b()) == []
    hooks = Hooks()
    ScheduleHooks(SimpleNamespace(**dict.fromkeys(_METHODS, print))).put(hooks, schedules, combined_1f1b())
    try:
        assert differences(schedules, combined_1f1b()) == []
    finally:
        hooks.take_off()


_METHODS = ("begin_iteration", "begin_instruction", "end_instruction", "end_iteration")


@pytest.mark.parametrize(
    "name",
    [
        "forward_step",
        "backward_step",
        "get_schedule_table",
        "get_forward_backward_func",
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_with_interleaving",
    ],
)
def test_what_is_missing_or_differs_is_named(name: str) -> None:
    """A function that has gone, or has other arguments, is one difference."""
    changed = copy_of(schedules)
    delattr(changed, name)
    assert len(differences(changed, None)) == 1
    setattr(changed, name, lambda config: None)
    (difference,) = differences(changed, None)
    assert name in difference


def test_hooks_come_off() -> None:
    """Megatron's modules are as they were."""
    before = dict(vars(schedules))
    hooks = Hooks()
    ScheduleHooks(SimpleNamespace(**dict.fromkeys(_METHODS, print))).put(hooks, schedules, combined_1f1b())
    assert schedules.forward_step is not before["forward_step"]
    hooks.take_off()
    assert dict(vars(schedules)) == before


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"cuda_graph_impl": "local", "cuda_graph_scope": [Scope.full_iteration]}, True),
        ({"enable_cuda_graph": True, "cuda_graph_scope": "full_iteration"}, True),
        ({"cuda_graph_impl": "full_iteration", "cuda_graph_scope": None}, True),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": None}, False),
        ({"cuda_graph_impl": "local", "cuda_graph_scope": [Scope.attn]}, False),
        ({"cuda_graph_impl": "none", "cuda_graph_scope": [Scope.full_iteration]}, False),
        ({"hybrid_context_parallel": True}, True),
        ({}, False),
    ],
)
def test_jobs_that_cannot_be_followed(fields: dict[str, object], refused: bool) -> None:
    """Full-iteration CUDA graphs and hybrid context parallelism are refused with the reason, others are not."""
    assert bool(why_not(SimpleNamespace(**fields))) == refused
