"""From several task vectors to one: their weighted sum, or the weighted sum of those that agree with the majority's sign."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .method import scaled, task_vectors, working_dtype


def refuse_zero_sum(options: Mapping[str, Any]) -> None:
    """A method's check. Errors: OptionError where `normalize` would divide by weights that cancel."""
    weights: Sequence[float] = options["weight"]
    if options["normalize"] and abs(math.fsum(weights)) <= 1e-9 * math.fsum(map(abs, weights)):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise OptionError(f"weight: {shown} sum to zero, so they cannot be normalized; set normalize to false, or other weights")


def shares(weights: Sequence[float], normalize: bool) -> list[float]:
    """The weights, divided by their sum where `normalize`."""
    total = math.fsum(weights) if normalize else 1.0
    return [weight / total for weight in weights]


def offsets(base: Tensor | None, models: Sequence[Tensor]) -> Sequence[Tensor]:
    """The task vectors, new; the models themselves, borrowed, where there is no base."""
    return models if base is None else list(task_vectors(base, models))


def blend(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum of w_i t_i` in the working dtype, as a new tensor; the tensors stay as they are."""
    merged = scaled(tensors[0], weights[0], working_dtype(*tensors))
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged.add_(tensor, alpha=weight)
    return merged


def weighted_sum(vectors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum of w_i d_i`. Takes over the vectors, which must be the caller's own."""
    total: Tensor | None = None
    for vector, weight in zip(vectors, weights, strict=True):
        total = vector.mul_(weight) if total is None else total.add_(vector, alpha=weight)
    assert total is not None
    return total


def sign_consensus(vectors: Iterable[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Elect the sign of `sum of w_i d_i` for each element (zero elects +) and sum the terms `w_i d_i` that have it.

    normalize: divide by the weights of those terms, where they do not cancel (the "disjoint mean" of TIES, section 3 of
    arXiv 2306.01708). Zeros agree with nobody and are not counted. Takes over the vectors, which must be the caller's own.
    """
    terms = [vector.mul_(weight) for vector, weight in zip(vectors, weights, strict=True)]
    total = terms[0] + terms[1] if len(terms) > 1 else terms[0].clone()
    for term in terms[2:]:
        total += term
    sign = torch.ones_like(total).copysign_(total)
    agreed = counted = total
    for index, (term, weight) in enumerate(zip(terms, weights, strict=True)):
        term.mul_(sign).clamp_(min=0)
        if normalize:
            votes = term.sign()
            counted = counted.add_(votes, alpha=weight) if index else votes.mul_(weight)
        agreed = agreed.add_(term) if index else term
    if normalize:
        cancelled = counted.sign()
        counted += cancelled.mul_(cancelled).neg_().add_(1)  # 0 becomes 1; masks of bool are many times slower
        agreed /= counted
    return agreed.mul_(sign)
