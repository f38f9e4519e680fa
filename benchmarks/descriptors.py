"""What a session opens: descriptors and listening sockets more than without one.

    python -m benchmarks.descriptors

Four processes, gloo, the store in rank 0's; counted in /proc before a session has opened and while it profiles on
simulated GPUs, whose own files are left out.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.common import print_table
from perseus_core.planning.schedule import one_f_one_b
from perseus_core.runtime.clock import clock_owner
from perseus_core.runtime.job import Job
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.ranks.order import Phase
from perseus_core.runtime.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    import torch.distributed  # noqa: F401  (once, before anything is forked)

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(prefix="claims-of-clocks-") as owners:
        from perseus_core.gpu import simulated

        simulated.create_node(REPOSITORY / "configs/gpus/a100.json", folder)
        os.environ[simulated.ENVIRONMENT_VARIABLE] = folder
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ[clock_owner.FOLDER_VARIABLE] = owners  # not among the simulated GPUs' files: those are not counted
        links = [context.Pipe() for _ in range(4)]
        processes = [
            context.Process(target=_open_on, args=(rank, folder, links[rank][1]), daemon=True) for rank in range(4)
        ]
        for process in processes:
            process.start()
        port = links[0][0].recv()
        for ours, _ in links[1:]:
            ours.send(port)
        rows = []
        for rank, (ours, _) in enumerate(links):
            assert ours.poll(120), "the small job has failed"
            before, after, phase = ours.recv()
            more = Counter(after)
            more.subtract(before)
            shown = ", ".join(f"{count:+d} {name}" for name, count in sorted(more.items()) if count)
            rows.append([f"{rank}{' (store)' * (rank == 0)}", sum(before.values()), phase, shown or "none"])
        for process in processes:
            process.kill()
            process.join()
    print_table(["rank of 4", "descriptors before", "session is at", "more"], rows)


def _open_on(rank: int, folder: str, link: Connection) -> None:
    import torch.distributed as dist

    from perseus_core.gpu import simulated
    from perseus_core.runtime.opening import open_session

    simulated.install()
    node = simulated.open_node()
    emulator = simulated.WorkEmulator(node, rank)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        link.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", link.recv(), None, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    dist.barrier()
    before = _descriptors(folder)
    schedule = one_f_one_b(4, 4)
    key = ProfileKey("none", "1f1b", 4, 1, 1, 1, 1)
    session = open_session(
        Settings(enabled=True, profile_cache="off", baseline_iterations=2),
        Job(rank, 4, 1, rank, 4, 0, lambda m: one_f_one_b(4, m), key),
        local_rank=rank,
    )
    end_s = time.monotonic() + 60
    phase = session.status().phase
    while phase is not Phase.PROFILE and time.monotonic() < end_s:
        session.begin_iteration(4)
        for step in schedule.stages[rank]:
            session.begin_instruction(step.chunk, step.microbatch, step.kind)
            emulator.work(step.kind.value, stage=rank)
            session.end_instruction()
        dist.barrier()
        session.end_iteration()
        phase = session.status().phase
    time.sleep(3)  # the watchdog of the clock has started by then
    link.send((before, _descriptors(folder), phase.value))
    time.sleep(60)


def _descriptors(simulated_node: str) -> Counter[str]:
    """Open descriptors of this process by kind; the simulated GPUs' own, which no real GPU has, are left out."""
    listeners = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listeners.add(f"socket:[{fields[9]}]")
    found: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target in listeners:
            found["listener"] += 1
        elif not target.startswith(simulated_node):
            found[Path(target).parent.name if "claims-of-clocks" in target else target.split(":")[0]] += 1
    return found


if __name__ == "__main__":
    main()
