"""Where the GPU's time lies on the host's clock: CUDA tells only the time between two of its events.

An anchor is an event whose host time is known. It is found in a side thread: an event is put on an otherwise empty
stream, and looked at until it is reached. The host time is that of the look that saw it, the end of the wait. The error
that remains is one-sided: the event was reached up to `uncertainty_s` before, the time since the look before that did
not see it yet. So it does not matter how long the event waited, as it does behind everything that training has given to
the GPU where CUDA_DEVICE_MAX_CONNECTIONS is 1. An anchor whose last two looks lie too far apart, because the thread did
not get the interpreter or the processor, is not sharp: it is refused where a better one is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from perseus_core.runtime.log import logger


class TimedEvent(Protocol):
    """As much of a `torch.cuda.Event` as is used here."""

    def query(self) -> bool:
        """Whether it is reached."""

    def elapsed_time(self, end_event: TimedEvent) -> float:
        """Milliseconds to another one; both must be reached."""


# As sharp as this is sharp: a part in ten of the shortest instructions, and less than what the energy counter's moves
# are uncertain by.
SHARP_S = 0.0005
_GOOD_ENOUGH_S = 50e-6
_TRIES = 5
# CUDA gives the time between two events as a 32-bit float in milliseconds (good to 1 us for 10 s, to 1 ms for hours),
# and the GPU's clock drifts against the host's, by this at most; so events are timed against a young anchor.
_DRIFT = 50e-6
_RENEW_EVERY_S = 5.0
_RETRY_S = (0.05, 1.0)  # after a refusal, at first and at most
# Beyond this an event's time on the host's clock counts as unknown.
_USABLE_S = 0.002
# How often to look at an event that is not reached: often as a rule, seldom where the GPU seems to hang.
_LOOK_EVERY_S = 0.0002
_LOOK_EVERY_S_LATER = 0.01
_LATER_S = 2.0


class Anchor(NamedTuple):
    """An event whose host time is known.

    Attributes:
        event: it.
        time_s: when it was seen to be reached [s, `time.monotonic`].
        uncertainty_s: by how much sooner it may have been reached; infinity where nobody has looked.
    """

    event: TimedEvent
    time_s: float
    uncertainty_s: float = math.inf

    def uncertainty_at(self, time_s: float) -> float:
        """The same for what is timed against it at some time, with the drift of the two clocks."""
        return self.uncertainty_s + _DRIFT * abs(time_s - self.time_s)

    def is_usable_at(self, time_s: float) -> bool:
        """Whether times on the host's clock that follow from it mean something then."""
        return self.uncertainty_at(time_s) <= _USABLE_S

    def or_better(self, other: Anchor) -> Anchor:
        """The other one if it is sharp, or sharper than this one has become; this one otherwise."""
        if other.uncertainty_s <= SHARP_S or other.uncertainty_s < self.uncertainty_at(other.time_s):
            return other
        return self


class AnchorFinder:
    """Keeps an anchor young, from a side thread.

    Attributes:
        anchor: the best one.
        is_stopping: set by others when it is to end.
    """

    def __init__(self, provisional: Anchor, record: Callable[[], TimedEvent], now_s: Callable[[], float]) -> None:
        """Looks for nothing yet.

        Args:
            provisional: for what is timed before any was found.
            record: puts an event on a stream that is empty otherwise.
            now_s: the time.
        """
        self.anchor = provisional
        self.is_stopping = False
        self._record, self._now_s = record, now_s
        self._event: TimedEvent | None = None
        self._recorded_s = self._earliest_s = 0.0
        self._best: Anchor | None = None  # of this round
        self._num_tries = 0
        self._retry_s = _RETRY_S[0]

    def step(self) -> float | None:
        """Looks once; returns how long to wait until the next look, None at the end."""
        if self.is_stopping:
            return None
        try:
            return self._look()
        except Exception as error:  # as where somebody captures a CUDA graph on a stream that we share
            logger.debug("no anchor could be had", exc_info=error)
            self._event = None
            return _RETRY_S[1]

    def _look(self) -> float:
        if self._event is None:
            self._recorded_s = self._earliest_s = self._now_s()
            self._event = self._record()
        looked_s = self._now_s()
        if not self._event.query():
            self._earliest_s = looked_s
            return _LOOK_EVERY_S if looked_s - self._recorded_s < _LATER_S else _LOOK_EVERY_S_LATER
        seen_s = self._now_s()
        has_waited = self._earliest_s > self._recorded_s
        found = Anchor(self._event, seen_s, seen_s - self._earliest_s)
        self._event = None
        self._num_tries += 1
        if self._best is None or found.uncertainty_s < self._best.uncertainty_s:
            self._best = found
        # One that had to wait is as uncertain as looks lie apart, and so will be the next one.
        enough_s = SHARP_S if has_waited else _GOOD_ENOUGH_S
        if self._best.uncertainty_s > enough_s and self._num_tries < _TRIES:
            return 0.0
        return self._end_round(self._best)

    def _end_round(self, best: Anchor) -> float:
        """Takes the best of the tries, or refuses it; returns how long to wait until the next one."""
        self.anchor = self.anchor.or_better(best)
        self._best, self._num_tries = None, 0
        if best.uncertainty_s <= SHARP_S:
            self._retry_s = _RETRY_S[0]
            return _RENEW_EVERY_S
        retry_s, self._retry_s = self._retry_s, min(2 * self._retry_s, _RETRY_S[1])
        return retry_s
