"""The packed file: every code of an adapter in one blob, beside the sidecar that says what lies where.

    adapter_model.packed.safetensors
      codes        U8  [bytes]            tensor by tensor, row by row, every row from a byte of its own, LSB first
      stats        F32 [scales, 1 or 2]   (scale), or (mean, scale); tensor by tensor, row by row
      levels.B     F32 [2^B]              the codebook of each width that occurs
      checksums    U8  [tensors, 8]       the first bytes of the SHA-256 of each tensor's codes and stats
      ...                                 what is not coded (DoRA's lengths, biases, modules_to_save), as it was
    adapter_quant.json                    names, shapes and widths; from headers alone, so that a plan has it
    adapter_config.json                   peft's, unchanged

Opening such a folder gives the adapter that it stands for: an ordinary one, each tensor computed as it is read, so that whatever takes
adapters takes these. The difference of a fine-tune (delta.py) is as large as a model, and is written weight by weight: delta.packed.safetensors has
`NAME.codes` [rows, bytes], `NAME.stats` and `NAME.checksum` for each, delta_quant.json says the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from mergekit_plus.checkpoint.checkpoint import FileSource
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.checkpoint.folder import ADAPTER_QUANT, DELTA_QUANT
from mergekit_plus.checkpoint.plan import Read
from mergekit_plus.errors import CheckpointError, OptionError

from .codebooks import BITS, WIDTHS
from .coding import Coded, Coding, decode, table
from .packing import pack, row_bytes, unpack

VERSION = 1
CHECKSUM = 8  # bytes
CODES, STATS, CHECKSUMS = "codes", "stats", "checksums"
BLOCK = 1 << 20  # elements that are expanded at once
MOST = 1 << 32  # elements of a tensor, above which a sidecar is not believed


@dataclass(frozen=True)
class Entry:
    """A coded tensor: its name, dtype and shape once it is expanded, how its rows are coded, and which axis of it the rows are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int  # 0, or 1: the rows are the columns of the tensor, as of B
    coding: Coding

    @property
    def rows(self) -> int:
        """Rows that are coded, each with a width of its own."""
        return self.shape[self.axis]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return prod(self.shape) // max(1, self.rows)

    @property
    def bits(self) -> tuple[int, ...]:
        """The width of each row."""
        return self.coding.widths(self.rows)

    @property
    def code_bytes(self) -> int:
        """Bytes of its codes."""
        return sum(row_bytes(self.width, bits) for bits in self.bits)

    @property
    def scales(self) -> int:
        """Rows of `stats` that are its own."""
        return self.coding.scales(self.rows, self.width)

    @property
    def spec(self) -> TensorSpec:
        """The tensor that it expands to."""
        return TensorSpec(self.name, self.dtype, self.shape)


def rows_of(tensor: Tensor, axis: int) -> Tensor:
    """The rows of a tensor that are coded, [rows, width]."""
    return tensor.movedim(axis, 0).flatten(1)


def widths_of(entries: Sequence[Entry]) -> list[int]:
    """The widths that occur."""
    return sorted({bits for entry in entries for bits in entry.bits})


def packed_specs(entries: Sequence[Entry]) -> list[TensorSpec]:
    """The tensors of the packed file, but for what is not coded.

    Their bytes are the sum of `rows * ceil(width * bits / 8) + 4 * columns * scales + 8` over what is coded, and `4 * 2^bits` for each width that occurs.
    """
    columns = entries[0].coding.columns
    return [
        TensorSpec(CODES, "U8", (sum(entry.code_bytes for entry in entries),)),
        TensorSpec(STATS, "F32", (sum(entry.scales for entry in entries), columns)),
        TensorSpec(CHECKSUMS, "U8", (len(entries), CHECKSUM)),
        *_level_specs(entries),
    ]


def _level_specs(entries: Sequence[Entry]) -> list[TensorSpec]:
    """The codebooks."""
    return [TensorSpec(f"levels.{bits}", "F32", (1 << bits,)) for bits in widths_of(entries)]


def _level_tensors(entries: Sequence[Entry]) -> list[Tensor]:
    return [table(entries[0].coding.codebook, bits).clone() for bits in widths_of(entries)]


