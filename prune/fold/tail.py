"""Distilling the tail: the last blocks of a folded model are drawn towards the blocks of the whole one that they were.

FoldGPT (arXiv 2407.00928) names "tail-layer distillation"; how many blocks and which distance are not known. Chosen here: the mean squared error between
the hidden states that leave block j of the folded model and block kept[j] of its teacher, summed over the last blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.training import Loss


def with_tail(loss: Loss, blocks: Sequence[nn.Module], targets: Sequence[nn.Module], weight: float) -> Loss:
    """A loss + weight x the sum of the mean squared errors between what leaves `blocks` of the model and `targets` of its teacher.

    The loss must run both of them, as `distillation` does.
    """

    def both(model: Any, rows: Tensor) -> Tensor:
        seen: dict[nn.Module, Tensor] = {}
        handles = [module.register_forward_hook(_into(seen)) for module in (*blocks, *targets)]
        try:
            value = loss(model, rows)
        finally:
            for handle in handles:
                handle.remove()
        for block, target in zip(blocks, targets, strict=True):
            value = value + weight * functional.mse_loss(seen[block].float(), seen[target].float())
        return value

    return both


def _into(seen: dict[nn.Module, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = output if isinstance(output, Tensor) else output[0]

    return hook
