"""Everything about a DeepSpeed job that changes how long its instructions take and what they cost."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import deepspeed
import torch

from perseus_core import __version__
from perseus_core.planning.schedule import Schedule
from perseus_core.runtime.measure.profile_cache import ProfileKey

# Sections of a DeepSpeed config that change what is computed, or how.
_SECTIONS = (
    "activation_checkpointing",
    "amp",
    "bf16",
    "communication_data_type",
    "compile",
    "curriculum_learning",
    "data_efficiency",
    "fp16",
    "pipeline",
    "tensor_parallel",
    "torch_autocast",
    "zero_optimization",
)


def profile_key(engine: Any, schedule: Schedule, input_shapes: str) -> ProfileKey:
    """The key of an engine's profile.

    Args:
        engine: the pipeline engine.
        schedule: of one training batch.
        input_shapes: of a microbatch, as this rank saw it.
    """
    config = engine._config._param_dict
    checkpointing = getattr(engine.module, "activation_checkpoint_interval", 0)
    return ProfileKey(
        model=_fingerprint(engine.module),
        schedule=schedule.name,
        num_stages=schedule.num_stages,
        num_chunks=schedule.num_chunks,
        tensor_parallel=engine.grid.model_parallel_size,
        data_parallel=engine.grid.data_parallel_size,
        microbatch_size=engine.train_micro_batch_size_per_gpu(),
        details=(
            ("input shapes", input_shapes),
            ("checkpointing interval", str(checkpointing)),
            *((name, json.dumps(config[name], sort_keys=True)) for name in _SECTIONS if name in config),
        ),
        versions=(
            ("cuda", str(torch.version.cuda)),
            ("deepspeed", deepspeed.__version__),
            ("perseus", __version__),
            ("torch", torch.__version__),
        ),
    )


def shapes_of(inputs: Any) -> str:
    """Shapes and types of the tensors in a microbatch."""
    if torch.is_tensor(inputs):
        return f"{list(inputs.shape)} {inputs.dtype}"
    if isinstance(inputs, (list, tuple)):
        return ", ".join(map(shapes_of, inputs))
    return ""


def _fingerprint(module: Any) -> str:
    """A hash of all layers of the pipeline, their order, and which stage holds which."""
    layers = [_layer(spec) for spec in getattr(module, "_layer_specs", [])]
    own = [f"{name}{list(parameter.shape)}{parameter.dtype}" for name, parameter in module.named_parameters()]
    text = json.dumps([layers, list(map(str, getattr(module, "parts", []))), own])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layer(spec: Any) -> str:
    built = getattr(spec, "typename", None)
    if built is not None:
        values = [*getattr(spec, "module_args", ()), *sorted(getattr(spec, "module_kwargs", {}).items())]
        text = f"{built.__qualname__}({values})"
    else:
        text = repr(spec)
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # addresses differ from run to run
