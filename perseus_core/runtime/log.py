"""The log: few lines, on rank 0 unless only another rank knows, each thing said once."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("perseus")

Metric = Callable[[str, float], None]
"""Receives (name, value) of what is measured, for TensorBoard and the like."""


class Announcer:
    """Says things, some of them only once.

    Attributes:
        speaks: whether this rank says what all ranks know (rank 0 does).
    """

    def __init__(self, *, speaks: bool, metric: Metric | None = None) -> None:
        """`metric` is called on every rank that has one: all know the same figures."""
        self.speaks = speaks
        self._metric = metric
        self._said: set[str] = set()

    @property
    def has_metric(self) -> bool:
        """Whether figures are wanted here."""
        return self._metric is not None

    def say(self, message: str, *values: object) -> None:
        """What all ranks know."""
        if self.speaks:
            logger.info(message, *values)

    def warn(self, message: str, *values: object) -> None:
        """What all ranks know and the user should."""
        if self.speaks:
            logger.warning(message, *values)

    def warn_once(self, topic: str, message: str, *values: object) -> None:
        """The same, at most once per topic."""
        if topic not in self._said:
            self._said.add(topic)
            self.warn(message, *values)

    def measure(self, name: str, value: float) -> None:
        """Hands a figure that all ranks know to the user's metrics, whichever rank keeps them."""
        if self._metric is not None:
            self._metric(name, value)


def show_log() -> None:
    """Prints the log to stderr where the program has not configured logging: a job should not be silent about us."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[perseus] %(message)s"))
        logger.addHandler(handler)
