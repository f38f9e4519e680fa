"""Opens the session of one Megatron job: its place in the job, its GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config

from perseus_core.runtime.adapter import FollowedSession, device_of_rank, events_of
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Metric
from perseus_core.runtime.opening import open_session
from perseus_core.runtime.settings import Settings
from perseus_megatron.extraction import schedule_factory
from perseus_megatron.layout import Layout
from perseus_megatron.profile_key import profile_key


def open_training_session(
    settings: Settings,
    layout: Layout,
    model: Sequence[Any],
    num_microbatches: int,
    sequence_length: int,
    microbatch_size: int,
    *,
    metric: Metric | None = None,
) -> FollowedSession:
    """Opens the session; all ranks do so at the same training iteration.

    Args:
        settings: what the user wants.
        layout: this rank's place.
        model: this rank's model chunks.
        num_microbatches: of the iteration that begins.
        sequence_length: of a microbatch.
        microbatch_size: samples.
        metric: called with the name and value of what is measured.
    """
    config = get_model_config(model[0])
    torch_device = next(model[0].parameters()).device
    schedule = schedule_factory(config, layout.num_stages, len(model))
    rank = torch.distributed.get_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    key = profile_key(model, config, layout, schedule(num_microbatches), sequence_length, microbatch_size)
    job = Job(
        stage=layout.stage,
        num_stages=layout.num_stages,
        num_chunks=len(model),
        rank=rank,
        world_size=torch.distributed.get_world_size(),
        data_parallel_rank=layout.pipeline,
        schedule=schedule,
        key=key,
    )
    return open_session(
        settings,
        job,
        device=lambda: device_of_rank(torch_device, local_rank),
        events=events_of(torch_device),
        metric=metric,
    )
