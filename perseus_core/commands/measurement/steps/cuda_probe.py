"""Tries one thing with CUDA in a process of its own, and prints what it found as JSON. Not confirmed on a GPU yet."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

from perseus_core.runtime.measure.anchors import SHARP_S, Anchor, AnchorFinder
from perseus_core.runtime.measure.cuda import Cuda
from perseus_core.runtime.measure.cuda_events import CudaEvents
from perseus_core.runtime.side_threads import OwnThreads

_SIZE = 4096
_BACKLOG = 200
_IDLE_S = 1.0


def main(what: str, duration_s: float) -> None:
    """Does it and prints.

    Args:
        what: `anchors` or `captures`.
        duration_s: about how long.
    """
    torch: Any = importlib.import_module("torch")
    torch.cuda.set_device(0)
    found = _anchors(torch, duration_s) if what == "anchors" else _captures(torch, duration_s)
    print(json.dumps(found), flush=True)


def _anchors(torch: Any, duration_s: float) -> dict[str, float]:
    """Anchors found behind a backlog, beside one that was found while the GPU had nothing to do."""
    cuda = Cuda(0)
    stream = cuda.own_stream()

    def record() -> Any:
        event = cuda.new_event()
        stream.record(event)
        return event

    matrix = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device="cuda")
    product = matrix @ matrix
    torch.cuda.synchronize()
    truth = _find(record, _IDLE_S)
    errors_s, num_refused, num_found = [], 0, 0
    until_s = time.monotonic() + duration_s
    while time.monotonic() < until_s or not num_found:
        for _ in range(_BACKLOG):
            torch.mm(matrix, matrix, out=product)
        anchor = _find(record, 2.0)
        num_found += 1
        if anchor.uncertainty_s > SHARP_S:
            num_refused += 1
            continue
        truly_s = truth.time_s + truth.event.elapsed_time(anchor.event) / 1000
        errors_s.append(abs(anchor.time_s - truly_s))
        if anchor.time_s - truth.time_s > _IDLE_S:  # clocks drift against each other, and floats lose their last digits
            torch.cuda.synchronize()
            truth = _find(record, _IDLE_S)
    return {"error_s": max(errors_s, default=0.0), "refused": num_refused / num_found}


def _find(record: Any, limit_s: float) -> Anchor:
    """One round of the finder."""
    begin_s = time.monotonic()
    provisional = Anchor(record(), begin_s)
    finder = AnchorFinder(provisional, record, time.monotonic)
    while finder.anchor is provisional and time.monotonic() < begin_s + limit_s:
        time.sleep(min(0.01, finder.step() or 0.0))
    return finder.anchor


def _captures(torch: Any, duration_s: float) -> dict[str, Any]:
    """Graphs captured in torch's default mode while a side thread records anchors and slices."""
    events = CudaEvents(0)
    slices = events.slices("")
    ending = False

    def disturb() -> float | None:

        if slices is not None:
            slices.begin()
            slices.finished()
        return None if ending else 0.001

    small = torch.zeros(64, device="cuda")
    events.record()
    thread = OwnThreads().start("perseus-disturb", disturb)
    failures, num_captured = [], 0
    until_s = time.monotonic() + duration_s
    while time.monotonic() < until_s:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(200):
                    small.add_(1)
            graph.replay()
            torch.cuda.synchronize()
            num_captured += 1
        except RuntimeError as error:
            failures.append(str(error).splitlines()[0])
            break
        with events.between_iterations():
            pass
    ending = True
    thread.join(1.0)
    return {"num_captured": num_captured, "failures": failures}


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
