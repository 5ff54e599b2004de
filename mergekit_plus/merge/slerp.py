"""Along the great circle from the base to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .method import Scan, merge_method, scaled, working_dtype
from .sphere import arc, cosines, gram

PARALLEL = 0.9995  # beyond this |cosine| the circle's formula loses its digits, and a straight line is the same

Place = Annotated[float, Field(ge=0, le=1, description="where between the base (0) and the model (1)")]


def cosine(scan: Scan) -> float:
    """The cosine of the angle between the base and the model, each one flat vector; 0 where one of them is zero."""
    return float(cosines(gram(scan, _both))[0, 1])


def _both(base: Tensor | None, models: Sequence[Tensor]) -> Sequence[Tensor]:
    assert base is not None
    return base, models[0]


@merge_method("slerp", statistic=cosine, models=(1, 1))
def slerp(base: Tensor, models: Sequence[Tensor], *, measured: float, t: Place = 0.5) -> Tensor:
    """The point at `t` on the great circle from the base to the model, each tensor taken as one vector.

    `(sin((1-t)W) a + sin(tW) b) / sin W` with the angle W between a and b, which keep their lengths; a straight line where they
    are parallel. Source: Shoemake, SIGGRAPH 1985. Equal models give that model.
    """
    found = torch.tensor(measured, dtype=torch.float64)
    stay, go = (float(weight) for weight in arc(found, t, found.abs() > PARALLEL))
    return scaled(base, stay, working_dtype(base, *models)).add_(models[0], alpha=go)
