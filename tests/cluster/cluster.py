"""A whole cluster in one process and in virtual time: real sessions on virtual GPUs, the same from the same seed.

    cluster = Cluster(seed=1, stages=4, pipelines=2, tensor_parallel=2, microbatches=8)
    cluster.throttle(rank=5, clock_mhz=900, at_s=60.0)
    cluster.run_iterations(100)
    assert "planning anew" in cluster.log_text

The runtime's code runs as it is. Time, threads, GPUs, marks on the stream and the store between ranks are handed in.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from perseus_core.gpu.simulated.description import Description
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import Schedule, one_f_one_b
from perseus_core.runtime.adapter import FollowedSession
from perseus_core.runtime.clock.settable_clock import Guard
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Announcer, logger
from perseus_core.runtime.measure.profile_cache import ProfileKey
from perseus_core.runtime.opening import prepare
from perseus_core.runtime.ranks.store import LocalStore, Store
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings
from tests.cluster.virtual_clock import VirtualClock
from tests.cluster.virtual_gpu import GpuNoise, StageModel, VirtualGpu, Work
from tests.cluster.virtual_job import Rank, VirtualEvents, VirtualJob, instruction_types
from tests.cluster.virtual_threads import EventQueue, VirtualThreads

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Surroundings:
    """What one rank's session is made from.

    Attributes:
        settings: the same on all ranks.
        job: the rank's place.
        gpu: its GPU.
        events: marks on its stream.
        store: what the ranks talk through.
        threads: time and threads.
        guard: makes the clock that is set.
    """

    settings: Settings
    job: Job
    gpu: VirtualGpu
    events: VirtualEvents
    store: Store
    threads: VirtualThreads
    guard: Guard


MakeSession = Callable[[Surroundings], FollowedSession]


def real_session(rank: Surroundings) -> Session:
    """The session that adapters open, in these surroundings."""
    return Session(
        rank.settings,
        rank.job,
        rank.events,
        rank.store,
        prepare=lambda: prepare(rank.settings, rank.job, lambda: rank.gpu, rank.threads),
        threads=rank.threads,
        announcer=Announcer(speaks=rank.job.rank == 0),
        guard=rank.guard,
    )


@dataclass(frozen=True)
class Said:
    """One line of the log.

    Attributes:
        time_s: virtual time.
        rank: whose code said it, -1 for none.
        text: what it said.
    """

    time_s: float
    rank: int
    text: str


class Cluster:
    """A job and its sessions.

    Ranks are numbered as Megatron does: tensor-parallel ranks next to each other, then pipelines, then stages.

    Attributes:
        queue: virtual time.
        job: what trains.
        ranks: all of them.
        log: what was said.
    """

    def __init__(
        self,
        *,
        seed: int,
        stages: int,
        microbatches: int,
        pipelines: int = 1,
        tensor_parallel: int = 1,
        settings: Settings | None = None,
        make_session: MakeSession = real_session,
        absent_ranks: Collection[int] = (),
        schedule: Callable[[int, int], Schedule] = one_f_one_b,
        profile: Profile | str = "gpt3-175b_a100_8stages.csv",
        gpus: Description | str = "a100.json",
        others: Mapping[int, tuple[str, str]] | None = None,
        time_scale: float = 0.25,
        tail_share: float = 0.05,
        time_noise: float = 0.003,
        gpu_noise: GpuNoise | None = None,
        task_s: float = 0.2,
    ) -> None:
        """Makes GPUs, hosts and sessions. Nothing runs yet.

        Args:
            seed: of everything random.
            stages, pipelines, tensor_parallel: how many ranks, and how they are arranged.
            microbatches: of an iteration.
            settings: of all sessions.
            make_session: makes one rank's session.
            absent_ranks: those that never open one.
            schedule: of a number of stages and of microbatches.
            profile: that the GPUs follow, or a file of `configs/profiles`; its stages are spread over the job's.
            gpus: what describes them, or a file of `configs/gpus`.
            others: by stage, another such profile and another file, where not all stages have the same GPUs.
            time_scale: multiplies the profile's times and energies.
            tail_share: from the last instruction's end to the iteration's, as a share of one stage's work.
            time_noise: of one execution's time, relative standard deviation.
            gpu_noise: of GPUs and counters.
            task_s: how long something slow takes that a session does in the background.
        """
        # A session without a cache of profiles and without files, which other tests might find.
        self.settings = settings or Settings(enabled=True, profile_cache="off")
        self.queue = EventQueue()
        self.log: list[Said] = []
        self._random = random.Random(seed)
        plan = schedule(stages, microbatches)
        if isinstance(profile, str):
            profile = Profile.load(_CONFIGS / "profiles" / profile)
        if isinstance(gpus, str):
            gpus = Description.load(_CONFIGS / "gpus" / gpus)
        models = _stage_models(plan, gpus, profile, time_scale)
        for stage, (its_profile, its_gpus) in (others or {}).items():
            like = Profile.load(_CONFIGS / "profiles" / its_profile)
            models[stage] = _stage_models(plan, Description.load(_CONFIGS / "gpus" / its_gpus), like, time_scale)[stage]
        work_s = max(sum(model.times_s[0]) for model in models) * microbatches
        self.job = VirtualJob(
            self.queue, plan, tail_s=tail_share * work_s, time_noise=time_noise, random_numbers=self._random
        )
        groups = {
            (pipeline, stage): self._make_group(
                models[stage], stage, pipeline, pipelines, tensor_parallel, gpu_noise or GpuNoise(), task_s
            )
            for pipeline in range(pipelines)
            for stage in range(stages)
        }
        for group, work in groups.values():
            self.job.add_stage(group, work)
        self.ranks = sorted((rank for group, _ in groups.values() for rank in group), key=lambda rank: rank.number)
        self._store = LocalStore()
        self._store_delays_s: dict[int, float] = {}
        key = ProfileKey("virtual", plan.name, stages, plan.num_chunks, tensor_parallel, pipelines, 1)
        self._make_session = make_session
        self._absent_ranks = frozenset(absent_ranks)
        self._schedule = partial(schedule, stages)
        self._key = key
        self._has_begun = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Running

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Trains until a condition holds, which is looked at after everything that happens."""
        self._run(lambda: self.queue.run_until(is_over))

    def run_iterations(self, number: int) -> None:
        """Trains for so many iterations more."""
        self.job.stop_after = self.job.num_ended + number
        self._run(self.queue.run_until_stopped)

    def run_for(self, seconds: float) -> None:
        """Trains for so long."""
        self.queue.call_at(self.queue.now_s + seconds, self.queue.stop)
        self._run(self.queue.run_until_stopped)

    def _run(self, run: Callable[[], None]) -> None:
        with self._listening(), _without_garbage_collection():
            if not self._has_begun:
                self._has_begun = True
                self._open_sessions()
                self.job.start()
            run()

    def close(self) -> None:
        """All ranks close their sessions. What these still have to do is done in what is run after that."""
        with self._listening():
            for rank in self.ranks:
                if rank.session is not None:
                    self.queue.rank = rank.number
                    rank.session.close()

    # Looking

    @property
    def log_text(self) -> str:
        """What was said, a line each."""
        return "\n".join(f"{said.time_s:.6f} {said.rank} {said.text}" for said in self.log)

    def session(self, rank: int) -> Session:
        """A rank's session, where it is a real one."""
        session = self.ranks[rank].session
        assert isinstance(session, Session), f"rank {rank} has opened no session"
        return session

    def iteration_times_s(self) -> list[float]:
        """How long each iteration took."""
        ends = self.job.ended_at_s
        return [end_s - begin_s for begin_s, end_s in zip([0.0, *ends], ends, strict=False)]

    def energy_j(self) -> float:
        """Of all GPUs until now, exactly."""
        return sum(rank.gpu.energy_j() for rank in self.ranks)

    # Faults

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Has anything done at some time [s]."""
        self.queue.call_at(time_s, action)

    def throttle(self, rank: int, clock_mhz: int | None, *, at_s: float) -> None:
        """From some time on heat lets a GPU run no faster; None: it has cooled down."""
        self.at(at_s, lambda: self.ranks[rank].gpu.throttle(clock_mhz))

    def slow_down(self, rank: int, factor: float, *, at_s: float) -> None:
        """From some time on a GPU's instructions take so many times their time."""
        self.at(at_s, lambda: self.ranks[rank].gpu.slow_down(factor))

    def stop_side_threads(self, rank: int, seconds: float, *, at_s: float) -> None:
        """From some time on a rank's side threads do nothing, for some time."""
        self.at(at_s, lambda: self.ranks[rank].threads.stop_for(seconds))

    def delay_store(self, rank: int, seconds: float) -> None:
        """Each call of the store takes a rank so long from now on."""
        self._store_delays_s[rank] = seconds

    # Making

    def _make_group(
        self,
        model: StageModel,
        stage: int,
        pipeline: int,
        pipelines: int,
        tensor_parallel: int,
        noise: GpuNoise,
        task_s: float,
    ) -> tuple[list[Rank], Work]:
        work = Work()
        group = []
        for place in range(tensor_parallel):
            number = (stage * pipelines + pipeline) * tensor_parallel + place
            threads = VirtualThreads(self.queue, number, task_s=lambda: task_s)
            numbers = random.Random(self._random.random())
            gpu = VirtualGpu(model, work, threads, random_numbers=numbers, noise=noise)
            group.append(Rank(number, stage, pipeline, gpu, threads))
        return group, work

    def _open_sessions(self) -> None:
        for rank in self.ranks:
            if rank.number not in self._absent_ranks:
                self.queue.rank = rank.number
                rank.session = self._make_session(self._surroundings_of(rank))

    def _surroundings_of(self, rank: Rank) -> Surroundings:
        schedule = self.job.schedule
        place = Job(
            rank.stage,
            schedule.num_stages,
            schedule.num_chunks,
            rank.number,
            len(self.ranks),
            rank.pipeline,
            self._schedule,
            self._key,
        )
        store = _SlowStore(self._store, rank.threads, self._store_delays_s)
        guard = VirtualClock.guard_for(rank.threads)
        return Surroundings(self.settings, place, rank.gpu, rank.events, store, rank.threads, guard)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Keeps what the package's logger is told."""
        listener = _Listener(self.queue, self.log)
        level, propagates = logger.level, logger.propagate
        logger.addHandler(listener)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(listener)
            logger.setLevel(level)
            logger.propagate = propagates