def apart_specs(entry: Entry) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """The tensors of one weight of a difference, whose rows have one width."""
    name, coding = entry.name, entry.coding
    return (
        TensorSpec(f"{name}.codes", "U8", (entry.rows, entry.code_bytes // entry.rows)),
        TensorSpec(f"{name}.stats", "F32", (entry.scales, coding.columns)),
        TensorSpec(f"{name}.checksum", "U8", (CHECKSUM,)),
    )


# ---- writing ----


Code = Callable[[Sequence[Tensor]], Sequence[Coded]]  # what a step reads -> the codes of every entry, in order


def packed_step(entries: Sequence[Entry], reads: Sequence[Read], code: Code) -> Step:
    """The step that writes the packed tensors."""

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        with torch.no_grad():
            return packed_tensors(entries, code(tensors))

    return Step(tuple(reads), tuple(packed_specs(entries)), run)


def packed_tensors(entries: Sequence[Entry], coded: Sequence[Coded]) -> list[Tensor]:
    """The tensors of the packed file, in the order of `packed_specs`."""
    codes = [_packed_rows(each) for each in coded]
    sums = [_checksum(rows, each.stats) for rows, each in zip(codes, coded, strict=True)]
    return [torch.cat(codes), torch.cat([each.stats for each in coded]), torch.stack(sums), *_level_tensors(entries)]


def _packed_rows(coded: Coded) -> Tensor:
    """The bytes of a tensor's codes, row by row."""
    if not isinstance(coded.coding.bits, tuple):
        return pack(coded.codes, coded.coding.bits).flatten()
    return torch.cat([pack(row[None], bits).flatten() for row, bits in zip(coded.codes, coded.coding.bits, strict=True)])


def apart_tensors(coded: Coded) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of one weight of a difference, in the order of `apart_specs`."""
    codes = _packed_rows(coded).view(len(coded.codes), -1)
    return codes, coded.stats, _checksum(codes, coded.stats)


def levels_step(entries: Sequence[Entry]) -> Step:
    """The step that writes the codebooks."""
    tensors = _level_tensors(entries)
    return Step((), tuple(_level_specs(entries)), lambda _, first_row, measured: tensors)


def _checksum(codes: Tensor, stats: Tensor) -> Tensor:
    digest = hashlib.sha256()
    for tensor in (codes, stats):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()[:CHECKSUM]), dtype=torch.uint8)


def sidecar(entries: Sequence[Entry], **more: object) -> bytes:
    """adapter_quant.json, or delta_quant.json: what most tensors share stands once."""
    coding, dtype = entries[0].coding, entries[0].dtype
    bits = max(BITS, key=[bits for entry in entries for bits in entry.bits].count)

    def facts(entry: Entry) -> dict[str, object]:
        own = {"shape": list(entry.shape), "axis": entry.axis, "dtype": entry.dtype}
        widths: object = entry.bits[0] if len(set(entry.bits)) == 1 else list(entry.bits)
        return {key: value for key, value in {**own, "bits": widths}.items() if value != {"axis": 0, "dtype": dtype, "bits": bits}.get(key)}

    head = {"version": VERSION, **more, "codebook": coding.codebook, "scale": coding.scale, "bits": bits, "dtype": dtype}
    lines = ",\n".join(f"    {json.dumps(entry.name)}: {json.dumps(facts(entry))}" for entry in entries)
    return (json.dumps(head, indent=2)[:-2] + ',\n  "tensors": {\n' + lines + "\n  }\n}\n").encode()


# ---- reading ----


def entries_of(packed: Checkpoint, name: str = ADAPTER_QUANT) -> list[Entry]:
    """What a sidecar says of the coded tensors.

    Errors: CheckpointError where it is no such sidecar, or does not fit the packed tensors.
    """
    said = packed.json_file(name)
    where = f"{packed.label}: {name}"
    if said.get("version") != VERSION:
        raise CheckpointError(f"{where} is of version {said.get('version')!r}; {VERSION} is the one that is known here")
    try:
        coding = Coding(_width(said["bits"]), said["codebook"], said["scale"])
        entries = [_entry(tensor, {**{key: said[key] for key in ("bits", "dtype")}, **facts}, coding) for tensor, facts in said["tensors"].items()]
        if not entries:
            raise ValueError("no tensors")
    except (KeyError, TypeError, ValueError, AttributeError, OptionError) as error:
        raise CheckpointError(f"{where} is not what a packed file is described by ({error})") from None
    for spec in _stored_specs(entries, name):
        found = packed.specs.get(spec.name)
        if found is None or (found.dtype, found.shape) != (spec.dtype, spec.shape):
            there = "is missing" if found is None else f"is {found.dtype} {found.shape}"
            raise CheckpointError(f"{where} does not fit its tensors: {spec.name} {there}, but must be {spec.dtype} {spec.shape}")
    return entries


def _stored_specs(entries: Sequence[Entry], name: str) -> list[TensorSpec]:
    """The tensors that a sidecar of this name speaks of."""
    if name == ADAPTER_QUANT:
        return packed_specs(entries)
    return [*(spec for entry in entries for spec in apart_specs(entry)), *_level_specs(entries)]


def _entry(name: str, facts: Mapping[str, Any], coding: Coding) -> Entry:
    shape, axis, bits = tuple(facts["shape"]), facts.get("axis", 0), facts["bits"]
    if axis not in (0, 1) or len(shape) < 2 or not all(type(length) is int and 0 < length < MOST for length in shape) or prod(shape) > MOST:
        raise ValueError(f"{name} has the shape {shape}")
    if facts["dtype"] not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(f"{name} has the dtype {facts['dtype']}")
    rows = shape[axis]
    widths = tuple(map(_width, bits)) if isinstance(bits, list) else _width(bits) or (0,) * rows
    if isinstance(widths, tuple) and len(widths) != rows:
        raise ValueError(f"{name} has {len(widths)} widths for {rows} rows")
    return Entry(name, facts["dtype"], cast(tuple[int, ...], shape), axis, replace(coding, bits=widths))


def _width(bits: object) -> int:
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"bits {bits!r}")
    return bits


def expanded(packed: Checkpoint, name: str = ADAPTER_QUANT) -> Checkpoint:
    """What packed tensors stand for, each expanded as it is read: `level * scale (+ mean)` in float32, rounded once to the dtype that it had.

    A tensor's checksum is compared when it is read, and a CheckpointError names it where it differs.
    """
    entries = entries_of(packed, name)
    steps = []
    for entry, reads in zip(entries, _apart(packed, entries) if name == DELTA_QUANT else _together(packed, entries), strict=True):
        levels = [(packed, f"levels.{bits}") for bits in widths_of([entry])]
        steps.append(Step((*reads, *levels), (entry.spec,), Expand(entry, packed.label)))
    coded = {spec.name for spec in _stored_specs(entries, name)}
    steps += [copy_step(packed, tensor) for tensor in packed.specs if tensor not in coded]
    files = {file: content for file, content in packed.files.items() if file != ADAPTER_QUANT}
    return Checkpoint(packed.label, Plan(steps), files, packed.notes, packed.pinned)


def _apart(packed: Checkpoint, entries: Sequence[Entry]) -> list[list[Read]]:
    return [[(packed, spec.name) for spec in apart_specs(entry)] for entry in entries]


def _together(packed: Checkpoint, entries: Sequence[Entry]) -> list[list[Read]]:
    """The codes, stats and checksum of each tensor, as parts of the blobs that hold those of all."""
    code_ends, stat_ends = accumulate(entry.code_bytes for entry in entries), accumulate(entry.scales for entry in entries)
    return [
        [
            (_part(packed, CODES, entry.name, slice(code_end - entry.code_bytes, code_end)), entry.name),
            (_part(packed, STATS, entry.name, slice(stat_end - entry.scales, stat_end)), entry.name),
            (_part(packed, CHECKSUMS, entry.name, slice(number, number + 1)), entry.name),
        ]
        for number, (entry, code_end, stat_end) in enumerate(zip(entries, code_ends, stat_ends, strict=True))
    ]


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds the codes of an adapter, and not what they stand for."""
    return CODES in checkpoint.specs and ADAPTER_QUANT in checkpoint.files


def _part(packed: Checkpoint, name: str, to: str, rows: slice) -> Checkpoint:
    """Some rows of a packed tensor, as a tensor of another name: the same bytes of the same file, where it lies in one."""
    spec = packed.specs[name]
    spec = TensorSpec(to, spec.dtype, spec.slice_shape(rows))
    if isinstance(packed.source, FileSource):
        file, offset = packed.source.places[name]
        return replace(packed, source=FileSource({to: spec}, {to: (file, offset + rows.start * packed.specs[name].row_bytes)}))
    return Checkpoint(packed.label, Plan([Step(((packed, name),), (spec,), lambda tensors, first_row, measured: (tensors[0][rows],))]))


class Expand:
    """A tensor from its codes, stats, checksum and codebooks."""

    def __init__(self, entry: Entry, label: str) -> None:
        self.entry, self.label = entry, label

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return (expand(self.entry, *self.checked(tensors)),)

    def checked(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Codes, stats, and the levels of each width, of what the step reads. Errors: CheckpointError where the checksum differs."""
        codes, stats, checksum, *levels = tensors
        if not torch.equal(_checksum(codes, stats), checksum.flatten()):
            raise CheckpointError(f"{self.label}: the codes of {self.entry.name} are not those that were written (checksum); get the file again")
        return codes, stats, dict(zip(widths_of([self.entry]), levels, strict=True))


def expand(entry: Entry, codes: Tensor, stats: Tensor, tables: Mapping[int, Tensor]) -> Tensor:
    """The tensor that codes and stats stand for; tables: the levels of each width."""
    rows = torch.empty((entry.rows, entry.width), dtype=TORCH_DTYPES[entry.dtype])
    codes, row, at = codes.flatten(), 0, 0
    for count, bits in _blocks(entry):
        size, coding = count * row_bytes(entry.width, bits), replace(entry.coding, bits=bits or (0,) * count)
        each = 0 if coding.scale == "tensor" else coding.scales(1, entry.width)  # scales of a row
        own = stats[row * each : (row + count) * each] if each else stats
        unpacked = unpack(codes[at : at + size].view(count, -1), bits, entry.width)
        rows[row : row + count] = decode(Coded(unpacked, own, coding), tables[bits])
        row, at = row + count, at + size
    moved = (entry.shape[entry.axis], *entry.shape[: entry.axis], *entry.shape[entry.axis + 1 :])
    return rows.view(moved).movedim(0, entry.axis).contiguous()


def _blocks(entry: Entry) -> Iterator[tuple[int, int]]:
    """Neighbouring rows of one width that are expanded at once: how many, and their bits."""
    most = max(1, BLOCK // max(1, entry.width))
    for bits, same in groupby(entry.bits):
        count = len(list(same))
        yield from ((min(most, count - first), bits) for first in range(0, count, most))
