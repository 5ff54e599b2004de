"""Opening checkpoints: one `.safetensors` file, or a model folder with one file or with shards and their index, on a disk or on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckpointError, ReadError, Unreachable, closest, nearest
from .blob import Blob, File, check_small
from .checkpoint import Checkpoint, FileSource, SmallFile
from .hub import HubFolder, Reference, cached_snapshot, download, in_cache, parse_reference, pin, way_back
from .safetensors import MAX_HEADER, PICKLE_HELP, read_header
from .spec import TensorSpec, natural_order

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's
PACKED_ADAPTER, ADAPTER_QUANT = "adapter_model.packed.safetensors", "adapter_quant.json"  # the same at a few bits, and what describes it
PACKED_DELTA, DELTA_QUANT = "delta.packed.safetensors", "delta_quant.json"  # the difference of a fine-tune
PACKED = {PACKED_ADAPTER: (ADAPTER_CONFIG, ADAPTER_QUANT), PACKED_DELTA: (DELTA_QUANT,)}
COMPACT = "mergekit_plus_compact"  # the model_type of a folded model that stores what blocks share once
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
# The small files that make a folder of tensors a model: what transformers, peft and servers read beside the weights.
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*.model", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
ADAPTERS = (ADAPTER, ADAPTER_CONFIG, *PACKED, ADAPTER_QUANT, DELTA_QUANT)  # every file of theirs
IN_CACHE = (SINGLE, INDEX, "model-*.safetensors", *CARRIED, *ADAPTERS)  # what a snapshot must not lack where the Hub cannot say


class Listing(Protocol):
    """A folder, wherever it lies: what is in it, and each file opened on request."""

    @property
    def place(self) -> str:
        """Where it lies, as errors say it."""
        ...

    @property
    def names(self) -> Collection[str]:
        """The files in it, without folders."""
        ...

    def open(self, name: str) -> Blob:
        """A file to read tensors from."""
        ...

    def small(self, name: str) -> SmallFile:
        """A file that is read whole."""
        ...


class LocalFolder:
    """A folder on a disk. A link in it may lead to a file of the folder itself or, as in the Hub's cache, to the blobs of its repository.

    digests: the SHA-256 that files of it must have, by name, where that is known.
    """

    def __init__(self, path: Path, digests: Mapping[str, str] | None = None) -> None:
        self.path, self.place, self._digests = path, str(path), digests or {}
        self.names = tuple(entry.name for entry in path.iterdir() if entry.is_file())
        real = path.resolve()
        self._inside = [real]
        if snapshots := next((parent for parent in (real, *real.parents) if parent.name == "snapshots"), None):
            self._inside += [snapshots.parent / "blobs", snapshots.parent.parent / "blobs"]  # of the repository; of all of them, as Xet keeps them

    def small(self, name: str) -> Path:
        path = self._own(name)
        check_small(str(path), path.stat().st_size)
        return path

    def open(self, name: str) -> File:
        return File(self._own(name), self._digests.get(name, ""))

    def _own(self, name: str) -> Path:
        """The path of a file, if it is one of this folder: what a small one holds is copied into every output, which may be published."""
        path = self.path / name
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in self._inside):
            raise CheckpointError(f"{path} is a link to {target}, outside of the model's folder; put the file itself there")
        return path


def open_checkpoint(ref: str | Path, cache: bool = False) -> Checkpoint:
    """Open a file, a folder, or a repository on the Hub; reads headers only. See `Checkpoint.open`."""
    try:
        return _open(ref, Path(ref).expanduser(), cache)
    except (OSError, RuntimeError) as error:  # a path too long, a folder that may not be entered, a ~user that does not exist
        raise CheckpointError(f"{ref} cannot be opened: {getattr(error, 'strerror', None) or error}") from None


def _open(ref: str | Path, path: Path, cache: bool) -> Checkpoint:
    if path.is_dir():
        return open_listing(LocalFolder(path), str(ref))
    if path.is_file():
        if path.name.endswith(PICKLES):
            raise CheckpointError(f"{path} is a pickle checkpoint; {PICKLE_HELP}")
        if path.name in PACKED:
            return open_listing(LocalFolder(path.parent), str(ref))
        config = path.parent / ADAPTER_CONFIG
        return Checkpoint(str(ref), _source([File(path)]), {ADAPTER_CONFIG: config} if path.name == ADAPTER and config.is_file() else {})
    if isinstance(ref, str) and "+" in ref:
        from ..adapters.apply import open_adapted

        return open_adapted(ref, cache)
    if isinstance(ref, str) and (ref.startswith("hf://") or not Path(*path.parts[:1]).is_dir()) and (there := parse_reference(ref)):
        return _open_on_hub(there, ref, cache)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, beside) if closest(path.name, beside) else ""
    raise CheckpointError(f"{ref}: no such file or folder, and not an org/name on the Hub.{near}")


def _open_on_hub(there: Reference, label: str, cache: bool) -> Checkpoint:
    """Open a repository, a folder or a file in it: from the local cache where it is whole there, else by range requests."""
    pinned = pin(there)
    if pinned is None:
        snapshot = cached_snapshot(there, IN_CACHE)
        if snapshot is None:
            raise Unreachable(f"{there.repo}: not a local path, and the Hub cannot be reached; nor is it in the local cache ({way_back()})")
        return _open_snapshot(replace(there, revision=snapshot.name), snapshot, label)
    revision = there.revision
    there, files = pinned
    if there.path in files:
        if not there.path.endswith(".safetensors"):
            raise CheckpointError(f"{there} is not a .safetensors file{'; ' + PICKLE_HELP if there.path.endswith(PICKLES) else ''}")
        folder = HubFolder(replace(there, path=there.path.rpartition("/")[0]), files)
        wanted = [there.path.rpartition("/")[2]]
    else:
        folder = HubFolder(there, files)
        if not folder.names:
            raise CheckpointError(f"{there} holds no files.{nearest(there.path, files)}")
        wanted = _wanted(folder.names)
    if cache and not in_cache(folder, wanted):
        download(folder, wanted, revision)
    if snapshot := in_cache(folder, wanted):
        return _open_snapshot(there, snapshot, label, {name: folder.sha256(name) for name in wanted})
    if there.path in files:
        return Checkpoint(label, _source([folder.open(wanted[0])]), pinned=str(there))
    return open_listing(folder, label, str(there))


def _wanted(names: Collection[str]) -> list[str]:
    """The files of a model folder that opening and saving it may read."""
    weights = [SINGLE] if SINGLE in names else [INDEX, "model-*.safetensors"] if INDEX in names else [*ADAPTERS]
    if INDEX in weights and not any(fnmatch(name, weights[1]) for name in names):  # shards with names of their own
        weights[1] = "*.safetensors"
    return [name for name in names if any(fnmatch(name, known) for known in (*weights, *CARRIED))]


def _open_snapshot(there: Reference, snapshot: Path, label: str, digests: Mapping[str, str] | None = None) -> Checkpoint:
    path = snapshot / there.path
    if path.is_file():
        return Checkpoint(label, _source([LocalFolder(path.parent, digests).open(path.name)]), pinned=str(there))
    if not path.is_dir():
        raise CheckpointError(f"{there}: the local cache has no {there.path} of it, and the Hub cannot be reached")
    return open_listing(LocalFolder(path, digests), label, str(there))


def open_listing(folder: Listing, label: str, pinned: str = "") -> Checkpoint:
    """Open a model folder, expanded where it is compact; or a PEFT adapter's: a checkpoint of the adapter's own tensors, expanded where they are packed."""
    carried: tuple[str, ...] = CARRIED
    if SINGLE in folder.names:  # before the index, as transformers does
        source = _source([folder.open(SINGLE)])
    elif INDEX in folder.names:
        source = _indexed(folder)
    elif ADAPTER in folder.names:
        source = _source([folder.open(ADAPTER)])
        carried = (*CARRIED, ADAPTER_CONFIG)
    elif packed := next((name for name in PACKED if name in folder.names), None):
        return _open_packed(folder, label, pinned, packed)
    else:
        raise CheckpointError(_nothing_to_open(folder))
    return whole(Checkpoint(label, source, _small(folder, carried), pinned=pinned))


def whole(opened: Checkpoint) -> Checkpoint:
    """The model that a compact one stands for; another as it is."""
    try:
        is_compact = opened.config.get("model_type") == COMPACT
    except ReadError:
        raise
    except CheckpointError:  # no JSON: for whoever needs it to say
        return opened
    if not is_compact:
        return opened
    from prune.fold.compact import expanded

    return expanded(opened)


def _open_packed(folder: Listing, label: str, pinned: str, packed: str) -> Checkpoint:
    """What the packed file in a folder stands for, computed as it is read."""
    from quant.adapters.container import expanded

    if missing := next((name for name in PACKED[packed] if name not in folder.names), None):
        raise CheckpointError(f"{folder.place} has {packed} but no {missing}, which says what is in it; get that file too")
    small = _small(folder, (*CARRIED, *PACKED[packed]))
    return expanded(Checkpoint(label, _source([folder.open(packed)]), small, pinned=pinned), PACKED[packed][-1])


def _small(folder: Listing, carried: Sequence[str]) -> dict[str, SmallFile]:
    return {name: folder.small(name) for name in sorted(folder.names) if any(fnmatch(name, known) for known in carried)}


def _source(files: Sequence[Blob]) -> FileSource:
    """The tensors of these files, in an order that does not depend on how they are spread over them."""
    specs: dict[str, TensorSpec] = {}
    places: dict[str, tuple[Blob, int]] = {}
    with ThreadPoolExecutor(8, "headers") as pool:  # on the Hub, each is two requests
        headers = list(pool.map(read_header, files))
    for file, header in zip(files, headers, strict=True):
        for name, spec in header.specs.items():
            if name in specs:
                raise CheckpointError(f"tensor '{name}' is in {places[name][0].name} and again in {file.name}")
            specs[name], places[name] = spec, (file, header.offsets[name])
    return FileSource({name: specs[name] for name in sorted(specs, key=natural_order)}, places)


def _indexed(folder: Listing) -> FileSource:
    index = f"{folder.place}/{INDEX}"
    weight_map = _weight_map(folder, index)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not the name of a .safetensors file in its folder")
        if shard not in folder.names:
            raise CheckpointError(f"{folder.place}/{shard} is missing; {INDEX} lists it among {len(shards)} shards")
    source = _source([folder.open(shard) for shard in shards])
    for name, shard in weight_map.items():
        if name not in source.specs or source.places[name][0].name != shard:
            raise CheckpointError(f"{index} says that '{name}' is in {shard}, but it is not there")
    for name in source.specs:
        if name not in weight_map:
            raise CheckpointError(f"{source.places[name][0].place} holds '{name}', which {INDEX} does not list")
    return source


def _weight_map(folder: Listing, index: str) -> Mapping[str, str]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError(f"{len(pairs) - len(table)} of its keys appear twice")
        return table

    try:
        if folder.open(INDEX).size > MAX_HEADER:
            raise ValueError(f"it is longer than {MAX_HEADER} bytes")
        parsed = json.loads(folder.small(INDEX).read_bytes(), object_pairs_hook=refuse_duplicates)
        weight_map = parsed["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("weight_map must give a file name for each tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors shards ({error})") from None
    return dict(weight_map)


def _nothing_to_open(folder: Listing) -> str:
    names, place = folder.names, folder.place
    if ADAPTER_CONFIG in names:
        return f"{place} is a PEFT adapter without {ADAPTER}{f'; {PICKLE_HELP}' if 'adapter_model.bin' in names else ''}"
    if any(fnmatch(name, "*.safetensors") for name in names):
        files = ", ".join(sorted(name for name in names if name.endswith(".safetensors"))[:3])
        return f"{place} has {files} but neither {SINGLE} nor {INDEX}; name the .safetensors file itself"
    if any(name.endswith(PICKLES) for name in names):
        return f"{place} holds only a pickle checkpoint; {PICKLE_HELP}"
    return f"{place} holds no {SINGLE} and no {INDEX}"
