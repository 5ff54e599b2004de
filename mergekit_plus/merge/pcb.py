"""PCB-Merging: every element of every task vector competes, within its task and between tasks; the losers are dropped."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..options import SearchRange
from ..statistics import order_statistics, sums
from .method import Lambda, PerModel, Scan, merge_method, task_vectors

Ratio = Annotated[float, Field(gt=0, le=1, description="share of each whole task vector that survives"), SearchRange(0.05, 1)]
Winsor = Annotated[float, Field(ge=0, lt=0.5, description="share of the magnitudes clipped at either end"), SearchRange(0, 0.3)]
Inter = Annotated[
    Literal["sum", "normalized", "pairwise"],
    Field(description="the competition between tasks: which of the three released versions"),
]
Frozen = Annotated[bool, Field(description="leave elements that no model changed out of the count")]


@dataclass(frozen=True)
class Bounds:
    """Of one task vector: the magnitudes to which it is clipped, then the score that is just dropped and the best score."""

    low: float
    high: float
    drop: float = 0.0
    best: float = 0.0


def measure(scan: Scan, *, models: int, ratio: float, winsor: float, inter: str, exclude_frozen: bool) -> tuple[Bounds | None, ...]:
    """The bounds of each task vector over the whole model; None for one whose magnitudes are all alike, which takes no part.

    Two order statistics of about one pass each, and one more pass with `exclude_frozen`. Ranks as in the released code:
    `int(D q)` and `int(D (1-q) - 1)` of the magnitudes (their least and greatest where D q < 1), `int(D (1-r))` of the scores.
    """
    size = scan.size
    if exclude_frozen:
        size = sum(map(int, sums(scan, lambda base, models: [int(_changed(_vectors(base, models)).sum())])))
    if not size:
        return (None,) * models

    def live(rows: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        return [row[_changed(vectors)] for row in rows] if exclude_frozen else list(rows)

    def magnitudes(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
        vectors = _vectors(base, models)
        return live([vector.abs() for vector in vectors], vectors)

    ends = [0, size - 1]
    if size * winsor >= 1:
        ends = [int(size * winsor), int(size * (1 - winsor) - 1)]
    bounds: list[Bounds | None] = []
    for low, high in order_statistics(scan, magnitudes, [[ends[0], max(ends)] for _ in range(models)], size=size):
        bounds.append(Bounds(low, high) if low < high else None)
    for index, bound in enumerate(bounds):
        if bound is None:
            kind = "nowhere, or everywhere as much"
            warnings.warn(f"pcb: model {index + 1} differs from the base {kind}, and takes no part", stacklevel=2)
    active = [bound for bound in bounds if bound is not None]

    def scores(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
        vectors = _vectors(base, models)
        chosen = [vector for vector, bound in zip(vectors, bounds, strict=True) if bound is not None]
        return live(_scores(chosen, active, inter), vectors)

    if not active:
        return tuple(bounds)
    drop = min(int(size * (1 - ratio)), size - 1)
    found = iter(order_statistics(scan, scores, [[drop, size - 1] for _ in active], size=size))
    return tuple(None if bound is None else Bounds(bound.low, bound.high, *next(found)) for bound in bounds)


@merge_method("pcb", statistic=measure, scope="model", linear=("lambda",), passes=2)
def pcb(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[Bounds | None],
    lambda_: PerModel[Lambda] = (1.0,),
    ratio: Ratio = 0.1,
    winsor: Winsor = 0.01,
    inter: Inter = "sum",
    exclude_frozen: Frozen = False,
) -> Tensor:
    """The base plus the mean of the task vectors' winning elements, weighted by how clearly they won.

    `tau = sum_i lambda_i d_i w_i / sum_i w_i` with the winsorised task vectors d_i, scores `exp(N |d_i|^2) * inter_i` and weights
    w_i that run from 0 for the score at the cut to 1 for the task's best. inter: "sum" is `tanh(d_i * sum_j d_j)` on the raw
    vectors (pcb-merging.py and the language experiments), "normalized" takes the others' normalized vectors (pcb.py),
    "pairwise" is `sum_j tanh(n_i n_j)` of normalized ones (pcb_ES.py), the only one that does not depend on scale.

    Everything is counted over the whole model, unlike TIES. At most `ratio` of a task's elements survive: those that tie with the
    cut do not. Source: arXiv 2410.02396 as in its released code (specs/merge_prune_fold.md 1.2); it differs in the scores'
    common factor exp(-N), which cancels and keeps many tasks finite, and where the released code gives NaN.
    The defaults are the released ones (0.1, 0.01, "sum").
    """
    vectors = _vectors(base, models)
    merged, total = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    tasks = [(vectors[index], bound, lambda_[index]) for index, bound in enumerate(measured) if bound is not None]
    if not tasks:
        return merged.add_(base.to(merged.dtype))
    scores = _scores([vector for vector, _, _ in tasks], [bound for _, bound, _ in tasks], inter)
    for score, (vector, bound, scale) in zip(scores, tasks, strict=True):
        if bound.drop < bound.best:
            weight = score.clamp_(bound.drop, bound.best).sub_(bound.drop).div_(bound.best - bound.drop)
        else:
            weight = (score >= bound.best).to(score.dtype)
        total += weight
        merged.addcmul_(vector.abs().clamp_(bound.low, bound.high).mul_(vector.sign()), weight, value=scale)
    return merged.div_(total.clamp_(min=1e-12)).add_(base.to(merged.dtype))


def _scores(vectors: Sequence[Tensor], bounds: Sequence[Bounds], inter: str) -> list[Tensor]:
    """The scores of some task vectors' elements. The measurement and the merge both call this, so that the cut is the same."""
    places = [  # where a magnitude stands between the task's least and greatest, in [0, 1]
        vector.abs().clamp_(bound.low, bound.high).sub_(bound.low).div_(bound.high - bound.low) for vector, bound in zip(vectors, bounds, strict=True)
    ]
    signed = [place * vector.sign() for place, vector in zip(places, vectors, strict=True)] if inter != "sum" else vectors
    if inter == "pairwise":
        rivals = [_total([one.mul(other).tanh_() for other in signed]) for one in signed]
    else:
        total = _total(signed)
        rivals = [vector.mul(total).tanh_() for vector in vectors]
    return [place.square_().sub_(1).mul_(len(vectors)).exp_().mul_(rival) for place, rival in zip(places, rivals, strict=True)]


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _vectors(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
    assert base is not None
    return list(task_vectors(base, models))


def _changed(vectors: Sequence[Tensor]) -> Tensor:
    """Where at least one task vector is not zero."""
    return _total([vector.abs() for vector in vectors]) > 0
