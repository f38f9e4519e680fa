"""Locking clocks without privileges: requests to `zeusd`, the Zeus daemon, over its Unix socket.

The daemon runs as root and locks clocks for those who may open its socket. Its HTTP interface is documented in
ml-energy/zeus, docs/zeusd/api.md. Reading needs no privileges and stays with NVML.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import Any
from urllib.parse import urlencode

from perseus_core.gpu.errors import CallFailed, GpuError, GpuLost, NoPermission, NotSupported
from perseus_core.gpu.nvml import NvmlDevice

SOCKET_VARIABLE = "ZEUSD_SOCK_PATH"
_TOKEN_VARIABLE = "ZEUSD_TOKEN"
_TIMEOUT_S = 10.0


class ZeusdClient:
    """Speaks to the daemon, one connection a request."""

    def __init__(self, socket_path: str, token: str | None = None) -> None:
        """Connects to nothing yet.

        Args:
            socket_path: the daemon's Unix socket.
            token: for a daemon that wants one; by default the variable ZEUSD_TOKEN.
        """
        self.socket_path = socket_path
        self._token = os.environ.get(_TOKEN_VARIABLE) if token is None else token

    def discover(self) -> dict[str, Any]:
        """What the daemon offers (`GET /discover`): GPUs, and which groups of calls are enabled.

        Raises:
            GpuError: if there is no daemon, or one that does not know this call.
        """
        answer = self.request("GET", "/discover", doing="asking which GPUs it has")
        try:
            document = json.loads(answer)
            gpus = document["gpus"]
            assert isinstance(gpus, list)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise GpuError(f"zeusd at {self.socket_path} answers {answer[:80]!r} to /discover; update it") from None
        assert isinstance(document, dict)
        return document

    def request(self, method: str, path: str, *, doing: str, **parameters: str | int) -> str:
        """Makes one request and returns the body of the answer.

        Raises:
            NoPermission: for 401 and 403.
            NotSupported: for 400 and 404.
            GpuLost: if the daemon's driver has lost the GPU.
            GpuError: if the daemon cannot be reached, or for any other status.
        """
        target = f"{path}?{urlencode(parameters)}" if parameters else path
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        connection = _UnixConnection(self.socket_path)
        try:
            connection.request(method, target, headers=headers)
            answer = connection.getresponse()
            status, body = answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise CallFailed(
                f"{doing} through zeusd at {self.socket_path}: no answer ({error}); start the daemon, or unset "
                f"{SOCKET_VARIABLE} to do without it"
            ) from None
        finally:
            connection.close()
        if status != http.client.OK:
            raise _our_error(status, body, f"{doing} through zeusd at {self.socket_path}")
        return body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, socket_path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._socket_path = socket_path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


def _our_error(status: int, body: str, what: str) -> GpuError:
    said = f"HTTP {status}: {body.strip()[:200]}"
    if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        return NoPermission(
            f"{what}: refused ({said}); run the daemon as root with gpu-control enabled, and set {_TOKEN_VARIABLE} if "
            "it wants a token"
        )
    if status in (http.client.BAD_REQUEST, http.client.NOT_FOUND):
        return NotSupported(f"{what}: not supported ({said}); update zeusd, and start it with gpu-control enabled")
    if "lost" in body.lower():
        return GpuLost(f"{what}: the GPU is lost ({said}); reset it or restart the machine")
    return CallFailed(f"{what}: failed ({said}); see the daemon's log")


class ZeusdDevice(NvmlDevice):
    """One GPU whose clock is locked by zeusd; everything is read through NVML."""

    def __init__(self, uuid: str, client: ZeusdClient) -> None:
        """Finds the GPU in NVML by its UUID and in the daemon by its PCI address.

        Raises:
            GpuError: if the daemon cannot be reached or does not have this GPU.
        """
        super().__init__(uuid)
        self._client = client
        self._gpu_id = self._find_in_daemon()

    def lock_clock(self, clock_mhz: int) -> None:
        """Asks for one fixed clock (`POST /gpu/set_gpu_locked_clocks`)."""
        self._post(
            "set_gpu_locked_clocks",
            f"locking the clock of {self.uuid} at {clock_mhz} MHz",
            min_clock_mhz=clock_mhz,
            max_clock_mhz=clock_mhz,
        )

    def reset_clock(self) -> None:
        """Gives the clock back to the driver (`POST /gpu/reset_gpu_locked_clocks`)."""
        self._post("reset_gpu_locked_clocks", f"resetting the clock of {self.uuid}")

    def set_power_limit(self, limit_w: float) -> None:
        """Sets the power limit (`POST /gpu/set_power_limit`). Nothing in this package calls it."""
        self._post(
            "set_power_limit",
            f"setting the power limit of {self.uuid} to {limit_w:g} W",
            power_limit_mw=round(limit_w * 1000),
        )

    def _post(self, call: str, doing: str, **parameters: int) -> None:
        self._client.request("POST", f"/gpu/{call}", doing=doing, gpu_ids=self._gpu_id, **parameters, block="true")

    def _find_in_daemon(self) -> int:
        """The daemon's number for this GPU; a container's own numbers need not be the daemon's."""
        wanted = _pci_address(self.identity.pci_bus_id)
        for gpu in self._client.discover()["gpus"]:
            if _pci_address(str(gpu.get("pci_address", ""))) == wanted:
                return int(gpu["id"])
        raise GpuError(
            f"zeusd at {self._client.socket_path} does not have GPU {self.uuid} at {self.identity.pci_bus_id}; "
            "run the daemon on this machine, update it if it tells no PCI addresses, and let it see all GPUs"
        )


def _pci_address(text: str) -> tuple[int, ...]:
    """(domain, bus, device) of `00000000:07:00.0` (NVML) or `0000:07:00.0` (zeusd)."""
    try:
        return tuple(int(part, 16) for part in text.split(".")[0].split(":"))
    except ValueError:
        return ()
