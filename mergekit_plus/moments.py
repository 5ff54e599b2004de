"""What a calibrated method knows of a linear layer's inputs: their moments over the tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Means over the tokens that reached a linear layer while the text flowed through the model.

    An expert that no token reached has `tokens` 0 and zeros.
    """

    gram: Tensor  # float32 [in, in]: the mean of x x^T
    mean: Tensor  # float32 [in]: the mean of x
    tokens: int
    cross: Tensor | None = None  # float32 [in, in]: the mean of x_dense x^T, the same tokens in the model that nothing was done to

    @classmethod
    def unseen(cls, weight: Tensor) -> Moments:
        """Those of the inputs of a weight [out, in] that no token reached."""
        width = weight.shape[1]
        return cls(weight.new_zeros(width, width, dtype=torch.float32), weight.new_zeros(width, dtype=torch.float32), 0)

    @property
    def norms(self) -> Tensor:
        """The root mean square of each input, float32 [in]."""
        return self.gram.diagonal().sqrt()
