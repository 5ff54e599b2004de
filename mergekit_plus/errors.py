"""What can go wrong, as a tree: every error says what, where, and what to do, in one line.

    CompressError            the user's to mend; one line on stderr, exit code 2
      CheckpointError        a file or folder that cannot be read as a checkpoint, or inputs that do not fit together
        ReadError            an input that could not be read this time: the disk or the network failed; trying again may help
          Unreachable        the Hub, or a file on it, cannot be had just now
      OptionError            a value, a name or a combination of options that cannot be
      RecipeError            a recipe file; holds every problem found, not the first
      OutputError            the output exists, or cannot be written
    CheckFailed              a check of a recipe failed; exit code 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence


class CompressError(Exception):
    """A mistake the user can mend; its text is shown as it is, without a traceback."""


class CheckpointError(CompressError):
    """A checkpoint that cannot be read, or checkpoints that do not fit together."""


class ReadError(CheckpointError):
    """An input that could not be read this time, through no fault of its own."""


class Unreachable(ReadError):
    """The Hub cannot be reached, or refuses what it gave before."""


class OptionError(CompressError):
    """A value, a name or a combination of options that cannot be."""


class RecipeError(CompressError):
    """Every problem of a recipe at once, one a line."""


class OutputError(CompressError):
    """The output exists already, or cannot be written."""


class CheckFailed(Exception):
    """A check of a recipe measured something outside its bound."""


SHOWN = 30  # names in one line; every registry fits, the tensors of a model do not


def closest(name: str, names: Sequence[str]) -> str | None:
    """The closest of `names`, in any case; None where none is close."""
    in_lower = {one.lower(): one for one in reversed(names)}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    close = close or [in_lower[one] for one in difflib.get_close_matches(name.lower(), in_lower, n=1, cutoff=0.6)]
    return close[0] if close else None


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `names` in any case, or all of them (the first few of many) where none is close."""
    known = list(names)
    if close := closest(name, known):
        return f" Did you mean '{close}'?"
    more = f", and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f" Known: {', '.join(known[:SHOWN])}{more}." if known else ""


def not_inputs(names: Iterable[str], inputs: Iterable[str]) -> Iterator[str]:
    """A sentence for each of these names that is not an input."""
    known = list(inputs)
    return (f"'{name}' is not an input.{nearest(name, known)}" for name in names if name not in known)


def printable(text: str) -> str:
    """One line without control characters: names and messages out of a file must not steer a terminal or look like lines of their own."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text)
