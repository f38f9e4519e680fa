"""The simulated GPUs of one machine: a folder that every process of the simulation opens.

The folder holds `node.json` (what the GPUs are), `gpu<i>.state` (where each is, a `SharedRecord`) and, where asked for,
`log/` (what really ran). Only the standard library is needed to open it, so that any program can live on it.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from perseus_core.errors import InputError
from perseus_core.gpu.simulated import model as physics
from perseus_core.gpu.simulated.description import Description, Noise
from perseus_core.gpu.simulated.execution_log import ExecutionLog
from perseus_core.gpu.simulated.model import GpuModel, GpuState, InstructionCost, Work
from perseus_core.gpu.simulated.shared_record import SharedRecord
from perseus_core.gpu.simulated.shortcomings import Shortcomings

NODE_FILE = "node.json"
_CALLS_FILE = "calls.lock"
_VERSION = 3


@dataclass(frozen=True)
class Identity:
    """What NVML tells of a GPU and never changes."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    default_stage: int


@dataclass(frozen=True)
class NodeSettings:
    """What all GPUs of the machine share beside their `GpuModel`.

    Attributes:
        type_names: for each of the model's costs, (stage, chunk, kind).
        noise: measurement noise.
        shortcomings: what else they do wrong.
        seed: of the noise.
        power_limits_w: lowest, default and highest power limit.
        memory_clock_mhz: the one memory clock.
        memory_bytes: memory of one GPU.
        compute_capability: CUDA compute capability.
        log: whether what runs is logged.
    """

    type_names: tuple[tuple[int, int, str], ...]
    noise: Noise
    shortcomings: Shortcomings
    seed: int
    power_limits_w: tuple[float, float, float]
    memory_clock_mhz: int
    memory_bytes: int
    compute_capability: tuple[int, int]
    log: bool


class SimulatedGpu:
    """One GPU as every process sees it. All methods are safe between threads and processes."""

    def __init__(
        self, identity: Identity, model: GpuModel, settings: NodeSettings, record: SharedRecord, log: ExecutionLog
    ) -> None:
        """Made by `SimulatedNode`."""
        self.identity = identity
        self.model = model
        self.settings = settings
        self.log = log
        self._record = record

    def version(self) -> int:
        """Changes whenever any process has changed anything on this GPU."""
        return self._record.version()

    def state(self) -> GpuState:
        """The state at this moment, a copy."""
        with self._record.locked():
            state = _decode(self._record.read())
            now_s = time.monotonic()
        physics.advance(self.model, state, now_s)
        return state

    @contextmanager
    def changing(self) -> Iterator[GpuState]:
        """The state at this moment, to be changed; nothing is changed if the block raises."""
        with self._record.locked():
            state = _decode(self._record.read())
            physics.advance(self.model, state, time.monotonic())
            yield state
            self._record.write(_encode(state))

    def lock_clocks(self, lowest_mhz: int, highest_mhz: int) -> None:
        """Asks for a range of clocks; the GPU will run at the highest supported clock of it."""
        target = self.model.clocks_mhz[physics.clock_index_at_most(self.model, highest_mhz)]
        with self.changing() as state:
            state.locked_mhz = [lowest_mhz, highest_mhz]
            if target not in self.settings.shortcomings.disobeyed_clocks_mhz:
                physics.request_clock(self.model, state, target)
        self.log.clock_request(self.identity.index, state.time_s, target)

    def reset_clocks(self) -> None:
        """Gives the clock back: the highest supported one."""
        with self.changing() as state:
            state.locked_mhz = []
            physics.request_clock(self.model, state, self.model.clocks_mhz[0])
        self.log.clock_request(self.identity.index, state.time_s, None)

    def effective_clock_mhz(self) -> int:
        """The clock it runs at now."""
        return self.model.clocks_mhz[physics.effective_clock_index(self.model, self.state())]

    def reported_clock_mhz(self) -> int:
        """The clock that NVML tells."""
        register, state = self.settings.shortcomings.clock_register, self.state()
        if register.reports == "clock asked for":
            return (state.locked_mhz[1] if state.locked_mhz else self.model.clocks_mhz[0]) + register.offset_mhz
        state.set_clock_mhz = physics.set_clock_at(state, state.time_s - register.lag_s)
        return self.model.clocks_mhz[physics.effective_clock_index(self.model, state)] + register.offset_mhz

    def true_energy_j(self) -> float:
        """Oracle: the exact energy since the start, which no real GPU tells. The NVML counter lags behind it."""
        return self.state().energy_j

    def true_power_w(self) -> float:
        """Oracle: the exact power now, without noise."""
        state = self.state()
        return physics.power_w(self.model, state, physics.effective_clock_index(self.model, state))


