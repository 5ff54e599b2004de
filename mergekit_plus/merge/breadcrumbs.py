"""Model Breadcrumbs: drop the outliers and the small ones of each task vector, then merge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from .combine import refuse_zero_sum, shares, sign_consensus, weighted_sum
from .method import Density, Int8Mask, Lambda, Normalize, PerModel, Rescale, Scan, Weight, merge_method
from .trim import Band, Trim, trimmed_vectors, trims

Gamma = Annotated[float, Field(ge=0, lt=1, description="share of the task vector that is dropped as outliers, the largest")]


def bands(scan: Scan, *, density: Sequence[float], gamma: Sequence[float], rescale: bool) -> tuple[Trim | None, ...]:
    """For each model the cuts that keep `int(density * size)` elements below the `int(gamma * size)` largest, fewer of those where need be."""
    found: list[Band | None] = []
    for share, outliers in zip(density, gamma, strict=True):
        kept = int(share * scan.size)
        skipped = min(int(outliers * scan.size), scan.size - kept)
        found.append(Band(kept, skipped) if share < 1 and scan.size else None)
    return trims(scan, found, rescale)


@merge_method("breadcrumbs", statistic=bands, check=refuse_zero_sum, linear=("weight", "lambda"))
def breadcrumbs(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[Trim | None],
    first: int = 0,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    gamma: PerModel[Gamma] = (0.01,),
    normalize: Normalize = False,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus a weighted sum of task vectors without their largest and their smallest elements.

    Of each tensor's task vector `int(density * size)` elements stay (none of a tensor too small for one), those after the
    `int(gamma * size)` largest; with density 1 all of it stays, outliers too. Of equal magnitudes the first count as the larger,
    where mergekit's unstable sort decides. `rescale` restores the L1 norm. `int8_mask` has no effect. Source: arXiv 2312.06795 with
    the parameters of mergekit 0.1.5. Equal models with density 1 and normalized weights give that model.
    """
    weights = [lambda_ * share for share in shares(weight, normalize)]
    merged = weighted_sum(trimmed_vectors(base, models, measured, first), weights)
    return merged.add_(base.to(merged.dtype))


@merge_method("breadcrumbs_ties", statistic=bands, linear=("lambda",))
def breadcrumbs_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[Trim | None],
    first: int = 0,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    gamma: PerModel[Gamma] = (0.01,),
    normalize: Normalize = False,
    rescale: Rescale = False,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus the sum of breadcrumbs (see breadcrumbs) that agree with the majority's sign, or their mean where `normalize`.

    The sign of the weighted sum is elected, zero elects +. `int8_mask` has no effect. Sources: arXiv 2312.06795 and 2306.01708, as
    mergekit 0.1.5 puts them together. Equal models with density 1 and `normalize` give that model.
    """
    merged = sign_consensus(trimmed_vectors(base, models, measured, first), weight, normalize)
    return merged.mul_(lambda_).add_(base.to(merged.dtype))
