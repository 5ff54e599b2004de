"""Pruned tiny models, and checkpoints that are nothing but a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import tiny_model
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, TensorSpec
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import describe


@dataclass(frozen=True)
class Headers:
    """Tensors of which nothing but their specs can be had."""

    specs: Mapping[str, TensorSpec]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        raise AssertionError(f"{name} was read")


def described(config: Any) -> Checkpoint:
    """The headers that transformers would save for a causal model of this configuration."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    specs = {name: TensorSpec(name, "BF16", tuple(value.shape)) for name, value in model.named_parameters() if name not in tied}
    content = json.dumps({**config.to_dict(), "architectures": [type(model).__name__]}).encode()
    return Checkpoint("described", Headers(specs), {"config.json": content})


def pruned(tensors: Mapping[str, Tensor], names: tuple[str, ...], share: float = 0.5) -> dict[str, Tensor]:
    """The smallest weights of each of these tensors set to zero."""

    def cut(weight: Tensor) -> Tensor:
        return weight.masked_fill(weight.abs() < weight.abs().flatten().float().quantile(share), 0)

    return {name: cut(value) if name in names else value for name, value in tensors.items()}


def pruned_model(name: str, under: Path) -> tuple[Checkpoint, Any]:
    """A tiny model with half of its linear weights zero: the checkpoint, in memory, and the loaded model. Norms and biases are random too."""
    dense = tiny_model(name, under)
    noise = torch.Generator().manual_seed(5)
    tensors = {key: dense.read(key) for key in dense.specs}
    tensors = {key: value + 0.1 * torch.randn(value.shape, generator=noise) if value.ndim == 1 else value for key, value in tensors.items()}
    found = Checkpoint("pruned", Checkpoint.from_tensors(pruned(tensors, describe(dense).linears)).source, dense.files)
    return found, load_model(found)


WINDOWS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=WINDOWS).logits
        return found


def disturb(parameters: Mapping[str, Tensor], by: float = 0.05) -> None:
    """Move every trainable parameter, as training would."""
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(by * torch.randn(parameter.shape, generator=noise))
