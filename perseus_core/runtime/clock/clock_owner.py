"""Whose clock is it? A GPU's clock has one owner at a time on a machine, so that nobody undoes what another has set.

For each GPU there is a file, named by its UUID. The owner holds a lock (`flock`) on it, which the kernel releases when
the last process that has the file open is gone: the owner and its watchdog. The content tells people who it is. A
content without a lock was left by somebody who could not give the clock back.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from perseus_core.gpu.errors import GpuError

FOLDER_VARIABLE = "PERSEUS_CLOCK_OWNERS"
_SIMULATION_VARIABLE = "PERSEUS_SIMULATED_GPUS"
_FOLDER = Path("/tmp/perseus-clock-owners")  # not $TMPDIR, which differs from job to job
_MAX_BYTES = 4096
_RETRY_EVERY_S = 0.05


class ClockTaken(GpuError):  # noqa: N818 (named by what happened)
    """Another process owns the clock of this GPU."""


@dataclass(frozen=True)
class ClockOwner:
    """Who owns, or owned, a GPU's clock.

    Attributes:
        pid: process.
        command: how it was started, shortened.
        since: local date and time.
    """

    pid: int
    command: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command}), since {self.since}"


class ClockClaim:
    """The right to set one GPU's clock. Lasts until `release`, or until every process that has it open is gone."""

    def __init__(self, descriptor: int, *, was_left_behind: bool) -> None:
        """Made by `claim_clock`.

        Args:
            descriptor: of the locked file; a watchdog inherits it and so keeps the claim after its owner's death.
            was_left_behind: whether the owner before could not give the clock back.
        """
        self.descriptor = descriptor
        self.was_left_behind = was_left_behind

    def release(self) -> None:
        """Gives up the claim, for everybody who shares it. Only when the clock has been given back."""
        os.ftruncate(self.descriptor, 0)
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)

    def close_in_child(self) -> None:
        """In a forked child: the claim is the parent's and stays so."""
        os.close(self.descriptor)


def claim_clock(uuid: str, *, patience_s: float = 0.0) -> ClockClaim:
    """Makes this process the owner of a GPU's clock.

    Args:
        uuid: of the GPU.
        patience_s: how long to wait for another owner to leave; a watchdog needs a moment when a job is restarted.

    Raises:
        ClockTaken: if there is another owner.
        GpuError: if the folder of owners cannot be used.
    """
    descriptor = _open(uuid)
    deadline_s = time.monotonic() + patience_s
    while not _try_lock(descriptor, fcntl.LOCK_EX):
        if time.monotonic() >= deadline_s:
            owner = _read(descriptor)
            os.close(descriptor)
            raise ClockTaken(
                f"the clock of {uuid} belongs to {owner or 'another process'}; this process measures only; end the "
                "other job, or give each job its own GPUs"
            )
        time.sleep(_RETRY_EVERY_S)
    was_left_behind = os.fstat(descriptor).st_size > 0
    os.ftruncate(descriptor, 0)
    owner = ClockOwner(os.getpid(), " ".join(sys.orig_argv)[:200], time.strftime("%Y-%m-%d %H:%M:%S"))
    os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)
    return ClockClaim(descriptor, was_left_behind=was_left_behind)


def clock_owner(uuid: str) -> ClockOwner | None:
    """Who owns the clock of a GPU now, if anybody who uses this package does.

    Raises:
        GpuError: if the folder of owners cannot be used.
    """
    descriptor = _open(uuid)
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _read(descriptor)
    finally:
        os.close(descriptor)


def clock_left_behind(uuid: str) -> ClockOwner | None:
    """Who was the last owner of a GPU's clock, if he is gone and could not give it back.

    Raises:
        GpuError: if the folder of owners cannot be used.
    """
    descriptor = _open(uuid)
    try:
        return _read(descriptor) if _try_lock(descriptor, fcntl.LOCK_SH) else None
    finally:
        os.close(descriptor)


def owners_folder() -> Path:
    """Where the files are: PERSEUS_CLOCK_OWNERS, else a folder in /tmp that all users share.

    Containers that share GPUs but not /tmp must be given a common folder.
    """
    if FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    if _SIMULATION_VARIABLE in os.environ:
        # Simulated GPUs of different simulations bear the same UUIDs and have nothing to do with each other.
        return Path(os.environ[_SIMULATION_VARIABLE]) / "clock-owners"
    return _FOLDER


def _open(uuid: str) -> int:
    folder = owners_folder()
    path = folder / uuid
    try:
        folder.mkdir(exist_ok=True)
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o777 | stat.S_ISVTX)  # like /tmp: whatever the umask, other users own clocks too
        try:
            # Without O_CREAT first: in such a folder Linux denies it for files of other users (fs.protected_regular).
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC)
            os.fchmod(descriptor, 0o666)
            return descriptor
    except OSError as error:
        raise GpuError(
            f"{path}: the owner of the clock cannot be entered ({error.strerror}); set {FOLDER_VARIABLE} to a folder "
            "that all jobs of this machine may write to"
        ) from None


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> ClockOwner | None:
    try:
        return ClockOwner(**json.loads(os.pread(descriptor, _MAX_BYTES, 0)))
    except (ValueError, TypeError):
        return None  # at this moment being written
