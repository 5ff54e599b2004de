"""An adapter beside the layers of a model, where it cannot be added to their weights: packed ones stay as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.adapters import Adapter
from mergekit_plus.adapters.peft import refuse_misfits
from mergekit_plus.errors import CheckpointError

Factors = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank] with the scale in it


def attach(model: nn.Module, adapter: Adapter, dtype: torch.dtype, device: str = "cpu") -> None:
    """Let every layer that an adapter is for add `scale * B A x` to its output from now on; packed adapters are expanded once.

    Errors: CheckpointError for an adapter that is more than products beside linear layers, or does not fit the model.
    """
    if not adapter.plain:
        raise CheckpointError(f"{adapter.label} is more than products B A beside linear layers; dequantize the model first, so that it can be applied")
    owners, problems = dict(model.named_modules()), []
    for name, module in adapter.lowrank.items():
        shape = adapter.checkpoint.specs[module.b].shape[0], adapter.checkpoint.specs[module.a].shape[1]
        owner: Any = owners.get(name)
        own = (owner.out_features, owner.in_features) if hasattr(owner, "in_features") else None
        if own != shape:
            problems.append(f"{name} is a linear layer {shape}, in the model {own or 'none'}")
    refuse_misfits(f"{adapter.label} does not fit the model", problems, "Give the model that it was trained on")
    for name, module in adapter.lowrank.items():
        a, b = adapter.checkpoint.read(module.a), adapter.checkpoint.read(module.b).float() * module.scale
        owners[name].register_forward_hook(partial(_add, (a.to(device, dtype), b.to(device, dtype))))


def _add(factors: Factors, owner: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    a, b = factors
    return output + functional.linear(functional.linear(inputs[0], a), b)
