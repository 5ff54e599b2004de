"""Bytes on the Hub, fetched ahead of their use: a plan says what will be read and in which order, a few threads keep a bounded amount of it in memory.

Reads that follow each other in a file come as one span. A reader whose span is under way waits for it; one whose span nobody has begun
has it fetched at once, whatever the bound, so that nobody can wait for ever. The first failure is everybody's: whoever reads gets it. Where a
plan reads a file whole, its SHA-256 follows the spans, and must be the Hub's.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from ..errors import CheckpointError, Unreachable
from .blob import Blob
from .hub import HubFile
from .ranges import RANGE

THREADS = 8  # requests under way at once
SMALLEST = 1 << 16  # bytes of a span, however little memory there is
Read = tuple[Blob, int, int]  # file, start, length


class _State(Enum):
    PLANNED = auto()
    COMING = auto()
    HERE = auto()
    GONE = auto()  # read to its end, and let go


@dataclass(eq=False)
class _Span:
    """Neighbouring bytes of a file that are fetched by one request."""

    file: HubFile
    start: int
    stop: int
    state: _State = _State.PLANNED
    buffer: memoryview | None = None  # its bytes, and room behind them
    unread: int = 0  # bytes that the plan has not read yet
    readers: int = 0  # that are copying just now
    unhashed: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def data(self) -> memoryview:
        assert self.buffer is not None
        return self.buffer[: self.size]


@dataclass(eq=False)
class _Digest:
    """The SHA-256 of a file up to `position`, and the spans beyond it that came early."""

    position: int
    sha: hashlib._Hash
    early: dict[int, _Span] = field(default_factory=dict)
    busy: bool = False
    known: bool = True  # False once too much came early

    @property
    def pending(self) -> bool:
        """Whether it will go further without another span."""
        return self.busy or self.position in self.early


class Prefetch:
    """Fetches ahead within so many bytes; `begin` a plan, read through `HubFile.read_into`, `finish` it, `close` in the end."""

    def __init__(self, total: int) -> None:
        self.limit = span_limit(total)
        self.slots = self.free = total // self.limit  # spans in memory; each has a buffer, which is used again and again
        self._buffers: list[memoryview] = []
        self.stop = threading.Event()
        self._changed = threading.Condition()
        self._queue: list[_Span] = []  # to be fetched, in the order of the plan
        self._next = 0
        self._spans: dict[HubFile, list[_Span]] = {}  # by their starts
        self._digests: dict[HubFile, _Digest] = {}
        self._failure: Exception | None = None
        self._attached: dict[HubFile, None] = {}
        self._threads: list[threading.Thread] = []

    def begin(self, reads: Iterable[Read]) -> None:
        """What will be read next, in about this order; files that do not lie on the Hub are passed over."""
        queue, spans = plan_spans(reads, self.limit)
        if not queue and not self._spans:
            return
        with self._changed:
            for span in self._queue:  # what a plan before this one did not read in the end
                span.unread, span.unhashed = 0, False
                self._release(span)
            self._queue, self._next, self._spans = queue, 0, spans
            self._digests = {file: _Digest(len(file.head), hashlib.sha256(file.head)) for file, own in spans.items() if _covers(file, own)}
            for span in queue:
                span.unread, span.unhashed = span.size, span.file in self._digests
            self._changed.notify_all()
        for file in spans:
            file.attach(self, self.stop)
            self._attached[file] = None
            if len(file.head) == file.size and not file.verified:
                file.settle(hashlib.sha256(file.head).hexdigest())
        while len(self._threads) < min(THREADS, len(queue)):
            self._threads.append(threading.Thread(target=self._work, name="prefetch", daemon=True))
            self._threads[-1].start()

    def read(self, file: HubFile, buffer: memoryview, offset: int) -> None:
        """Fill the buffer; bytes that are not planned, or were read once already, are fetched on the spot."""
        while buffer:
            span, length = self._span_at(file, offset, len(buffer))
            if span is None:
                file.fetch(buffer[:length], offset)
            else:
                self._take(span, buffer[:length], offset)
            buffer, offset = buffer[length:], offset + length

    def finish(self) -> None:
        """Wait until what was read is hashed. Errors: CheckpointError for a file that is not what the Hub lists."""
        with self._changed:
            self._changed.wait_for(lambda: self.stop.is_set() or not self._hashing)
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Stop at once; nobody waits for answers that are still under way."""
        self.stop.set()
        for file in self._attached:
            file.detach()
        with self._changed:
            self._changed.notify_all()

    @property
    def _over(self) -> bool:
        return self._failure is not None or self.stop.is_set()

    @property
    def _hashing(self) -> bool:
        return any(digest.pending for digest in self._digests.values())

    def _span_of(self, file: HubFile, offset: int) -> _Span:
        """The span that begins there."""
        own = self._spans[file]
        return own[bisect_right(own, offset, key=lambda span: span.start) - 1]

    def _span_at(self, file: HubFile, offset: int, length: int) -> tuple[_Span | None, int]:
        """The span that holds this byte, claimed for the caller where it has not begun; and how much of `length` it or the gap before the next holds."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            own = self._spans.get(file, [])
            index = bisect_right(own, offset, key=lambda span: span.start) - 1
            if index >= 0 and offset < own[index].stop:
                span = own[index]
                return None if span.state is _State.GONE else span, min(length, span.stop - offset)
            following = own[index + 1].start - offset if index + 1 < len(own) else length
            return None, min(length, following)

    def _take(self, span: _Span, buffer: memoryview, offset: int) -> None:
        with self._changed:
            # what is read faster than it is hashed waits for the hash; all else that has not begun is fetched at once
            self._changed.wait_for(lambda: span.state is not _State.PLANNED or self.free > 0 or self._over or not self._hashing)
            if span.state is _State.PLANNED and not self._over:
                self._claim(span)
                threading.Thread(target=self._fetch, args=(span,), name="prefetch", daemon=True).start()  # which nobody waits for after a failure
            self._changed.wait_for(lambda: span.state in (_State.HERE, _State.GONE) or self._over)
            if self._failure is not None:
                raise self._failure
            if self.stop.is_set():
                raise Unreachable(f"{span.file.place}: reading was stopped")
            here = span.state is _State.HERE
            span.readers += here
        if not here:
            span.file.fetch(buffer, offset)  # somebody else has read all of it
            return
        start = offset - span.start
        buffer[:] = span.data[start : start + len(buffer)]
        with self._changed:
            span.readers -= 1
            span.unread -= len(buffer)
            self._release(span)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.stop.is_set() or self._may_begin())
                if self.stop.is_set():
                    return
                span = self._queue[self._next]
                self._claim(span)
            self._fetch(span)

    def _may_begin(self) -> bool:
        while self._next < len(self._queue) and self._queue[self._next].state is not _State.PLANNED:
            self._next += 1
        return self._next < len(self._queue) and self.free > 0

    def _claim(self, span: _Span) -> None:
        span.state = _State.COMING
        self.free -= 1

    def _fetch(self, span: _Span) -> None:
        with self._changed:
            span.buffer = self._buffers.pop() if self._buffers else None
        if span.buffer is None:
            span.buffer = np.empty(self.limit, np.uint8).data
        try:
            span.file.fetch(span.data, span.start)
        except Exception as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
            return
        with self._changed:
            span.state = _State.HERE
            digest = self._digests.get(span.file) if span.unhashed else None
            if digest is not None:
                digest.early[span.start] = span
                if len(digest.early) > self.slots and self._span_of(span.file, digest.position).state is _State.PLANNED:  # they come in another order
                    self._forget(span.file)
                    digest = None
            self._release(span)
            self._changed.notify_all()
        if digest is not None:
            self._hash(span.file, digest)

    def _hash(self, file: HubFile, digest: _Digest) -> None:
        """Hash what is next, unless another thread is at it."""
        with self._changed:
            if digest.busy:
                return
            digest.busy = True
        while True:
            with self._changed:
                span = digest.early.pop(digest.position, None)
                if span is None:
                    self._settle(file, digest)
                    digest.busy = False
                    self._changed.notify_all()
                    return
                data = span.data
            digest.sha.update(data)
            with self._changed:
                digest.position = span.stop
                span.unhashed = False
                self._release(span)

    def _settle(self, file: HubFile, digest: _Digest) -> None:
        try:
            if digest.known and digest.position == file.size:
                file.settle(digest.sha.hexdigest())
        except CheckpointError as error:
            self._failure = self._failure or error

    def _forget(self, file: HubFile) -> None:
        digest = self._digests.pop(file)
        digest.known = False
        digest.early.clear()
        for span in self._spans[file]:
            span.unhashed = False
            self._release(span)

    def _release(self, span: _Span) -> None:
        """Let it go once everybody is done with it."""
        if span.state is _State.HERE and span.unread <= 0 and not span.unhashed and not span.readers:
            span.state = _State.GONE
            self.free += 1
            if span.buffer is not None and len(self._buffers) < self.slots:
                self._buffers.append(span.buffer)
            span.buffer = None
            self._changed.notify_all()


def span_limit(total: int) -> int:
    """Bytes of one span at most, where so many may be in memory."""
    return max(SMALLEST, min(RANGE, total // THREADS))


def plan_spans(reads: Iterable[Read], limit: int) -> tuple[list[_Span], dict[HubFile, list[_Span]]]:
    """The spans of these reads in their order, and those of each file by their starts: neighbours joined up to the limit, nothing twice."""
    queue: list[_Span] = []
    of_file: dict[HubFile, list[_Span]] = {}
    latest: dict[HubFile, _Span] = {}
    for file, start, length in reads:
        if not isinstance(file, HubFile):
            continue
        own = of_file.setdefault(file, [])
        at, stop = max(start, len(file.head)), start + length
        while at < stop:
            index = bisect_right(own, at, key=lambda span: span.start) - 1
            before = own[index] if index >= 0 else None
            if before is not None and before.stop > at:
                at = before.stop
                continue
            end = min(stop, own[index + 1].start) if index + 1 < len(own) else stop
            if before is not None and before is latest.get(file) and before.stop == at and before.size < limit:
                before.stop = at = min(end, before.start + limit)
                continue
            latest[file] = _Span(file, at, min(end, at + limit))
            insort(own, latest[file], key=lambda span: span.start)
            queue.append(latest[file])
            at = latest[file].stop
    return queue, of_file


def _covers(file: HubFile, spans: list[_Span]) -> bool:
    """Whether these spans are what remains to be verified of a file: all that comes after its head."""
    if file.verified or not spans:
        return False
    at = len(file.head)
    for span in spans:
        if span.start != at:
            return False
        at = span.stop
    return at == file.size
