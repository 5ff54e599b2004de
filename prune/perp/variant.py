"""How a retraining variant is written: tensors that train themselves, or one file with one module that changes a weight.

    @adapter("scale_lora")
    class ScaleLora(Adapter):
        def __init__(self, weight, generator, *, ...options): ...
        def forward(self, weight) -> Tensor: ...                  # what the layer computes with while it trains

An adapter sees weights [out, in] in float32, starts as the identity, and its parameters train while the weight does not. Where the weight that is
kept afterwards is not the one that it trained with, it says so in `merged`. Zeros of the weight are zeros of the merged one, unless the adapter
`densifies`; whoever merges sees to it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.model import ModelMap, Role, describe, meta_model
from mergekit_plus.options import Options
from mergekit_plus.registry import Registry

INSIDE = ("weight", "generator")


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor that may train: its name in the checkpoint, where it is in the model, what it is, and its shape in the checkpoint.

    The role "voice": a factor of what a place of a folded model has beside the weights that it shares.
    """

    name: str
    parameter: str
    role: Role | Literal["voice"]
    shape: tuple[int, ...]
    transposed: bool = False  # stored [in, out]
    tied: bool = False  # a head that is the embeddings, too
    also: tuple[str, ...] = ()  # where else in the model the same parameter is: blocks that share it

    @property
    def is_bias(self) -> bool:
        return self.parameter.rpartition(".")[2] == "bias"


class Adapter(nn.Module, ABC):
    """Changes a weight [out, in]."""

    densifies = False

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """What the layer computes with while it trains."""

    def merged(self, weight: Tensor) -> Tensor:
        """The weight that is kept; that of `forward` where nothing else is said."""
        changed: Tensor = self(weight)
        return changed


@dataclass(frozen=True)
class Variant:
    """A way to retrain: which tensors, and what stands on them; None where they train themselves."""

    name: str
    summary: str
    trains: Callable[[Site], bool]
    options: Options
    adapter: type[Adapter] | None = None

    @property
    def densifies(self) -> bool:
        """Whether zeros of a weight are lost."""
        return self.adapter is not None and self.adapter.densifies

    def make(self, weight: Tensor, generator: torch.Generator | None, options: Mapping[str, Any]) -> Adapter:
        """The adapter of a weight [out, in]; on the meta device where that is, to be counted."""
        assert self.adapter is not None
        own = {name: value for name, value in options.items() if name in self.options.table}
        return self.adapter(weight, generator, **self.options.check(own))


VARIANTS: Registry[Variant] = Registry("retraining variant")


def adapter(name: str, role: Role = "linear") -> Callable[[type[Adapter]], type[Adapter]]:
    """Register an adapter of the weights of one role under a name."""

    def register(kind: type[Adapter]) -> type[Adapter]:
        summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
        VARIANTS.register(name, Variant(name, summary, lambda site: site.role == role and not site.is_bias, Options(name, kind.__init__, INSIDE), kind))
        return kind

    return register


def _themselves(name: str, summary: str, trains: Callable[[Site], bool]) -> None:
    VARIANTS.register(name, Variant(name, summary, trains, Options(name, lambda: None)))


_themselves("biases", "Every bias trains, those of norms among them.", lambda site: site.is_bias)
_themselves("norms", "The weights and biases of norms train.", lambda site: site.role == "norm")
_themselves("lora", "The low-rank voices train that blocks of a compact model have beside the weights that they share.", lambda site: site.role == "voice")
_themselves("full", "Everything trains, linear layers under their mask: the reference that the others are measured by.", lambda site: True)


def sites_of(checkpoint: Checkpoint) -> tuple[Site, ...]:
    """The tensors of a checkpoint that may train, in its order; reads headers and config.json only.

    What transformers packs under another shape (experts) has no place of its own in the model, and is left out. A head that is tied to the embeddings
    is a site of its own.
    Errors: CheckpointError for a model that transformers does not know.
    """
    model, known = meta_model(checkpoint), describe(checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    aliases = {name for group in known.tied for name in group[1:]}
    found = []
    for name, spec in checkpoint.specs.items():
        meaning = known.tensors[name]
        if meaning.parameter is not None and shapes.get(meaning.parameter) == spec.shape and spec.is_float and name not in aliases:
            found.append(Site(name, meaning.parameter, meaning.role, spec.shape, meaning.transposed))
    return (*found, *_tied_heads(model, known, shapes))


def _tied_heads(model: Any, known: ModelMap, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Site]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    path = next((f"{path}.weight" for path, module in model.named_modules() if module is head), None)
    if isinstance(head, nn.Linear) and path is not None and any(path in group for group in known.tied):
        yield Site(path, path, "head", shapes[path], tied=True)


def sites_of_block(module: nn.Module, name: str, linears: Mapping[str, object]) -> tuple[Site, ...]:
    """The tensors of one block that may train; `linears` are named as in the checkpoint, under the block's `name`; `parameter` is the place in the block."""
    from transformers.pytorch_utils import Conv1D

    found = []
    for path, parameter in module.named_parameters():
        owner, _, leaf = path.rpartition(".")
        inside = module.get_submodule(owner)
        norm = "norm" in type(inside).__name__.lower() or (leaf == "weight" and parameter.ndim == 1)
        full = f"{name}.{path}"
        role: Role = "linear" if full in linears else "norm" if norm else "bias" if leaf == "bias" else "other"
        found.append(Site(full, path, role, tuple(parameter.shape), isinstance(inside, Conv1D) and role == "linear"))
    return tuple(found)
