"""Which GPUs CUDA_VISIBLE_DEVICES means, and in which order CUDA counts them.

CUDA numbers GPUs "fastest first" unless CUDA_DEVICE_ORDER says PCI_BUS_ID; NVML always numbers them by PCI address.
Where all GPUs are of one kind the two agree. Where they are not, only UUIDs are certain. (CUDA C++ Programming Guide,
"CUDA Environment Variables".)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from perseus_core.errors import InputError
from perseus_core.gpu.nvml import GpuIdentity

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"
_ORDER_REMEDY = f"set {_ORDER}=PCI_BUS_ID, or name the GPUs by UUID in {_VISIBLE}"


def visible_gpus(gpus: Sequence[GpuIdentity], environment: Mapping[str, str]) -> list[GpuIdentity]:
    """The GPUs that CUDA shows to this process, in its order: element i is `cuda:i`.

    Args:
        gpus: all GPUs of the machine, in NVML's order.
        environment: the process's environment variables.

    Raises:
        InputError: if the variables name a GPU that is not there, one twice, a MIG slice, or if CUDA's order cannot be
            known.
    """
    value = environment.get(_VISIBLE)
    if value is None:
        if len(gpus) > 1:
            _require_known_order(gpus, environment, "all GPUs are visible")
        chosen = list(gpus)
    else:
        chosen = _named_gpus(value, gpus, environment)
    for gpu in chosen:
        if gpu.is_split:
            raise InputError(
                f"GPU {gpu.index} ({gpu.uuid}) is in MIG mode, and the clock of a slice cannot be locked by itself; "
                "use GPUs without MIG"
            )
    return chosen


def _named_gpus(value: str, gpus: Sequence[GpuIdentity], environment: Mapping[str, str]) -> list[GpuIdentity]:
    chosen: list[GpuIdentity] = []
    for entry in (part.strip() for part in value.split(",")):
        if entry == "" and value.strip() == "":
            break
        if entry.startswith("-") and entry[1:].isdecimal():
            break  # CUDA ignores a negative number and whatever follows it
        gpu = _gpu_by_number(entry, gpus, environment) if entry.isdecimal() else _gpu_by_uuid(entry, gpus)
        if gpu in chosen:
            raise InputError(f"{_VISIBLE}={value} names GPU {entry} twice; name each GPU once")
        chosen.append(gpu)
    return chosen


def _gpu_by_number(entry: str, gpus: Sequence[GpuIdentity], environment: Mapping[str, str]) -> GpuIdentity:
    if int(entry) >= len(gpus):
        raise InputError(f"{_VISIBLE} names GPU {entry}, but this machine has {len(gpus)}; correct the variable")
    _require_known_order(gpus, environment, f"{_VISIBLE} names GPU {entry} by number")
    return gpus[int(entry)]


def _gpu_by_uuid(entry: str, gpus: Sequence[GpuIdentity]) -> GpuIdentity:
    if entry.upper().startswith("MIG"):
        raise InputError(
            f"{_VISIBLE} names the MIG slice {entry}, and the clock of a slice cannot be locked by itself; use whole "
            "GPUs"
        )
    if not entry.upper().startswith("GPU-"):
        raise InputError(f"{_VISIBLE} holds {entry!r}, which is neither a number nor a UUID such as GPU-8932f937-...")
    matches = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    if not matches:
        raise InputError(f"{_VISIBLE} names {entry}, which this machine does not have; `nvidia-smi -L` lists its GPUs")
    if len(matches) > 1:
        raise InputError(f"{_VISIBLE} names {entry}, which fits {len(matches)} GPUs; write more of the UUID")
    return matches[0]


def _require_known_order(gpus: Sequence[GpuIdentity], environment: Mapping[str, str], situation: str) -> None:
    if environment.get(_ORDER, "").upper() == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) == 1:
        return
    kinds = ", ".join(sorted({gpu.name for gpu in gpus}))
    raise InputError(
        f"{situation}, and the GPUs of this machine differ ({kinds}), so CUDA's numbers are not NVML's; {_ORDER_REMEDY}"
    )