class _Listener(logging.Handler):
    def __init__(self, queue: EventQueue, log: list[Said]) -> None:
        super().__init__(logging.INFO)
        self._queue = queue
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.append(Said(self._queue.now_s, self._queue.rank, record.getMessage()))


class _SlowStore:
    """The store as one rank sees it: its calls take that rank as long as is asked for."""

    def __init__(self, store: Store, threads: VirtualThreads, delays_s: dict[int, float]) -> None:
        self._store = store
        self._threads = threads
        self._delays_s = delays_s
        self.is_hosted_here = store.is_hosted_here

    def append(self, key: str, value: bytes) -> None:
        self._take_time()
        self._store.append(key, value)

    def set(self, key: str, value: bytes) -> None:
        self._take_time()
        self._store.set(key, value)

    def read(self, key: str) -> bytes | None:
        self._take_time()
        return self._store.read(key)

    def delete(self, key: str) -> None:
        self._take_time()
        self._store.delete(key)

    def is_first(self, key: str) -> bool:
        self._take_time()
        return self._store.is_first(key)

    def _take_time(self) -> None:
        if self._delays_s:
            self._threads.spend(self._delays_s.get(self._threads.rank, 0.0))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A cluster's many objects live as long as it does: looking through them takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _stage_models(
    schedule: Schedule, description: Description, profile: Profile, time_scale: float
) -> list[StageModel]:
    """The job's stages behave like the profile's, from the first to the last, however many there are."""
    num_stages, last = profile.num_stages, max(1, schedule.num_stages - 1)
    models = []
    for stage in range(schedule.num_stages):
        like = round(stage * (num_stages - 1) / last)
        types = [t._replace(stage=like) for t in instruction_types(schedule, stage)]
        models.append(StageModel.of(description, profile, types, time_scale=time_scale))
    return models
