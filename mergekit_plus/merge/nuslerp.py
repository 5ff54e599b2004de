"""Between two models, or their task vectors, along a great circle: as a whole, by rows or by columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .combine import offsets
from .method import PerModel, Scan, Weight, merge_method, working_dtype
from .sphere import arc, column_products, cosine, cosines, gram, row_products

PARALLEL = 1e-16  # of the squared sine

RowWise = Annotated[bool, Field(description="with nuslerp_flatten false: along the first dimension (columns) instead of the last (rows), as mergekit has it")]
Flatten = Annotated[bool, Field(description="take a tensor as one vector; false takes each row, or column, by itself")]


def angles(scan: Scan, *, nuslerp_row_wise: bool, nuslerp_flatten: bool) -> Tensor | None:
    """The cosine between the two, [] or one for each column; None where the rows are measured as they are merged."""
    if nuslerp_flatten:
        return torch.tensor(cosines(gram(scan, offsets))[0, 1], dtype=torch.float64)
    if not nuslerp_row_wise or not scan.size:
        return None

    def products(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
        a, b = (end if end.dim() else end[None] for end in offsets(base, models))
        return [column_products(*pair) for pair in ((a, b), (a, a), (b, b))]

    return cosine(*(torch.stack(parts).sum(0) for parts in zip(*scan.map(products), strict=True)))


@merge_method("nuslerp", unit="row", statistic=angles, models=(2, 2))
def nuslerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    measured: Tensor | None,
    weight: PerModel[Weight] = (1.0,),
    nuslerp_row_wise: RowWise = False,
    nuslerp_flatten: Flatten = True,
) -> Tensor:
    """The point between two models, or between their task vectors where a base is given, on the great circle.

    slerp at `t = w_2 / (w_1 + w_2)` (a half where the weights cancel), tensor by tensor, row by row or column by column; a straight
    line where the two are parallel. mergekit computes in the dtype of the inputs; here the angles are float64. Source: mergekit 0.1.5,
    the formula is Shoemake's, SIGGRAPH 1985. Equal models give that model.
    """
    first, second = offsets(base, models)
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if measured is None:
        measured = cosine(*(row_products(*pair) for pair in ((first, second), (first, first), (second, second))))
    dtype = working_dtype(*((base,) if base is not None else ()), *models)
    stay, go = (share.to(first.device, dtype) for share in arc(measured, t, 1 - measured.square() <= PARALLEL))
    merged = first.to(dtype) * stay + second.to(dtype) * go
    return merged if base is None else merged.add_(base.to(dtype))

