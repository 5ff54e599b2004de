"""TIES: trim each task vector, elect a sign for each element, merge those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from .combine import sign_consensus
from .method import Density, Int8Mask, Lambda, Normalize, PerModel, Rescale, Scan, Weight, merge_method
from .trim import Band, Trim, thresholds, trimmed_vectors, trims

GlobalDensity = Annotated[float, Field(gt=0, le=1, description="share of the whole model's task vector that is kept")]


def of_tensor(scan: Scan, *, density: Sequence[float], rescale: bool = False) -> tuple[Trim | None, ...]:
    """For each model the cut that keeps `max(1, int(density * size))` elements; None where all stay."""
    return trims(scan, [Band(max(1, int(share * scan.size))) if share < 1 and scan.size else None for share in density], rescale)


def of_model(scan: Scan, *, density: Sequence[float]) -> tuple[Trim | None, ...]:
    """The same over the whole model, with all that tie with the cut."""
    return thresholds(scan, [max(1, int(share * scan.size)) if share < 1 and scan.size else None for share in density])


@merge_method("ties", statistic=of_tensor, linear=("lambda",))
def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[Trim | None],
    first: int = 0,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    normalize: Normalize = True,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus `lambda` times the mean of the trimmed task vectors that agree with the majority's sign.

    Of each tensor's task vector exactly `max(1, int(density * size))` elements stay: the largest, and of equal ones those with
    the lowest flat index (mergekit takes whichever an unstable sort puts first). The sign of the weighted sum is elected, zero
    elects +; `normalize` divides by the weights that agree. `rescale` restores the L1 norm of each trimmed vector (mergekit sums it
    in the dtype of the inputs, which overflows in float16). `int8_mask` has no effect. Source: arXiv 2306.01708, per tensor as in
    mergekit 0.1.5; `ties_global` is the paper's. Equal models with density 1 give that model.
    """
    return _elected(base, models, measured, first, weight, normalize, lambda_)


@merge_method("ties_global", statistic=of_model, scope="model", linear=("lambda",))
def ties_global(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[Trim | None],
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[GlobalDensity] = (0.2,),
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """TIES as in its paper: each task vector is trimmed over the whole model, not tensor by tensor.

    Of each flattened task vector the `int(density * size)` largest elements stay, and all that tie with the least of them, as in the
    authors' code; then as `ties`. It differs from that code in that an element whose sum is zero elects + instead of the sign of
    most elements, and that models can be weighted. The default density is the paper's 20 %. Source: arXiv 2306.01708, algorithm 1.
    Equal models with density 1 give that model.
    """
    return _elected(base, models, measured, 0, weight, normalize, lambda_)


def _elected(
    base: Tensor, models: Sequence[Tensor], measured: Sequence[Trim | None], first: int, weight: Sequence[float], normalize: bool, scale: float
) -> Tensor:
    merged = sign_consensus(trimmed_vectors(base, models, measured, first), weight, normalize)
    return merged.mul_(scale).add_(base.to(merged.dtype))
