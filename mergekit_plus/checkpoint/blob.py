"""A file that bytes are read from by position, wherever it lies: `File` on a disk, `HubFile` (in `hub`) in a repository on the Hub."""

from __future__ import annotations

import os
import stat
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from ..digests import Digests
from ..errors import CheckpointError, ReadError

MAX_SMALL = 256 << 20  # bytes of a tokenizer and the like; the largest are a seventh of that


class Blob(Protocol):
    """Bytes that do not change, read by position."""

    @property
    def name(self) -> str:
        """Its name in its folder: what indexes and manifests call it."""
        ...

    @property
    def place(self) -> str:
        """Where it lies, as errors say it."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def identity(self) -> str:
        """What tells it from a file of the same name with other contents."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from this offset. Errors: CheckpointError where that cannot be."""
        ...

    def check_unchanged(self) -> None:
        """Refuse a file that is another one than when it was opened. Errors: CheckpointError."""
        ...

    def digest(self, digests: Digests) -> Future[str]:
        """The SHA-256 of the whole, as hexadecimal digits."""
        ...

    def facts(self, sha256: str) -> dict[str, Any]:
        """What a manifest says of it once everything is read. Errors: CheckpointError for a file that is not what it must be."""
        ...


class File:
    """A regular file open for positional reads; closed when nobody refers to it any more. `sha256`: what it must be, where that is known."""

    def __init__(self, path: Path, sha256: str = "") -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        self.path, self.name, self.place, self._sha256 = path, path.name, str(path), sha256
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        self.size = status.st_size
        self._seen = (status.st_size, status.st_mtime_ns)

    @property
    def identity(self) -> str:
        return f"{self._seen[0]} bytes, written to at {self._seen[1]}"

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise ReadError(f"{self.path} cannot be read at byte {offset + done}: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(f"{self.path} ended at byte {offset + done} while it was being read: is it still being written?")
            done += got

    def check_unchanged(self) -> None:
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != self._seen:
            raise CheckpointError(f"{self.path} changed while it was being read; run again when nothing writes to it")

    def digest(self, digests: Digests) -> Future[str]:
        return digests.of(self.fd)

    def facts(self, sha256: str) -> dict[str, Any]:
        if self._sha256 not in ("", sha256):
            raise CheckpointError(f"{self.path} is not the file that the Hub lists (its SHA-256 differs); delete it, and run again")
        return {"bytes": self.size, "sha256": sha256}


def check_small(place: str, size: int) -> None:
    """Refuse to read a file whole that is too large for what it should be.

    Errors: CheckpointError.
    """
    if size > MAX_SMALL:
        raise CheckpointError(f"{place} is {size} bytes long; at most {MAX_SMALL} of a file beside the weights are read")
