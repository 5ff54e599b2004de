"""One model as it is, or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from .method import PerModel, merge_method, scaled, working_dtype

Scale = Annotated[float, Field(description="by what the tensors are multiplied", allow_inf_nan=False)]


@merge_method("passthrough", models=(1, 1))
def passthrough(models: Sequence[Tensor], *, scale: PerModel[Scale] = (1.0,)) -> Tensor:
    """One model, times `scale`.

    For recipes that put a model together from parts. Source: mergekit 0.1.5.
    """
    return scaled(models[0], scale[0], working_dtype(*models))
