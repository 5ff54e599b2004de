"""From the base towards a model, where they are near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from .method import merge_method, task_vectors, working_dtype

Distance = Annotated[float, Field(ge=0, description="how far an element may go from the base; the model's where it is nearer")]


@merge_method("nearswap", models=(1, 1))
def nearswap(base: Tensor, models: Sequence[Tensor], *, t: Distance = 1e-4) -> Tensor:
    """The model's elements where they are within `t` of the base's; elsewhere the base's, moved by `t` towards the model's.

    `k b + (1-k) a` with `k = min(1, t / |a - b|)`. mergekit takes |a - b| as 1e-6 at least, which matters for a `t` below that only, and
    has no default for `t`; 1e-4 is that of the model with which the method came. Source: mergekit 0.1.5, after alchemonaut's
    QuartetAnemoi-70B-t0.0001. Equal models give that model.
    """
    (vector,) = task_vectors(base, models)
    far = vector.abs() > t
    moved = vector.clamp_(-t, t).add_(base.to(vector.dtype))
    return moved.where(far, models[0].to(working_dtype(base, *models)))
