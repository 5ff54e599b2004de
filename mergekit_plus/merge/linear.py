"""The weighted average of models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .combine import blend, refuse_zero_sum, shares
from .method import Normalize, PerModel, Weight, merge_method


@merge_method("linear", check=refuse_zero_sum)
def linear(models: Sequence[Tensor], *, weight: PerModel[Weight] = (1.0,), normalize: Normalize = True) -> Tensor:
    """The weighted average of the models, `sum of w_i m_i / sum of w_i`.

    Source: model soups, arXiv 2203.05482. Equal models give that model.
    """
    return blend(models, shares(weight, normalize))
