"""A small pipeline job without a framework: real processes, real gloo, simulated GPUs. `run` starts it.

Every rank executes its stage of 1F1B. A forward or backward is an instruction of the work emulator, and a
little arithmetic whose result depends on every instruction in order: the loss that must not change.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class PipelineJob:
    """What to run.

    Attributes:
        node: folder of the simulated GPUs.
        out: folder for results: `rank<i>.json` and `rank<i>.log`.
        settings: the user's block; empty for a job without us.
        iterations: how many at most.
        iterations_under_plan: stop when a plan has run for so many; 0 for never.
        plan_to_reach: the first plan that counts for that.
        phase_to_reach: if given, iterations in this phase count instead of those under a plan.
        least_iterations: stop no earlier than this.
        num_stages, data_parallel: ranks are stages x data_parallel.
        num_microbatches: of an iteration.
        tail_s: time outside the pipeline.
        faults: what to do to a rank or its GPU, see `_do_fault`.
        evaluate_every: an evaluation after every so many iterations; 0 for none.
        short_every: an iteration of half the microbatches after every so many; 0 for none.
        swap_order_at: an iteration in which each stage leaves out its last instruction's hooks; -1 for none.
        close_at: the session is closed before this iteration and training goes on; -1 for at the end.
    """

    node: str
    out: str
    settings: dict[str, Any]
    iterations: int
    num_stages: int = 4
    data_parallel: int = 1
    num_microbatches: int = 8
    tail_s: float = 0.01
    faults: list[dict[str, Any]] = field(default_factory=list)
    evaluate_every: int = 0
    short_every: int = 0
    swap_order_at: int = -1
    close_at: int = -1
    iterations_under_plan: int = 0
    plan_to_reach: int = 1
    phase_to_reach: str = ""
    least_iterations: int = 0


def run(job: PipelineJob, timeout_s: float = 300) -> list[dict[str, Any] | None]:
    """Runs the job in processes of its own; returns what each rank has written, None for one that has not."""
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(asdict(job)))
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{out / 'job.json'}\n")
    server.stdin.flush()
    patience = threading.Timer(timeout_s, server.kill)
    patience.start()
    pid = int(server.stdout.readline())
    patience.cancel()
    end_s = time.monotonic() + timeout_s
    while not (out / "statuses.json").exists() and time.monotonic() < end_s:
        time.sleep(0.02)
    if not (out / "statuses.json").exists():
        os.killpg(pid, signal.SIGKILL)
    results: list[dict[str, Any] | None] = []
    for rank in range(job.num_stages * job.data_parallel):
        path = out / f"rank{rank}.json"
        results.append(json.loads(path.read_text()) if path.exists() else None)
    return results


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported torch once and forks the jobs."""
    hook = str(ROOT / "perseus_core" / "gpu" / "simulated" / "hook")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), hook, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.pipeline"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


def log_of(job: PipelineJob, rank: int = 0) -> list[str]:
    """The log lines of a rank."""
    return (Path(job.out) / f"rank{rank}.log").read_text().splitlines()


def _serve() -> None:
    """Reads paths of job files from stdin, starts each job in a session of its own and prints its process id."""
    import torch.distributed  # noqa: F401  (once, before anything is forked)

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for line in sys.stdin:
        job = PipelineJob(**json.loads(Path(line.strip()).read_text()))
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _run_ranks(job)
            os._exit(0)
        print(pid, flush=True)


def _run_ranks(job: PipelineJob) -> None:
    from perseus_core.gpu import simulated

    os.environ[simulated.ENVIRONMENT_VARIABLE] = job.node
    simulated.install()
    pids = []
    for rank in range(job.num_stages * job.data_parallel):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _train(rank, job)
                status = 0
            except BaseException:
                (Path(job.out) / f"rank{rank}.error").write_text(traceback.format_exc())
            os._exit(status)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    unfinished = Path(job.out) / "statuses.unfinished"
    unfinished.write_text(json.dumps(statuses))
    unfinished.rename(Path(job.out) / "statuses.json")


