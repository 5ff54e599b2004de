"""A forward pass in float32 that multiplies in bfloat16, as the model does where it is used: matrices and attention, nothing else.

A product of two bfloat16 numbers is exact in float32, and sums are float32: what is lost is the rounding of the factors. The Gram matrices, taken of the
factors as they are multiplied, are those of what the layers see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..checkpoint import TensorSpec


def multiplies_in_bfloat16(weights: Iterable[TensorSpec], device: str) -> bool:
    """Whether these weights are stored in bfloat16, and it is a processor with instructions for it that works with them."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 does not tell
    return device == "cpu" and bool(capabilities.get("avx512_bf16")) and all(spec.dtype == "BF16" for spec in weights)


class Bfloat16Products(TorchFunctionMode):
    """While this is entered, the products of modules are of bfloat16 factors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) == 3 and kwargs.get("attn_mask") is None:
            return func(*(states.bfloat16() for states in args), **kwargs).float()
        if func is not functional.linear and func is not torch.addmm:
            return func(*args, **kwargs)
        products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before, products.fp32_precision = products.fp32_precision, "bf16"
        try:
            return func(*args, **kwargs)
        finally:
            products.fp32_precision = before
