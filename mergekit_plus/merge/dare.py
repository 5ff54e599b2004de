"""DARE: drop elements of the task vectors at random, scale up the rest, then merge them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..noise import Noise
from .combine import refuse_zero_sum, shares, sign_consensus, weighted_sum
from .method import Density, Int8Mask, Lambda, Normalize, PerModel, Rescale, Weight, merge_method, task_vectors


@merge_method("dare_linear", check=refuse_zero_sum, linear=("weight", "lambda"))
def dare_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    noise: Noise,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus a weighted sum of task vectors, of which each element stays with probability `density`.

    `rescale` divides what stays by `density`, as the paper does, so that the expectation is task arithmetic's (mergekit restores
    the L1 norm instead, which for large tensors is nearly the same). An element's mask depends on the seed, the tensor's name, the
    model's place and the element's index, and on nothing else. `int8_mask` has no effect. Source: arXiv 2311.03099.
    """
    weights = [lambda_ * share for share in shares(weight, normalize)]
    merged = weighted_sum(_dropped(base, models, noise, density, rescale), weights)
    return merged.add_(base.to(merged.dtype))


@merge_method("dare_ties", linear=("lambda",))
def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    noise: Noise,
    weight: PerModel[Weight] = (1.0,),
    density: PerModel[Density] = (1.0,),
    normalize: Normalize = False,
    rescale: Rescale = True,
    lambda_: Lambda = 1.0,
    int8_mask: Int8Mask = False,
) -> Tensor:
    """The base plus the sum of randomly thinned task vectors that agree with the majority's sign.

    Each element stays with probability `density`, divided by it where `rescale` (see dare_linear); then the sign of the weighted
    sum is elected and the terms that have it are summed, or averaged where `normalize`. `int8_mask` has no effect.
    Sources: arXiv 2311.03099 and 2306.01708.
    """
    merged = sign_consensus(_dropped(base, models, noise, density, rescale), weight, normalize)
    return merged.mul_(lambda_).add_(base.to(merged.dtype))


def _dropped(base: Tensor, models: Sequence[Tensor], noise: Noise, density: Sequence[float], rescale: bool) -> Iterator[Tensor]:
    for index, vector in enumerate(task_vectors(base, models)):
        share = density[index]
        if share < 1:
            vector.mul_(noise.keep(index, share, vector))
            if rescale:
                vector.div_(share)
        yield vector
