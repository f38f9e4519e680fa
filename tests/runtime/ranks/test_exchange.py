from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from perseus_core.runtime.ranks.exchange import LocalExchange, in_process_exchanges

ROOT = Path(__file__).resolve().parents[3]

# What the ranks of a torch job do; each prints lines that the test reads.
_RANK = """
import os, signal, sys, time
import numpy as np
import torch, torch.distributed as dist
from perseus_core.runtime.ranks.exchange import ExchangeError, TorchExchange

def say(*words):
    # One write, so that the lines of the ranks do not mix.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def arrived(exchange, count, limit_s=20.0):
    rows, end = [], time.monotonic() + limit_s
    while len(rows) < count and time.monotonic() < end:
        rows += exchange.arrived_rows(count, 0.1)
    return rows

def until(parcel):
    while (content := parcel.content()) is None:
        time.sleep(0.001)
    return content

def rank_main(rank, behaviour):
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 3), rank=rank, world_size=3)
    exchange = TorchExchange()
    assert exchange.introduce(np.array([rank, 10.0 * rank])).tolist() == [[0, 0], [1, 10], [2, 20]]
    for n in range(5):
        exchange.send_row(np.array([n + 100.0 * rank]))
    assert [row[:, 0].tolist() for row in arrived(exchange, 5)] == [[n, n + 100, n + 200] for n in range(5)]
    contents = until(exchange.collect(b"x" * (rank + 1), [1, 2, 3]))
    assert contents == ([b"x", b"xx", b"xxx"] if rank == 0 else []), contents
    assert until(exchange.distribute(b"a plan" if rank == 0 else None, 6)) == [b"a plan"]
    if behaviour == "dies" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "hangs" and rank == 1:
        time.sleep(600)
    exchange.send_row(np.array([1.0]))
    if behaviour == "dies":
        try:
            arrived(exchange, 6)
            say(rank, "no error")
        except ExchangeError:
            say(rank, "error")
    start_s = time.monotonic()
    exchange.close(0.5)
    say(rank, "closed", time.monotonic() - start_s < 20.0)
    if behaviour == "well":
        dist.barrier()
    if behaviour != "dies":
        dist.destroy_process_group()
    say(rank, "left", time.monotonic() - start_s < 25.0)

pids = []
for rank in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            rank_main(rank, sys.argv[2])
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    pids.append(pid)
if sys.argv[2] == "hangs":
    statuses = [os.waitpid(pids[rank], 0)[1] for rank in (0, 2)]
    os.kill(pids[1], signal.SIGKILL)
else:
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
say("statuses", statuses)
"""


def _run(behaviour: str, tmp_path: Path, *, program: str = _RANK) -> set[str]:
    pytest.importorskip("torch")
    job = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "store"), behaviour],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # All ranks at once: one that is left over would keep the pipes open.
    patience = threading.Timer(120, os.killpg, (job.pid, signal.SIGKILL))
    patience.start()
    output, errors = job.communicate()
    patience.cancel()
    return set(output.splitlines()) | {line for line in errors.splitlines() if "Error" in line}


def test_rows_and_parcels_reach_every_rank_of_a_torch_job(tmp_path: Path) -> None:
    """Three processes over gloo; all leave in order."""
    lines = _run("well", tmp_path)
    assert "statuses [0, 0, 0]" in lines
    assert {f"{rank} left True" for rank in range(3)} <= lines


def test_a_rank_that_dies_is_an_error_and_no_hang(tmp_path: Path) -> None:
    """The others are told at once and can leave."""
    lines = _run("dies", tmp_path)
    assert {"0 error", "2 error", "0 closed True", "2 closed True", "0 left True", "2 left True"} <= lines
    assert f"statuses [0, {signal.SIGKILL.value}, 0]" in lines


def test_a_rank_that_hangs_holds_up_nobody_who_leaves(tmp_path: Path) -> None:
    """An open operation is left behind, also when the program destroys its process groups."""
    lines = _run("hangs", tmp_path)
    assert {"0 closed True", "2 closed True", "0 left True", "2 left True"} <= lines


# Rank 1 leaves the exchange long before rank 0, which then ends as a Python program ends; several times.
_LEFT_ALONE = """
import os, sys
import numpy as np
import torch.distributed as dist
from perseus_core.runtime.ranks.exchange import TorchExchange

def rank_main(rank, store):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    exchange = TorchExchange()
    exchange.introduce(np.zeros(1))
    for n in range(1 + 5 * (rank == 0)):
        exchange.send_row(np.zeros(18))
    exchange.close(0.3)
    dist.barrier()
    dist.destroy_process_group()

statuses = []
for job in range(5):
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            rank_main(rank, f"{sys.argv[1]}{job}")
            sys.exit(0)
    statuses += [os.waitpid(pid, 0)[1] for pid in pids]
print("statuses", statuses)
"""


def test_a_rank_that_was_left_alone_ends_well(tmp_path: Path) -> None:
    """Its open operations end with the peer, while Python is ending; that must not abort the process."""
    lines = _run("", tmp_path, program=_LEFT_ALONE)
    assert f"statuses {[0] * 10}" in lines


def test_rows_wait_for_the_last_rank_but_not_for_good() -> None:
    """Whoever asks too early gets nothing, and all of it later, in order."""
    first, second = in_process_exchanges(2)
    for n in range(3):
        first.send_row(np.array([float(n)]))
    start_s = time.monotonic()
    assert first.arrived_rows(1, 0.05) == []
    assert time.monotonic() - start_s < 5
    for n in range(3):
        second.send_row(np.array([10.0 + n]))
    assert [rows[:, 0].tolist() for rows in first.arrived_rows(3, 1.0)] == [[0, 10], [1, 11], [2, 12]]


def test_a_job_of_one_rank_talks_to_itself() -> None:
    """Without torch."""
    exchange = LocalExchange()
    assert exchange.introduce(np.array([1.0])).tolist() == [[1.0]]
    exchange.send_row(np.array([2.0]))
    assert [rows.tolist() for rows in exchange.arrived_rows(1, 1.0)] == [[[2.0]]]
    assert exchange.collect(b"abc", [3]).content() == [b"abc"]
    assert exchange.distribute(b"plan", 4).content() == [b"plan"]
