"""Factors that train: full-precision latents whose coded form is what the model computes with, and what is stored in the end.

`Factors` stand beside a linear layer and add `scale * (x A^T) B^T` to its output, A and B as `straight_through` makes them of the latents; with DoRA's
lengths they bring every row of `W + scale * B A` to its length, which as in DoRA (arXiv 2402.09353, 4.3) counts as a constant when gradients are taken. A
`Latent`'s are kept relative to sizes that are given, for each component or for all, so that a learning rate means the same whatever their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.errors import CheckpointError

from ..linear import QuantLinear
from .coding import Coding, positive, straight_through

NAME = "few_bits"  # of the module that is put beside a layer, while it trains


class Factors(nn.Module):
    """What stands beside one module while it trains. shape: the weight's, (out, in). coding: None trains factors as they are."""

    def __init__(self, shape: tuple[int, int], scale: float, coding: Coding | None, lengths: Tensor | None = None) -> None:
        super().__init__()
        self.shape, self.scale, self.coding = shape, scale, coding
        self.lengths = lengths  # of the rows, where the adapter is one of DoRA
        self.off = False  # while a teacher answers
        self.plain: tuple[Tensor, Tensor] | None = None  # the teacher's own factors

    def rows(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B, by its columns, [rank, out], out of what trains."""
        raise NotImplementedError

    def stored(self) -> tuple[Tensor, Tensor]:
        """The same product as it is written."""
        return self.rows()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B's columns as the model computes with them: the coded latents, or the teacher's own."""
        if self.off and self.plain is not None:
            return self.plain
        a, rows_b = self.rows()
        return (a, rows_b) if self.coding is None else (straight_through(a, self.coding), straight_through(rows_b, self.coding))

    def forward(self, x: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of the layer with the adapter; what the layer itself gives is `output`, of weight [out, in] and bias."""
        a, rows_b = self.factors()
        changed: Tensor = output + functional.linear(functional.linear(x, a * self.scale), rows_b.T)  # scaled where it is smallest
        if self.lengths is None:
            return changed
        with torch.no_grad():
            factors: Tensor = self.lengths / torch.linalg.vector_norm(weight + self.scale * (rows_b.T @ a), dim=1)
        return changed * factors if bias is None else (changed - bias) * factors + bias


class Latent(Factors):
    """The latents of one module's A [rank, in] and B, by its columns, [rank, out]."""

    def __init__(
        self, a: Tensor, rows_b: Tensor, scale: float, coding: Coding | None, sizes: tuple[Tensor, Tensor], lengths: Tensor | None = None
    ) -> None:
        super().__init__((rows_b.shape[1], a.shape[1]), scale, coding, lengths)
        self.a, self.rows_b, self.sizes = nn.Parameter((a / sizes[0]).float()), nn.Parameter((rows_b / sizes[1]).float()), sizes

    def rows(self) -> tuple[Tensor, Tensor]:
        """The latents in their own size."""
        return self.a * self.sizes[0], self.rows_b * self.sizes[1]


def small(shape: tuple[int, int], coding: Coding | None, generator: torch.Generator) -> Tensor:
    """What B begins as: zeros; where it is coded, from a normal of deviation 1e-3 cut at twice that, for zeros have no scale."""
    rows = torch.zeros(shape)
    return rows if coding is None else nn.init.trunc_normal_(rows, std=1e-3, a=-2e-3, b=2e-3, generator=generator)


def sizes_of(rows: Tensor) -> Tensor:
    """The root mean square of each component, [rank, 1]; 1 of zeros: what latents that start from something are relative to."""
    return positive(rows.square().mean(1, keepdim=True).sqrt()).float()


@contextmanager
def attached(model: Any, latents: Mapping[str, Factors]) -> Iterator[dict[str, nn.Parameter]]:
    """The model with latents beside its modules; their parameters, by name. Afterwards it is as it was.

    Errors: CheckpointError for a module that the model does not have, or that is no linear layer of the latents' shape.
    """
    handles, owners = [], []
    parameters: dict[str, nn.Parameter] = {}
    try:
        for name, latent in latents.items():
            owner = _linear(model, name, latent)
            owner.add_module(NAME, latent)
            owners.append(owner)
            handles.append(owner.register_forward_hook(_add))
            known = {id(parameter) for parameter in parameters.values()}  # pools are those of several modules
            parameters |= {f"{name}.{leaf}": parameter for leaf, parameter in latent.named_parameters() if id(parameter) not in known}
        yield parameters
    finally:
        for handle in handles:
            handle.remove()
        for owner in owners:
            delattr(owner, NAME)


def _add(owner: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    weight = owner.weight.T if _is_turned(owner) else owner.weight
    changed: Tensor = getattr(owner, NAME)(inputs[0], output, weight, owner.bias)
    return changed


def _is_turned(owner: Any) -> bool:
    """Whether the weight is [in, out]: that of transformers' Conv1D."""
    return type(owner).__name__ == "Conv1D"


def _linear(model: Any, name: str, latent: Factors) -> Any:
    try:
        owner = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the model has no module '{name}', which the adapter changes; give the base that it was trained on") from None
    weight = getattr(owner, "weight", None)
    turned = _is_turned(owner)
    found = None if weight is None or weight.ndim != 2 else tuple(weight.shape[::-1] if turned else weight.shape)
    if not (turned or isinstance(owner, nn.Linear | QuantLinear)) or found != latent.shape:
        raise CheckpointError(f"{name}: the adapter is for a linear layer {latent.shape}, the model has {type(owner).__name__} {found or ''}")
    return owner


class Teacher:
    """The same model as its latents were given: with the plain factors of a `Latent`, or, of one without, with none."""

    def __init__(self, model: Any, latents: Mapping[str, Factors]) -> None:
        self.model, self.latents = model, latents

    def __call__(self, **arguments: Any) -> Any:
        for latent in self.latents.values():
            latent.off = True
        try:
            with torch.no_grad():
                return self.model(**arguments)
        finally:
            for latent in self.latents.values():
                latent.off = False
