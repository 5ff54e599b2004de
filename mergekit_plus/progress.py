"""Progress of long work: a bar with bytes and an ETA on a terminal, a quiet line a phase elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

SHORT = 1.0  # seconds; a phase that took less is not worth a line in a log


class Progress(Protocol):
    """Phases of work, each advanced by bytes (or by what `unit` says), from what is `done` already."""

    def phase(self, label: str, total: int | None, unit: str = "B", done: int = 0) -> AbstractContextManager[None]: ...

    def advance(self, amount: int) -> None: ...

    def say(self, text: str) -> None:
        """What stands beside the bar: a loss, a name."""
        ...

    def tell(self, line: str) -> None:
        """A line that stays."""
        ...


class _Quiet:
    @contextmanager
    def phase(self, label: str, total: int | None, unit: str = "B", done: int = 0) -> Iterator[None]:
        yield

    def advance(self, amount: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def tell(self, line: str) -> None:
        pass


class _Lines(_Quiet):
    """One line a phase, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.said = stream, ""

    @contextmanager
    def phase(self, label: str, total: int | None, unit: str = "B", done: int = 0) -> Iterator[None]:
        start, self.said = time.monotonic(), ""
        yield
        seconds = time.monotonic() - start
        size = "" if not total else f" {(total - done) / 1e6:.0f} MB" if unit == "B" else f" {total - done}{unit}"
        if seconds >= SHORT:
            print(f"{label}{size and f':{size}'} in {seconds:.1f} s{self.said and f', {self.said}'}", file=self.stream)

    def say(self, text: str) -> None:
        self.said = text

    def tell(self, line: str) -> None:
        print(line, file=self.stream)


class _Bars(_Quiet):
    """A tqdm bar a phase, for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @contextmanager
    def phase(self, label: str, total: int | None, unit: str = "B", done: int = 0) -> Iterator[None]:
        from tqdm import tqdm

        with tqdm(desc=label, total=total, initial=done, unit=unit, unit_scale=True, file=self.stream, leave=False) as self._bar:
            yield

    def advance(self, amount: int) -> None:
        self._bar.update(amount)

    def say(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def tell(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=self.stream)


def quiet() -> Progress:
    """Says nothing."""
    return _Quiet()


def on(stream: TextIO | None = None) -> Progress:
    """Bars on a terminal, lines elsewhere; on stderr by default."""
    stream = stream or sys.stderr
    return _Bars(stream) if stream.isatty() else _Lines(stream)