def _train(rank: int, job: PipelineJob) -> None:
    import torch
    import torch.distributed as dist

    from perseus_core.gpu import simulated
    from perseus_core.planning.schedule import Kind, one_f_one_b
    from perseus_core.runtime.inert import InertSession
    from perseus_core.runtime.job import Job
    from perseus_core.runtime.measure.profile_cache import ProfileKey
    from perseus_core.runtime.opening import open_session
    from perseus_core.runtime.settings import Settings

    torch.set_num_threads(1)
    logging.basicConfig(
        filename=Path(job.out) / f"rank{rank}.log", format="%(relativeCreated)d %(levelname)s %(message)s",
        level=logging.DEBUG if os.environ.get("PERSEUS_TEST_DEBUG") else logging.INFO,
    )  # fmt: skip
    world = job.num_stages * job.data_parallel
    store = _rendezvous(rank, world, Path(job.out) / "port")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    stage, replica = rank % job.num_stages, rank // job.num_stages
    replicas = [
        dist.new_group([r * job.num_stages + s for r in range(job.data_parallel)]) for s in range(job.num_stages)
    ]
    node = simulated.open_node()
    emulator = simulated.WorkEmulator(node, rank)
    session = open_session(
        Settings.from_mapping(job.settings),
        Job(
            stage,
            job.num_stages,
            1,
            rank,
            world,
            replica,
            lambda m: one_f_one_b(job.num_stages, m),
            ProfileKey("test", "1f1b", job.num_stages, 1, 1, job.data_parallel, 1),
        ),
        local_rank=rank,
    )

    sent: list[Any] = []

    def send(value: torch.Tensor, to_stage: int) -> None:
        sent.append(dist.isend(value, replica * job.num_stages + to_stage))

    def receive(from_stage: int) -> torch.Tensor:
        value = torch.zeros(4, dtype=torch.float64)
        dist.recv(value, replica * job.num_stages + from_stage)
        return value

    weight = torch.full((4,), 1.0 + stage / 10, dtype=torch.float64)

    def forward(microbatch: int) -> torch.Tensor:
        value = receive(stage - 1) if stage > 0 else torch.arange(4, dtype=torch.float64) + microbatch
        session.begin_instruction(0, microbatch, Kind.FORWARD)
        emulator.work("forward", stage=stage, label={"iteration": iteration, "microbatch": microbatch})
        value = torch.sin(value * weight)
        session.end_instruction()
        if stage + 1 < job.num_stages:
            send(value, stage + 1)
        return value

    def backward(microbatch: int) -> torch.Tensor:
        gradient = receive(stage + 1) if stage + 1 < job.num_stages else torch.cos(weight + microbatch)
        session.begin_instruction(0, microbatch, Kind.BACKWARD)
        emulator.work("backward", stage=stage, label={"iteration": iteration, "microbatch": microbatch})
        gradient = gradient * torch.cos(weight)
        session.end_instruction()
        if stage > 0:
            send(gradient, stage - 1)
        return gradient

    begins_s, energies_j, losses, hook_s, follows_plan = [], [], [], [], []
    started_cpu_s = time.process_time()
    under_plan, reached, last = 0, 0, job.iterations
    for iteration in range(job.iterations):
        if job.iterations_under_plan:
            now = session.status()
            reached += now.phase.value == job.phase_to_reach if job.phase_to_reach else now.plan >= job.plan_to_reach
            if rank == 0 and reached >= job.iterations_under_plan and not store.check(["last"]):
                store.set("last", str(max(iteration + 3, job.least_iterations)))  # no rank is further ahead
            if store.check(["last"]):
                last = int(store.get("last"))
        if iteration >= last:
            break
        under_plan += session.status().plan > 0
        _do_faults(job, rank, iteration, under_plan, node, session)
        if iteration == job.close_at:
            status = session.status()
            session.close()
            session = InertSession()
        evaluating = job.evaluate_every and iteration % job.evaluate_every == job.evaluate_every - 1
        count = job.num_microbatches
        if job.short_every and iteration % job.short_every == job.short_every - 1:
            count //= 2
        begins_s.append(time.monotonic())
        energies_j.append(node.gpus[rank].true_energy_j())
        entered = time.perf_counter()
        session.begin_iteration(count, training=not evaluating)
        hook_s.append(time.perf_counter() - entered)
        follows_plan.append(session.status().follows_plan)
        gradient = torch.zeros(4, dtype=torch.float64)
        for instruction in one_f_one_b(job.num_stages, count).stages[stage]:
            if instruction.kind is Kind.FORWARD:
                forward(instruction.microbatch)
            elif not evaluating:
                gradient += backward(instruction.microbatch)
        for handle in sent:
            handle.wait()
        sent.clear()
        if job.data_parallel > 1:
            dist.all_reduce(gradient, group=replicas[stage])
        weight = weight - 0.01 * gradient
        losses.append(float(gradient.sum()))
        time.sleep(job.tail_s)
        entered = time.perf_counter()
        session.end_iteration()
        hook_s[-1] += time.perf_counter() - entered
    begins_s.append(time.monotonic())
    energies_j.append(node.gpus[rank].true_energy_j())
    if job.close_at < 0:
        status = session.status()
    entered = time.monotonic()
    session.close()
    closing_s = time.monotonic() - entered
    (Path(job.out) / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "begins_s": begins_s,
                "energies_j": energies_j,
                "losses": losses,
                "follows_plan": follows_plan,
                "status": {k: getattr(v, "value", v) for k, v in asdict(status).items()},
                "closing_s": closing_s,
                "cpu_s": time.process_time() - started_cpu_s,
                "hook_s": hook_s,
                "faults": job.faults,
            }
        )
    )
    dist.barrier()
    dist.destroy_process_group()


