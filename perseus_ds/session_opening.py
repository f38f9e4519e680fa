"""Opens the session of one pipeline engine: its place in the job, its GPU, its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from perseus_core.runtime.adapter import device_of_rank, events_of
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.job import Job
from perseus_core.runtime.opening import open_session
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings
from perseus_ds.extraction import schedule_factory
from perseus_ds.profile_key import profile_key, shapes_of


def open_engine_session(engine: Any, settings: Settings, pipe_schedule: Any) -> Session | InertSession:
    """Opens the session; all ranks do so at the same training batch.

    Args:
        engine: the pipeline engine, which has trained one batch before.
        settings: what the user wants.
        pipe_schedule: DeepSpeed's schedule of the training batch that begins.
    """
    schedule = schedule_factory(pipe_schedule)
    usual = schedule(pipe_schedule.num_micro_batches)
    job = Job(
        stage=engine.stage_id,
        num_stages=usual.num_stages,
        num_chunks=usual.num_chunks,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        data_parallel_rank=engine.grid.get_data_parallel_id(),
        schedule=schedule,
        key=profile_key(engine, usual, _input_shapes(engine)),
    )
    return open_session(
        settings,
        job,
        device=lambda: device_of_rank(engine.device, engine.local_rank),
        local_rank=engine.local_rank,
        events=events_of(engine.device),
        metric=_to_monitor(engine),
    )


def _input_shapes(engine: Any) -> str:
    """Shapes of a microbatch of the batch before, where its buffer still holds one: on the first stage, on rank 0."""
    inputs = engine.pipe_buffers.get("inputs", [])
    return next((shapes_of(each) for each in inputs if each is not None), "")


def _to_monitor(engine: Any) -> Callable[[str, float], None] | None:
    """Hands figures to DeepSpeed's monitor (TensorBoard, W&B, CSV, Comet), where the config enables one."""
    monitor: Any = getattr(engine, "monitor", None)
    if not getattr(monitor, "enabled", False):
        return None
    return lambda name, value: monitor.write_events([(f"Perseus/{name}", value, engine.global_samples)])
