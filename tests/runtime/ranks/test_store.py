"""The stores through which ranks talk: torch's own, with several clients in one process, and that of this process.

What a rank sets or appends it sees itself at once. A TCPStore answers neither, so others may see it a moment later: by
the time at which the rank that said it has been answered anything else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from perseus_core.runtime.ranks.store import MAX_BYTES, LocalStore, Store, StoreError, TorchStore, job_store
from tests.conftest import REPOSITORY

BINARY = bytes(range(256)) * 3
# Whoever waits so long waits for good.
HANGS_S = 60.0

_prefixes = count()


@pytest.fixture(scope="module")
def host() -> Iterator[Any]:
    """A TCPStore as rank 0 of a job hosts it."""
    distributed = pytest.importorskip("torch.distributed")
    yield distributed.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)


def client_of(host: Any, limit_s: float = HANGS_S) -> Any:
    """A rank's own connection to it."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", host.port, None, is_master=False, timeout=timedelta(seconds=limit_s))


@pytest.fixture(params=["tcp", "hash", "local"])
def stores(request: pytest.FixtureRequest) -> tuple[Store, Store]:
    """The same store as two ranks see it."""
    if request.param == "local":
        local = LocalStore()
        return local, local
    distributed = pytest.importorskip("torch.distributed")
    prefix = f"test{next(_prefixes)}"
    if request.param == "hash":
        hashed = distributed.HashStore()
        return TorchStore(hashed, prefix), TorchStore(hashed, prefix)
    host = request.getfixturevalue("host")
    return TorchStore(client_of(host), prefix), TorchStore(client_of(host), prefix)


@pytest.fixture
def dying_host() -> Iterator[tuple[subprocess.Popen[str], TorchStore]]:
    """A host of its own process, and a connection to it."""
    pytest.importorskip("torch.distributed")
    code = (
        "import sys, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, None, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        import torch.distributed as dist

        port = int(process.stdout.readline())
        client = dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=timedelta(seconds=HANGS_S))
        yield process, TorchStore(client, "test")
    finally:
        process.kill()
        process.communicate()


def settle(*stores: Store) -> None:
    """Returns when all have been heard."""
    for store in stores:
        store.read("never set")


def beside(task: Callable[[], Any]) -> Future[Any]:
    """Does something that may hang in a thread that nobody waits for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_what_one_rank_sets_all_others_read(stores: tuple[Store, Store]) -> None:
    """Any bytes, none included, until they are taken away."""
    one, other = stores
    for value in (BINARY, b"", b"\0", b"\xff\xfe\0absent"):
        one.set("key", value)
        assert (one.read("key"), other.read("key")) == (value, value)
    one.delete("key")
    assert (one.read("key"), other.read("key")) == (None, None)


def test_what_ranks_append_is_one_value(stores: tuple[Store, Store]) -> None:
    """Each part whole, from the first on; after it was taken away it begins anew."""
    one, other = stores
    for part in range(20):
        (one, other)[part % 2].append("round", bytes([part]) * 24)
        settle(one, other)
    assert one.read("round") == b"".join(bytes([part]) * 24 for part in range(20))
    other.delete("round")
    other.append("round", BINARY)
    assert one.read("round") == BINARY


def test_parts_that_are_appended_at_the_same_time_do_not_mix(stores: tuple[Store, Store]) -> None:
    """Ranks do not take turns."""

    def tell(store: Store, rank: int) -> None:
        for number in range(200):
            store.append("round", bytes([rank, number]) * 12)

    tasks = [beside(lambda store=store, rank=rank: tell(store, rank)) for rank, store in enumerate(stores * 2)]
    for task in tasks:
        task.result(HANGS_S)
    settle(*stores)
    content = stores[0].read("round") or b""
    parts = [content[begin : begin + 24] for begin in range(0, len(content), 24)]
    assert all(part == part[:2] * 12 for part in parts)
    for rank in range(4):
        assert [part[1] for part in parts if part[0] == rank] == list(range(200))


def test_reading_waits_for_no_key(stores: tuple[Store, Store]) -> None:
    """A store's `get` would, for minutes."""
    assert beside(lambda: stores[0].read("never set")).result(HANGS_S / 2) is None


def test_deleting_what_is_not_there_does_no_harm(stores: tuple[Store, Store]) -> None:
    """Rounds to which nobody appended."""
    stores[0].delete("never set")
    assert stores[0].read("never set") is None


def test_one_rank_is_the_first(stores: tuple[Store, Store]) -> None:
    """Of each key anew."""
    assert [store.is_first("unheard") for store in (*stores, *stores)] == [True, False, False, False]
    assert [store.is_first("other") for store in reversed(stores)] == [True, False]


def test_one_is_the_first_of_many_that_ask_at_the_same_time(stores: tuple[Store, Store]) -> None:
    """Never two, never none."""
    for number in range(20):
        asked = [beside(lambda store=store, key=f"k{number}": store.is_first(key)) for store in stores * 4]
        assert sorted(answer.result(HANGS_S) for answer in asked) == [False] * 7 + [True]


def test_keys_of_the_job_and_of_other_sessions_are_left_alone(host: Any) -> None:
    """A prefix of ours begins all keys."""
    client = client_of(host)
    client.set("key", "the job's")
    first, second = TorchStore(client, "perseus0"), TorchStore(client, "perseus1")
    first.set("key", b"ours")
    assert (first.read("key"), second.read("key"), client.get("key")) == (b"ours", None, b"the job's")
    second.delete("key")
    assert (first.read("key"), client.get("key")) == (b"ours", b"the job's")


