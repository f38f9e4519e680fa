"""A small GPT on megatron-core: GPTModel, data parallelism, optimizer, and one step of training, all Megatron's own.

What `pretrain_gpt.py` does in its thousand lines, for programs that use megatron-core without `megatron.training`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY = 256


@dataclass(frozen=True)
class Sizes:
    """Of the job.

    Attributes:
        stages: pipeline size.
        chunks: model chunks of a stage (virtual pipeline).
        tensor_parallel: GPUs that share each layer.
        context_parallel: GPUs that share each sequence. Each attends to its own part of it only: attention over all
            parts is Transformer Engine's, which needs a GPU.
        expert_parallel: GPUs that share each layer's experts, two each; 1 for no experts. Their communication is then
            overlapped, a forward and a backward run as one, which Megatron does in bfloat16 and on several chunks only.
        layers_per_chunk: transformer layers.
        layers_at_ends: those of the first and of the last stage, which have the embedding and the head beside; 0 for as
            many as the others have.
        width, heads, sequence_length: of the model.
        microbatch_size: samples.
    """

    stages: int
    chunks: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    layers_per_chunk: int = 1
    layers_at_ends: int = 0
    width: int = 32
    heads: int = 2
    sequence_length: int = 32
    microbatch_size: int = 2

    @property
    def experts(self) -> int:
        """Of each layer; 0 for an ordinary one."""
        return 2 * self.expert_parallel if self.expert_parallel > 1 else 0

    @property
    def layers(self) -> int:
        """Transformer layers in all."""
        even = self.stages * self.chunks * self.layers_per_chunk
        return even - 2 * (self.layers_per_chunk - self.layers_at_ends) if self.layers_at_ends else even


class Training:
    """One rank of the job. `torch.distributed` is there already.

    Attributes:
        model: this rank's chunks.
        data: the microbatches of each chunk, tokens and what comes next.
    """

    def __init__(self, sizes: Sizes, text: Path) -> None:
        """Builds the parallel groups, the model and the optimizer."""
        self.sizes = sizes
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor_parallel,
            pipeline_model_parallel_size=sizes.stages,
            virtual_pipeline_model_parallel_size=sizes.chunks if sizes.chunks > 1 else None,
            context_parallel_size=sizes.context_parallel,
            expert_model_parallel_size=sizes.expert_parallel,
        )
        torch.manual_seed(1234)
        model_parallel_cuda_manual_seed(1234)
        self.config = _config(sizes)
        self.model = [_chunk(self.config, sizes, chunk) for chunk in range(sizes.chunks)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-3, bf16=self.config.bf16), self.model
        )
        self._tokens = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
        # Every stage of a pipeline draws the same microbatches; only the first and the last use them.
        seed = parallel_state.get_data_parallel_rank()
        self.data: list[Iterator[tuple[torch.Tensor, torch.Tensor]]] = [self._microbatches(seed) for _ in self.model]

    def step(self, num_microbatches: int) -> float:
        """Trains one iteration; returns its loss, on the last stage only."""
        loss = self.compute_gradients(num_microbatches)
        self.optimizer.step()
        return loss

    def compute_gradients(self, num_microbatches: int) -> float:
        """An iteration without the optimizer's step; returns its loss, on the last stage only."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(num_microbatches, forward_only=False)

    def evaluate(self, num_microbatches: int) -> float:
        """Forward passes only; returns the loss, on the last stage only."""
        with torch.no_grad():
            return self._run(num_microbatches, forward_only=True)

    def _run(self, num_microbatches: int, *, forward_only: bool) -> float:
        pipelined = self.sizes.stages > 1
        losses = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=self.data if pipelined and self.sizes.chunks > 1 else self.data[0],
            model=self.model if self.sizes.chunks > 1 else self.model[0],
            num_microbatches=num_microbatches,
            seq_length=self.sizes.sequence_length,
            micro_batch_size=self.sizes.microbatch_size,
            forward_only=forward_only,
        )
        return sum(float(loss["loss"]) for loss in losses) / num_microbatches if losses else 0.0

    def _microbatches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        length = self.sizes.sequence_length
        last = len(self._tokens) - length - 1
        first = parallel_state.get_context_parallel_rank() * length // self.sizes.context_parallel
        while True:
            starts = torch.randint(last, (self.sizes.microbatch_size,), generator=generator).tolist()
            pieces = torch.stack([self._tokens[start : start + length + 1] for start in starts])
            part = slice(first, first + length // self.sizes.context_parallel)
            yield pieces[:, :-1][:, part].contiguous(), pieces[:, 1:][:, part].contiguous()


def _config(sizes: Sizes) -> TransformerConfig:
    experts: dict[str, Any] = {}
    if sizes.experts:
        experts = {
            "num_moe_experts": sizes.experts,
            "expert_model_parallel_size": sizes.expert_parallel,
            "moe_token_dispatcher_type": "alltoall",
            "overlap_moe_expert_parallel_comm": True,
            "add_bias_linear": False,
            "bf16": True,
            "params_dtype": torch.bfloat16,
        }
    return TransformerConfig(
        num_layers=sizes.layers,
        num_layers_in_first_pipeline_stage=sizes.layers_at_ends or None,
        num_layers_in_last_pipeline_stage=sizes.layers_at_ends or None,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=sizes.tensor_parallel,
        pipeline_model_parallel_size=sizes.stages,
        virtual_pipeline_model_parallel_size=sizes.chunks if sizes.chunks > 1 else None,
        pipeline_dtype=torch.bfloat16 if sizes.experts else torch.float32,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        # As Megatron-LM's own arguments have it; without, an interleaved stage waits for both neighbours at once.
        overlap_p2p_comm=sizes.chunks > 1,
        batch_p2p_comm=False,
        **experts,
    )


def _chunk(config: TransformerConfig, sizes: Sizes, chunk: int) -> Any:
    virtual: dict[str, int] = {}
    if sizes.chunks > 1:
        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)  # what 0.12 asks for
        if "vp_stage" in inspect.signature(parallel_state.is_pipeline_first_stage).parameters:
            virtual = {"vp_stage": chunk}
    place: Any = {"ignore_virtual": False, **virtual}
    model = GPTModel(
        config,
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=sizes.experts or None),
        vocab_size=VOCABULARY,
        max_sequence_length=sizes.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=False,
        **virtual,
    )
    if config.bf16:
        model = Float16Module(config, model)
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=False), model)


def _forward(
    data: Iterator[tuple[torch.Tensor, torch.Tensor]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    tokens, labels = next(data)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    run = model.build_schedule_plan if return_schedule_plan else model
    return run(tokens, positions, mask, labels=labels), partial(_loss)


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.mean()
    return loss, {"loss": loss.detach().clone()}
