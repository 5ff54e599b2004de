"""Along the great circle from the base to a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..statistics import sums
from .method import Scan, merge_method, scaled, working_dtype

PARALLEL = 0.9995  # beyond this |cosine| the circle's formula loses its digits, and a straight line is the same

Place = Annotated[float, Field(ge=0, le=1, description="where between the base (0) and the model (1)")]


def cosine(scan: Scan) -> float:
    """The cosine of the angle between the base and the model, each one flat vector; 0 where one of them is zero."""

    def products(base: Tensor | None, models: Sequence[Tensor]) -> tuple[float, float, float]:
        assert base is not None
        a, b = (tensor.to(torch.float64).reshape(-1) for tensor in (base, models[0]))
        return float(a @ b), float(a @ a), float(b @ b)

    if scan.size == 0:
        return 0.0
    both, first, second = sums(scan, products)
    norms = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, both / norms)) if norms else 0.0


@merge_method("slerp", statistic=cosine, models=(1, 1))
def slerp(base: Tensor, models: Sequence[Tensor], *, measured: float, t: Place = 0.5) -> Tensor:
    """The point at `t` on the great circle from the base to the model, each tensor taken as one vector.

    `(sin((1-t)W) a + sin(tW) b) / sin W` with the angle W between a and b, which keep their lengths; a straight line where they
    are parallel. Source: Shoemake, SIGGRAPH 1985. Equal models give that model.
    """
    if abs(measured) > PARALLEL:
        stay, go = 1 - t, t
    else:
        angle = math.acos(measured)
        stay, go = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return scaled(base, stay, working_dtype(base, *models)).add_(models[0], alpha=go)
