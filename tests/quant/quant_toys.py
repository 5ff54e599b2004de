"""Weights, drawn and real, and texts whose inputs are correlated like those of a real layer: a few directions hold most of the power."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_plus.moments import Moments
from quant import Quantized, dequantize


def a_weight(rows: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) / 50).to(dtype)


def real_weights() -> list[Tensor]:
    """The MLP's of the small trained Llama in tests/models."""
    found = []
    for path in sorted((Path(__file__).parents[1] / "models" / "base").glob("*.safetensors")):
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            found += [file.get_tensor(name) for name in file.keys() if ".mlp." in name]  # noqa: SIM118
    return found


def a_text(width: int, tokens: int = 1000, seed: int = 0) -> Tensor:
    """Inputs [tokens, width], float32, of a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width).unsqueeze(1)
    return torch.randn(tokens, width, generator=generator) @ mix + torch.randn(width, generator=generator) / 4


def moments_of(x: Tensor, dense: Tensor | None = None) -> Moments:
    """The moments of inputs [tokens, in]; with those of the dense model, their cross moments as well."""
    y = x.double()
    gram, mean = y.T @ y / len(x), y.mean(0)
    return Moments(gram.float(), mean.float(), len(x), None if dense is None else (dense.double().T @ y / len(x)).float())


def same(one: Quantized, two: Quantized) -> bool:
    """Whether codes, scales and zero points are the same."""
    zeros = [torch.empty(0) if quantized.zero_point is None else quantized.zero_point for quantized in (one, two)]
    return torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale) and torch.equal(*zeros)


def output_error(weight: Tensor, quantized: Quantized, moments: Moments) -> float:
    """The mean over tokens of the squared error of the layer's output, summed over outputs: tr((W - Q) H (W - Q)^T).

    With `moments.cross`, of the output for that of the dense model; less a term that the weight has no part in, so that it may be negative.
    """
    gram = moments.gram.double()
    w, q = weight.double(), dequantize(quantized).double()
    if moments.cross is None:
        e = w - q
        return float((e @ gram * e).sum())
    return float((q @ gram * q).sum() - 2 * (w @ moments.cross.double() * q).sum() + (w @ gram * w).sum())
