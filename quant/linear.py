"""A linear layer whose weight stays packed: the tensors of `pack-quantized` as they are stored, and products that read them there.

    layer = QuantLinear(tensors, Scheme(bits=4, group_size=128))    # weight_packed, weight_scale, weight_shape, weight_zero_point
    y = layer(x)

Its state_dict is what a checkpoint in compressed-tensors' `pack-quantized` holds for the layer, names, dtypes and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .formats import decode
from .kernels import packed_linear
from .quantized import Scheme, dequantize

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


class QuantLinear(nn.Module):
    """`y = x W^T + b` for a packed weight W [out, in], `(code - zero point) * scale`.

    tensors: those of the weight by the last part of their names, as formats/pack_quantized.py describes them. bias: [out] or None. Nothing of it is
    trained; gradients reach x. By default products are those of kernels.packed_linear: integers, multiplied by scales in float32.
    `as_dequantized`: they are those of the dense layer that `dequantize` makes of this one, bit for bit, its weight made anew for each.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None = None, as_dequantized: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = map(int, tensors["weight_shape"].tolist())
        self.scheme, self.as_dequantized = scheme, as_dequantized
        for part in PARTS:
            self.register_buffer(part, tensors.get(part))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in] in the dtype of its scales, made when it is asked for, which some models do."""
        parts = {part: tensor for part in PARTS if (tensor := getattr(self, part)) is not None}
        return dequantize(decode(parts, self.scheme, (self.out_features, self.in_features)))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            product: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
            return product
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """`x W^T + b` without a way back."""
        if self.as_dequantized:
            return functional.linear(x, self.weight.to(x.dtype), self.bias)
        y = packed_linear(x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.scheme.bits, self.scheme.group_size)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.scheme}"


class _Frozen(torch.autograd.Function):
    """The product with a weight that is made again for the way back: a dense one kept for each layer would be the model that packing avoids."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight.to(grads[0].dtype), None
