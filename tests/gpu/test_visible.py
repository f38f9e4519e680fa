from __future__ import annotations

from collections.abc import Callable

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.discovery import device_by_uuid, visible_devices
from perseus_core.gpu.nvml import GpuIdentity
from perseus_core.gpu.simulated import SimulatedNode
from perseus_core.gpu.visible import visible_gpus


def make_gpus(*names: str, split: frozenset[int] = frozenset()) -> list[GpuIdentity]:
    uuids = ["GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44"]
    return [
        GpuIdentity(i, uuids[i], name, f"00000000:0{i + 1}:00.0", is_split=i in split) for i, name in enumerate(names)
    ]


ALIKE = make_gpus("A100", "A100", "A100", "A100")
MIXED = make_gpus("A40", "A100", "A100")


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        (" 3 , 1 ", [3, 1]),
        ("", []),
        ("-1", []),
        ("1,-1,2", [1]),
        ("GPU-bb33,GPU-aa11", [2, 0]),
        ("GPU-b", [2]),
        ("gpu-CC44", [3]),
        ("GPU-aa2,3", [1, 3]),
    ],
)
def test_numbers_and_uuids_name_the_right_gpus_in_their_order(value: str | None, indices: list[int]) -> None:
    """As CUDA reads the variable: unambiguous UUID prefixes count, a negative number ends the list."""
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.index for gpu in visible_gpus(ALIKE, environment)] == indices


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("4", "names GPU 4, but this machine has 4"),
        ("0,0", "twice"),
        ("0,GPU-aa11", "twice"),
        ("GPU-aa", "fits 2 GPUs"),
        ("GPU-ff", "does not have"),
        ("MIG-5c89/1/0", "MIG slice MIG-5c89/1/0"),
        ("all", "neither a number nor a UUID"),
        ("0,,1", "holds ''"),
    ],
)
def test_what_is_not_certain_is_refused(value: str, message: str) -> None:
    """Locking the clock of a wrong GPU would be worse than none."""
    with pytest.raises(InputError, match=message):
        visible_gpus(ALIKE, {"CUDA_VISIBLE_DEVICES": value})


def test_numbers_on_a_mixed_machine_need_the_pci_order() -> None:
    """CUDA puts the fastest first, in an order that NVML does not know."""
    with pytest.raises(InputError, match=r"A100, A40.*set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_gpus(MIXED, {"CUDA_VISIBLE_DEVICES": "1"})
    with pytest.raises(InputError, match="all GPUs are visible"):
        visible_gpus(MIXED, {})
    ordered = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert [gpu.index for gpu in visible_gpus(MIXED, ordered)] == [1]
    assert [gpu.index for gpu in visible_gpus(MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-bb33"})] == [2]


def test_a_gpu_in_mig_mode_is_refused() -> None:
    """Its slices share one clock."""
    gpus = make_gpus("A100", "A100", split=frozenset({1}))
    with pytest.raises(InputError, match=r"GPU 1 \(GPU-aa22\) is in MIG mode"):
        visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": "1"})
    assert [gpu.index for gpu in visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": "0"})] == [0]


def test_visible_devices_are_the_gpus_cuda_would_use(make_node: Callable[..., SimulatedNode]) -> None:
    """Through NVML, by UUID, in the order of the variable."""
    node = make_node(num_gpus=4)
    uuids = [gpu.identity.uuid for gpu in node.gpus]
    devices = visible_devices({"CUDA_VISIBLE_DEVICES": f"3,{uuids[1]}"})
    assert [device.uuid for device in devices] == [uuids[3], uuids[1]]
    devices[0].lock_clock(800)
    assert [bool(gpu.state().locked_mhz) for gpu in node.gpus] == [False, False, False, True]


def test_torchs_form_of_a_uuid_is_understood(node: SimulatedNode) -> None:
    """`torch.cuda.get_device_properties(i).uuid` has no leading GPU-."""
    uuid = node.gpus[1].identity.uuid
    assert device_by_uuid(uuid.removeprefix("GPU-"), {}).uuid == uuid
