"""Output files: which tensor goes where, and a file that is written in any order while its SHA-256 follows behind."""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, uint8

from ..errors import OptionError
from .folder import SINGLE
from .safetensors import encode_header, file_order
from .spec import TensorSpec, natural_order

READ_BACK = 4 << 20  # bytes hashed at once
CHECKPOINT = 256 << 20  # bytes of a file after which they are put on the disk and may be told of


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name, its header, where each tensor begins, and its size in bytes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


def plan_shards(specs: Iterable[TensorSpec], max_shard_size: int, single: str = "") -> list[Shard]:
    """Lay tensors out in files of at most `max_shard_size` bytes, in natural order of their names.

    One file if all fit, or if `single` names it.

    The layout depends on names, dtypes and shapes alone, never on how the inputs were sharded.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in sorted(specs, key=lambda spec: natural_order(spec.name)):
        if groups[-1] and filled + spec.nbytes > max_shard_size and not single:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    count = len(groups)
    names = [single or SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    shards = []
    for name, group in zip(names, groups, strict=True):
        header, offsets = encode_header(file_order(group))
        shards.append(Shard(name, header, offsets, len(header) + sum(spec.nbytes for spec in group)))
    return shards


def index_json(shards: list[Shard]) -> dict[str, object]:
    """`model.safetensors.index.json` of these shards."""
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(shard.size - len(shard.header) for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in sorted(weight_map)}}


Finished = Callable[[int, str], None]  # the file's first bytes, so many, are on the disk and have this SHA-256


class Abandoned(RuntimeError):
    """A file that will not be written to the end, because something else went wrong."""


class ShardFile:
    """A file being written at any place by any thread; `digest` follows the part that is complete from the start.

    prefix: how many bytes an interrupted save has finished, and their hash; the file is then there already.
    """

    def __init__(self, folder: Path, shard: Shard, prefix: tuple[int, hashlib._Hash] | None = None) -> None:
        self.shard = shard
        self.path = folder / shard.name
        self.finished, self._sha = prefix or (0, hashlib.sha256())
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | (0 if prefix else os.O_CREAT | os.O_EXCL), 0o666)
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        self._changed = threading.Condition()
        self._complete = self.finished  # bytes written without a gap from the start
        self._ahead: list[tuple[int, int]] = []  # written runs that begin beyond it
        self._abandoned = self._elsewhere = False
        if shard.size:
            os.posix_fallocate(self.fd, 0, shard.size)
        self._put(memoryview(shard.header), 0)

    def write(self, tensor: Tensor, name: str, at: int = 0) -> None:
        """Put a tensor's bytes `at` bytes into the place of the tensor `name`."""
        self.put(raw_bytes(tensor), name, at)

    def put(self, data: memoryview, name: str, at: int) -> None:
        """Put bytes `at` bytes into the place of the tensor `name`."""
        self._put(data, self.shard.offsets[name] + at)

    def was_put(self, name: str, at: int, length: int) -> None:
        """So many bytes there have been written, by another process that has closed the file since."""
        self._elsewhere = True
        self._note(self.shard.offsets[name] + at, length)

    def _put(self, data: memoryview, offset: int) -> None:
        write_at(self.fd, data, offset)
        self._note(offset, len(data))

    def _note(self, offset: int, length: int) -> None:
        with self._changed:
            heapq.heappush(self._ahead, (offset, offset + length))
            while self._ahead and self._ahead[0][0] <= self._complete:
                self._complete = max(self._complete, heapq.heappop(self._ahead)[1])
            self._changed.notify()

    def digest(self, tell: Finished | None = None) -> str:
        """The SHA-256 of the whole file, read back behind the writers; the file is on the disk when this returns.

        tell: is told now and then how far the file is on the disk.
        Errors: Abandoned when the writers gave up.
        """
        sha = self._sha
        buffer = memoryview(bytearray(READ_BACK))
        position = told = self.finished
        while position < self.shard.size:
            with self._changed:
                while not self._abandoned and self._complete < min(position + READ_BACK, self.shard.size):
                    self._changed.wait()
                if self._abandoned:
                    raise Abandoned(f"{self.path.name} was not written to the end")
            got = self._read_back(buffer, position)
            sha.update(buffer[:got])
            position += got
            if tell and position - told >= CHECKPOINT and position < self.shard.size:
                os.fsync(self.fd)
                tell(position, sha.hexdigest())
                told = position
        if told < self.shard.size or not self.shard.size:
            os.fsync(self.fd)
            if tell:
                tell(position, sha.hexdigest())
        return sha.hexdigest()

    def _read_back(self, buffer: memoryview, position: int) -> int:
        # what another machine wrote and closed is seen by whoever opens the file after that: network file systems promise no more
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC) if self._elsewhere else self.fd
        try:
            got = os.preadv(fd, [buffer], position)
            os.posix_fadvise(fd, position, got, os.POSIX_FADV_DONTNEED)  # starts writing back what is still dirty
            return got
        finally:
            if fd != self.fd:
                os.close(fd)

    def abandon(self) -> None:
        """Let a waiting `digest` go; the file will not be finished."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def close(self) -> None:
        """Close the file."""
        self._finalizer()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as a file has them."""
    return memoryview(tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(uint8).numpy().data if tensor.numel() else b"")


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of it at this byte of a file."""
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def known_prefix(path: Path, length: int, digest: str, advance: Callable[[int], None]) -> tuple[int, hashlib._Hash] | None:
    """The hash of a file's first `length` bytes, where the file is there and they have this SHA-256."""
    sha, buffer, position = hashlib.sha256(), memoryview(bytearray(READ_BACK)), 0
    try:
        with path.open("rb", buffering=0) as stream:
            while position < length and (got := stream.readinto(buffer[: length - position])):
                sha.update(buffer[:got])
                position += got
                advance(got)
    except OSError:
        return None
    return (length, sha) if sha.hexdigest() == digest else None


_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes from "5GB", "512MiB", "2e9" or a number.

    Errors: OptionError.
    """
    digits = str(text).strip().lower()
    unit = digits.lstrip("0123456789.+-")
    if unit.startswith("e"):  # an exponent, "2e9", not a unit
        unit = unit[1:].lstrip("0123456789+")
    number = digits[: len(digits) - len(unit)] if unit else digits
    try:
        size = float(number) * _UNITS[unit.strip()]
    except (ValueError, KeyError):
        raise OptionError(f"'{text}' is not a size; write 5GB, 512MiB or a number of bytes") from None
    if not 1 <= size < 1 << 62:
        raise OptionError(f"a size must be positive (and below 4 EiB), not '{text}'")
    return int(size)
