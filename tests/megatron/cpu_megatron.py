"""Lets the real Megatron run on a machine without a GPU, for tests and demonstrations only.

Megatron asks for CUDA in a few dozen places. Here a tensor asked for on CUDA is made on the CPU, CUDA's streams and
events become nothing, and the CPU's random numbers stand for the GPU's. Schedules, communication, data parallelism,
optimizer and model are Megatron's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
import types
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """What `torch.set_default_device` is made of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING_FOR_CUDA:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return func(*args).replace(
                    "torch.", "torch.cuda.", 1
                )  # Megatron compares it with torch.cuda.FloatTensor
            if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
                args = (args[0], "cpu", *args[2:])
        if not kwargs:
            return func(*args)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


_ASKING_FOR_CUDA = {torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _Nothing:
    """A stream or an event: everything it is asked to do is done."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time_s = 0.0

    def record_event(self, event: Any = None) -> Any:
        return event or _Nothing()

    def record(self, *_: Any) -> None:
        self._time_s = time.perf_counter()

    def elapsed_time(self, end: Any) -> float:
        return float(end._time_s - self._time_s) * 1e3

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _do_nothing


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def install() -> None:
    """What megatron.core needs."""
    cuda: Any = torch.cuda
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    replaced = {
        "current_device": lambda: local_rank,
        "device_count": lambda: local_rank + 1,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "current_stream": lambda *_: _Nothing(),
        "default_stream": lambda *_: _Nothing(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Nothing,
        "Event": _Nothing,
        "get_device_properties": lambda device=None: types.SimpleNamespace(
            major=0, minor=0, name="cpu", total_memory=0, multi_processor_count=1, gcnArchName="cpu"
        ),
        **dict.fromkeys(("synchronize", "set_device", "set_stream", "empty_cache"), _do_nothing),
    }
    for name, replacement in replaced.items():
        setattr(cuda, name, replacement)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _do_nothing

    # Megatron frees a tensor's data while it is being sent. NCCL has kept it by then, gloo has not.
    isend = dist.distributed_c10d.isend
    dist.isend = dist.distributed_c10d.isend = lambda tensor, *args, **kwargs: isend(tensor.detach(), *args, **kwargs)

    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    _install_for_experts()
    _CudaMeansCpu().__enter__()


def _install_for_experts() -> None:
    """What layers of experts need."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # Megatron asks for it though there is no Transformer Engine
    # Sizes of what is sent are on the CPU already, but their type is converted on the way there only.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    torch.Tensor.record_stream = _do_nothing


def install_for_training_loop() -> None:
    """What megatron.training of a Megatron-LM checkout needs beside."""
    if "triton" not in sys.modules and not _can_import("triton"):
        kernels: Any = types.ModuleType("megatron.core.transformer.custom_layers.batch_invariant_kernels")
        kernels.enable_batch_invariant_mode = lambda *_: sys.exit("--batch-invariant-mode needs triton")
        sys.modules[kernels.__name__] = kernels
    import megatron.core.datasets.utils as datasets
    import megatron.training.training as training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    datasets.compile_helpers = _do_nothing  # the installed megatron-core brings them compiled
    with contextlib.suppress(ImportError):
        from megatron.legacy import fused_kernels

        fused_kernels.load = _do_nothing


def _can_import(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True
