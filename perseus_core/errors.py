"""The errors of this package."""


class PerseusError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(PerseusError, ValueError):
    """Something the user gave is wrong. The message names the thing, the value and the remedy in one sentence."""
