"""The one noun: a checkpoint is a set of named tensors that are read one at a time, and the result of an operation is one too.

`Checkpoint` = a label, a `TensorSource`, and the small files (config.json, tokenizer) that travel with the tensors. A source is a set
of files (`FileSource`), tensors in memory (`TensorTable`), or a `Plan`: steps that compute tensors from other checkpoints when they
are asked for. Nothing in a plan is computed before it is read, so operations compose without a file in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, nearest
from .blob import Blob
from .dtypes import TAGS, TORCH_DTYPES
from .spec import TensorSpec

MAX_CONFIG = 16 << 20  # bytes of a config.json

Rows = slice  # start and stop always set


class SmallFile(Protocol):
    """A file that is read whole: a Path, or a file on the Hub."""

    def read_bytes(self) -> bytes: ...


class TensorSource(Protocol):
    """Where tensors come from."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """What there is."""
        ...

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """The tensor, or these rows of it; raw bytes (uint8) for a dtype that torch cannot hold."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Named tensors and the small files beside them. `files` maps a name to its bytes or to where they lie."""

    label: str
    source: TensorSource
    files: Mapping[str, bytes | SmallFile] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what whoever made it should know
    pinned: str = ""  # the reference that opens exactly this again, where the label may not: a repository at its commit

    def __post_init__(self) -> None:
        for name in self.files:
            if "/" in name or name in ("", ".", "..") or not name.isprintable():  # it is written under that name
                raise CheckpointError(f"{self.label}: {name!r} is not the name of a file beside the weights")

    @classmethod
    def open(cls, ref: str | Path, cache: bool = False) -> Checkpoint:
        """Open a `.safetensors` file, a model folder, or `org/name[@revision]` on the Hub; reads headers only. `model+adapter` is a model with a
        PEFT adapter applied.

        A repository on the Hub is read by range requests, or, with `cache`, brought into the local Hub cache first.
        Errors: CheckpointError saying what is missing or malformed, and where; Unreachable where the Hub cannot be read.
        """
        from .folder import open_checkpoint

        return open_checkpoint(ref, cache)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], label: str = "memory") -> Checkpoint:
        """A checkpoint of tensors in memory."""
        return cls(label, TensorTable(tensors))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, before its bytes are read."""
        return self.source.specs

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, empty where there is none."""
        return self.json_file("config.json", MAX_CONFIG)

    @property
    def ref(self) -> str:
        """What manifests and recipes call it."""
        return self.pinned or self.label

    def file(self, name: str) -> bytes:
        """The bytes of a small file."""
        content = self.files[name]
        try:
            return content if isinstance(content, bytes) else content.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.label}: {name} cannot be read any more: {error.strerror}") from None

    def json_file(self, name: str, most: int | None = None) -> dict[str, Any]:
        """The table in a small file of JSON, of at most so many bytes; empty where there is none.

        Errors: CheckpointError where it is no JSON table.
        """
        if name not in self.files:
            return {}
        try:
            raw = self.file(name)
            if most is not None and len(raw) > most:
                raise ValueError(f"it is longer than {most} bytes")
            parsed = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.label}: {name} is not JSON that can be read ({error})") from None
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{self.label}: {name} is not a JSON object")
        return parsed

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """A tensor, or these rows of it."""
        if name not in self.specs:
            raise CheckpointError(f"{self.label} has no tensor '{name}'.{nearest(name, self.specs)}")
        return self.source.read(name, rows)

    def with_config(self, **changes: Any) -> Checkpoint:
        """The same tensors under a changed config.json; None removes a key; nothing where there is no config.json."""
        if "config.json" not in self.files:
            return self
        config = {name: value for name, value in {**self.config, **changes}.items() if value is not None or name not in changes}
        return replace(self, files={**self.files, "config.json": json.dumps(config, indent=2).encode() + b"\n"})


@dataclass(frozen=True, eq=False)
class FileSource:
    """Tensors in safetensors files. `places` says in which file, and at which byte."""

    specs: Mapping[str, TensorSpec]
    places: Mapping[str, tuple[Blob, int]]

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        spec, (file, offset) = self.specs[name], self.places[name]
        shape, nbytes = spec.slice_shape(rows), spec.nbytes
        if rows is not None:
            offset, nbytes = offset + rows.start * spec.row_bytes, (rows.stop - rows.start) * spec.row_bytes
        raw = torch.empty(nbytes, dtype=torch.uint8)
        file.read_into(raw.numpy().data, offset)
        if spec.dtype not in TORCH_DTYPES:
            return raw
        return raw.view(TORCH_DTYPES[spec.dtype]).view(shape)


class TensorTable:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, TAGS[tensor.dtype], tuple(tensor.shape)) for name, tensor in self.tensors.items()
        }

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        return rows_of(self.tensors[name], self.specs[name], rows)


def rows_of(tensor: Tensor, spec: TensorSpec, rows: Rows | None) -> Tensor:
    """These rows of a whole tensor; of its raw bytes where torch cannot hold its dtype."""
    if rows is None or not spec.shape:
        return tensor
    if spec.dtype not in TORCH_DTYPES:
        return tensor[rows.start * spec.row_bytes : rows.stop * spec.row_bytes]
    return tensor[rows]