def test_what_many_ranks_append_may_be_longer_than_one_may_send(host: Any) -> None:
    """A round of a large job is read in one go, longer than what breaks a connection when it is sent."""
    stores = [TorchStore(client_of(host), f"test{next(_prefixes)}")]
    part = bytes(range(256)) * (2**20 // 256)
    for _ in range(12):
        stores[0].append("round", part)
    assert stores[0].read("round") == part * 12
    stores[0].delete("round")


@pytest.mark.parametrize("call", ["set", "append"])
def test_a_value_that_is_too_long_never_reaches_the_store(host: Any, call: str) -> None:
    """It would close the connection, which is the job's."""
    store = TorchStore(client_of(host), f"test{next(_prefixes)}")
    store.set("key", b"before")
    with pytest.raises(StoreError, match="at once"):
        getattr(store, call)("key", bytes(MAX_BYTES + 1))
    assert store.read("key") == b"before"
    getattr(store, call)("key", bytes(MAX_BYTES))
    assert (store.read("key") or b"").endswith(bytes(MAX_BYTES))
    store.delete("key")


def test_while_training_waits_for_a_key_we_wait_and_nothing_else(host: Any) -> None:
    """Its call goes first on the connection that is its own; when it has what it waits for, all goes on."""
    client, other = client_of(host), client_of(host)
    store, of_other_rank = TorchStore(client, "perseus"), TorchStore(other, "perseus")
    key = f"awaited{next(_prefixes)}"
    in_training = beside(lambda: client.get(key))
    ours = [beside(lambda: store.append("held up", b"1")), beside(lambda: store.read("news"))]
    for number in range(50):
        of_other_rank.set("news", bytes([number]))
        assert of_other_rank.read("news") == bytes([number])
    assert not in_training.done()
    other.set(key, "here")
    assert in_training.result(HANGS_S) == b"here"
    assert ours[0].result(HANGS_S) is None
    assert ours[1].result(HANGS_S) in (None, *(bytes([number]) for number in range(50)))
    settle(store)
    assert of_other_rank.read("held up") == b"1"
    of_other_rank.delete("held up")
    of_other_rank.delete("news")


def test_a_host_that_is_gone_is_an_error_and_no_hang(dying_host: tuple[subprocess.Popen[str], TorchStore]) -> None:
    """In one line, whatever is asked; it was killed, so it said nothing."""
    process, store = dying_host
    store.set("key", b"value")
    process.send_signal(signal.SIGKILL)
    process.wait()
    calls: list[Callable[[], Any]] = [
        lambda: store.read("key"),
        lambda: store.append("key", b"more"),
        lambda: store.set("key", b"other"),
        lambda: store.delete("key"),
        lambda: store.is_first("key"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="cannot be reached any more") as caught:
            beside(call).result(HANGS_S)
        assert "\n" not in str(caught.value)


def test_a_host_that_dies_ends_a_call_that_waits_for_its_answer(
    dying_host: tuple[subprocess.Popen[str], TorchStore],
) -> None:
    """One that has stopped is not seen to be gone; one that is killed is."""
    process, store = dying_host
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    asked = beside(lambda: store.read("key"))
    process.send_signal(signal.SIGKILL)
    with pytest.raises(StoreError):
        asked.result(HANGS_S)


_COUNTING = """
import sys, threading
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from perseus_core.runtime.ranks.store import TorchStore

client = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, is_master=False, timeout=timedelta(seconds=60))
client.set("warm", "up")

def opened():
    descriptors = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sorted(str(link.readlink()) for link in descriptors), len(list(Path("/proc/self/task").iterdir()))

before = opened()
store = TorchStore(client, "counting")
store.append("round", b"1")
store.set("news", b"2")
assert store.is_first("unheard")
assert (store.read("round"), store.read("absent")) == (b"1", None)
store.delete("round")
assert opened() == before, (before, opened())
assert any(name.startswith("socket:") for name in before[0]), "the job's own connection"
print("nothing")
"""


def test_nothing_is_opened_for_it(host: Any) -> None:
    """No connection, no listener, no thread: the store's host has no descriptor to spare for each rank.

    In a process of its own, in which nobody else opens anything.
    """
    command = [sys.executable, "-W", "ignore", "-c", _COUNTING, str(host.port)]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.stdout == "nothing\n", finished.stderr


def test_a_store_of_files_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """It cannot append. Behind a prefix it is still one."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed import distributed_c10d

    files = distributed.FileStore(str(tmp_path / "store"), 1)
    for store in (files, distributed_c10d.PrefixStore("a", distributed_c10d.PrefixStore("b", files))):
        with pytest.raises(StoreError, match=r"\(FileStore\) cannot append .* torchrun or env://"):
            TorchStore(store, "test")


def test_without_a_torch_job_there_is_no_store() -> None:
    """One sentence with the remedy."""
    distributed = pytest.importorskip("torch.distributed")
    assert not distributed.is_initialized()
    with pytest.raises(StoreError, match="torchrun or env://"):
        job_store("test")


def test_the_store_of_a_torch_job_is_its_rendezvous() -> None:
    """With a prefix of ours; a store that an adapter's job brings along serves, too."""
    distributed = pytest.importorskip("torch.distributed")
    hashed = distributed.HashStore()
    distributed.init_process_group("gloo", store=hashed, rank=0, world_size=1)
    try:
        job_store("perseus0").set("key", BINARY)
        assert TorchStore(hashed, "perseus0").read("key") is None, "torch has a prefix of its own"
        assert job_store("perseus0").read("key") == BINARY
        assert job_store("perseus1").read("key") is None
    finally:
        distributed.destroy_process_group()
