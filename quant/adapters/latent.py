"""Factors that train: full-precision latents whose coded form is what the model computes with, and what is stored in the end.

`Factors` stand beside a linear layer and add `scale * (x A^T) B^T` to its output, A and B as `straight_through` makes them of the latents. A `Latent`'s
are kept relative to a size that is given, so that a learning rate means the same for factors of any size.
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
from .coding import Coding, straight_through

NAME = "few_bits"  # of the module that is put beside a layer, while it trains


class Factors(nn.Module):
    """What stands beside one module while it trains. shape: the weight's, (out, in). coding: None trains factors as they are."""

    def __init__(self, shape: tuple[int, int], scale: float, coding: Coding | None) -> None:
        super().__init__()
        self.shape, self.scale, self.coding = shape, scale, coding
        self.off = False  # while a teacher answers
        self.plain: tuple[Tensor, Tensor] | None = None  # the teacher's own factors

    def rows(self) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B, by its columns, [rank, out], out of what trains."""
        raise NotImplementedError

    def stored(self) -> tuple[Tensor, Tensor]:
        """The same product as it is written."""
        return self.rows()

    def forward(self, x: Tensor) -> Tensor:
        if self.off and self.plain is not None:
            a, rows_b = self.plain
        else:
            a, rows_b = self.rows()
            if self.coding is not None:
                a, rows_b = straight_through(a, self.coding), straight_through(rows_b, self.coding)
        return functional.linear(functional.linear(x, a), rows_b.T) * self.scale


class Latent(Factors):
    """The latents of one module's A [rank, in] and B, by its columns, [rank, out]."""

    def __init__(self, a: Tensor, rows_b: Tensor, scale: float, coding: Coding | None, sizes: tuple[float, float]) -> None:
        super().__init__((rows_b.shape[1], a.shape[1]), scale, coding)
        self.a, self.rows_b, self.sizes = nn.Parameter((a / sizes[0]).float()), nn.Parameter((rows_b / sizes[1]).float()), sizes

    def rows(self) -> tuple[Tensor, Tensor]:
        """The latents in their own size."""
        return self.a * self.sizes[0], self.rows_b * self.sizes[1]


def small(shape: tuple[int, int], coding: Coding | None, generator: torch.Generator) -> Tensor:
    """What B begins as: zeros; where it is coded, from a normal of deviation 1e-3 cut at twice that, for zeros have no scale."""
    rows = torch.zeros(shape)
    return rows if coding is None else nn.init.trunc_normal_(rows, std=1e-3, a=-2e-3, b=2e-3, generator=generator)


def size_of(rows: Tensor) -> float:
    """The root mean square, 1 of zeros: what latents that start from something are relative to."""
    return float(rows.square().mean().sqrt()) or 1.0


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
    added: Tensor = getattr(owner, NAME)(inputs[0])
    return output + added


def _linear(model: Any, name: str, latent: Factors) -> Any:
    try:
        owner = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the model has no module '{name}', which the adapter changes; give the base that it was trained on") from None
    weight = getattr(owner, "weight", None)
    turned = type(owner).__name__ == "Conv1D"  # of transformers: [in, out]
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
