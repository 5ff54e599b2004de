"""The small files of an output: those that travel with the tensors, those that describe it, and last the manifest that vouches for all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .blob import Blob, File
from .folder import INDEX
from .journal import sync_folder
from .layout import Layout, is_file, manifest_name
from .shards import index_json
from .stage import Stage


@dataclass(frozen=True)
class Manifest:
    """What was written and what it was made of: SHA-256 and size of every file, and the folders of the inputs, seen from the output's."""

    outputs: dict[str, dict[str, Any]]
    inputs: dict[str, dict[str, dict[str, Any]]]
    places: dict[str, str] = field(default_factory=dict)  # of inputs on a disk

    def as_json(self) -> dict[str, Any]:
        from .. import __version__

        return {"tool": f"mergekit-plus {__version__}", "inputs": self.inputs, "places": self.places, "outputs": self.outputs}


Describe = Callable[[Manifest, Path], Mapping[str, bytes]]  # further small files, once the digests are known and everything else is in that folder


def input_facts(inputs: Mapping[str, Sequence[Blob]], found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The inputs as the manifest lists them; a small file on the Hub whose digest nobody knows, because it was not read, is none."""
    return {ref: {blob.name: found[blob.place] for blob in files if found[blob.place]["sha256"]} for ref, files in inputs.items()}


def input_places(inputs: Mapping[str, Sequence[Blob]], out: Path) -> dict[str, str]:
    """Where each input on a disk lies, seen from the output's folder."""
    folders = {ref: blob.path.absolute().parent for ref, blobs in inputs.items() for blob in blobs[:1] if isinstance(blob, File)}
    return {ref: os.path.relpath(folder, out.parent if is_file(out) else out) for ref, folder in folders.items()}


def write_small_files(carried: Mapping[str, bytes], layout: Layout, stage: Stage, manifest: Manifest, describe: Describe | None) -> Manifest:
    """Index, config, tokenizer, and what `describe` adds; the manifest last."""
    small = dict(carried)
    if not is_file(stage.out) and len(layout.shards) > 1:
        small[INDEX] = json.dumps(index_json(layout.shards), indent=2).encode() + b"\n"
    for name, content in small.items():
        _write_file(stage.files / name, content)
    if describe is not None and not is_file(stage.out):
        for name, content in describe(manifest, stage.files).items():
            _write_file(stage.files / name, content)
            small[name] = content
    outputs = dict(manifest.outputs)
    outputs |= {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in small.items()}
    manifest = replace(manifest, outputs=outputs)
    _write_file(stage.files / manifest_name(stage.out), json.dumps(manifest.as_json(), indent=2).encode() + b"\n")
    sync_folder(stage.files)
    return manifest


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def written_manifest(stage: Stage) -> Manifest:
    """The manifest of an output that a killed run had finished but for the renames."""
    name = manifest_name(stage.out)
    published = stage.out.parent / name if is_file(stage.out) else stage.out / name
    facts = json.loads((stage.files / name if (stage.files / name).exists() else published).read_bytes())
    return Manifest(facts["outputs"], facts["inputs"], facts["places"])
