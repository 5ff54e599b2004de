"""Progress of long work: a bar with bytes and an ETA on a terminal, a quiet line a phase elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Progress(Protocol):
    """Phases of work, each advanced by bytes."""

    def phase(self, label: str, total: int | None) -> _Phase: ...

    def advance(self, amount: int) -> None: ...


class _Phase(Protocol):
    def __enter__(self) -> object: ...

    def __exit__(self, *args: object) -> bool | None: ...


class _Quiet:
    @contextmanager
    def phase(self, label: str, total: int | None) -> Iterator[None]:
        yield

    def advance(self, amount: int) -> None:
        pass


class _Lines(_Quiet):
    """One line a phase, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @contextmanager
    def phase(self, label: str, total: int | None) -> Iterator[None]:
        start = time.monotonic()
        yield
        size = f" {total / 1e6:.0f} MB" if total else ""
        print(f"{label}:{size} in {time.monotonic() - start:.1f} s", file=self.stream)


class _Bars(_Quiet):
    """A tqdm bar a phase, for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @contextmanager
    def phase(self, label: str, total: int | None) -> Iterator[None]:
        from tqdm import tqdm

        with tqdm(desc=label, total=total, unit="B", unit_scale=True, file=self.stream, leave=False, disable=False) as self._bar:
            yield

    def advance(self, amount: int) -> None:
        self._bar.update(amount)


def quiet() -> Progress:
    """Says nothing."""
    return _Quiet()


def on(stream: TextIO = sys.stderr) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return _Bars(stream) if stream.isatty() else _Lines(stream)
