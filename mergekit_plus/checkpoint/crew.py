"""Units of a save computed in other processes, on other machines too.

The one that saves plans, measures, journals, hashes and publishes. A `Member` makes the plan again from where the inputs lie, refuses to go on where
that is another plan, and puts what it computes into the staged files where it sees these; else it hands the bytes back. A unit may be computed
twice, by one that was killed and by one that takes its place: the bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .layout import Layout, SaveOptions, file_inputs, plan_save
from .shards import Shard, raw_bytes, write_at
from .units import Sink, write_unit

Piece = tuple[str, int, memoryview]  # bytes that begin so many bytes into the place of this tensor
Finished = Generator[tuple[Sequence[int], Sequence[Piece]]]  # batches, and what of them is still to be written


@dataclass(frozen=True)
class Errand:
    """What a member must know of a save, beside the checkpoint."""

    out: Path
    options: SaveOptions  # with the memory and workers of the plan
    plan: str  # its `plan_digest`
    folder: Path  # where the files are staged
    inodes: Mapping[str, int]  # of these files: a file of the same name on another machine's disk is another one
    made: Sequence[Any]  # what was measured and computed before, in the order of `Layout.before`
    memory: int  # bytes that a batch takes at most: one unit, and the results where they are handed back


class Crew(Protocol):
    """Those who compute the units of a save."""

    def compute(self, errand: Errand, batches: Sequence[Sequence[int]], stop: threading.Event) -> Finished:
        """Each batch (the numbers of its units) as it is finished, in any order, and what could not be written where it was computed. Ends early once
        `stop` is set. Errors: what a unit raises, as it is."""
        ...


class Member:
    """One who computes units: the plan made again. Errors: CheckpointError where it is not the plan of the errand."""

    def __init__(self, checkpoint: Checkpoint, errand: Errand) -> None:
        layout = plan_save(checkpoint, errand.out, errand.options)
        if plan_digest(checkpoint, layout) != errand.plan:
            raise CheckpointError(
                f"{checkpoint.label}: a worker sees other inputs or runs another version than the one that saves; "
                "give all nodes the same mergekit-plus and torch, and let nothing write to the inputs"
            )
        for each, made in zip(layout.before, errand.made, strict=True):
            each.adopt(made)
        self.units, self.errand = layout.units, errand
        self.shard_of = {name: shard for shard in layout.shards for name in shard.offsets}

    def compute(self, numbers: Sequence[int]) -> list[Piece]:
        """Compute these units; what is handed back could not be written here."""
        shards = {id(shard): shard for number in numbers for spec in self.units[number][0].writes for shard in [self.shard_of[spec.name]]}
        fds: list[int] = []
        back = _Back()
        try:
            sinks: dict[int, Sink] = {}
            for key, shard in shards.items():
                fd = self._open(shard)
                sinks[key] = back if fd is None else _Staged(fd, shard)
                fds += [] if fd is None else [fd]
            where = {spec.name: sinks[id(self.shard_of[spec.name])] for number in numbers for spec in self.units[number][0].writes}
            for number in numbers:
                write_unit(*self.units[number], where, self.errand.options)
        finally:
            for fd in fds:
                os.close(fd)
        return back.pieces

    def _open(self, shard: Shard) -> int | None:
        """The staged file, where it is the one that the save has made: not where this machine sees another file, or none."""
        try:
            fd = os.open(self.errand.folder / shard.name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        status = os.fstat(fd)
        if (status.st_ino, status.st_size) == (self.errand.inodes[shard.name], shard.size):
            return fd
        os.close(fd)
        return None


@dataclass(frozen=True)
class _Staged:
    """A staged file, seen by the member."""

    fd: int
    shard: Shard

    def write(self, tensor: Tensor, name: str, at: int = 0) -> None:
        write_at(self.fd, raw_bytes(tensor), self.shard.offsets[name] + at)


@dataclass(frozen=True)
class _Back:
    """What is handed back, in place of a file."""

    pieces: list[Piece] = field(default_factory=list)

    def write(self, tensor: Tensor, name: str, at: int = 0) -> None:
        self.pieces.append((name, at, raw_bytes(tensor)))


def plan_digest(checkpoint: Checkpoint, layout: Layout) -> str:
    """What is the same wherever the same plan is made of the same inputs by the same program."""
    from .. import __version__

    blobs = [blob for _, source in file_inputs(checkpoint) for blob in dict.fromkeys(blob for blob, _ in source.places.values())]
    parts = [
        __version__,
        torch.__version__,
        [blob.identity for blob in blobs],
        [hashlib.sha256(shard.header).hexdigest() for shard in layout.shards],
        [[step.writes[0].name, *((rows.start, rows.stop) if rows is not None else ())] for step, rows in layout.units],
        [type(each).__name__ for each in layout.before],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
