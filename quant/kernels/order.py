"""Inputs in the order of their activations (GPTQ's `desc_act`, `g_idx`): codes are stored group by group once, activations gathered at each call."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_plus.errors import OptionError

from ..formats.bits import pack, unpack


def grouped(packed: Tensor, index: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Packed codes whose input k belongs to group `index[k]`, with the inputs sorted by group; and the order, so that
    `packed_linear(x[..., order], ...)` is the product. The codes themselves and None where they are sorted already.

    Errors: OptionError for groups that are not full.
    """
    width = index.numel()
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order].long(), torch.arange(width, device=index.device) // group_size):
        raise OptionError(f"g_idx does not give each group {group_size} of {width} inputs; dequantize the weight instead")
    if torch.equal(order, torch.arange(width, device=index.device)):
        return packed, None
    return pack(unpack(packed, bits, width)[:, order], bits), order
