"""NeuroAda: the k largest weights of each output row train."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from .variant import Adapter, adapter

K = Annotated[int, Field(ge=1, description="weights that train in each output row")]


@adapter("neuroada")
class NeuroAda(Adapter):
    """The k largest weights of each output row train, and nothing else of the matrix.

    After the released code of NeuroAda (k = 1 to 20). A row with fewer weights that are not zero trains those that it has.
    """

    def __init__(self, weight: Tensor, generator: torch.Generator | None, *, k: K = 8) -> None:
        super().__init__()
        places = weight.abs().topk(min(k, weight.shape[1]), dim=1).indices  # [out, k]
        self.register_buffer("places", places, persistent=False)
        self.theta = nn.Parameter(weight.new_zeros(places.shape))

    def forward(self, weight: Tensor) -> Tensor:
        places: Tensor = self.get_buffer("places")
        alive = weight.gather(1, places) != 0
        return weight.scatter_add(1, places, torch.where(alive, self.theta, 0))
