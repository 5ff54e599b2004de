"""Toy checkpoints and steps, and a Python beside this one, for the tests of `mergekit_plus.checkpoint`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec
from mergekit_plus.checkpoint.dtypes import TAGS, TORCH_DTYPES
from mergekit_plus.checkpoint.plan import row_multiple

saving = importlib.import_module("mergekit_plus.checkpoint.save")  # the module; the package's `save` is its function
layouts = importlib.import_module("mergekit_plus.checkpoint.layout")


def header_bytes(table: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file from a header as a table, or as raw bytes where JSON should be strange."""
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def random_tensor(tag: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Random bits in any dtype that torch can hold (finite where that is a float of arithmetic)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = TORCH_DTYPES[tag]
    if tag in ("F16", "BF16", "F32", "F64"):
        return torch.randn(shape, generator=generator).to(dtype)
    if tag == "BOOL":
        return torch.randint(0, 2, shape, generator=generator).bool()
    width = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel()
    return torch.randint(0, 256, (count * width,), generator=generator, dtype=torch.uint8).view(dtype).view(tuple(shape))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes (NaN equals NaN)."""
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def write_model(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: Mapping[str, Any] | None = None) -> Path:
    """A model folder as transformers writes it, its tensors dealt out to some shards."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        total = sum(tensor.nbytes for tensor in tensors.values())
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy"}))
    return folder


def map_step(
    reads: Sequence[tuple[Checkpoint, str]], function: Callable[..., Tensor], name: str = "", dtype: str = "", multiple: int | None = None, **keywords: Any
) -> Step:
    """A step whose write has the shape of what it first reads, each element computed from the same element of each read."""
    first = reads[0][0].specs[reads[0][1]]
    spec = TensorSpec(name or first.name, dtype or first.dtype, first.shape)

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return (function(*tensors).to(TORCH_DTYPES[spec.dtype]),)

    return Step(tuple(reads), (spec,), run, row_multiple(first) if multiple is None else multiple, **keywords)


def mapped(checkpoint: Checkpoint, function: Callable[[Tensor], Tensor], label: str = "mapped", **keywords: Any) -> Checkpoint:
    """Every tensor of a checkpoint through an elementwise function."""
    return Checkpoint(label, Plan([map_step([(checkpoint, name)], function, **keywords) for name in checkpoint.specs]), checkpoint.files)


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """The spec of a tensor in memory."""
    return TensorSpec(name, TAGS[tensor.dtype], tuple(tensor.shape))


def python(code: str, *arguments: object, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; a hang there is a failure here."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    variables = {**os.environ, "PYTHONPATH": root + os.pathsep + str(Path(__file__).parent), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables, check=False)


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
