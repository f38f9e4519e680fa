"""What a framework adapter says about the job, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perseus_core.planning.schedule import Schedule
from perseus_core.runtime.measure.profile_cache import ProfileKey


@dataclass(frozen=True)
class Job:
    """One rank's place in the job.

    Attributes:
        stage: pipeline stage of this rank.
        num_stages: stages of the pipeline.
        num_chunks: model chunks per stage.
        rank: global rank.
        world_size: all ranks.
        data_parallel_rank: which of the pipelines this rank belongs to.
        schedule: the schedule for a number of microbatches; raises `InputError` for a number that the framework cannot
            run.
        key: everything that changes what a profile would say, beside the GPU.
    """

    stage: int
    num_stages: int
    num_chunks: int
    rank: int
    world_size: int
    data_parallel_rank: int
    schedule: Callable[[int], Schedule]
    key: ProfileKey
