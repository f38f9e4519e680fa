"""What can go wrong with a GPU: our few errors, whatever library or daemon reported it."""

from __future__ import annotations

from perseus_core.errors import PerseusError


class GpuError(PerseusError):
    """A call about a GPU failed. The message says what was being done, on which GPU, and the remedy."""


class NoDriver(GpuError):  # noqa: N818 (named by what happened)
    """There is no usable NVIDIA driver, or the Python package that speaks to it is missing."""


class NoPermission(GpuError):  # noqa: N818 (named by what happened)
    """This process may not do that. Locking clocks needs root, CAP_SYS_ADMIN or zeusd."""


class NotSupported(GpuError):  # noqa: N818 (named by what happened)
    """This GPU or this driver cannot do that."""


class CallFailed(GpuError):  # noqa: N818 (named by what happened)
    """A call has failed for a reason that may pass; the next one may not."""


class GpuLost(GpuError):  # noqa: N818 (named by what happened)
    """The GPU has fallen off the bus, or needs a reset."""
