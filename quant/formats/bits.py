"""Codes of 2 to 8 bits as a dense stream of bits in int32 words, and back, eight codes at a time.

Element i of a row takes bits `i*bits ... i*bits + bits-1` of the row; bit t of word w is bit `32*w + t` of the row; the last word is
filled with zeros. Eight codes make exactly `bits` bytes of that stream, so eight codes held in the eight bytes of an int64 are moved
together by three rounds of shift, mask and or, and the first `bits` bytes of the int64 are the stream (words are little-endian).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

UNIT = 32  # codes that fill whole words at every width


def words(count: int, bits: int) -> int:
    """int32 words of a row of `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes `[rows, n]`, signed, to int32 words `[rows, words(n, bits)]`; a code is stored with 2^(bits-1) added."""
    rows, count = codes.shape
    if count % UNIT:
        codes = pad(codes, (0, -count % UNIT), value=-1 << (bits - 1))  # which is stored as zero
    stream = codes.contiguous().view(-1)
    if stream.storage_offset() % 8:
        stream = stream.clone()  # a view as int64 must begin at a multiple of 8 bytes
    lanes = stream.view(torch.int64).bitwise_xor(_repeat(1 << (bits - 1), 8))  # [rows*n/8]; adds 2^(bits-1) to each byte
    lanes &= _repeat((1 << bits) - 1, 8)
    for field, slot in _rounds(bits):
        odd = lanes >> (slot - field)
        odd &= _repeat(((1 << field) - 1) << field, 2 * slot)
        lanes &= _repeat((1 << field) - 1, 2 * slot)
        lanes |= odd
    part = _part(bits)
    size = part.itemsize
    packed = lanes.view(part).view(rows, -1, 8 // size)[..., : bits // size].contiguous()  # the first bytes of every eight
    return packed.view(rows, -1).view(torch.int32)[:, : words(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 words `[rows, words(n, bits)]` to int8 codes `[rows, n]`, the inverse of `pack`."""
    rows = packed.shape[0]
    units = -(-count // UNIT)
    part = _part(bits)
    size = part.itemsize
    stream = pad(packed, (0, units * bits - packed.shape[1])).view(part).view(rows, units * 4, bits // size)
    slots = torch.zeros((rows, units * 4, 8 // size), dtype=part, device=packed.device)
    slots[..., : bits // size] = stream
    lanes = slots.view(torch.int64)  # [rows, n/8, 1]
    for field, slot in reversed(_rounds(bits)):
        odd = lanes << (slot - field)
        odd &= _repeat(((1 << field) - 1) << slot, 2 * slot)
        lanes &= _repeat((1 << field) - 1, 2 * slot)
        lanes |= odd
    stored = lanes.view(torch.int8).view(rows, -1)[:, :count]
    return stored + (-1 << (bits - 1))  # wraps at 8 bits, as it must


def _rounds(bits: int) -> list[tuple[int, int]]:
    """(field, slot) of each round: fields of so many bits lie in slots of so many; pairs of fields are joined."""
    return [] if bits == 8 else [(bits << step, 8 << step) for step in range(3)]


def _part(bits: int) -> torch.dtype:
    """The widest integer that divides `bits` bytes; wide pieces are copied faster."""
    return torch.int32 if bits % 4 == 0 else torch.int16 if bits % 2 == 0 else torch.uint8


def _repeat(value: int, every: int) -> int:
    """The int64 with `value` at every so many bits."""
    whole = sum(value << place for place in range(0, 64, every))
    return whole - (1 << 64) if whole >> 63 else whole
