"""Has the steps done by a worker process: one that hangs is killed, and the next steps are done by another one."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import perseus_core
from perseus_core.commands.measurement.results import Standing
from perseus_core.commands.measurement.step_list import LAST_STEP, STEPS, Step
from perseus_core.gpu.device import Device
from perseus_core.gpu.errors import GpuError
from perseus_core.runtime.clock.clock_owner import claim_clock
from perseus_core.runtime.patience import patiently

# torch and CUDA need a while where files come over a network.
_OPENING_LIMIT_S = 60.0
_GIVING_BACK_LIMIT_S = 5.0
GIVEN_BACK = "given_back"


@dataclass(frozen=True)
class Measured:
    """What has become of one step.

    Attributes:
        name, title: of the step.
        standing: against what is assumed.
        sentence: what was found, or why nothing was.
        figures: of it; empty where nothing was measured.
        took_s: how long it took.
    """

    name: str
    title: str
    standing: Standing
    sentence: str
    figures: Mapping[str, Any]
    took_s: float = 0.0


@dataclass(frozen=True)
class TimeLimits:
    """How long things may take [s].

    Attributes:
        step_s: about how long a step measures.
        deadline_s: how long it may take in all.
        total_s: how long all steps may.
    """

    step_s: float
    deadline_s: float
    total_s: float = 500.0

    @classmethod
    def for_steps_of(cls, step_s: float) -> TimeLimits:
        """Locking and changing need some seconds, however short one measures."""
        return cls(step_s, 3 * step_s + 25)


def measure(
    devices: Sequence[Device],
    limits: TimeLimits,
    *,
    lock: bool,
    tell: Callable[[Measured], None] = lambda measured: None,
    steps: Sequence[Step] = STEPS,
) -> list[Measured]:
    """Does the steps, those that lock clocks only where asked to.

    Args:
        devices: all visible GPUs.
        limits: of time.
        lock: whether clocks may be locked. They are given back in any case, also where an exception ends this.
        tell: told of each step when it is done.
        steps: which ones.
    """
    wanted = [step for step in steps if lock or not step.locks]
    done: list[Measured] = []

    def add(measured: Measured) -> None:
        done.append(measured)
        tell(measured)

    end_s = time.monotonic() + limits.total_s
    try:
        while len(done) < len(wanted):
            left = wanted[len(done) :]
            if time.monotonic() >= end_s:
                for step in left:
                    add(_not_measured(step, f"the {limits.total_s:g} s for all steps were over"))
                break
            _let_work(left, done, limits, end_s, add)
    finally:
        returned = give_back(devices) if lock else None
    if returned is not None:
        add(returned)
        _let_work([LAST_STEP], done, limits, time.monotonic() + limits.deadline_s, add)
    return done


def _not_measured(step: Step, why: str, took_s: float = 0.0) -> Measured:
    return Measured(step.name, step.title, Standing.NOT_MEASURED, why, {}, took_s)


def _let_work(
    steps: Sequence[Step], done: Sequence[Measured], limits: TimeLimits, end_s: float, add: Callable[[Measured], None]
) -> None:
    """One worker's life: it does the steps in order until it is through, dies or hangs. It does one at least."""
    known = {measured.name: measured.figures for measured in done}
    left = list(steps)
    with _worker([step.name for step in steps], limits.step_s, known) as answers:
        begin_s = time.monotonic()
        if (opened := answers(min(_OPENING_LIMIT_S, end_s - begin_s))) is None or "opened" not in opened:
            why = f"nothing could be begun ({(opened or {}).get('broken', 'the worker process does not answer')})"
            for step in left:
                add(_not_measured(step, why))
            return
        while left:
            begin_s = time.monotonic()
            deadline_s = min(begin_s + limits.deadline_s, end_s)
            answer: dict[str, Any] | None = {}
            while answer is not None and "ends" not in answer:
                answer = answers(deadline_s - time.monotonic())
            step, took_s = left.pop(0), time.monotonic() - begin_s
            if answer is None:
                how = "had hung" if time.monotonic() >= deadline_s else "had died"
                add(_not_measured(step, f"it {how} after {took_s:.0f} s; its process was ended", took_s))
                return
            sentence, standing = answer["sentence"], Standing(answer["standing"])
            add(Measured(step.name, step.title, standing, sentence, answer["figures"], took_s))


@contextmanager
def _worker(
    names: Sequence[str], step_s: float, known: Mapping[str, Mapping[str, Any]]
) -> Iterator[Callable[[float], dict[str, Any] | None]]:
    """Inside it works; gives what waits so many seconds for its next answer (None: there is none)."""
    reading, writing = os.pipe()
    request = {"steps": names, "step_s": step_s, "known": known, "answer_to": writing, "parent": os.getpid()}
    root = str(Path(perseus_core.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "perseus_core.commands.measurement.worker", json.dumps(request)],
        pass_fds=(writing,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))},
        start_new_session=True,  # a group of its own, to be killed with all that it has started
    )
    os.close(writing)
    text = bytearray()

    def next_answer(limit_s: float) -> dict[str, Any] | None:
        until_s = time.monotonic() + limit_s
        while b"\n" not in text:
            ready, _, _ = select.select([reading], [], [], max(0.0, until_s - time.monotonic()))
            more = os.read(reading, 65536) if ready else b""
            if not more:
                return None
            text.extend(more)
        line, _, rest = bytes(text).partition(b"\n")
        text[:] = rest
        answer: dict[str, Any] = json.loads(line)
        return answer

    try:
        yield next_answer
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(reading)


def give_back(devices: Sequence[Device]) -> Measured:
    """Has every clock given back, and says whether it was. Takes a few seconds at most, even where the driver hangs."""
    failures: dict[str, str] = {device.uuid: "the driver has not answered" for device in devices}

    def reset(device: Device) -> None:
        try:
            # The watchdog of a worker that was killed gives the clock back first, and only then lets go of it.
            claim = claim_clock(device.uuid, patience_s=_GIVING_BACK_LIMIT_S - 1)
            try:
                patiently(device.reset_clock, limit_s=1.0)
            finally:
                claim.release()
            del failures[device.uuid]
        except Exception as error:  # whatever it is, the page must say that the clock may still be locked
            failures[device.uuid] = str(error) if isinstance(error, GpuError) else repr(error)

    begin_s = time.monotonic()
    threads = [threading.Thread(target=reset, args=(device,), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, begin_s + _GIVING_BACK_LIMIT_S + 1 - time.monotonic()))
    took_s = time.monotonic() - begin_s
    name, title = GIVEN_BACK, "clocks are given back"
    if failures:
        told = "; ".join(f"{uuid}: {why}" for uuid, why in failures.items())
        remedy = "run `sudo nvidia-smi -rgc` when the driver answers"
        return Measured(name, title, Standing.DIFFERS, f"not all clocks are given back: {told}; {remedy}", {}, took_s)
    sentence = f"the clocks of all {len(devices)} GPU(s) were reset"
    return Measured(name, title, Standing.AS_ASSUMED, sentence, {"num_reset": len(devices)}, took_s)
