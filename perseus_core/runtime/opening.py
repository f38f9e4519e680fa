"""How an adapter gets a session: whatever is missing, training goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from perseus_core.errors import PerseusError
from perseus_core.gpu.device import Device
from perseus_core.gpu.discovery import visible_devices
from perseus_core.gpu.errors import GpuError
from perseus_core.runtime.background import Background, within
from perseus_core.runtime.inert import InertSession
from perseus_core.runtime.job import Job
from perseus_core.runtime.log import Announcer, Metric, logger, show_log
from perseus_core.runtime.measure.events import EventSource, HostEvents
from perseus_core.runtime.measure.profile_cache import ProfileCache
from perseus_core.runtime.ranks.exchange import Exchange, LocalExchange, TorchExchange
from perseus_core.runtime.replan.background_planner import BackgroundPlanner
from perseus_core.runtime.replan.job_planner import JobPlanner
from perseus_core.runtime.replan.state_file import load_state
from perseus_core.runtime.session import Session
from perseus_core.runtime.settings import Settings

# A driver that does not answer within this time has hung.
_DRIVER_PATIENCE_S = 20.0


def open_session(
    settings: Settings,
    job: Job,
    *,
    device: Device | Callable[[], Device] | None = None,
    local_rank: int | None = None,
    events: EventSource | None = None,
    exchange: Exchange | None = None,
    metric: Metric | None = None,
) -> Session | InertSession:
    """Opens this rank's session. All ranks of the job call it at the same place, after `torch.distributed` is there.

    Args:
        settings: what the user wants.
        job: this rank's place in the job.
        device: its GPU, or how to find it; by default the one that `local_rank` names among the visible ones. What goes
            wrong in finding it is said in the log, and the other ranks are not left waiting.
        local_rank: by default the environment's LOCAL_RANK, else the rank.
        events: marks on its compute stream; by default the host's time.
        exchange: by default over `torch.distributed`, or none for a job of one rank.
        metric: called with what is measured; all ranks know it, so any rank may hold the user's metrics.

    Returns:
        The session; where there is nothing to do, or no way to do it, one that does nothing.
    """
    if not settings.enabled:
        return InertSession()
    show_log()
    try:
        if exchange is None:
            exchange = LocalExchange() if job.world_size == 1 else TorchExchange()
        clocks_mhz: tuple[int, ...] = ()
        why_not = ""
        found: Device | None = None
        try:
            found, clocks_mhz = within(
                _DRIVER_PATIENCE_S,
                lambda: _ready(device, _local_rank(local_rank, job)),
                otherwise=lambda: GpuError(f"the GPU driver has not answered for {_DRIVER_PATIENCE_S:g} s"),
            )
        except PerseusError as error:
            why_not = str(error)
        background = Background()
        office = None
        if job.rank == 0 and found is not None:
            office = _office(settings, job, clocks_mhz, background)
        return Session(
            settings,
            job,
            found,
            events or HostEvents(),
            exchange,
            announcer=Announcer(speaks=job.rank == 0, metric=metric),
            office=office,
            background=background,
            why_not=why_not,
        )
    except Exception as error:
        logger.warning("rank %d: %s: %s; training goes on without perseus", job.rank, type(error).__name__, error)
        logger.debug("details", exc_info=error)
        return InertSession()


def cache_folder(settings: Settings) -> Path | None:
    """Where profiles are kept, or None."""
    if settings.profile_cache in ("off", ""):
        return None
    if settings.profile_cache != "auto":
        return Path(settings.profile_cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "perseus"


def _office(settings: Settings, job: Job, clocks_mhz: tuple[int, ...], background: Background) -> BackgroundPlanner:
    folder = cache_folder(settings)
    cache = None if folder is None else ProfileCache(folder)
    restored = load_state(settings.state_file, job.key) if settings.state_file else None
    desk = JobPlanner(
        job.schedule,
        clocks_mhz,
        settings.pick,
        straggler_slowdown=settings.straggler_slowdown,
        frontier_file=settings.frontier_file,
    )
    return BackgroundPlanner(
        job,
        desk,
        background,
        cache=cache,
        state_file=settings.state_file,
        known_profile=None if cache is None or settings.measure_only else cache.load(job.key),
        restored=None if settings.measure_only else restored,
    )


def _ready(device: Device | Callable[[], Device] | None, local_rank: int) -> tuple[Device, tuple[int, ...]]:
    """The GPU, asked once for everything that is asked of it later, so that nothing waits for the driver then."""
    if device is None:
        devices = visible_devices()
        if local_rank >= len(devices):
            raise GpuError(f"local rank {local_rank} has no GPU, {len(devices)} are visible; give each rank its own")
        device = devices[local_rank]
    elif callable(device):
        device = device()
    device.total_energy_j()
    return device, device.supported_clocks_mhz()


def _local_rank(local_rank: int | None, job: Job) -> int:
    if local_rank is not None:
        return local_rank
    return int(os.environ.get("LOCAL_RANK", job.rank))
