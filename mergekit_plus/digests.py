"""SHA-256 of files, computed in the background from the moment they are first heard of.

Hashing reads a file from end to end, so it also brings the file into the page cache for whoever reads it next. No torch here: the program starts
hashing its inputs before it imports anything heavy.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

BLOCK = 1 << 20  # bytes read and hashed at once: they stay in a core's cache in between

Key = tuple[int, int, int, int]  # device, inode, size, time of the last change


class Digests:
    """Hashes files in daemon threads; `of` answers with a future. A file that changed since is another file."""

    def __init__(self) -> None:
        self._known: dict[Key, Future[str]] = {}
        self._waiting: queue.SimpleQueue[tuple[int, Future[str]] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max(1, len(os.sched_getaffinity(0)) // 2))]
        for thread in self._threads:
            thread.start()

    def start(self, path: Path) -> None:
        """Begin to hash a file that will be wanted; one that cannot be opened is left to whoever wants it."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        self.of(fd)
        os.close(fd)

    def of(self, fd: int) -> Future[str]:
        """The SHA-256 of an open file, as hexadecimal digits."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in self._known:
            self._known[key] = Future()
            self._waiting.put((os.dup(fd), self._known[key]))
        return self._known[key]

    def stop(self) -> None:
        """Give up and let the threads go; futures that are not done yet are cancelled."""
        self._stopped.set()
        for _ in self._threads:
            self._waiting.put(None)

    def _work(self) -> None:
        while (task := self._waiting.get()) is not None:
            fd, future = task
            try:
                digest = sha256(fd, self._stopped.is_set)
                if digest is None:
                    future.cancel()
                else:
                    future.set_result(digest)
            except Exception as error:  # whoever waits for the future must hear of it
                future.set_exception(error)
            finally:
                os.close(fd)


def sha256(fd: int, stop: Callable[[], bool] = lambda: False) -> str | None:
    """The SHA-256 of an open file, or None once `stop` says so."""
    sha, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    position = 0
    while got := os.preadv(fd, [buffer], position):
        if stop():
            return None
        sha.update(buffer[:got])
        position += got
    return sha.hexdigest()
