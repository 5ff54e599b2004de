"""Codes of 0, 1, 2, 3, 4 or 8 bits as bytes, and back: LSB first, every row from a byte of its own, the last bits of a row zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import bits as stream


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n], each below 2^bits, to uint8 bytes [rows, row_bytes(n, bits)]. Bit t of byte i of a row is bit `8 i + t` of its stream."""
    if not codes.numel() or not bits:
        return torch.zeros((len(codes), row_bytes(codes.shape[1], bits)), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    return stream.pack(signed, bits).view(torch.uint8)[:, : row_bytes(codes.shape[1], bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 codes [rows, count]."""
    if not count or not len(packed) or not bits:
        return torch.zeros((len(packed), count), dtype=torch.uint8)
    words = pad(packed, (0, 4 * stream.words(count, bits) - packed.shape[1])).contiguous().view(torch.int32)
    return (stream.unpack(words, bits, count).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
