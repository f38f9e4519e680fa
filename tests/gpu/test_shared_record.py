"""Sharing between real processes, killed ones included."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.simulated.shared_record import SharedRecord

Start = Callable[..., "subprocess.Popen[str]"]

_OPEN = """
from pathlib import Path
from perseus_core.gpu.simulated.shared_record import SharedRecord
record = SharedRecord(Path(folder))
"""
_INCREMENT = """
for _ in range(300):
    with record.locked():
        record.write(str(int(record.read()) + 1).encode())
"""


@pytest.fixture
def record(tmp_path: Path) -> SharedRecord:
    return SharedRecord.create(tmp_path / "node", b"0")


def test_processes_and_threads_never_lose_a_change(record: SharedRecord, start_python: Start) -> None:
    """Three processes and two threads of this one each count 300 times; nothing is missing."""
    processes = [start_python(_OPEN + _INCREMENT) for _ in range(3)]
    threads = [threading.Thread(target=exec, args=(_INCREMENT, {"record": record})) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        assert process.wait(timeout=90) == 0
    assert record.read() == b"1500"


def test_a_holder_killed_with_sigkill_leaves_a_free_lock_and_the_old_content(
    record: SharedRecord, start_python: Start
) -> None:
    """Killed after its bytes were written but before they became valid: as if it had never been."""
    holder = start_python(
        _OPEN
        + """
import time
from perseus_core.gpu.simulated import shared_record
class Never:
    def __getattr__(self, name):
        return getattr(shared_record.struct.Struct("<Q"), name)
    def pack_into(self, *_):
        print("half way", flush=True)
        time.sleep(60)
with record.locked():
    shared_record._VERSION = Never()
    record.write(b"unfinished")
"""
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "half way\n"
    os.kill(holder.pid, signal.SIGKILL)
    with record.locked():
        assert record.read() == b"0"
        record.write(b"next")
    assert record.read() == b"next"


def test_the_lock_keeps_others_out(record: SharedRecord, start_python: Start) -> None:
    """While this process holds it, another one's change waits."""
    with record.locked():
        other = start_python(_OPEN + "print('ready', flush=True)\n" + _INCREMENT)
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        time.sleep(0.1)
        assert record.read() == b"0"
    assert other.wait(timeout=90) == 0
    assert record.read() == b"300"


def test_a_forked_child_has_a_lock_of_its_own(record: SharedRecord) -> None:
    """Parent and child would share one flock if the child did not open the file again."""
    with record.locked():
        child = os.fork()
        if child == 0:
            with record.locked():
                record.write(b"child")
            os._exit(0)
        time.sleep(0.1)
        assert record.read() == b"0"
    assert os.waitpid(child, 0)[1] == 0
    assert record.read() == b"child"


def test_every_write_changes_the_version(record: SharedRecord) -> None:
    """Pollers rely on it."""
    before = record.version()
    with record.locked():
        record.write(b"0")
    assert record.version() != before


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    """Something else under that name is not overwritten."""
    (tmp_path / "other").write_text("mine")
    with pytest.raises(InputError, match="is not the state of a simulated GPU"):
        SharedRecord(tmp_path / "other")
    with pytest.raises(InputError, match="cannot be opened"):
        SharedRecord(tmp_path / "absent")
