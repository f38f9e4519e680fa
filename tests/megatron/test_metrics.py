"""Where figures go in a job of `megatron.training`. The training loop is a stand-in with the names of the real one."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from perseus_core.runtime.settings import Settings
from perseus_megatron import training_hooks


class Writers:
    """Megatron's, of both kinds."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.logged: list[tuple[dict[str, float], int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))


def figures_reach(monkeypatch: pytest.MonkeyPatch, tensorboard: Writers | None, wandb: Writers | None) -> None:
    """Trains under `hook_training`, and has one figure measured in the middle."""
    training: Any = ModuleType("megatron.training.training")
    training.get_args = lambda: SimpleNamespace(curr_iteration=40)
    training.get_tensorboard_writer = lambda: tensorboard
    training.get_wandb_writer = lambda: wandb
    training.train = lambda model: training.measure("saving", 0.125)

    def follow(settings: Settings, model: Any, *, metric: Any, hook: Any) -> SimpleNamespace:
        training.measure = metric
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setitem(sys.modules, "megatron.training", ModuleType("megatron.training"))
    monkeypatch.setitem(sys.modules, "megatron.training.training", training)
    monkeypatch.setattr(training_hooks, "follow", follow)
    training_hooks.hook_training(Settings(enabled=True))
    training.train(model=[])


def test_figures_reach_megatrons_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard and W&B both get the figure, under our name and at Megatron's iteration."""
    tensorboard, wandb = Writers(), Writers()
    figures_reach(monkeypatch, tensorboard, wandb)
    assert tensorboard.scalars == [("perseus/saving", 0.125, 40)]
    assert wandb.logged == [({"perseus/saving": 0.125}, 40)]


def test_ranks_without_a_writer_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer alone is enough, and where there is none nothing fails."""
    tensorboard = Writers()
    figures_reach(monkeypatch, tensorboard, None)
    figures_reach(monkeypatch, None, None)
    assert len(tensorboard.scalars) == 1