class SimulatedNode:
    """All simulated GPUs of one machine.

    Attributes:
        folder: where their shared state is.
        gpus: in NVML order.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder that `create` made.

        Raises:
            InputError: if there is none.
        """
        self.folder = folder
        try:
            document = json.loads((folder / NODE_FILE).read_text(encoding="utf-8"))
            version = document["version"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{folder}: holds no simulated GPUs ({type(error).__name__}); unset PERSEUS_SIMULATED_GPUS, or start "
                "the command with `perseus simulate`"
            ) from None
        if version != _VERSION:
            raise InputError(f"{folder}: holds simulated GPUs of version {version}, this program expects {_VERSION}")
        model = document["model"]
        settings = document["settings"]
        self.model = GpuModel(
            tuple(model["clocks_mhz"]),
            tuple(model["blocking_w"]),
            tuple(InstructionCost(tuple(c["time_s"]), tuple(c["energy_j"])) for c in model["costs"]),
            tuple(model["clock_latencies_s"]),
            model["counter_period_s"],
            model["counter_window_s"],
        )
        self.settings = NodeSettings(
            tuple((stage, chunk, kind) for stage, chunk, kind in settings["type_names"]),
            Noise(**settings["noise"]),
            Shortcomings.from_document(settings["shortcomings"]),
            settings["seed"],
            (settings["power_limits_w"][0], settings["power_limits_w"][1], settings["power_limits_w"][2]),
            settings["memory_clock_mhz"],
            settings["memory_bytes"],
            (settings["compute_capability"][0], settings["compute_capability"][1]),
            settings["log"],
        )
        self._calls = SharedRecord(folder / _CALLS_FILE)
        log = ExecutionLog(folder / "log", enabled=self.settings.log)
        self.gpus = tuple(
            SimulatedGpu(
                Identity(**identity),
                self.model,
                self.settings,
                SharedRecord(_state_file(folder, identity["index"])),
                log,
            )
            for identity in document["gpus"]
        )

    @classmethod
    def create(cls, description: Description, folder: Path, *, log: bool = False) -> SimulatedNode:
        """Makes the GPUs of a description in a folder that exists and is empty.

        Args:
            description: what they are.
            folder: where their shared state will be; memory-backed (`/dev/shm`) is best, any will do.
            log: whether what really runs is logged (`perseus_core.gpu.simulated.execution_log`).

        Raises:
            InputError: if the profile cannot be read or does not fit the description.
        """
        # Imported here so that programs which only live on the GPUs do not load the planner.
        from perseus_core.planning.profile import Profile

        profile = Profile.load(description.profile).with_fused_passes()
        clocks = description.supported_clocks_mhz
        for stage in description.stages:
            if stage >= profile.num_stages:
                raise InputError(
                    f'"stages" names stage {stage}, but profile {description.profile} has {profile.num_stages} stages'
                )
        model = GpuModel(
            clocks,
            tuple(description.blocking_power_at(clock) for clock in clocks),
            tuple(
                physics.interpolate_costs(
                    clocks, [(m.clock_mhz, m.time_s, m.energy_j) for m in profile.of(t)], description.time_scale
                )
                for t in profile.types
            ),
            description.clock_latencies_s,
            description.energy_counter_period_s,
            description.shortcomings.energy_counter_window_s,
        )
        settings = NodeSettings(
            tuple((t.stage, t.chunk, t.kind.value) for t in profile.types),
            description.noise,
            description.shortcomings,
            description.seed,
            (description.min_power_limit_w, description.power_limit_w, description.max_power_limit_w),
            description.memory_clock_mhz,
            int(description.memory_gib * 2**30),
            description.compute_capability,
            log,
        )
        identities = [_identity(description, index, profile.num_stages) for index in range(description.num_gpus)]
        now_s = time.monotonic()
        for identity in identities:
            state = GpuState(now_s, clocks[0], description.power_limit_w)
            SharedRecord.create(_state_file(folder, identity.index), _encode(state))
        SharedRecord.create(folder / _CALLS_FILE, b"")
        (folder / "log").mkdir()
        document = {
            "version": _VERSION,
            "model": asdict(model),
            "settings": asdict(settings),
            "gpus": [asdict(identity) for identity in identities],
        }
        # Last, and in one step: whoever finds this file finds all of it.
        unfinished = folder / f".{NODE_FILE}.{os.getpid()}"
        unfinished.write_text(json.dumps(document), encoding="utf-8")
        unfinished.rename(folder / NODE_FILE)
        return cls(folder)

    @contextmanager
    def only_call(self) -> Iterator[None]:
        """Inside, no other call of the driver goes on, whichever process makes it and on whichever GPU."""
        with self._calls.locked():
            yield

    def group_of(self, gpu_index: int) -> tuple[SimulatedGpu, ...]:
        """The ranks of its tensor-parallel group, itself included."""
        size = self.settings.shortcomings.tensor_parallel
        begin = gpu_index // size * size
        return self.gpus[begin : begin + size]

    def cost_index(self, stage: int, chunk: int, kind: str) -> int:
        """Which of the model's costs an instruction type has.

        Raises:
            InputError: if the profile does not have that type.
        """
        try:
            return self.settings.type_names.index((stage, chunk, kind))
        except ValueError:
            raise InputError(
                f"the simulated GPUs' profile has no {kind} of stage {stage}, chunk {chunk}; use a profile that has it"
            ) from None


def _identity(description: Description, index: int, num_stages: int) -> Identity:
    group = index // description.shortcomings.tensor_parallel
    unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{description.name}/{description.seed}/{index}")
    return Identity(
        index,
        f"GPU-{unique}",
        description.name,
        f"{index // 200:08X}:{1 + index % 200:02X}:00.0",
        description.stages[index] if description.stages else group % num_stages,
    )


def _state_file(folder: Path, index: int) -> Path:
    return folder / f"gpu{index}.state"


def _encode(state: GpuState) -> bytes:
    values = dict(state.__dict__)
    if state.work is not None:
        values["work"] = state.work.__dict__
    return json.dumps(values).encode()


def _decode(content: bytes) -> GpuState:
    values = json.loads(content)
    if values["work"] is not None:
        values["work"] = Work(**values["work"])
    return GpuState(**values)
