"""Everything about a Megatron job that changes how long its instructions take and what they cost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

import megatron.core
import torch

from perseus_core import __version__
from perseus_core.planning.schedule import Schedule
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_megatron.layout import Layout


def profile_key(
    model: Sequence[Any],
    config: Any,
    layout: Layout,
    schedule: Schedule,
    sequence_length: int,
    microbatch_size: int,
) -> ProfileKey:
    """The key of a job's profile.

    Args:
        model: this rank's model chunks.
        config: their `ModelParallelConfig`.
        layout: this rank's place.
        schedule: of one iteration.
        sequence_length: of a microbatch.
        microbatch_size: samples.
    """
    return ProfileKey(
        model=_fingerprint(model, config),
        schedule=schedule.name,
        num_stages=schedule.num_stages,
        num_chunks=schedule.num_chunks,
        tensor_parallel=layout.tensor_parallel,
        data_parallel=layout.num_pipelines,
        microbatch_size=microbatch_size,
        details=(
            ("context parallel", str(layout.context_parallel)),
            ("expert parallel", str(layout.expert_parallel)),
            ("sequence length", str(sequence_length)),
        ),
        versions=(
            ("cuda", str(torch.version.cuda)),
            ("megatron-core", megatron.core.__version__),
            ("perseus", __version__),
            ("torch", torch.__version__),
        ),
    )


def _fingerprint(model: Sequence[Any], config: Any) -> str:
    """A hash of the configuration, which says what all stages hold, and of this rank's parameters."""
    fields = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    plain = {name: str(value) for name, value in fields.items() if _is_plain(value)}
    parameters = [
        f"{chunk} {name} {list(parameter.shape)} {parameter.dtype}"
        for chunk, module in enumerate(model)
        for name, parameter in module.named_parameters()
    ]
    return hashlib.sha256(json.dumps([plain, parameters], sort_keys=True).encode()).hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    """Whether a value's text says all about it: functions and objects have addresses in theirs."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Enum, torch.dtype))
