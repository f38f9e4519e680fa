"""Where a rank stands among the parallel dimensions of a Megatron job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state


@dataclass(frozen=True)
class Layout:
    """One rank's place. Ranks that compute the same layers of the same microbatches together are one stage.

    Attributes:
        stage: pipeline rank.
        num_stages: pipeline size.
        pipeline: which of the pipelines that train side by side (data parallelism) this rank belongs to.
        num_pipelines: how many there are.
        tensor_parallel, context_parallel, expert_parallel: sizes of what is folded into the stage.
    """

    stage: int
    num_stages: int
    pipeline: int = 0
    num_pipelines: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1

    @classmethod
    def of_this_rank(cls) -> Layout:
        """As `megatron.core.parallel_state` says."""
        pipeline, num_pipelines = _pipeline()
        return cls(
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            pipeline,
            num_pipelines,
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        )


def _pipeline() -> tuple[int, int]:
    """This rank's pipeline, and how many there are.

    Ranks that share a tensor- or context-parallel group wait for each other in every layer, and so do those that share
    an expert-parallel group, though Megatron counts the latter as data parallel. Both kinds of group hold neighbouring
    ranks, so the larger one contains the smaller.
    """
    dense = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if parallel_state.get_expert_model_parallel_world_size() == 1:
        return dense
    group: Any = parallel_state.get_expert_data_parallel_group()
    experts = group.rank(), group.size()
    return min(dense, experts, key=lambda rank_and_size: rank_and_size[1])
