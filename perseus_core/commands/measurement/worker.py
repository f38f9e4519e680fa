"""The process that measures: one step after another, each result a line of JSON. Its parent kills it where it hangs."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from perseus_core.commands.measurement.bench import Bench, open_bench
from perseus_core.commands.measurement.results import NotMeasured, Standing
from perseus_core.commands.measurement.step_list import STEPS_BY_NAME
from perseus_core.errors import PerseusError

_PR_SET_PDEATHSIG = 1


def main(arguments: str) -> None:
    """Does the steps of a request.

    Args:
        arguments: JSON: `steps`, `step_s`, `known`, the descriptor `answer_to`, and the process `parent`.
    """
    # Whoever started us is gone: so are we, and the clocks' watchdog gives them back.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our parent's business
    request = json.loads(arguments)
    if os.getppid() != request["parent"]:
        return  # gone before we could say that we go with it
    known: dict[str, Any] = request["known"]
    with os.fdopen(request["answer_to"], "w", encoding="utf-8") as answers:

        def answer(**values: object) -> None:
            answers.write(json.dumps(values) + "\n")
            answers.flush()

        try:
            bench = open_bench(request["step_s"], known)
        except Exception as error:  # a torch that finds no GPU, for one
            answer(broken=_words(error))
            return
        answer(opened=True)
        for name in request["steps"]:
            answer(begins=name)
            values = _do(name, bench)
            known[name] = values["figures"]
            answer(ends=name, **values)
        bench.events.close()


def _do(name: str, bench: Bench) -> dict[str, Any]:
    try:
        result = STEPS_BY_NAME[name].measure(bench)
        verdict = result.verdict
        return {
            "standing": verdict.standing.value,
            "sentence": verdict.sentence,
            "figures": asdict(result),  # type: ignore[call-overload]
        }
    except Exception as error:  # the next step may do better
        return {"standing": Standing.NOT_MEASURED.value, "sentence": _words(error), "figures": {}}


def _words(error: Exception) -> str:
    if isinstance(error, NotMeasured | PerseusError):
        return str(error)
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(sys.argv[1])
