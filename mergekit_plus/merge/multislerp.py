"""Between any number of models on the sphere, weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from .combine import blend, offsets, refuse_zero_sum, shares
from .method import PerModel, Scan, Weight, merge_method
from .sphere import barycentre, gram

NormalizeWeights = Annotated[bool, Field(description="divide the weights by their sum")]
Eps = Annotated[float, Field(gt=0, description="added to the norms; a mean direction shorter than this is none")]


def measure(scan: Scan, *, weight: Sequence[float], normalize_weights: bool, eps: float) -> list[float]:
    """How much of each model (or task vector) goes in."""
    if len(weight) == 1:
        return [1.0]
    return barycentre(gram(scan, offsets), shares(weight, normalize_weights), eps)


def refuse(options: Mapping[str, Any]) -> None:
    refuse_zero_sum({**options, "normalize": options["normalize_weights"]})


@merge_method("multislerp", statistic=measure, check=refuse)
def multislerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    measured: Sequence[float],
    weight: PerModel[Weight] = (1.0,),
    normalize_weights: NormalizeWeights = True,
    eps: Eps = 1e-8,
) -> Tensor:
    """The weighted barycentre on the sphere of the models, or of their task vectors where a base is given, tensor by tensor.

    The direction of `sum of w_i u_i` with the unit vectors u_i, at the length `sum of w_i |v_i|`. mergekit goes on to interpolate in the
    tangent space at that direction, where the weighted sum of the tangents is zero: its result is this one, plus rounding. Where the
    directions cancel it refuses more than two models; here they are averaged. Source: mergekit 0.1.5. Equal models give that model.
    """
    if base is None or len(models) == 1:
        return blend(models, measured)
    merged = blend(offsets(base, models), measured)
    return merged.add_(base.to(merged.dtype))

