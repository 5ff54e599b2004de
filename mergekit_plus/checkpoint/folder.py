"""Opening checkpoints that lie on a disk: one `.safetensors` file, or a model folder with one file or with shards and their index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, nearest
from .checkpoint import Checkpoint, FileSource
from .safetensors import MAX_HEADER, PICKLE_HELP, File, read_header
from .spec import TensorSpec, natural_order

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
MAX_SMALL = 256 << 20  # bytes of a tokenizer and the like; the largest are a seventh of that
# The small files that make a folder of tensors a model: what transformers, peft and servers read beside the weights.
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*.model", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip


def open_checkpoint(ref: str | Path) -> Checkpoint:
    """Open a file, a folder, or a repository on the Hub; reads headers only. See `Checkpoint.open`."""
    try:
        return _open(ref, Path(ref).expanduser())
    except (OSError, RuntimeError) as error:  # a path too long, a folder that may not be entered, a ~user that does not exist
        raise CheckpointError(f"{ref} cannot be opened: {getattr(error, 'strerror', None) or error}") from None


def _open(ref: str | Path, path: Path) -> Checkpoint:
    if path.is_dir():
        return open_folder(path, str(ref))
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise CheckpointError(f"{path} is a pickle checkpoint; {PICKLE_HELP}")
        return Checkpoint(str(ref), _source([File(path)]))
    if isinstance(ref, str) and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", ref) and not path.parent.is_dir():
        from .hub import download

        return open_folder(download(ref), ref)
    near = nearest(path.name, (entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else ""
    raise CheckpointError(f"{ref}: no such file or folder, and not an org/name on the Hub.{near if 'Did' in near else ''}")


def open_folder(folder: Path, label: str) -> Checkpoint:
    """Open a model folder."""
    if (folder / SINGLE).is_file():  # before the index, as transformers does
        source = _source([File(folder / SINGLE)])
    elif (folder / INDEX).is_file():
        source = _indexed(folder)
    else:
        raise CheckpointError(_nothing_to_open(folder))
    carried = sorted(path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, known) for known in CARRIED))
    for path in carried:
        _check_small(path, folder)
    return Checkpoint(label, source, {path.name: path for path in carried})


def _check_small(path: Path, folder: Path) -> None:
    """Refuse a small file that is none, or a link out of its folder: what it holds is copied into every output, which may be published."""
    target, home = path.resolve(), folder.resolve()
    if path.stat().st_size > MAX_SMALL:
        raise CheckpointError(f"{path} is {path.stat().st_size} bytes long; at most {MAX_SMALL} of a file beside the weights are read")
    cached = home.parent.name == "snapshots" and any(blobs in target.parents for blobs in (home.parents[1] / "blobs", home.parents[2] / "blobs"))
    if home not in target.parents and not cached:  # the Hub's cache keeps what a snapshot links to beside it, or shares it between repositories
        raise CheckpointError(f"{path} is a link to {target}, outside of the model's folder, and would be copied into the output; put the file itself there")


def _source(files: list[File]) -> FileSource:
    """The tensors of these files, in an order that does not depend on how they are spread over them."""
    specs: dict[str, TensorSpec] = {}
    places: dict[str, tuple[File, int]] = {}
    for file in files:
        header = read_header(file)
        for name, spec in header.specs.items():
            if name in specs:
                raise CheckpointError(f"tensor '{name}' is in {places[name][0].path.name} and again in {file.path.name}")
            specs[name], places[name] = spec, (file, header.offsets[name])
    return FileSource({name: specs[name] for name in sorted(specs, key=natural_order)}, places)


def _indexed(folder: Path) -> FileSource:
    index = folder / INDEX
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not the name of a .safetensors file in its folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing; {INDEX} lists it among {len(shards)} shards")
    source = _source([File(folder / shard) for shard in shards])
    for name, shard in weight_map.items():
        if name not in source.specs or source.places[name][0].path.name != shard:
            raise CheckpointError(f"{index} says that '{name}' is in {shard}, but it is not there")
    for name in source.specs:
        if name not in weight_map:
            raise CheckpointError(f"{source.places[name][0].path} holds '{name}', which {INDEX} does not list")
    return source


def _weight_map(index: Path) -> Mapping[str, str]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError(f"{len(pairs) - len(table)} of its keys appear twice")
        return table

    try:
        if index.stat().st_size > MAX_HEADER:
            raise ValueError(f"it is longer than {MAX_HEADER} bytes")
        parsed = json.loads(index.read_bytes(), object_pairs_hook=refuse_duplicates)
        weight_map = parsed["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("weight_map must give a file name for each tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors shards ({error})") from None
    return dict(weight_map)


def _nothing_to_open(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        return f"{folder} is a PEFT adapter, not a model; merge it into its base first (peft: merge_and_unload)"
    if any(fnmatch(name, "*.safetensors") for name in names):
        files = ", ".join(sorted(name for name in names if name.endswith(".safetensors"))[:3])
        return f"{folder} has {files} but neither {SINGLE} nor {INDEX}; name the .safetensors file itself"
    if any(fnmatch(name, pattern) for name in names for pattern in ("*.bin", "*.pt", "*.pth")):
        return f"{folder} holds only a pickle checkpoint; {PICKLE_HELP}"
    return f"{folder} holds no {SINGLE} and no {INDEX}"
