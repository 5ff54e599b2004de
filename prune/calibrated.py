"""Pruning that looks at a text: block after block, on the inputs that the pruned blocks before it yield."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.calibration import Block, HiddenStates, walk
from mergekit_plus.checkpoint import Checkpoint, Deferred, Step, TensorSpec, Work, copy_step
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.checkpoint.finite import is_finite, nonfinite
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.moments import Moments

from .masks import Sparsity, lowest, lowest_of_rows
from .perp import VARIANTS, check_variants, chosen_sites, sites_of
from .plan import DEFAULTS, Chosen, PruneOptions, as_scores, check_fit, choose, prune, pruned_checkpoint, scope_of
from .pruner import PRUNERS, Pruner, Scope
from .reconstruct import ReconstructOptions, reconstruct
from .structured import Site, by_gram, refit, sites, smaller_checkpoint

Process = Callable[[Block, Work], dict[str, Tensor]]


@dataclass(frozen=True)
class Repair:
    """That a few parameters of each block train, once it is pruned, until it computes again what it did: these variants of retraining."""

    variants: tuple[str, ...] = ("biases", "norms", "mask_lora")
    options: ReconstructOptions = field(default_factory=ReconstructOptions)


def prune_on(
    checkpoint: Checkpoint,
    ids: Tensor,
    sparsity: Sparsity | Mapping[str, Sparsity],
    method: str = "wanda",
    scope: str | None = None,
    options: Mapping[str, object] | None = None,
    how: PruneOptions = DEFAULTS,
    repair: Repair | None = None,
) -> Checkpoint:
    """As `plan.prune`, by any method, while a text flows through the model: int64 ids [windows, window]. Computed when it is first read.

    The moments of a block's inputs are taken while it is whole, on what the pruned blocks before it yield; then all of its layers are pruned, and repaired.
    Linear layers outside of the blocks through which the text flows stay as they are. `sparsity` may be one for each weight, by its name, where weights are
    compared within rows or a tensor. A method that needs no text is here for the repair alone.
    """
    pruner = PRUNERS[method]
    arguments = pruner.options.check(options or {})
    if not pruner.calibrated and repair is None:
        raise OptionError(f"{method} needs no calibration text")
    chosen, notes = _seen(choose(checkpoint, how))
    asked = dict.fromkeys(chosen.names, sparsity) if isinstance(sparsity, Sparsity) else dict(sparsity)
    first = asked[chosen.names[0]]
    check_fit(chosen, first)
    within = scope_of(pruner, first, scope)
    by_itself = None if pruner.calibrated else prune(checkpoint, first, method, scope, options, how)
    changed = dict.fromkeys([*chosen.names, *(_changed(chosen, repair) if repair else ())])
    dtypes = {name: TORCH_DTYPES[checkpoint.specs[name].dtype] for name in changed}

    def process(block: Block, work: Work) -> dict[str, Tensor]:
        inside = set(block.names)
        here = [name for name in chosen.names if name in inside]
        targets = HiddenStates.write(work.folder / f"targets-{block.index}", block.outputs()) if repair else None
        dense = deepcopy(block.module) if repair and repair.options.granularity != "block" else None
        if by_itself is not None:
            pruned = {name: by_itself.read(name) for name in here}
            pruned = {name: weight.T if chosen.turned(name) else weight for name, weight in pruned.items()}
        else:
            measured = block.moments([name for name in here if name in block.weights])
            stored = {name: _stored(chosen, block, name, how) for name in here}
            moments = {name: measured.get(name) or Moments.unseen(weight) for name, weight in stored.items()}
            pruned = prune_block(stored, moments, pruner, asked, within, arguments)
        for name in here:
            if name in block.weights:
                block.weights[name].copy_(pruned[name])
        found = {name: weight.T.contiguous().cpu() if chosen.turned(name) else weight.contiguous().cpu() for name, weight in pruned.items()}
        if repair and targets is not None:
            for name, weight in reconstruct(block, targets, repair.variants, repair.options, dense=dense).tensors.items():
                found[name] = weight.to(dtypes[name]).cpu()
                weight.copy_(found[name])  # what the blocks behind it see is what is stored
            targets.path.unlink()
        left = [name for name in changed if name in inside and name not in found]  # norms, where layers were repaired one by one
        return found | {name: checkpoint.read(name) for name in left}

    made = _walked(checkpoint, [checkpoint.specs[name] for name in changed], ids, process, how.device)
    steps: list[Step] = [copy_step(made, name) for name in changed] + [copy_step(checkpoint, name) for name in chosen.copied if name not in changed]
    result = pruned_checkpoint(chosen, steps)
    label = f"{checkpoint.label} pruned to {first} by {method}{' and repaired' if repair else ''}"
    return replace(result, label=label, notes=(*result.notes, *notes))


def _changed(chosen: Chosen, repair: Repair) -> list[str]:
    """The tensors of blocks that a repair changes. Errors: OptionError where it finds none."""
    if problems := check_variants(repair.variants, repair.options.variant_options) + repair.options.training.problems():
        raise OptionError("; ".join(problems))
    kept = {*chosen.names, *chosen.copied}  # a tied head is a site, and no tensor of the checkpoint
    inside = [site for site in sites_of(chosen.checkpoint) if site.name in kept and _in_walk(chosen, site.name)]
    variants = [name for name in repair.variants if any(VARIANTS[name].trains(site) for site in inside)]
    if not variants:
        raise OptionError(f"{', '.join(repair.variants)}: the blocks of {chosen.checkpoint.label} have nothing of the kind to train")
    return [site.name for site in chosen_sites(inside, variants)]


def prune_block(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    pruner: Pruner,
    sparsity: Mapping[str, Sparsity],
    scope: Scope,
    arguments: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The weights of a block [out, in], pruned, in their dtype; what is compared is a row, a tensor, or all of the block, which then has one sparsity."""
    if pruner.solves:
        return {name: pruner.function(weight, sparsity[name], moments=moments[name], **arguments).to(weight.dtype) for name, weight in weights.items()}
    scores = {name: as_scores(pruner.function(weight, moments=moments[name], **arguments), weight) for name, weight in weights.items()}
    if scope == "row":
        removed = {name: lowest_of_rows(score, sparsity[name]) for name, score in scores.items()}
    elif scope == "tensor":
        removed = {name: lowest(score.flatten(), sparsity[name].count(score.numel())).view_as(score) for name, score in scores.items()}
    else:
        flat = torch.cat([score.flatten() for score in scores.values()])
        parts = torch.split(lowest(flat, sparsity[next(iter(scores))].count(len(flat))), [score.numel() for score in scores.values()])
        removed = {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
    return {name: weight.masked_fill(removed[name], 0) for name, weight in weights.items()}


def shrink_on(checkpoint: Checkpoint, ids: Tensor, structured: Mapping[str, float], how: PruneOptions = DEFAULTS) -> Checkpoint:
    """As `structured.shrink`, on a text: int64 ids [windows, window]. Those units go without which the layers that read them lose least; the columns that
    are left are fitted to the whole layer's outputs."""
    places = sites(checkpoint, structured)
    specs = {name: site.smaller(checkpoint.specs[name]) for site in places for name in site.names}

    def process(block: Block, work: Work) -> dict[str, Tensor]:
        inside = [site for site in places if site.block == block.name]
        found: dict[str, Tensor] = {}
        measured = block.moments([site.reader for site in inside])
        for site in inside:
            found |= _smaller_site(checkpoint, block, site, measured[site.reader])
        return found

    made = _walked(checkpoint, list(specs.values()), ids, process, how.device)
    return smaller_checkpoint(checkpoint, structured, [copy_step(made, name) for name in specs])


def _smaller_site(checkpoint: Checkpoint, block: Block, site: Site, moments: Moments) -> dict[str, Tensor]:
    """What is left of a site's tensors; in the block's module, the columns that go are zero."""
    reader = block.weights[site.reader]
    kept = site.kept(by_gram(site, reader, moments).cpu())
    columns = site.take(site.reader, torch.arange(reader.shape[1])[None], kept)[0].to(reader.device)
    left = refit(reader, moments.gram, columns).to(TORCH_DTYPES[checkpoint.specs[site.reader].dtype])
    reader.zero_()
    reader[:, columns] = left.to(reader.dtype)
    return {**{name: site.take(name, checkpoint.read(name), kept) for name in site.makers}, site.reader: left.cpu()}


def _walked(checkpoint: Checkpoint, specs: Sequence[TensorSpec], ids: Tensor, process: Process, device: str) -> Checkpoint:
    """What `process` makes of the blocks, as tensors that are computed when one is first read."""

    def compute(work: Work) -> None:
        walk(checkpoint, ids, lambda block: process(block, work), work, device=device)

    return Checkpoint(checkpoint.label, Deferred(specs, [checkpoint], compute))


def _seen(chosen: Chosen) -> tuple[Chosen, list[str]]:
    """Those of the weights that stand in the blocks through which a text flows, and a note of the others."""
    seen = tuple(name for name in chosen.names if _in_walk(chosen, name))
    others = [name for name in chosen.names if not _in_walk(chosen, name)]
    if not seen:
        raise CheckpointError(f"{chosen.checkpoint.label} has nothing to prune on a text: none of its linear layers stands in blocks that transformers knows")
    notes = [f"{len(others)} linear layers stand outside of the blocks that the text flows through ('{others[0]}') and stay as they are"] if others else []
    return replace(chosen, names=seen, copied=(*chosen.copied, *others)), notes


def _in_walk(chosen: Chosen, name: str) -> bool:
    """Whether a tensor stands in the blocks through which a text can flow."""
    place = chosen.roles.tensors[name]
    return place.stack == chosen.roles.stack and place.block is not None and place.parameter is not None


def _stored(chosen: Chosen, block: Block, name: str, how: PruneOptions) -> Tensor:
    """A weight [out, in] of the block in its stored dtype."""
    if name in block.weights:
        weight = block.weights[name].to(TORCH_DTYPES[chosen.checkpoint.specs[name].dtype])
    else:
        weight = chosen.checkpoint.read(name).to(how.device)
        weight = weight.T.contiguous() if chosen.turned(name) else weight
    if not how.allow_nonfinite and not is_finite(weight):
        raise nonfinite(chosen.checkpoint.label, name, weight)
    return weight
