"""Norms and biases in the blocks through which a text flows: what calibration may change beside the weights that it quantises."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mergekit_plus.checkpoint import Checkpoint, TensorSpec
from mergekit_plus.model import ModelMap, Role, layer_of


@dataclass(frozen=True)
class Inner:
    """A parameter of a block: what is stored of it, what it is, and its name in the block's module."""

    spec: TensorSpec
    role: Role
    inside: str


def inner_parameters(checkpoint: Checkpoint, roles: ModelMap, names: Collection[str]) -> dict[str, Inner]:
    """Those of these tensors that are in the blocks through which a text can flow."""
    found: dict[str, Inner] = {}
    for name in names:
        meaning = roles.tensors[name]
        place = layer_of(meaning.parameter) if meaning.parameter is not None else None
        if meaning.stack == roles.stack and meaning.parameter is not None and place is not None:
            stack, number = place
            found[name] = Inner(checkpoint.specs[name], meaning.role, meaning.parameter.removeprefix(f"{stack}.").removeprefix(f"{number}."))
    return found
