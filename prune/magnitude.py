"""Magnitude: the smallest weights go."""

from __future__ import annotations

import torch
from torch import Tensor

from .pruner import pruner


@pruner("magnitude", scopes=("tensor", "row", "block", "global"))
def magnitude(weight: Tensor) -> Tensor:
    """The smallest weights go.

    Scores are |w|. PERP's released code compares within each tensor and removes all up to and with the element of rank `int(size * sparsity)`, one more than
    asked, or many where they tie (16-bit weights tie often); here exactly the asked number goes.
    """
    return (weight if weight.dtype == torch.float64 else weight.float()).abs()
