"""What an interrupted save has finished: one checked line of JSON on the disk for each thing that need not be done again.

A line is the first 16 hexadecimal digits of its SHA-256 and the record. It is written after what it tells of is on the disk, and is on the disk
itself before anyone relies on it. A line that is torn or wrong ends the journal: what it and all later ones told of is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Done:
    """What a journal tells: whose it is, and what that job has finished."""

    job: dict[str, str] = field(default_factory=dict)  # the parts of its fingerprint
    total: int = 0  # bytes of all shards
    shards: dict[str, tuple[int, str]] = field(default_factory=dict)  # how many bytes from the start are on the disk, and their SHA-256
    statistics: dict[str, Any] = field(default_factory=dict)
    work: dict[str, str] = field(default_factory=dict)  # SHA-256 of finished files of long computations
    inputs: dict[str, str] = field(default_factory=dict)  # SHA-256 of input files
    publishing: bool = False  # everything is on the disk; the renames may have begun

    @property
    def worth_keeping(self) -> bool:
        """Whether it holds work: the digests of inputs alone are had again by reading them."""
        return bool(self.shards or self.statistics or self.work)

    @property
    def amount(self) -> str:
        """How far it got: "3.1 of 20.0 GB"."""
        unit, name = next((unit, name) for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes")) if self.total >= unit or unit == 1)
        written = sum(position for position, _ in self.shards.values())
        if not written:
            before = f"{sum(name.endswith('.safetensors') for name in self.work)} parts of the computation" if self.work else "the measurements"
            return f"{before}, and 0 of {self.total / unit:.1f} {name}"
        return f"{written / unit:.1f} of {self.total / unit:.1f} {name}"

    def note(self, record: Mapping[str, Any]) -> None:
        """Take in one record; one of an unknown kind is passed over."""
        match record:
            case {"job": job, "total": total}:
                self.job, self.total = job, total
            case {"shard": name, "bytes": position, "sha256": digest}:
                self.shards[name] = (position, digest)
            case {"statistic": key, "value": value}:
                self.statistics[key] = value
            case {"work": name, "sha256": digest}:
                self.work[name] = digest
            case {"input": name, "sha256": digest}:
                self.inputs[name] = digest
            case {"publishing": True}:
                self.publishing = True

    def records(self) -> Iterator[dict[str, Any]]:
        """The records that tell this much."""
        yield {"job": self.job, "total": self.total}
        yield from ({"input": name, "sha256": digest} for name, digest in self.inputs.items())
        yield from ({"statistic": key, "value": value} for key, value in self.statistics.items())
        yield from ({"work": name, "sha256": digest} for name, digest in self.work.items())
        yield from ({"shard": name, "bytes": position, "sha256": digest} for name, (position, digest) in self.shards.items())
        if self.publishing:
            yield {"publishing": True}


def read(path: Path) -> Done:
    """What a journal tells, up to its first torn line; nothing where there is none."""
    done = Done()
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return done
    for line in lines:
        checksum, _, content = line.partition(b" ")
        if checksum != _checksum(content):
            break
        done.note(json.loads(content))
    return done


class Journal:
    """A journal being written; after an error of the disk it takes no further record, and says so with the same error."""

    def __init__(self, path: Path, done: Done) -> None:
        """Begin with what is done already. The file is written anew: nothing is appended to a torn line, or to one that may not be on the disk."""
        self.done = done
        self._lock = threading.Lock()
        self._error: OSError | None = None
        new = path.with_suffix(".new")
        self._fd: int | None = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._append(b"".join(map(_line, done.records())))
            os.replace(new, path)
            sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def add(self, **record: Any) -> None:
        """Write a record; it is on the disk when this returns."""
        with self._lock:
            if self._error is not None:
                raise self._error  # what the kernel could not write it may have forgotten: a second fsync would lie
            if self._fd is None:
                return  # the save is over: what this is about will be done again
            try:
                self._append(_line(record))
            except OSError as error:
                self._error = error
                raise
            self.done.note(record)

    def close(self) -> None:
        """No further records."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _append(self, data: bytes) -> None:
        assert self._fd is not None
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _line(record: Mapping[str, Any]) -> bytes:
    content = json.dumps(record).encode()  # a float comes back as the same float; NaN and infinities too
    return _checksum(content) + b" " + content + b"\n"


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode()
