"""Runs the unmodified `pretrain_gpt.py` of a Megatron-LM checkout on the CPU: `python -m ... SCRIPT [ARGUMENT ...]`."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

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


if __name__ == "__main__":
    main()
