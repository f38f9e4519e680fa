"""Runs the unmodified `pretrain_gpt.py` of a Megatron-LM checkout on the CPU: `python -m ... SCRIPT [ARGUMENT ...]`."""

from __future__ import annotations

import json
import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests.megatron import cpu_megatron


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    # Behind the installed megatron-core, which has its data helpers compiled.
    sys.path.append(str(script.parent))
    cpu_megatron.install_for_training_loop()
    cpu_megatron.install()
    torch.set_num_threads(1)
    keep_scalars_in_a_file()
    if "PERSEUS_SIMULATED_GPUS" in os.environ:
        occupy_when_training_starts()
    runpy.run_path(str(script), run_name="__main__")


def occupy_when_training_starts() -> None:
    """Passes occupy the simulated GPUs from the moment that Megatron knows its stages; before `train` is followed."""
    import megatron.training.training as training

    setup = training.setup_model_and_optimizer

    def set_up_and_occupy(*args: object, **kwargs: object) -> object:
        from perseus_megatron.simulated_work import occupy_simulated_gpus

        result = setup(*args, **kwargs)
        occupy_simulated_gpus()
        return result

    training.setup_model_and_optimizer = set_up_and_occupy


def keep_scalars_in_a_file() -> None:
    """Megatron's TensorBoard writer appends to `scalars.jsonl` in its folder; the tests need no tensorboard."""

    class SummaryWriter:
        def __init__(self, log_dir: str, **_: Any) -> None:
            self._file = Path(log_dir) / "scalars.jsonl"
            self._file.parent.mkdir(parents=True, exist_ok=True)

        def add_scalar(self, name: str, value: Any, step: int) -> None:
            with self._file.open("a") as file:
                file.write(json.dumps([name, float(value), step]) + "\n")

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    tensorboard: Any = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter
    sys.modules[tensorboard.__name__] = tensorboard


if __name__ == "__main__":
    main()
