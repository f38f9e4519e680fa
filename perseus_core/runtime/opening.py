"""How an adapter gets a session: whatever is missing, training goes on, and waits for nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from perseus_core.errors import PerseusError
from perseus_core.gpu.device import Device
from perseus_core.gpu.discovery import visible_devices
from perseus_core.gpu.errors import GpuError
from perseus_core.planning.switching import Switching
from perseus_core.runtime.gpu_measurements import GpuMeasurements
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Announcer, Metric, logger, show_log
from perseus_core.runtime.measure.events import EventSource, HostEvents
from perseus_core.runtime.measure.profile_cache import ProfileCache
from perseus_core.runtime.measure.stage_gpu import StageGpu, kind_of
from perseus_core.runtime.patience import patiently
from perseus_core.runtime.ranks.conversation import Conversation
from perseus_core.runtime.ranks.records import RankState
from perseus_core.runtime.ranks.store import LocalStore, Store, StoreError, job_store
from perseus_core.runtime.replan.background_planner import BackgroundPlanner
from perseus_core.runtime.replan.job_planner import JobPlanner
from perseus_core.runtime.replan.state_file import load_state
from perseus_core.runtime.session import Prepared, Session
from perseus_core.runtime.settings import Settings
from perseus_core.runtime.side_threads import OwnThreads, SideThreads

# Sessions of this process so far. All ranks open theirs in the same order, so the number names the same one on all.
_num_opened = 0


def open_session(
    settings: Settings,
    job: Job,
    *,
    device: Callable[[], Device] | None = None,
    local_rank: int | None = None,
    events: EventSource | None = None,
    store: Store | None = None,
    metric: Metric | None = None,
) -> Session | InertSession:
    """Opens this rank's session. All ranks of the job call it at the same iteration, and none waits for another.

    Args:
        settings: what the user wants.
        job: this rank's place in the job.
        device: finds its GPU, in a side thread; by default the one that `local_rank` names among the visible ones.
            What goes wrong is said in the log, and to the other ranks.
        local_rank: by default the environment's LOCAL_RANK, else the rank.
        events: marks on its compute stream; by default the host's time.
        store: what the ranks talk through; by default that of the `torch.distributed` job, or none for a job of one.
        metric: called with what is measured, on the training thread; any rank may hold the user's metrics.

    Returns:
        The session; where there is nothing to do, or no way to do it, one that does nothing.
    """
    if not settings.enabled:
        return _no_session(events)
    show_log()
    try:
        if store is None:
            store = _next_store(job.world_size)
        threads = OwnThreads()
        return Session(
            settings,
            job,
            events or HostEvents(),
            store,
            prepare=lambda: prepare(
                settings, job, device or (lambda: visible_device(_local_rank(local_rank, job))), threads
            ),
            threads=threads,
            announcer=Announcer(speaks=job.rank == 0, metric=metric),
        )
    except StoreError as error:  # the same on all ranks
        if job.rank == 0:
            logger.warning("%s; training goes on without perseus", error)
    except Exception as error:
        logger.warning("rank %d: %s: %s; training goes on without perseus", job.rank, type(error).__name__, error)
        logger.debug("details", exc_info=error)
        tell_failed(store)
    return _no_session(events)


def _no_session(events: EventSource | None) -> InertSession:
    if events is not None:
        events.close()
    return InertSession()


def tell_failed(store: Store | None = None) -> None:
    """Tells the other ranks, which open their sessions about now, that this one has failed to. Never raises.

    Args:
        store: that of the session that failed; by default that of the next one.
    """
    try:
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        rank, world_size = dist.get_rank(), dist.get_world_size()
        conversation = Conversation(
            store or _next_store(world_size),
            OwnThreads(),
            rank=rank,
            world_size=world_size,
            stage=0,
            data_parallel_rank=0,
            iteration=lambda: 0,
        )
        conversation.leave(RankState(ready=True, failed=True))
        conversation.start()
    except Exception as error:
        logger.debug("the other ranks cannot be told", exc_info=error)


def prepare(settings: Settings, job: Job, find_device: Callable[[], Device], threads: SideThreads) -> Prepared:
    """Looks for this rank's GPU and, on rank 0, for what is known of the job. May take a while.

    Args:
        settings: what the user wants.
        job: this rank's place.
        find_device: finds the GPU.
        threads: time and threads of the planner.
    """
    try:
        device = patiently(find_device)
        # Asked once for everything that is asked of it later, so that nothing waits for the driver then.
        patiently(device.total_energy_j)
        clocks_mhz = patiently(device.supported_clocks_mhz)
    except PerseusError as error:
        return Prepared(why_not=str(error))
    measured = _measured_before(settings, device, job)
    switching = settings.switching if measured is None else measured.switching(settings)
    window_s = 0.0 if measured is None else measured.partial_window_s
    limit_w = _power_limit_w(device)
    gpu = StageGpu(kind_of(device.name, limit_w), clocks_mhz)
    planner = None
    if job.rank == 0:
        job = replace(job, key=replace(job.key, gpu_name=device.name, power_limit_w=limit_w))
        planner = _planner(settings, job, switching, threads)
    return Prepared(device, gpu, planner=planner, switching=switching, counter_window_s=window_s)


def visible_device(local_rank: int) -> Device:
    """The visible GPU with this number.

    Raises:
        PerseusError: if there is none.
    """
    devices = visible_devices()
    if local_rank >= len(devices):
        raise GpuError(f"local rank {local_rank} has no GPU, {len(devices)} are visible; give each rank its own")
    return devices[local_rank]


def cache_folder(settings: Settings) -> Path | None:
    """Where profiles are kept, or None."""
    if settings.profile_cache in ("off", ""):
        return None
    if settings.profile_cache != "auto":
        return Path(settings.profile_cache)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "perseus"
    try:
        return Path.home() / ".cache" / "perseus"
    except RuntimeError as error:
        logger.warning("profiles are not kept: %s; set profile_cache to a folder", error)
        return None


def _measured_before(settings: Settings, device: Device, job: Job) -> GpuMeasurements | None:
    """What `perseus doctor --measure` has found on this model of GPU, if the settings name its file."""
    path = settings.gpu_measurements
    if path:
        try:
            measured = GpuMeasurements.load(path)
            measured.require(device.name, path)
            if job.rank == 0:
                logger.info("changes of clock are taken to last what was measured: %s", path)
            if job.rank == 0 and measured.doubt:
                logger.warning("%s: %s", path, measured.doubt)
            return measured
        except PerseusError as error:
            if job.rank == 0:
                logger.warning("%s; it is not used", error)
    return None


def _planner(settings: Settings, job: Job, switching: Switching, threads: SideThreads) -> BackgroundPlanner:
    folder = cache_folder(settings)
    cache = None if folder is None else ProfileCache(folder)
    restored = load_state(settings.state_file, job.key) if settings.state_file else None
    planner = JobPlanner(
        job.schedule,
        settings.pick,
        straggler_slowdown=settings.straggler_slowdown,
        switching=switching,
        frontier_file=settings.frontier_file,
        now_s=threads.now_s,
    )
    return BackgroundPlanner(
        job,
        planner,
        threads,
        cache=cache,
        state_file=settings.state_file,
        known_profile=None if cache is None or settings.measure_only else cache.load(job.key),
        profile_clocks=settings.profile_clocks,
        restored=None if settings.measure_only else restored,
    )


def _next_store(world_size: int) -> Store:
    global _num_opened
    number, _num_opened = _num_opened, _num_opened + 1
    return LocalStore() if world_size == 1 else job_store(f"perseus{number}")


def _power_limit_w(device: Device) -> float:
    """Part of what a profile depends on; 0 where the driver does not tell."""
    try:
        return device.power_limit_w()
    except GpuError:
        return 0.0


def _local_rank(local_rank: int | None, job: Job) -> int:
    if local_rank is not None:
        return local_rank
    return int(os.environ.get("LOCAL_RANK", job.rank))
