"""Finds the GPUs of this process and gives each the way to lock its clock that is open to it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from perseus_core.gpu.device import Device
from perseus_core.gpu.nvml import NvmlDevice, list_gpus
from perseus_core.gpu.visible import visible_gpus
from perseus_core.gpu.zeusd import SOCKET_VARIABLE, ZeusdClient, ZeusdDevice


def visible_devices(environment: Mapping[str, str] | None = None) -> list[Device]:
    """The GPUs that CUDA shows to this process; element i is `cuda:i`.

    Args:
        environment: by default this process's environment variables.

    Raises:
        InputError: if CUDA_VISIBLE_DEVICES does not say for certain which GPUs are meant (`perseus_core.gpu.visible`).
        GpuError: if there is no driver, or no zeusd though ZEUSD_SOCK_PATH is set.
    """
    environment = os.environ if environment is None else environment
    return [device_by_uuid(gpu.uuid, environment) for gpu in visible_gpus(list_gpus(), environment)]


def device_by_uuid(uuid: str, environment: Mapping[str, str] | None = None) -> Device:
    """One GPU. Where torch is at hand, `torch.cuda.get_device_properties(i).uuid` names it with certainty.

    The clock is locked through zeusd where ZEUSD_SOCK_PATH is set, else through NVML.

    Args:
        uuid: with or without the leading `GPU-`.
        environment: by default this process's environment variables.

    Raises:
        GpuError: if there is no such GPU, no driver, or no zeusd though ZEUSD_SOCK_PATH is set.
    """
    environment = os.environ if environment is None else environment
    if not uuid.startswith("GPU-"):
        uuid = f"GPU-{uuid}"
    socket_path = environment.get(SOCKET_VARIABLE)
    return ZeusdDevice(uuid, ZeusdClient(socket_path)) if socket_path else NvmlDevice(uuid)
