"""Occupies a simulated GPU as an instruction would: as long as the profile says at the clock of the moment."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping

from perseus_core.gpu.simulated import model as physics
from perseus_core.gpu.simulated.execution_log import ExecutedInstruction
from perseus_core.gpu.simulated.model import GpuState, Work
from perseus_core.gpu.simulated.node import SimulatedNode

# How often a sleeping emulator looks whether somebody has changed the clock.
_LOOK_EVERY_S = 0.002
_LOOK_AT_GROUP_EVERY_S = 0.0005
# A sleep ends late, by less than this as a rule; the rest of the way is waited for awake.
_SLEEP_OVERSHOOT_S = 0.0003


class WorkEmulator:
    """Runs instructions on one simulated GPU, one after another, by blocking the calling thread.

    Between instructions the GPU waits and draws blocking power; nothing needs to be called for that.
    """

    def __init__(self, node: SimulatedNode, gpu_index: int) -> None:
        """Uses GPU `gpu_index` of a node; the process appears in its process list with the first work."""
        self._node = node
        self._gpu = node.gpus[gpu_index]
        self._registered_pid = 0

    def work(
        self, kind: str, *, stage: int | None = None, chunk: int = 0, label: Mapping[str, int] | None = None
    ) -> ExecutedInstruction:
        """Occupies the GPU for one instruction and returns when it has finished, with what really happened.

        A GPU that another thread or process occupies is waited for first, as on one stream.

        Args:
            kind: a `perseus_core.planning.schedule.Kind` or its value.
            stage: the stage whose profile to follow; by default the one the description gives this GPU.
            chunk: model chunk.
            label: goes into the log, to recognise the instruction.

        Raises:
            InputError: if the profile has no such instruction.
        """
        identity = self._gpu.identity
        stage = identity.default_stage if stage is None else stage
        started = self._start(self._node.cost_index(stage, chunk, str(kind)))
        finished = self._wait_for(started)
        ended_s = self._wait_for_group(started.number, _end_s(finished))
        executed = ExecutedInstruction(
            gpu=identity.index,
            stage=stage,
            chunk=chunk,
            kind=str(kind),
            start_s=finished.start_s,
            end_s=ended_s,
            energy_j=finished.energy_j,
            clocks=tuple((int(clock), seconds) for clock, seconds in finished.segments),
            label=label or {},
            pid=os.getpid(),
        )
        self._gpu.log.executed(executed)
        return executed

    def _start(self, cost_index: int) -> Work:
        while True:
            with self._gpu.changing() as state:
                self._register(state)
                if not state.is_working:
                    noise = self._node.settings.noise
                    draw = random.Random(f"{self._node.settings.seed}/{self._gpu.identity.index}/{state.num_works}")
                    return physics.start_work(state, cost_index, _factor(draw, noise.time), _factor(draw, noise.energy))
                busy_until_s = _end_s(physics.finished_work(self._gpu.model, state))
            time.sleep(max(0.0, min(busy_until_s - time.monotonic(), _LOOK_EVERY_S)))

    def _register(self, state: GpuState) -> None:
        """Enters this process into the GPU's list of processes."""
        pid = os.getpid()
        if pid != self._registered_pid:
            others = [known for known in state.pids if known != pid and is_alive(known)]
            state.pids = [*others[-31:], pid]
            self._registered_pid = pid

    def _wait_for(self, started: Work) -> Work:
        """Sleeps until the work is done, looking now and then whether anything was changed."""
        finished, version = started, -1
        while True:
            if self._gpu.version() != version:
                version = self._gpu.version()
                state = self._gpu.state()
                if state.work is None or state.work.number != started.number:
                    return finished  # already followed by another process's work
                finished = physics.finished_work(self._gpu.model, state)
            remaining_s = _end_s(finished) - time.monotonic()
            if remaining_s <= 0:
                return finished
            if remaining_s > _SLEEP_OVERSHOOT_S:
                time.sleep(min(remaining_s - _SLEEP_OVERSHOOT_S, _LOOK_EVERY_S))

    def _wait_for_group(self, number: int, own_end_s: float) -> float:
        """Waits until all ranks of the tensor-parallel group have done as many instructions; returns when they had.

        One that has died, or has not begun to train, does none.
        """
        end_s = own_end_s
        for mate in self._node.group_of(self._gpu.identity.index):
            has_waited = False
            while mate is not self._gpu:
                state = mate.state()
                work = state.work
                if work is not None and work.number == number and work.end_s is not None:
                    end_s = max(end_s, work.end_s)
                    break
                if work is not None and work.number > number:  # so the one before has ended
                    end_s = max(end_s, work.start_s) if has_waited else end_s
                    break
                if not any(is_alive(pid) for pid in state.pids):
                    break
                has_waited = True
                time.sleep(_LOOK_AT_GROUP_EVERY_S)
        return end_s


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _end_s(work: Work) -> float:
    assert work.end_s is not None, "a finished work has an end"
    return work.end_s


def _factor(draw: random.Random, sigma: float) -> float:
    return max(0.2, draw.gauss(1.0, sigma)) if sigma else 1.0
