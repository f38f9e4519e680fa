"""A small pipeline job to which things happen: real processes, gloo, a TCPStore, simulated GPUs. `start` begins one.

Each rank runs one stage of 1F1B and computes a loss that depends on every instruction in order. What it is at, it
writes into a file of its own in every iteration; a test waits for what it wants to see there or in the logs, does
something to the processes, and says `stop`. Ranks end as Python programs end, with all that happens then.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUM_MICROBATCHES = 4
MOST_ITERATIONS = 100_000
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000


@dataclass
class FaultyJob:
    """What to run.

    Attributes:
        node: folder of the simulated GPUs.
        out: folder for everything that is written.
        settings: the user's block.
        num_ranks: each is one stage.
        is_coupled: stages wait for each other, as a pipeline does; otherwise each trains for itself.
        iterations: 0: until the test says so.
        works: instructions take time on the simulated GPUs.
        absent_ranks: they never open a session.
        pauses_after_opening: these ranks stay between opening and their first iteration.
        spare_descriptors: how many a rank can still open when the session opens; 0: as many as usual.
        has_own_store: the store is in a process of its own, not in rank 0's.
        has_networks: each rank is in a network of its own, joined by a cable, and its host's name is 127.0.1.1.
        has_no_home: the machine does not know the user, and HOME is not set.
    """

    node: str
    out: str
    settings: dict[str, Any]
    num_ranks: int = 3
    is_coupled: bool = True
    iterations: int = 0
    works: bool = True
    absent_ranks: list[int] = field(default_factory=list)
    pauses_after_opening: list[int] = field(default_factory=list)
    spare_descriptors: int = 0
    has_own_store: bool = False
    has_networks: bool = False
    has_no_home: bool = False


class RunningJob:
    """A job that was started."""

    def __init__(self, job: FaultyJob, leader: int) -> None:
        """`leader` waits for the ranks; its process group is the job."""
        self.job = job
        self._leader = leader

    def pid(self, who: str) -> int:
        """Of "rank0", ... or "store"."""
        path = Path(self.job.out) / f"{who}.pid"
        self.wait_until(path.exists, f"{who} has started")
        return int(path.read_text())

    def now(self, rank: int) -> dict[str, Any]:
        """What a rank is at: iteration, phase, plan, and its longest call of the session until then [s]."""
        path = Path(self.job.out) / f"rank{rank}.now"
        return json.loads(path.read_text()) if path.exists() else {"iteration": -1, "phase": "", "plan": 0}

    def wait_until(self, condition: Callable[[], Any], what: str, limit_s: float = 150.0) -> None:
        """Waits for something that the job does."""
        end_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end_s, f"not within {limit_s:g} s: {what}; see {self.job.out}"
            time.sleep(0.02)

    def wait_for_plan(self) -> None:
        """Until all ranks have executed an iteration under a plan."""
        self.wait_until(
            lambda: all(self.now(rank)["plan"] > 0 for rank in range(self.job.num_ranks)), "all ranks run a plan"
        )

    def wait_for_iterations(self, number: int, ranks: list[int] | None = None) -> None:
        """Until ranks have begun so many more."""
        ranks = list(range(self.job.num_ranks)) if ranks is None else ranks
        before = {rank: self.now(rank)["iteration"] for rank in ranks}
        self.wait_until(
            lambda: all(self.now(rank)["iteration"] >= before[rank] + number for rank in ranks), "training goes on"
        )

    def stop(self) -> list[int]:
        """Training ends, after the same iteration everywhere; what the ranks ended with, as `os.waitpid` says."""
        (Path(self.job.out) / "stop").touch()
        return self.statuses()

    def statuses(self, limit_s: float = 120.0) -> list[int]:
        """What the ranks ended with, once they have."""
        path = Path(self.job.out) / "statuses.json"
        self.wait_until(path.exists, "all ranks have ended", limit_s)
        return [status for status, _ in json.loads(path.read_text())]

    def ended_at_s(self) -> list[float]:
        """When the ranks ended, in the time of this machine [s, `time.monotonic`]."""
        return [at_s for _, at_s in json.loads((Path(self.job.out) / "statuses.json").read_text())]

    def losses(self, rank: int) -> list[float]:
        """Of all iterations of a rank that has ended."""
        return json.loads((Path(self.job.out) / f"rank{rank}.json").read_text())["losses"]

    def num_calls_of_dead_store(self, rank: int) -> int:
        """For each, torch writes a warning of many lines to stderr."""
        lines = (Path(self.job.out) / f"rank{rank}.stderr").read_text().splitlines()
        return sum("TCPStore.cpp" in line and "failed on" in line for line in lines)

    def longest_call_s(self) -> float:
        """The longest call of any session by any training thread."""
        longest_s = [self.now(rank).get("longest_call_s", 0.0) for rank in range(self.job.num_ranks)]
        for path in Path(self.job.out).glob("rank*.json"):
            longest_s.append(json.loads(path.read_text())["longest_call_s"])
        return max(longest_s)

    def log(self) -> list[str]:
        """All lines of all ranks: what they logged, and what anything else wrote to stderr."""
        lines = []
        for rank in range(self.job.num_ranks):
            for suffix in ("log", "stderr"):
                path = Path(self.job.out) / f"rank{rank}.{suffix}"
                if path.exists():
                    lines += path.read_text().splitlines()
        return lines

    def warnings(self) -> list[str]:
        """Of the log, without those that a busy machine causes: instructions that take longer than they should."""
        return [line for line in self.log() if " WARNING " in line and "slower than its profile" not in line]

    def kill(self) -> None:
        """Ends all processes of the job."""
        for path in [*Path(self.job.out).glob("*.pid")]:
            with contextlib.suppress(OSError):
                os.kill(int(path.read_text()), signal.SIGCONT)
        with contextlib.suppress(OSError):
            os.killpg(self._leader, signal.SIGKILL)


def start(job: FaultyJob) -> RunningJob:
    """Starts a job."""
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(asdict(job)))
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{out / 'job.json'}\n")
    server.stdin.flush()
    return RunningJob(job, int(server.stdout.readline()))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported torch once and forks the jobs."""
    hook = str(ROOT / "perseus_core" / "gpu" / "simulated" / "hook")
    path = os.pathsep.join([str(ROOT), hook, *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.faulty_job"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


# The server


def _serve() -> None:
    import torch.distributed  # noqa: F401  (once, before anything is forked)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        job = FaultyJob(**json.loads(Path(line.strip()).read_text()))
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            return _lead(job)  # ranks return through here, and end as programs do
        print(pid, flush=True)
    return None


def _lead(job: FaultyJob) -> None:
    from perseus_core.gpu import simulated

    os.environ[simulated.ENVIRONMENT_VARIABLE] = job.node
    simulated.install()
    who = [f"rank{rank}" for rank in range(job.num_ranks)]
    pids = {}
    for name in ["store"] * job.has_own_store + who:
        pid = os.fork()
        if pid == 0:
            _write(Path(job.out) / f"{name}.pid", str(os.getpid()))
            return _host_store(job) if name == "store" else _run_rank(int(name[4:]), job)
        pids[pid] = name
    ended = {}
    while len(ended) < job.num_ranks:
        pid, status = os.wait()
        if pids[pid] in who:
            ended[pids[pid]] = status, time.monotonic()
    for pid, name in pids.items():
        if name == "store":
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    _write(Path(job.out) / "statuses.json", json.dumps([ended[name] for name in who]))
    os._exit(0)


def _write(path: Path, content: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(content)
    unfinished.rename(path)


def _host_store(job: FaultyJob) -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    _write(Path(job.out) / "port", str(store.port))
    time.sleep(3600)


def _run_rank(rank: int, job: FaultyJob) -> None:
    errors = os.open(Path(job.out) / f"rank{rank}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    os.close(errors)
    logging.basicConfig(
        filename=Path(job.out) / f"rank{rank}.log",
        format="%(relativeCreated)d %(levelname)s %(message)s",
        level=logging.DEBUG if os.environ.get("PERSEUS_TEST_DEBUG") else logging.INFO,
    )
    if job.has_networks:
        _enter_network(rank, job)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if job.has_no_home:
        _forget_users()
    _train(rank, job)


# Training


def _train(rank: int, job: FaultyJob) -> None:
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
    out, num_ranks = Path(job.out), job.num_ranks
    store = _rendezvous(rank, job)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    dist.barrier()
    node = simulated.open_node()
    emulator = simulated.WorkEmulator(node, rank)
    if job.spare_descriptors:
        _leave_descriptors(job.spare_descriptors)
    opened_s = time.monotonic()
    session: Any = InertSession()
    if rank not in job.absent_ranks:
        session = open_session(
            Settings.from_mapping(job.settings),
            Job(
                rank,
                num_ranks,
                1,
                rank,
                num_ranks,
                0,
                lambda m: one_f_one_b(num_ranks, m),
                ProfileKey("test", "1f1b", num_ranks, 1, 1, 1, 1),
            ),
            local_rank=rank,
        )
    longest_s = 0.0

    def call(method: Callable[..., None], *arguments: Any) -> None:
        nonlocal longest_s
        begin_s = time.perf_counter()
        method(*arguments)
        longest_s = max(longest_s, time.perf_counter() - begin_s)

    def tell(iteration: int) -> None:
        status = session.status()
        now = {"iteration": iteration, "phase": status.phase.value, "plan": status.plan, "opened_s": opened_s}
        _write(out / f"rank{rank}.now", json.dumps({**now, "longest_call_s": longest_s}))

    tell(-1)
    while rank in job.pauses_after_opening and not (out / "go on").exists():
        time.sleep(0.01)
    sent: list[Any] = []

    def receive(source: int, otherwise: torch.Tensor) -> torch.Tensor:
        if not 0 <= source < num_ranks or not job.is_coupled:
            return otherwise
        value = torch.zeros(4, dtype=torch.float64)
        dist.recv(value, source)
        return value

    def send(value: torch.Tensor, target: int) -> None:
        if 0 <= target < num_ranks and job.is_coupled:
            sent.append((dist.isend(value, target), value))

    weight = torch.full((4,), 1.0 + rank / 10, dtype=torch.float64)
    losses: list[float] = []
    order = one_f_one_b(num_ranks, NUM_MICROBATCHES).stages[rank]
    iteration, last = 0, job.iterations or MOST_ITERATIONS
    while iteration < last:
        # No rank is further ahead: the pipeline couples them.
        if rank == 0 and last == MOST_ITERATIONS and (out / "stop").exists():
            _write(out / "last", str(iteration + 3))
        if (out / "last").exists():
            last = int((out / "last").read_text())
        call(session.begin_iteration, NUM_MICROBATCHES)
        gradient = torch.zeros(4, dtype=torch.float64)
        for instruction in order:
            m = instruction.microbatch
            if instruction.kind is Kind.FORWARD:
                value = receive(rank - 1, torch.arange(4, dtype=torch.float64) + m)
            else:
                value = receive(rank + 1, torch.cos(weight + m))
            session.begin_instruction(0, m, instruction.kind)
            if job.works:
                emulator.work(instruction.kind.value, stage=rank)
            if instruction.kind is Kind.FORWARD:
                send(torch.sin(value * weight), rank + 1)
            else:
                value = value * torch.cos(weight)
                gradient += value
                send(value, rank - 1)
            session.end_instruction()
        for handle, _ in sent:
            handle.wait()
        sent.clear()
        weight = weight - 0.01 * gradient
        losses.append(float(gradient.sum()))
        call(session.end_iteration)
        tell(iteration)  # opens a file, as a checkpoint does
        iteration += 1
    call(session.close)
    _write(out / f"rank{rank}.json", json.dumps({"losses": losses, "longest_call_s": longest_s}))
    dist.barrier()
    dist.destroy_process_group()


def _rendezvous(rank: int, job: FaultyJob) -> Any:
    """The store that a launcher would give the job; the others read its port from a file."""
    import torch.distributed as dist

    address = _ADDRESSES[0] if job.has_networks else "127.0.0.1"
    path = Path(job.out) / "port"
    if rank == 0 and not job.has_own_store:
        store = dist.TCPStore(address, 0, None, is_master=True, wait_for_workers=False)
        _write(path, str(store.port))
        return store
    while not path.exists():
        time.sleep(0.01)
    return dist.TCPStore(address, int(path.read_text()), None, is_master=False, wait_for_workers=False)


def _leave_descriptors(number: int) -> None:
    """From now on this process can open no more than so many descriptors."""
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    limit = 0
    while number:
        number -= limit not in used
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _forget_users() -> None:
    """As in a container that runs with a user number of its own."""
    import pwd

    def getpwuid(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    pwd.getpwuid = getpwuid
    for name in ("HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)


# Networks of our own

_ADDRESSES = ("10.231.77.1", "10.231.77.2")


def may_have_namespaces() -> bool:
    """Whether this process may make namespaces and join them by a cable."""
    commands = "ip link set lo up && ip link add perseus0 type veth peer name perseus1 && mount --make-rprivate /"
    try:
        return not subprocess.run(
            ["unshare", "--net", "--mount", "--uts", "sh", "-c", commands], capture_output=True, timeout=60
        ).returncode
    except (OSError, subprocess.SubprocessError):
        return False


def _enter_network(rank: int, job: FaultyJob) -> None:
    """Two ranks, each in namespaces of its own, which end with it. As on Debian, a host's name is 127.0.1.1 there."""
    name, out = ("perseus-a", "perseus-b")[rank], Path(job.out)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    assert libc.sethostname(name.encode(), len(name)) == 0
    hosts = out / f"hosts{rank}"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    _do("mount", "--make-rprivate", "/")
    _do("mount", "--bind", str(hosts), "/etc/hosts")
    _write(out / f"network{rank}", "")
    other = out / f"network{1 - rank}"
    while not other.exists():
        time.sleep(0.01)
    if rank == 0:
        peer = (out / "rank1.pid").read_text()
        _do("ip", "link", "add", "perseus0", "type", "veth", "peer", "name", "perseus1", "netns", peer)
        _write(out / "cable", "")
    while not (out / "cable").exists():
        time.sleep(0.01)
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "address", "add", f"{_ADDRESSES[rank]}/24", "dev", f"perseus{rank}")
    _do("ip", "link", "set", f"perseus{rank}", "up")
    os.environ["GLOO_SOCKET_IFNAME"] = f"perseus{rank}"  # for training's own groups


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    _serve()
