"""DELLA: drop elements of the task vectors at random, the small ones of a row more often, make up for it, then merge them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import OptionError
from ..noise import Noise
from ..statistics import sums
from .combine import refuse_zero_sum, shares, sign_consensus, weighted_sum
from .method import Density, Int8Mask, Lambda, Normalize, PerModel, Scan, Weight, merge_method, task_vectors

Epsilon = Annotated[float, Field(ge=0, lt=0.5, description="how far the chance to stay goes below and above `density`, from a row's smallest to its largest")]
RescaleHow = Annotated[
    bool | Literal["l1"],
    Field(description="make up for the elements that were dropped: true divides each by its chance to stay, l1 scales a tensor to its L1 norm"),
]


def refuse(options: Mapping[str, Any]) -> None:
    """Errors: OptionError where a chance would leave (0, 1)."""
    for density, epsilon in zip(options["density"], options["epsilon"], strict=True):
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise OptionError(f"density {density:g} with epsilon {epsilon:g}: density - epsilon and density + epsilon must lie between 0 and 1")


def refuse_linear(options: Mapping[str, Any]) -> None:
    refuse(options)
    refuse_zero_sum(options)


def factors(scan: Scan, *, density: Sequence[float], epsilon: Sequence[float], rescale: bool | str) -> list[float]:
    """By what each thinned task vector is multiplied: 1, or what restores its L1 norm in expectation."""
    which = [index for index, share in enumerate(density) if share < 1] if rescale == "l1" else []
    found = [1.0] * len(density)
    if not which:
        return found

    def norms(base: Tensor | None, models: Sequence[Tensor]) -> list[float]:
        assert base is not None
        rows = [(vector.abs(), chances(vector, density[index], epsilon[index])) for index, vector in enumerate(task_vectors(base, models)) if index in which]
        return [float(row.sum(dtype=torch.float64)) for row, _ in rows] + [float((row * chance).sum()) for row, chance in rows]

    totals = sums(scan, norms)
    for place, index in enumerate(which):
        kept = totals[len(which) + place]
        found[index] = totals[place] / kept if kept else 1.0
    return found


def chances(vector: Tensor, density: float, epsilon: float) -> Tensor:
    """Each element's chance to stay, in float64: by its rank in the row, from `density - epsilon` to `density + epsilon`."""
    width = vector.shape[-1] if vector.dim() else 1
    if width < 2 or not vector.numel():
        return torch.full(vector.shape, density, dtype=torch.float64, device=vector.device)
    rows = vector.abs().reshape(-1, width)
    order = rows.argsort(dim=1, stable=True)
    steps = torch.linspace(density - epsilon, density + epsilon, width, dtype=torch.float64, device=vector.device)
    return torch.empty(rows.shape, dtype=torch.float64, device=vector.device).scatter_(1, order, steps.expand_as(order)).reshape(vector.shape)


@merge_method("della", unit="row", statistic=factors, check=refuse, linear=("lambda",))
def della(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[float],
    noise: Noise,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    epsilon: PerModel[Epsilon] = (0.15,),
    normalize: Normalize = True,
    rescale: RescaleHow = True,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus the mean of task vectors, thinned at random by magnitude, that agree with the majority's sign.

    In each row (along the last dimension; a tensor of one dimension is one row) the element of rank r out of n, smallest first, stays
    with probability `density - epsilon + 2 epsilon r / (n - 1)`; with density 1 all stay. `rescale` divides what stays by that
    probability, as the paper does, so that nothing changes in expectation. mergekit multiplies the whole tensor by what restores its L1
    norm instead, which makes the small elements smaller and the large ones larger: `rescale: l1`, here with the expectation of that
    factor. Of equal magnitudes the first rank lower. mergekit ranks tensors of three dimensions along the second.
    `int8_mask` has no effect. Source: arXiv 2406.11617 with the parameters of mergekit 0.1.5. Equal models with density 1 give that model.
    """
    merged = sign_consensus(_thinned(base, models, measured, noise, density, epsilon, rescale), weight, normalize)
    return merged.mul_(lambda_).add_(base.to(merged.dtype))


@merge_method("della_linear", unit="row", statistic=factors, check=refuse_linear, linear=("weight", "lambda"))
def della_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    measured: Sequence[float],
    noise: Noise,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    epsilon: PerModel[Epsilon] = (0.15,),
    normalize: Normalize = False,
    rescale: RescaleHow = True,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus a weighted sum of task vectors, thinned at random by magnitude (see della).

    `int8_mask` has no effect. Source: arXiv 2406.11617 with the parameters of mergekit 0.1.5. Equal models with density 1 and
    normalized weights give that model.
    """
    weights = [lambda_ * share for share in shares(weight, normalize)]
    merged = weighted_sum(_thinned(base, models, measured, noise, density, epsilon, rescale), weights)
    return merged.add_(base.to(merged.dtype))


def _thinned(
    base: Tensor, models: Sequence[Tensor], measured: Sequence[float], noise: Noise, density: Sequence[float], epsilon: Sequence[float], rescale: bool | str
) -> Iterator[Tensor]:
    for index, vector in enumerate(task_vectors(base, models)):
        if density[index] < 1:
            chance = chances(vector, density[index], epsilon[index])
            vector.mul_(noise.uniform(index, vector) < chance)
            if rescale is True:
                vector.div_(chance)
            elif rescale:
                vector.mul_(measured[index])
        yield vector
