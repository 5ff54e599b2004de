"""SaRA-style: the smallest weights train, zeros among them."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from .variant import Adapter, adapter

Quantile = Annotated[float, Field(gt=0, le=1, description="share of each matrix, its smallest weights, that trains")]


@adapter("sara")
class Sara(Adapter):
    """The smallest weights of each matrix train; after pruning those are the zeros, so it densifies.

    After the released code of SaRA, with a share of each matrix in place of one threshold for all, without its low-rank penalty, and without choosing
    anew on the way.
    """

    densifies = True

    def __init__(self, weight: Tensor, generator: torch.Generator | None, *, quantile: Quantile = 0.1) -> None:
        super().__init__()
        count = max(1, int(quantile * weight.numel()))
        self.register_buffer("places", weight.abs().flatten().argsort(stable=True)[:count], persistent=False)
        self.theta = nn.Parameter(weight.new_zeros(count))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten().scatter_add(0, self.get_buffer("places"), self.theta).view_as(weight)
