"""Every error that aligntune raises on purpose, in one small tree.

User mistakes derive from `ValueError` as well, so code that guards a call with `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AlignTuneError(Exception):
    """Base of every error raised on purpose by aligntune; its message is written for the person who sees it."""

    exit_code = 1


class ConfigError(AlignTuneError, ValueError):
    """Options that are unknown, of the wrong type, out of range or contradictory.

    `faults` holds every fault that was found, one line each; the message lists them all.
    """

    exit_code = 2

    def __init__(self, message: str, faults: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.faults: tuple[str, ...] = tuple(faults)

    @classmethod
    def from_faults(cls, faults: Iterable[str], where: str = "the configuration") -> ConfigError:
        """One error for all `faults`; a single fault is its own message."""
        faults = list(faults)
        if len(faults) == 1:
            return cls(faults[0], faults)
        lines = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(faults, 1))
        return cls(f"{len(faults)} faults in {where}:\n{lines}", faults)


class DataError(AlignTuneError, ValueError):
    """A dataset that cannot be read, is of a kind the algorithm does not take, or has bad rows."""

    exit_code = 3


class BackendUnavailableError(AlignTuneError, RuntimeError):
    """The backend cannot run on this machine (no GPU, a package missing); the message says what would help."""

    exit_code = 4


class UnsupportedAlgorithmError(AlignTuneError, ValueError):
    """The backend does not run this algorithm; the message names one that does."""

    exit_code = 5


class CheckpointError(AlignTuneError, RuntimeError):
    """A checkpoint that is missing, unfinished or belongs to another run."""

    exit_code = 6


class NonFiniteError(AlignTuneError, ArithmeticError):
    """A loss, gradient or reward that is NaN or infinite."""

    exit_code = 7


class GpuMemoryError(AlignTuneError, MemoryError):
    """The GPU's memory ran out in a step; the message says where it went and what would lower it by how much."""

    exit_code = 11


class RewardError(AlignTuneError, RuntimeError):
    """A reward function that raised, or returned something other than one number (or None) a completion."""

    exit_code = 8


class ComparisonError(AlignTuneError, RuntimeError):
    """Two arms that cannot be compared: one of them died."""

    exit_code = 10


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice closest in spelling to `name`, or None where none is close."""
    choices = list(choices)
    folded = {choice.lower().replace("-", "_"): choice for choice in choices}
    hits = difflib.get_close_matches(name.lower().replace("-", "_"), list(folded), n=1, cutoff=0.55)
    return folded[hits[0]] if hits else None


def unknown(what: str, name: object, choices: Iterable[str], *, list_all: bool = True) -> str:
    """The sentence for an unknown name: the nearest valid one and, unless there are too many, all of them."""
    choices = sorted(choices)
    text = f"unknown {what} {name!r}"
    close = nearest(str(name), choices)
    if close:
        text += f"; did you mean {close!r}?"
    if list_all or not close:
        text += f" Valid: {', '.join(choices)}." if close else f"; valid: {', '.join(choices)}"
    return text
