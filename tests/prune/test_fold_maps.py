"""Which blocks share under each map, whose weights a set has, and the parents that a text chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import OptionError
from mergekit_plus.evaluate import load_model, load_tokenizer
from mergekit_plus.training import loss_on
from prune.fold import Fold, folded, stack_of
from prune.fold.blocks import blocks_of
from prune.fold.maps import choose_parents, groups_of, mapped, regular

MODELS = Path(__file__).parents[1] / "models"
BASE = Checkpoint.open(MODELS / "base")
BLOCKS = len(stack_of(BASE).layers)


def test_neighbours_share_in_a_sequence_and_its_last_group_may_be_short() -> None:
    assert groups_of(6, 2) == (0, 0, 1, 1, 2, 2)
    assert groups_of(5, 2) == (0, 0, 1, 1, 2)


def test_a_cycle_runs_through_all_sets_before_it_begins_again() -> None:
    assert groups_of(6, 2, "cycle") == (0, 1, 2, 0, 1, 2)
    assert groups_of(6, 3, "cycle") == (0, 1, 0, 1, 0, 1)


def test_a_middle_cycle_leaves_the_first_and_the_last_block_alone() -> None:
    assert groups_of(8, 2, "middle_cycle") == (0, 1, 2, 3, 1, 2, 3, 4)
    assert groups_of(4, 2, "middle_cycle") == (0, 1, 1, 2)


@pytest.mark.parametrize("map_", ["sequence", "cycle", "middle_cycle"])
def test_sets_that_serve_one_block_each_are_the_model(map_: str) -> None:
    assert mapped(range(6), 1, map_) == Fold.of(range(6))  # type: ignore[arg-type]


def test_stepwise_takes_blocks_at_regular_intervals_first_and_last_among_them() -> None:
    assert [1 + block for block in regular(18, 9)] == [1, 3, 5, 7, 9, 11, 13, 15, 18]
    assert [1 + block for block in regular(6, 3)] == [1, 3, 6]
    assert regular(6, 1) == (0,)
    assert regular(5, 5) == (0, 1, 2, 3, 4)


def test_parents_are_of_the_blocks_that_were_kept() -> None:
    kept = (0, 2, 3, 5, 8, 9)
    assert mapped(kept, 2, "cycle", "first").parents == (0, 2, 3)  # the paper's "lower"
    assert mapped(kept, 2, "sequence", "first").parents == (0, 3, 8)
    assert mapped(kept, 2, "cycle", "stepwise").parents == (0, 3, 9)
    assert mapped(kept, 2, "middle_cycle", "stepwise").parents == (0, 2, 8, 9)
    assert mapped(kept, 2, "cycle", "average").parents == (None, None, None)
    assert mapped(kept, 2, "cycle", "average").sources(4) == (2, 8)
    assert mapped(kept, 2, "sequence", "loss", [2, 5, 8]).parents == (2, 5, 8)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(OptionError, match="7 blocks cannot be run through 2 times; keep a number of blocks that 2 divides, or use the map sequence"):
        groups_of(7, 2, "cycle")
    with pytest.raises(OptionError, match="5 blocks between the first and the last cannot be run through 2 times"):
        groups_of(7, 2, "middle_cycle")
    with pytest.raises(OptionError, match="1 parents for 3 sets of weights"):
        mapped(range(6), 2, "cycle", "loss", [0])


def test_the_mean_of_equal_blocks_is_the_block() -> None:
    names = stack_of(BASE).layers
    tensors = {name: BASE.read(name) for name in BASE.specs}
    equal = {name: tensors[name.replace(f".{block}.", ".0.", 1)] for block, layer in enumerate(names) for name in layer}
    model = Checkpoint("equal", Checkpoint.from_tensors(tensors | equal).source, BASE.files)
    result = folded(model, mapped(range(BLOCKS), 2, "cycle", "average"))
    assert all(torch.equal(result.read(name), model.read(name)) for name in model.specs)


def test_a_cycle_is_run_set_by_set() -> None:
    """The number of its block is injected into each weight: places 0, 1, 2, 0, 1, 2 have those of the blocks 0, 1, 2."""
    name = "model.layers.{}.mlp.up_proj.weight"
    ids = {name.format(block): torch.full(BASE.specs[name.format(block)].shape, float(block)) for block in range(6)}
    model = Checkpoint("ids", Checkpoint.from_tensors({name: BASE.read(name) for name in BASE.specs} | ids).source, BASE.files)
    result = folded(model, mapped(range(6), 2, "cycle", "first"))
    assert [int(result.read(name.format(place))[0, 0]) for place in range(6)] == [0, 1, 2, 0, 1, 2]
    result = folded(model, mapped(range(6), 2, "cycle", "average"))
    assert [float(result.read(name.format(place))[0, 0]) for place in range(6)] == [1.5, 2.5, 3.5, 1.5, 2.5, 3.5]


def test_the_parents_that_a_text_chooses_are_the_best_of_each_group_in_turn() -> None:
    from mergekit_plus.calibration import read_text

    rows = read_text([MODELS / "text" / "docs.val.txt"], load_tokenizer(BASE), 4, 48)
    plain = mapped(range(BLOCKS), 3)
    model = load_model(BASE)
    chosen = choose_parents(blocks_of(model, BASE), plain, rows)

    def loss(parents: list[int], groups: tuple[int, ...]) -> float:
        return loss_on(load_model(folded(BASE, Fold(tuple(range(BLOCKS)), groups, tuple(parents)))), rows)

    first = {parent: loss([parent, 3, 4, 5], (0, 0, 0, 1, 2, 3)) for parent in range(3)}
    best = min(first, key=lambda parent: first[parent])
    second = {parent: loss([best, parent], plain.groups) for parent in range(3, 6)}
    assert chosen == (best, min(second, key=lambda parent: second[parent]))
    up = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert up[0] is up[1] is up[2]
    assert up[3] is not up[2]
    assert loss_on(model, rows) == pytest.approx(min(second.values()), abs=1e-5)
