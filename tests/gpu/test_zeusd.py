"""Locking clocks through a stand-in for zeusd that speaks its documented interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from perseus_core.gpu.discovery import visible_devices
from perseus_core.gpu.errors import CallFailed, GpuError, GpuLost, NoPermission, NotSupported
from perseus_core.gpu.simulated import SimulatedNode, faults
from perseus_core.gpu.zeusd import ZeusdClient, ZeusdDevice

PARAMETERS = {
    "/gpu/set_gpu_locked_clocks": {"gpu_ids", "block", "min_clock_mhz", "max_clock_mhz"},
    "/gpu/reset_gpu_locked_clocks": {"gpu_ids", "block"},
    "/gpu/set_power_limit": {"gpu_ids", "block", "power_limit_mw"},
}


class StandIn(ThreadingUnixStreamServer):
    """Answers as zeusd does, on a node whose GPUs it numbers the other way round."""

    daemon_threads = True

    def __init__(self, path: Path, node: SimulatedNode) -> None:
        super().__init__(str(path), Handler)
        self.node = node
        self.token: str | None = None
        self.answer: tuple[int, str] | None = None
        self.document: object = {
            "gpus": [
                {"id": i, "name": gpu.identity.name, "pci_address": gpu.identity.pci_bus_id[4:].lower()}
                for i, gpu in enumerate(reversed(node.gpus))
            ],
            "enabled_api_groups": ["gpu-control"],
            "auth_required": False,
        }


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def address_string(self) -> str:
        return "client"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(*((200, json.dumps(self.server.document)) if self.path == "/discover" else (404, "")))

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.reply(401, "Authentication required.")
        if self.server.answer is not None:
            return self.reply(*self.server.answer)
        if set(query) != PARAMETERS.get(url.path) or query["block"] not in ("true", "false"):
            return self.reply(400, "Query deserialize error")
        gpu = list(reversed(self.server.node.gpus))[int(query["gpu_ids"])]
        if url.path == "/gpu/set_gpu_locked_clocks":
            gpu.lock_clocks(int(query["min_clock_mhz"]), int(query["max_clock_mhz"]))
        elif url.path == "/gpu/reset_gpu_locked_clocks":
            gpu.reset_clocks()
        else:
            with gpu.changing() as state:
                state.power_limit_w = int(query["power_limit_mw"]) / 1000
        return self.reply(200, "")

    def reply(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body:
            self.wfile.write(body.encode())


@pytest.fixture
def daemon(node: SimulatedNode, tmp_path: Path) -> Iterator[StandIn]:
    for gpu in node.gpus:
        faults.deny_permission(gpu)  # this process may not lock clocks itself
    with StandIn(tmp_path / "zeusd.sock", node) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def device(daemon: StandIn) -> ZeusdDevice:
    return ZeusdDevice(daemon.node.gpus[0].identity.uuid, ZeusdClient(str(daemon.server_address)))


def test_the_variable_sends_locks_to_the_daemon_and_reads_to_nvml(daemon: StandIn, node: SimulatedNode) -> None:
    """The right GPU, though the daemon numbers them differently; an unprivileged process can lock it."""
    device = visible_devices({"ZEUSD_SOCK_PATH": str(daemon.server_address)})[0]
    device.lock_clock(800)
    assert [gpu.state().locked_mhz for gpu in node.gpus] == [[800, 800], []]
    assert device.power_w() == pytest.approx(50)
    device.reset_clock()
    assert node.gpus[0].state().locked_mhz == []
    device.set_power_limit(250)
    assert device.power_limit_w() == pytest.approx(250)


def test_without_the_variable_nvml_refuses(daemon: StandIn) -> None:
    """And the message names zeusd as a remedy."""
    with pytest.raises(NoPermission, match="zeusd"):
        visible_devices({})[0].lock_clock(800)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (403, '{"errors": {"0": "NVML error: no permission"}}', NoPermission),
        (400, '{"errors": {"0": "NVML error: not supported"}}', NotSupported),
        (404, "", NotSupported),
        (500, '{"errors": {"0": "NVML error: the GPU is lost"}}', GpuLost),
        (500, '{"errors": {"0": "unknown"}}', CallFailed),
    ],
)
def test_the_daemons_errors_become_our_few(
    daemon: StandIn, device: ZeusdDevice, status: int, body: str, kind: type[GpuError]
) -> None:
    """With what was being done and what the daemon said."""
    daemon.answer = (status, body)
    with pytest.raises(GpuError) as caught:
        device.lock_clock(800)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"locking the clock of {device.uuid} at 800 MHz through zeusd")
    assert f"HTTP {status}" in str(caught.value)


def test_a_token_is_sent(daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """From ZEUSD_TOKEN; without it, the remedy is named."""
    daemon.token = "secret"
    uuid = daemon.node.gpus[0].identity.uuid
    with pytest.raises(NoPermission, match="ZEUSD_TOKEN"):
        ZeusdDevice(uuid, ZeusdClient(str(daemon.server_address))).lock_clock(800)
    monkeypatch.setenv("ZEUSD_TOKEN", "secret")
    ZeusdDevice(uuid, ZeusdClient(str(daemon.server_address))).lock_clock(800)
    assert daemon.node.gpus[0].state().locked_mhz == [800, 800]


def test_a_missing_daemon_is_named(node: SimulatedNode, tmp_path: Path) -> None:
    """A socket path that leads nowhere is an error at once, not at the first lock."""
    with pytest.raises(GpuError, match=r"gone\.sock: no answer .* unset ZEUSD_SOCK_PATH"):
        visible_devices({"ZEUSD_SOCK_PATH": str(tmp_path / "gone.sock")})


@pytest.mark.parametrize("document", [{"gpus": []}, {"gpus": [{"id": 0, "name": "Test GPU"}]}])
def test_a_daemon_that_does_not_have_the_gpu_is_refused(daemon: StandIn, document: object) -> None:
    """Another machine's daemon, or an old one without PCI addresses: no guess which GPU is meant."""
    daemon.document = document
    with pytest.raises(GpuError, match="does not have GPU"):
        ZeusdDevice(daemon.node.gpus[0].identity.uuid, ZeusdClient(str(daemon.server_address)))


def test_an_answer_that_is_not_zeusds_is_refused(daemon: StandIn) -> None:
    """Something else behind the socket."""
    daemon.document = ["hello"]
    with pytest.raises(GpuError, match="update it"):
        ZeusdClient(str(daemon.server_address)).discover()
