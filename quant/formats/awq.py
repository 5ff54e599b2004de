"""AWQ's GEMM layout, which others write: read, not written. Turned, with four-bit codes of eight outputs in a word in an order of its own.

    P.qweight  I32  [in, out/8]       nibble k of a word is the output 8w + ORDER[k]
    P.qzeros   I32  [groups, out/8]   unsigned zero points, stored as they are
    P.scales   F16  [groups, out]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint.spec import TensorSpec

from ..quantized import Quantized, Scheme
from .config import Stored, unreadable
from .format import READERS, Reader
from .pack_quantized import prefix_of

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_config(found: Mapping[str, Any]) -> Callable[[str], Stored | None]:
    """How a module is stored, from a `quantization_config` of quant_method "awq".

    Errors: CheckpointError for what cannot be read.
    """
    bits, size = found.get("bits", found.get("w_bit", 4)), int(found.get("group_size", found.get("q_group_size", 128)))
    version = str(found.get("version") or found.get("checkpoint_format") or found.get("format") or "gemm").lower()
    if version != "gemm" or bits != 4:
        raise unreadable(f"awq of {bits} bits in the version '{version}'")
    stored = Stored("awq", Scheme(4, max(size, 0), not found.get("zero_point", True)))
    skipped = tuple(str(name) for name in found.get("modules_to_not_convert") or ())
    return lambda module: None if any(name in module for name in skipped) else stored


def specs(weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """The tensors that take the place of `P.weight`."""
    prefix, (out, width) = prefix_of(weight, scheme, "awq"), weight.shape
    groups = scheme.groups(width)
    return (
        TensorSpec(f"{prefix}qweight", "I32", (width, out // 8)),
        TensorSpec(f"{prefix}qzeros", "I32", (groups, out // 8)),
        TensorSpec(f"{prefix}scales", "F16", (groups, out)),
    )


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: Sequence[int]) -> Quantized:
    """The codes of a whole weight."""
    zeros = None if scheme.symmetric else _unpack(tensors["qzeros"]).T.contiguous()
    return Quantized(_unpack(tensors["qweight"]).T.contiguous(), tensors["scales"].T.contiguous(), zeros, 4)


def _unpack(words: Tensor) -> Tensor:
    """int32 words `[rows, n/8]` to codes `[rows, n]`, signed."""
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(ORDER)] = torch.arange(0, 32, 4, dtype=torch.int32)  # of the nibble where each output is
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2).to(torch.int8) - 8


READERS.register(
    "awq",
    Reader(
        ("qweight", "qzeros", "scales"), specs, lambda specs, read, scheme: (8 * specs["qweight"].shape[1], specs["qweight"].shape[0]),
        decode, lambda scheme: 0,
    ),
)  # fmt: skip
