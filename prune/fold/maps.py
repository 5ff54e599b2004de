"""Which places of a folded model have one set of weights, and whose these are: maps and parents.

    mapped(range(18), 2, "cycle", "stepwise")      # 9 sets, run through twice; set k is what the k-th of 9 blocks at regular intervals had

sequence: neighbours share (FoldGPT). cycle: the sets are run through from first to last, again and again (Relaxed Recursive Transformers, arXiv
2410.20672). middle_cycle: so are those of the middle, and the first and the last block are alone (Mixture-of-Recursions, arXiv 2507.10524).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mergekit_plus.errors import OptionError
from mergekit_plus.progress import Progress, quiet
from mergekit_plus.training import loss_on

from .blocks import Blocks
from .surgery import Fold

Map = Literal["sequence", "cycle", "middle_cycle"]
Source = Literal["first", "average", "stepwise", "loss"]


def groups_of(places: int, share: int, map_: Map = "sequence") -> tuple[int, ...]:
    """The number of the group of each place; each has `share` places, but the last of a sequence may have fewer.

    Errors: OptionError where there is no place, and where the places do not divide evenly.
    """
    if share < 1 or places < 1:
        raise OptionError(f"groups of {share} blocks out of {places}: there must be one at least")
    if map_ == "sequence":
        return tuple(place // share for place in range(places))
    alone = 1 if map_ == "middle_cycle" else 0
    inner = places - 2 * alone
    if inner < share or inner % share:
        of = f"{inner} blocks between the first and the last" if alone else f"{inner} blocks"
        raise OptionError(f"{of} cannot be run through {share} times; keep a number of blocks that {share} divides, or use the map sequence")
    sets = inner // share
    middle = [alone + place % sets for place in range(inner)]
    return (0, *middle, alone + sets) if alone else tuple(middle)


def regular(places: int, sets: int) -> tuple[int, ...]:
    """`sets` of the places at regular intervals, the first and the last among them: floor(linspace(1, L, K)) of the paper, counted from 0."""
    return tuple(number * (places - 1) // (sets - 1) if sets > 1 else 0 for number in range(sets))


def mapped(kept: Sequence[int], share: int, map_: Map = "sequence", parent: Source = "first", chosen: Sequence[int | None] | None = None) -> Fold:
    """The fold of these blocks of a model under a map.

    parent: whose weights a set has: its first block's ("lower", where the map is a cycle), their mean, those of blocks at regular intervals (stepwise;
    of the middle ones for middle_cycle); or, for "loss", the blocks in `chosen`, as `choose_parents` finds them.
    Errors: as `groups_of`, and OptionError for another number of `chosen` blocks than there are sets.
    """
    groups = groups_of(len(kept), share, map_)
    sets = groups[-1] + 1
    parents: list[int | None]
    if parent == "loss":
        parents = list(chosen or ())
        if len(parents) != sets:
            raise OptionError(f"{len(parents)} parents for {sets} sets of weights: name one for each")
    elif parent == "average":
        parents = [None] * sets
    elif parent == "stepwise" and map_ == "middle_cycle":
        parents = [kept[0], *(kept[1 + place] for place in regular(len(kept) - 2, sets - 2)), kept[-1]]
    elif parent == "stepwise":
        parents = [kept[place] for place in regular(len(kept), sets)]
    else:
        parents = [kept[groups.index(group)] for group in range(sets)]
    return Fold(tuple(kept), groups, tuple(parents))


# ---- the parents that a text likes best ----


def share_weights(blocks: Blocks, places: Sequence[int], parent: int) -> None:
    """Let these blocks of a model have the parameters of one of its blocks: the same, not equal ones."""
    for name, parameter in blocks.shared_of(parent).items():
        for place in places:
            set_parameter(blocks.modules[place], name, parameter)


def set_parameter(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Put a parameter at a place of a module."""
    owner, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


def choose_parents(blocks: Blocks, fold: Fold, rows: Tensor, progress: Progress | None = None) -> tuple[int, ...]:
    """For each group of a fold the member whose weights all of it should have, by the loss on a text; rows: int64 [windows, window].

    blocks: those of a model that has the blocks `fold.kept` alone; they share afterwards. Greedy: the groups are decided one after the
    other, while those that are still to come have their own weights. As many runs over the text as there are blocks in groups of several.
    """
    progress = progress or quiet()
    places = [[place for place, its in enumerate(fold.groups) if its == group] for group in range(len(fold.parents))]
    chosen = []
    with progress.phase("choosing parents", sum(len(members) for members in places if len(members) > 1), " runs"), torch.no_grad():
        for members in places:
            own = {place: blocks.shared_of(place) for place in members}  # before they share
            losses = {}
            for parent in members if len(members) > 1 else ():
                share_weights(blocks, members, parent)
                losses[parent] = loss_on(blocks.model, rows)
                progress.advance(1)
                for place, parameters in own.items():
                    for name, parameter in parameters.items():
                        set_parameter(blocks.modules[place], name, parameter)
            best = min(losses, key=lambda place: losses[place], default=members[0])
            share_weights(blocks, members, best)
            chosen.append(fold.kept[best])
    return tuple(chosen)
