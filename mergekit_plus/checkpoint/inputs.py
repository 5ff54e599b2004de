"""The files that a checkpoint comes from: found through its plan, hashed, watched for changes, and never written over."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ..errors import OutputError, ReadError
from .blob import Blob, File
from .checkpoint import Checkpoint
from .folder import ADAPTER, INDEX, PACKED, SINGLE
from .hub import HubFile
from .layout import file_inputs, is_file


def input_files(checkpoint: Checkpoint) -> dict[str, list[Blob]]:
    """The files behind a checkpoint, under the reference of the input that they belong to: those that its tensors are read from, as they are
    open now, and the small ones."""
    found: dict[str, dict[str, Blob]] = {}
    for part, source in file_inputs(checkpoint):
        files = found.setdefault(part.ref, {})
        files.update({blob.place: blob for blob, _ in source.places.values()})
        for small in part.files.values():
            if isinstance(small, HubFile):
                files[small.place] = small
            elif isinstance(small, Path) and str(small) not in files:
                files[str(small)] = File(small)
    return {ref: [files[place] for place in sorted(files)] for ref, files in found.items()}


def _local_paths(checkpoint: Checkpoint) -> Iterator[Path]:
    for part, source in file_inputs(checkpoint):
        yield from (blob.path for blob, _ in source.places.values() if isinstance(blob, File))
        yield from (small for small in part.files.values() if isinstance(small, Path))


def digest_of(blob: Blob, future: Future[str]) -> dict[str, Any]:
    """What the manifest says of an input."""
    try:
        return blob.facts(future.result())
    except OSError as error:
        raise ReadError(f"{blob.place} cannot be read to its end: {error.strerror}") from None


def check_target(out: Path, overwrite: bool, checkpoint: Checkpoint) -> None:
    """Refuse an output that exists (unless it may be replaced and is nothing but a model), or that is an input or holds one.

    Errors: OutputError.
    """
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist")
    # the Hub's cache links to blobs
    inputs = {place for path in _local_paths(checkpoint) for place in (path.resolve(), path.parent.resolve() / path.name)}
    resolved = out.resolve()
    if any(resolved in (path, *path.parents) for path in inputs):
        raise OutputError(f"{out} is one of the inputs, or holds one; write somewhere else with -o")
    if not out.exists():
        return
    if is_file(out) != out.is_file():
        raise OutputError(f"{out} is a {'file' if out.is_file() else 'folder'}; an output is a folder, or a file that ends in .safetensors")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists already; name another output with -o, or replace it with --overwrite")
    if out.is_dir() and not any((out / name).is_file() for name in (SINGLE, INDEX, ADAPTER, *PACKED)):
        raise OutputError(f"{out} is a folder without a model in it; --overwrite replaces models only")
    if out.is_dir() and (inner := next((path.name for path in out.iterdir() if path.is_dir()), None)):
        raise OutputError(f"{out} holds the folder {inner}, which --overwrite would delete; move it away, or name another output with -o")
