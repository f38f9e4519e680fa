"""The order in which the real frameworks run a pipeline: their own schedule code, run on one stage at a time.

Nothing is computed or sent: recorders stand for Megatron's forward and backward steps and its communicator; DeepSpeed's
schedule is a generator of instructions anyway.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from perseus_core.planning.schedule import Instruction, Kind


def deepspeed_order(num_stages: int, num_microbatches: int, stage: int) -> tuple[Instruction, ...]:
    """What DeepSpeed's `TrainSchedule` runs on a stage. The n-th forward (backward) of a batch is microbatch n."""
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    kinds = {ForwardPass: Kind.FORWARD, BackwardPass: Kind.BACKWARD}
    schedule = TrainSchedule(micro_batches=num_microbatches, stages=num_stages, stage_id=stage)
    order: list[Instruction] = []
    for command in (command for step in schedule.steps() for command in step):
        if kind := kinds.get(type(command)):
            order.append(Instruction(stage, 0, sum(i.kind is kind for i in order), kind))
    return tuple(order)


def megatron_order(
    num_stages: int, num_microbatches: int, stage: int, num_chunks: int = 1, group: int | None = None
) -> tuple[Instruction, ...]:
    """What Megatron's `forward_backward_pipelining_*` runs on a stage; raises what Megatron raises."""
    import torch
    from megatron.core import ModelParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import schedules

    config: Any = ModelParallelConfig(
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        microbatch_group_size_per_vp_stage=group,
        pipeline_dtype=torch.float32,
    )
    config.hidden_size = 1
    config.fine_grained_activation_offloading = False

    class Chunk(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.model_type = ModelType.encoder_or_decoder

    chunks = [Chunk() for _ in range(num_chunks)]
    run = getattr(schedules, f"forward_backward_pipelining_{'with' if num_chunks > 1 else 'without'}_interleaving")
    parameter, groups = _process_groups(run, num_stages, stage)
    order: list[Instruction] = []

    def forward_step(_func: object, _data: object, model: Chunk, *_: object, **arguments: Any) -> tuple[object, int]:
        order.append(Instruction(stage, chunks.index(model), arguments["current_microbatch"], Kind.FORWARD))
        return order[-1], 0

    def backward_step(_input: object, forward: Instruction, *_: object, **__: object) -> str:
        order.append(forward._replace(kind=Kind.BACKWARD))
        return "gradient"

    with (
        mock.patch.object(schedules, "forward_step", forward_step),
        mock.patch.object(schedules, "backward_step", backward_step),
        mock.patch.object(schedules, "torch", _CpuTorch(torch)),
    ):
        run(
            forward_step_func=None,
            data_iterator=[None] * num_chunks,
            model=chunks,
            num_microbatches=num_microbatches,
            seq_length=1,
            micro_batch_size=1,
            p2p_communicator=_Communicator(config, groups.pp, num_chunks),
            **{parameter: groups},
        )
    return tuple(order)


def _process_groups(run: Any, num_stages: int, stage: int) -> tuple[str, Any]:
    """The process groups of a stage, and the parameter by which a version's schedule takes them."""
    from megatron.core import __version__, process_groups_config

    types = {"pg_collection": "ProcessGroupCollection", "grad_finalize_pgs": "GradFinalizeProcessGroups"}  # 0.15, 0.14
    parameter = next((name for name in types if name in inspect.signature(run).parameters), None)
    if parameter is None:
        pytest.skip(f"the schedules of megatron-core {__version__} take no communicator; 0.14 and newer do")
    groups = getattr(process_groups_config, types[parameter])()
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    for name in ("tp", "cp", "embd", "pos_embd", "dp_cp"):
        setattr(groups, name, alone)
    groups.pp = SimpleNamespace(size=lambda: num_stages, rank=lambda: stage)
    return parameter, groups


class _CpuTorch:
    """torch, except that `zeros(device="cuda")` lands on the CPU."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def zeros(self, *size: Any, device: object = None, **options: Any) -> Any:
        return self._torch.zeros(*size, **options)


class _Communicator:
    """Stands for Megatron's P2PCommunicator: says at once that what was asked for has come."""

    def __init__(self, config: object, pp_group: object, num_chunks: int) -> None:
        self.config = config
        self.pp_group = pp_group
        self.virtual_pipeline_model_parallel_size = num_chunks if num_chunks > 1 else None

    def recv_forward(self, *_: object) -> str:
        return "activation"

    def recv_backward(self, *_: object, **__: object) -> str:
        return "gradient"

    def send_forward(self, *_: object) -> None: ...

    def send_backward(self, *_: object) -> None: ...

    def send_forward_recv_backward(self, *_: object) -> str:
        return "gradient"

    def send_backward_recv_forward(self, *_: object) -> str:
        return "activation"

    def send_forward_recv_forward(self, *_: object, recv_prev: bool, **__: object) -> str | None:
        return "activation" if recv_prev else None

    def send_backward_recv_backward(self, *_: object, recv_next: bool, **__: object) -> str | None:
        return "gradient" if recv_next else None

    def send_forward_backward_recv_forward_backward(
        self, *_: object, recv_prev: bool, recv_next: bool, **__: object
    ) -> tuple[str | None, str | None]:
        return "activation" if recv_prev else None, "gradient" if recv_next else None
