"""The safetensors file format: its header read with suspicion and written byte for byte as the safetensors library writes it.

A file is 8 bytes of little-endian header length, that many bytes of JSON, and the tensors' bytes back to back. Everything read
here may be hostile: lengths are bounded before anything is allocated, and a header that the format forbids is refused with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..errors import CheckpointError, nearest
from .blob import Blob
from .spec import DTYPE_BITS, DTYPE_RANK, TensorSpec

MAX_HEADER = 100_000_000  # bytes, the library's own limit
MAX_TENSORS = 1_000_000
MAX_NAME = 1024
MAX_RANK = 8
MAX_DIM = 1 << 48
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: where each tensor's bytes begin in the file, and what the tensor is."""

    specs: Mapping[str, TensorSpec]  # in the order of the bytes
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


def read_header(file: Blob) -> Header:
    """Read and check the header of an open file.

    Errors: CheckpointError naming the file and what is wrong with it.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.place} is not a safetensors file: {file.size} bytes long{_pickle_hint(file)}")
    prefix = bytearray(8)
    file.read_into(memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER, file.size - 8):
        reason = f"its header would be {length} bytes long in a file of {file.size}{_pickle_hint(file)}"
        raise CheckpointError(f"{file.place} is not a safetensors file, or is truncated: {reason}")
    raw = bytearray(length)
    file.read_into(memoryview(raw), 8)
    try:
        return parse_header(bytes(raw), file.size)
    except ValueError as error:
        raise CheckpointError(f"{file.place}: {error}") from None


def parse_header(raw: bytes, file_size: int) -> Header:
    """Check a header's JSON against the size of its file.

    Errors: ValueError with the reason, for whatever the format (or good sense) forbids: https://github.com/huggingface/safetensors#format
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_int=_integer)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the header is not JSON ({error})") from None
    if not raw.startswith(b"{") or not isinstance(parsed, dict):
        raise ValueError("the header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) and _is_text(key + value) for key, value in metadata.items()):
        raise ValueError("__metadata__ is not a table of strings")
    if len(parsed) > MAX_TENSORS:
        raise ValueError(f"{len(parsed)} tensors; at most {MAX_TENSORS} are read")

    start = 8 + len(raw)
    entries = sorted(((name, *_entry(name, entry)) for name, entry in parsed.items()), key=lambda item: (item[2], item[3]))
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    position = 0
    for name, spec, begin, end in entries:
        if begin != position:
            raise ValueError(f"tensor '{name}' starts at byte {begin}, the one before it ends at {position}: a hole or an overlap")
        specs[name], offsets[name] = spec, start + begin
        position = end
    if start + position != file_size:
        raise ValueError(
            f"the tensors end at byte {start + position} but the file is {file_size} bytes long: truncated, or not written to the end"
        )
    return Header(specs, offsets, metadata)


def _entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if not name or len(name) > MAX_NAME or not _is_text(name) or CONTROL.search(name):
        raise ValueError(f"a tensor's name is empty, too long or has control characters: {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor '{name}' must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor '{name}' has the unknown dtype {dtype!r}.{nearest(str(dtype), DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_count(dim) and dim <= MAX_DIM for dim in shape):
        raise ValueError(f"tensor '{name}' has the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"tensor '{name}' has impossible offsets {str(offsets)[:80]}")
    if prod(max(1, dim) for dim in shape) >= 1 << 60:
        raise ValueError(f"tensor '{name}' has the impossible shape {shape}: its size overflows")
    begin, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"tensor '{name}' is {dtype} {tuple(shape)}, {bits / 8:g} bytes, but its offsets hold {end - begin}")
    return TensorSpec(name, dtype, tuple(shape)), begin, end


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice}' appears twice")
    return table


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the header holds {name}")


def _integer(digits: str) -> int:
    """No sign (the library refuses even -0) and no more digits than a 64-bit number has."""
    if digits.startswith("-") or len(digits) > 20:
        raise ValueError(f"the header holds the impossible number {digits[:24]}")
    return int(digits)


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: a JSON escape can smuggle half a surrogate pair in, and the library refuses it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pickle_hint(file: Blob) -> str:
    start = bytearray(min(4, file.size))
    file.read_into(memoryview(start), 0)
    pickled = start == b"PK\x03\x04" or start[:1] == b"\x80"
    return ". It looks like a pickle; " + PICKLE_HELP if pickled else ""


PICKLE_HELP = (
    "pickles can run code and are not read. Convert it first: "
    "python -c \"import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() for k, v in "
    "torch.load('IN', weights_only=True).items()}, 'OUT.safetensors')\""
)


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Tensors in the order in which the safetensors library lays them out: widest dtypes first, then by name."""
    return sorted(specs, key=lambda spec: (-DTYPE_RANK[spec.dtype], spec.name))


def encode_header(specs: Iterable[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds these tensors in this order, and each tensor's offset in the file."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for spec in specs:
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, position + spec.nbytes]}
        begins[spec.name] = position
        position += spec.nbytes
    raw = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    prefix = len(raw).to_bytes(8, "little") + raw
    return prefix, {name: len(prefix) + begin for name, begin in begins.items()}
