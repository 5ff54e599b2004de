"""ScaleLoRA, as what it is: a scale for each row times a scale for each column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .variant import Adapter, adapter


@adapter("scale_lora")
class ScaleLora(Adapter):
    """W o (b a^T): a scale for each output row times one for each input column.

    PERP's released ScaleLoRA is W o (BA) with rank r and every entry of A and B equal at the start; the r components then get equal gradients for ever,
    so that BA is of rank one whatever r is. This is that, with 1 / r of the parameters, and exactly the identity at the start.
    """

    def __init__(self, weight: Tensor, generator: torch.Generator | None) -> None:
        super().__init__()
        self.rows = nn.Parameter(weight.new_ones(weight.shape[0], 1))
        self.columns = nn.Parameter(weight.new_ones(1, weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.rows * self.columns