def _rendezvous(rank: int, world_size: int, port_file: Path) -> Any:
    """The store that a launcher would give the job: hosted by rank 0, at a port that the others read from a file."""
    import torch.distributed as dist

    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        unfinished = port_file.with_suffix(".unfinished")
        unfinished.write_text(str(store.port))
        unfinished.rename(port_file)
        return store
    while not port_file.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port_file.read_text()), world_size, is_master=False)


def _do_faults(job: PipelineJob, rank: int, iteration: int, under_plan: int, node: Any, session: Any) -> None:
    """Faults are dicts with rank, what, for some a value, and when: in which iteration, or in which under a plan."""
    from perseus_core.gpu.simulated import faults

    for fault in job.faults:
        is_due = fault["iteration"] == iteration if "iteration" in fault else fault["under_plan"] == under_plan
        if fault["rank"] != rank or not is_due or "done" in fault:
            continue
        fault["done"] = iteration
        gpu, what, value = node.gpus[rank], fault["what"], fault.get("value")
        if what == "throttle":
            faults.throttle(gpu, value)
        elif what == "deny":
            faults.deny_permission(gpu)
        elif what == "unsupported":
            faults.remove_support(gpu, value)
        elif what == "hang":
            faults.hang(gpu, value, 3600.0)
        elif what == "lose":
            faults.lose(gpu)
        elif what == "clear":
            faults.clear(gpu)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "raise":

            def broken(*_: Any) -> Any:
                raise ZeroDivisionError("an error of ours")

            session._meter.take_in = broken
        elif what == "straggler":
            session.set_straggler(value)
        elif what == "kill_watchdog":
            for pid in _watchdogs(os.getpid()):
                os.kill(pid, signal.SIGKILL)


def _watchdogs(pid: int) -> list[int]:
    """The watchdog processes of a process, by their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"perseus_core.runtime.clock.watchdog" in arguments and str(pid).encode() in arguments:
            found.append(int(folder.name))
    return found


if __name__ == "__main__":
    _serve()
