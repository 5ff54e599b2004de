"""The losses of many folds at once: those of the models that the surgery makes, one by one."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURES, GROUPED, tiny_model

from mergekit_plus.errors import OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.training import loss_on
from prune.fold import Fold, folded, mapped
from prune.fold.blocks import blocks_of
from prune.fold.measure import losses

ROWS = torch.randint(0, 64, (11, 16), generator=torch.Generator().manual_seed(0))  # more than flow together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith(("ForCausalLM", "LMHeadModel"))])
def test_losses_are_those_of_the_models_that_surgery_makes(name: str, folder: Path) -> None:
    model = tiny_model(name, folder)
    folds = [Fold.of([0, 1]), Fold.of([1]), Fold.of([0]), mapped([0, 1], 2), mapped([0, 1], 2, parent="average"), Fold((0, 1), (0, 0), (1,))]
    found = losses(blocks_of(load_model(model), model), folds, ROWS)
    assert found == pytest.approx([loss_on(load_model(folded(model, fold)), ROWS) for fold in folds], rel=1e-6)


def test_a_block_runs_once_for_all_folds_that_come_to_it_alike(folder: Path) -> None:
    model = tiny_model("LlamaForCausalLM", folder / "deep", {**GROUPED, "num_hidden_layers": 6})
    blocks = blocks_of(load_model(model), model)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for module in blocks.modules:
        module.self_attn.register_forward_hook(count)
    losses(blocks, [Fold.of([block for block in range(6) if block not in gone]) for gone in combinations(range(6), 2)], ROWS[:2])
    # Once with all blocks, to see what they are called with; then block n for each of the sets of n blocks before it that may be gone: 40, not 15 x 4.
    assert runs == 6 + (1 + 2 + 4 + 7 + 10 + 10)


def test_blocks_in_another_order_are_not_measured(folder: Path) -> None:
    model = tiny_model("LlamaForCausalLM", folder)
    with pytest.raises(OptionError, match="not in the order of the model"):
        losses(blocks_of(load_model(model), model), [Fold.of([1, 0])], ROWS)
