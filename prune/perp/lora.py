"""LoRA under a mask: MaskLoRA, LoRA-Prune, and LoRA on the head."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from .variant import Adapter, adapter

Rank = Annotated[int, Field(ge=1, description="rank of the low-rank update")]
Alpha = Annotated[float, Field(gt=0, description="the update is scaled by alpha / rank")]


class LowRank(Adapter):
    """Has a product s BA, s = alpha / rank; A [rank, in] starts as in LoRA (Kaiming), B [out, rank] at zero."""

    def __init__(self, weight: Tensor, generator: torch.Generator | None, *, rank: Rank = 16, alpha: Alpha = 32.0) -> None:
        super().__init__()
        out, inputs = weight.shape
        self.scale = alpha / rank
        drawn = torch.empty(rank, inputs, device="meta" if weight.is_meta else "cpu")  # the same numbers on every device
        self.a = nn.Parameter(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator).to(weight.device))
        self.b = nn.Parameter(weight.new_zeros(out, rank))

    def update(self) -> Tensor:
        """[out, in]."""
        return self.scale * (self.b @ self.a)


@adapter("mask_lora")
class MaskLora(LowRank):
    """W + s (M o BA): low-rank updates of the weights that are not zero.

    M is W != 0. What trains is what is merged, so that the merged model computes what the trained one did. On a weight without zeros it is LoRA.
    The product is as large as the weight: a step costs a little more than LoRA's two thin ones.
    """

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(weight != 0, weight + self.update(), weight)


@adapter("head", role="head")
class HeadLora(MaskLora):
    """LoRA on the head, untied from the embeddings where it was tied to them.

    Pruning leaves the head alone; zeros that it has stay.
    """


@adapter("lora_prune")
class LoraPrune(LowRank):
    """W + s BA while it trains, W + s (M o BA) afterwards: LoRA whose update is pruned at the end.

    What it lacks at the end it had while it trained, so the merged model is another, as a rule a worse one; MaskLoRA exists because of it.
    """

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.update()

    def merged(self, weight: Tensor) -> Tensor:
        return torch.where(weight != 0, weight + self.update(), weight)
