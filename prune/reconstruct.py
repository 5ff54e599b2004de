"""Layer-wise reconstruction: after a block was compressed, a few of its parameters train until it computes again what the dense block did.

    targets = list(block.outputs())                               # of the dense block, before its weights change
    ... the block's weights are pruned, in place ...
    found = reconstruct(block, targets, ["biases", "norms", "mask_lora"], ReconstructOptions())
    found.tensors                                                 # {name: float32}, already in the block

After PERP's reconstruction: the mean squared error of the block's output, on the hidden states that the compressed blocks before it yield, by AdamW
under a linear schedule. It differs in that the rows are shuffled, without dropout or loss scaling, and in that the best state is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.calibration import Block
from mergekit_plus.errors import OptionError
from mergekit_plus.training import TrainOptions, train

from .perp import VARIANTS, Site, adapt, sites_of_block

Granularity = Literal["block", "sublayer", "linear"]


class Batches(Protocol):
    """Hidden states, batch by batch: a list, or `HiddenStates` in a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Tensor: ...


@dataclass(frozen=True)
class ReconstructOptions:
    """What is made equal again: a block's output, that of each of its sublayers (attention, MLP), or that of each linear layer. A step of the training
    reads one batch of hidden states."""

    granularity: Granularity = "block"
    variant_options: Mapping[str, Any] = field(default_factory=dict)
    training: TrainOptions = field(default_factory=lambda: TrainOptions(steps=50, lr=1e-3, batch=1, evaluations=2, dropout=False))


@dataclass(frozen=True)
class Reconstructed:
    """The changed tensors by the checkpoint's names, float32; and the mean squared error before and after, of the block's output, or the mean over parts."""

    tensors: dict[str, Tensor]
    before: float
    after: float


def reconstruct(
    block: Block, dense_outputs: Batches, variants: Sequence[str], options: ReconstructOptions, *, dense: nn.Module | None = None
) -> Reconstructed:
    """Train what these variants train of a compressed block, merged into its module in place; zeros of its linear weights stay.

    `dense_outputs`: what the block as it was makes of `block.inputs`, batch by batch, for the granularity "block"; the finer ones need the
    module as it was, `dense` (a copy made before its weights changed), and keep their inputs and targets in memory. Variants with nothing to train in
    a block (the head's) are passed over.
    Errors: OptionError where nothing is left to train, or `dense` is missing.
    """
    sites = sites_of_block(block.module, block.name, block.weights)
    if options.granularity == "block":
        rows = len(block.inputs)

        def output(module: Any, number: int) -> Tensor:
            return block.forward(number, block.inputs[number])

        found = [_fit(block.module, sites, variants, options, output, dense_outputs, rows)]
    else:
        if dense is None:
            raise OptionError(f"reconstruction by {options.granularity} needs the dense block beside the compressed one")
        found = []
        for path in _parts(sites, options.granularity):
            inside = [replace(site, parameter=site.parameter.removeprefix(f"{path}.")) for site in sites if site.parameter.startswith(f"{path}.")]
            calls, targets = _recorded(block, dense, path)
            part = block.module.get_submodule(path)

            def output_of_part(module: Any, number: int, calls: list[_Call] = calls) -> Tensor:
                return _first(module(*calls[number][0], **calls[number][1]))

            if any(VARIANTS[name].trains(site) for name in variants for site in inside):
                found.append(_fit(part, inside, variants, options, output_of_part, targets, len(targets)))
        if not found:
            raise OptionError(f"{', '.join(variants)}: nothing of the kind is inside a {options.granularity}")
    tensors = {name: tensor for one in found for name, tensor in one.tensors.items()}
    return Reconstructed(tensors, math.fsum(one.before for one in found) / len(found), math.fsum(one.after for one in found) / len(found))


def _fit(
    module: nn.Module,
    sites: Sequence[Site],
    variants: Sequence[str],
    options: ReconstructOptions,
    output: Callable[[Any, int], Tensor],
    targets: Batches,
    rows: int,
) -> Reconstructed:
    """Train a module until its outputs are near the targets."""
    here = [name for name in variants if any(VARIANTS[name].trains(site) for site in sites)]
    if not here:
        raise OptionError(f"{', '.join(variants)}: a block has nothing of the kind to train")
    adapted = adapt(module, sites, here, {name: value for name, value in options.variant_options.items() if _has_option(here, name)}, options.training.seed)

    def error(model: Any, numbers: Tensor) -> Tensor:
        errors = [functional.mse_loss(made := output(model, int(number)), targets[int(number)].to(made.device)) for number in numbers]
        return torch.stack(errors).mean()

    def evaluate() -> float:
        with torch.no_grad():
            sizes = [targets[number].numel() for number in range(rows)]
            return math.fsum(error(module, torch.tensor([number])).item() * size for number, size in enumerate(sizes)) / sum(sizes)

    record = train(module, adapted.parameters, error, torch.arange(rows), options.training, masks=adapted.masks, evaluate=evaluate)
    return Reconstructed(adapted.merge(), record.evaluations[0][1], record.value)


def _has_option(variants: Sequence[str], name: str) -> bool:
    return any(name in VARIANTS[variant].options.table for variant in variants)


def _parts(sites: Sequence[Site], granularity: Granularity) -> list[str]:
    """The paths in the block of what is made equal: its children that hold linear layers, or those layers."""
    paths = [site.parameter.rpartition(".")[0] for site in sites if site.role == "linear"]
    return list(dict.fromkeys(paths if granularity == "linear" else [path.partition(".")[0] for path in paths]))


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _recorded(block: Block, dense: nn.Module, path: str) -> tuple[list[_Call], list[Tensor]]:
    """What a part of the block is called with for each batch, in the block as it is now, and what the dense part makes of it."""
    calls: list[_Call] = []
    hook = block.module.get_submodule(path).register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    was = dense.get_submodule(path)
    try:
        with torch.no_grad():
            for _ in block.outputs():
                pass
            return calls, [_first(was(*args, **kwargs)) for args, kwargs in calls]
    finally:
        hook.remove()


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
