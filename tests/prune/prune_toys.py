"""Weights and moments of made-up layers, and plain float64 references of the pruners."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.moments import Moments
from prune.plan import PruneOptions, choose


def a_weight(rows: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moments_of(samples: Tensor) -> Moments:
    """The moments of inputs [tokens, in]."""
    wide = samples.double()
    return Moments((wide.T @ wide / len(wide)).float(), wide.mean(0).float(), len(wide))


def some_inputs(tokens: int, inputs: int, seed: int = 1) -> Tensor:
    """Correlated inputs, some of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) + 2 * torch.eye(inputs)
    return torch.randn(tokens, inputs, generator=generator) @ mixing * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator)]


def released_wanda_mask(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """What the released Wanda removes: `int(in * sparsity)` of each row, by a stable sort of |w| sqrt(mean x^2)."""
    order = torch.sort(weight.abs() * norms, dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
    return torch.zeros_like(weight, dtype=torch.bool).scatter(1, order, True)


def obs(weight: Tensor, gram: Tensor, damp: float, columns: int, share: float = 0.0, pattern: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """SparseGPT by its definition, in float64: the weight, and what was removed.

    Column j is taken out of the problem of the columns from j on, whose inverse Gram matrix C is computed anew each time: removing w_j costs w_j^2 / C_00,
    and the others make up for it by -w_j / C_00 C_0: (optimal brain surgeon). The threshold of a block is that of its costs' rank.
    """
    left = weight.double().clone()
    gram = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(len(gram))]
    scale = torch.stack([inverse[0, 0] for inverse in inverses])
    removed = torch.zeros_like(left, dtype=torch.bool)
    for j in range(len(gram)):
        if pattern is None and j % columns == 0:
            costs = left[:, j : j + columns] ** 2 / scale[j : j + columns]
            threshold = costs.flatten().sort().values[int(costs.numel() * share)]
            removed[:, j : j + columns] = costs < threshold
        if pattern is not None and j % pattern[1] == 0:
            costs = left[:, j : j + pattern[1]] ** 2 / scale[j : j + pattern[1]]
            removed[:, j : j + pattern[1]].scatter_(1, costs.topk(pattern[1] - pattern[0], dim=1, largest=False).indices, True)
        error = torch.where(removed[:, j], left[:, j], 0) / scale[j]
        left[:, j:] -= error[:, None] * inverses[j][0]
        left[removed[:, j], j] = 0
    return left, removed


def a_model(sizes: Sequence[tuple[int, int]] = ((7, 24), (1, 8), (5, 16)), blocks: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Checkpoint:
    """Blocks of linear layers of these sizes, between an embedding and a head, in no order of their names; no config."""
    tensors = {"lm_head.weight": a_weight(9, 8, 97), "model.norm.weight": torch.ones(8), "model.embed_tokens.weight": a_weight(9, 8, 98)}
    for block in reversed(range(blocks)):
        for number, (rows, inputs) in enumerate(sizes):
            tensors[f"model.layers.{block}.l{number}.weight"] = a_weight(rows, inputs, seed + 10 * block + number) * (1 + block) / (1 + number)
            tensors[f"model.layers.{block}.l{number}.bias"] = torch.ones(rows)
    return Checkpoint.from_tensors({name: tensor.to(dtype) for name, tensor in tensors.items()}, "toy")


def linears_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that pruning works on, in natural order."""
    return {name: checkpoint.read(name) for name in choose(checkpoint, PruneOptions()).names}
