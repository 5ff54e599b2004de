"""Low-rank voices beside shared weights: what they give back, and how much they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import describe
from prune.fold import Fold, expanded, folded, relaxed, stack_of
from prune.fold.maps import mapped
from prune.fold.relax import rank_of, relaxable, voice, voices

MODELS = Path(__file__).parents[1] / "models"
STORED = Checkpoint.open(MODELS / "base")
BASE = Checkpoint("base", Checkpoint.from_tensors({name: STORED.read(name).float() for name in STORED.specs}).source, STORED.files)
BLOCKS = len(stack_of(BASE).layers)
ROWS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
UP = "model.layers.{}.mlp.up_proj"


def product(factors: Checkpoint, module: str) -> torch.Tensor:
    return factors.read(f"{module}.lora_B.weight").double() @ factors.read(f"{module}.lora_A.weight").double()


def beyond(fold: Fold, place: int, module: str = UP) -> torch.Tensor:
    """What the block at a place had beyond the shared weight."""
    name = f"{module}.weight".format(place)
    return BASE.read(name).double() - folded(BASE, fold).read(name).double()


@pytest.mark.parametrize("parent", ["first", "average", "stepwise"])
@pytest.mark.parametrize("map_", ["sequence", "cycle", "middle_cycle"])
def test_voices_of_full_rank_give_back_every_linear_weight(map_: str, parent: str) -> None:
    fold = mapped(range(BLOCKS), 2, map_, parent)  # type: ignore[arg-type]
    factors, shared = voices(BASE, fold, 10**6), folded(BASE, fold)
    for name in relaxable(BASE, stack_of(BASE)):
        module, weight = name.removesuffix(".weight"), shared.read(name).double()
        if f"{module}.lora_A.weight" in factors.specs:
            weight += product(factors, module)
        assert (weight - BASE.read(name)).norm() <= 1e-5 * BASE.read(name).double().norm()


def test_what_a_voice_leaves_is_the_tail_of_the_singular_values() -> None:
    fold = mapped(range(BLOCKS), 2, "cycle", "average")
    values = torch.linalg.svdvals(beyond(fold, 4))
    left = []
    for rank in (1, 4, 16, 64):
        left.append(float((beyond(fold, 4) - product(voices(BASE, fold, rank), UP.format(4))).norm()))
        assert left[-1] == pytest.approx(float(values[rank:].norm()), rel=1e-4)
    assert left == sorted(left, reverse=True)


def test_the_singular_values_are_in_b_and_the_rank_is_capped() -> None:
    fold = mapped(range(BLOCKS), 2, "cycle", "average")
    factors = voices(BASE, fold, 8)
    a, b = factors.read(f"{UP.format(1)}.lora_A.weight"), factors.read(f"{UP.format(1)}.lora_B.weight")
    torch.testing.assert_close(a @ a.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.norm(dim=0).double(), torch.linalg.svdvals(beyond(fold, 1))[:8], atol=1e-5, rtol=1e-4)
    out, inputs = BASE.specs[f"{UP.format(1)}.weight"].shape
    assert voices(BASE, fold, 10**6).specs[f"{UP.format(1)}.lora_A.weight"].shape == (min(out, inputs), inputs)


def test_two_blocks_of_a_mean_have_opposite_voices() -> None:
    factors = voices(BASE, mapped(range(BLOCKS), 2, "cycle", "average"), 10**6)
    torch.testing.assert_close(product(factors, UP.format(0)), -product(factors, UP.format(BLOCKS // 2)), atol=1e-6, rtol=0)


def test_where_nothing_is_beyond_the_shared_weight_the_voice_starts_at_zero() -> None:
    """Under the first parent the first pass says nothing; stepwise, the first and the last block say nothing."""
    for parent, silent in (("first", range(BLOCKS // 2)), ("stepwise", (0, BLOCKS - 1))):
        factors = voices(BASE, mapped(range(BLOCKS), 2, "cycle", parent), 4)  # type: ignore[arg-type]
        for place in range(BLOCKS):
            a, b = factors.read(f"{UP.format(place)}.lora_A.weight"), factors.read(f"{UP.format(place)}.lora_B.weight")
            assert bool(b.any()) == (place not in silent)
            assert bool(a.any())
    assert torch.equal(*(voice(torch.zeros(3, 4), 2, "name")[0] for _ in range(2)))


def test_blocks_that_are_alone_have_no_voice() -> None:
    places = {int(name.split(".")[2]) for name in voices(BASE, mapped(range(BLOCKS), 2, "middle_cycle"), 2).specs}
    assert places == set(range(1, BLOCKS - 1))
    assert not voices(BASE, Fold.of(range(BLOCKS)), 2).specs


def test_voices_have_the_dtype_of_the_weights_and_norms_have_none() -> None:
    factors = voices(STORED, mapped(range(BLOCKS), 2), 2)
    assert {TORCH_DTYPES[spec.dtype] for spec in factors.specs.values()} == {torch.bfloat16}
    assert {name.rpartition(".lora_")[0] + ".weight" for name in factors.specs} == set(describe(STORED).linears)


def test_layers_that_cannot_have_a_voice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no linear layer of its blocks can have a voice of its own; leave out --relax"):
        voices(tiny_model("GPT2LMHeadModel", tmp_path), mapped(range(2), 2), 2)
    with pytest.raises(OptionError, match="a voice has a rank of 1 or more, not 0"):
        voices(BASE, mapped(range(BLOCKS), 2), 0)


def test_the_rank_is_read_from_the_option() -> None:
    assert rank_of("lora:8") == rank_of("lora:8:svd") == (8, "svd")
    assert rank_of("lora:16:zero") == (16, "zero")
    for wrong in ("lora", "lora:0", "svd:8", "8", "lora:8:one", "lora:8:zero:1"):
        with pytest.raises(OptionError, match=f"relax {wrong}: write lora:RANK, as in lora:8"):
            rank_of(wrong)


# ---- the model ----


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ROWS, use_cache=False).logits
        return found


@pytest.mark.parametrize("parent", ["first", "average", "stepwise"])
def test_a_model_that_is_relaxed_at_full_rank_is_the_model(parent: str) -> None:
    """Norms are private; in the paper they are tied, and had to be folded into the weights first."""
    model = expanded(relaxed(BASE, mapped(range(BLOCKS), 2, "cycle", parent), 10**6))  # type: ignore[arg-type]
    assert model.specs == BASE.specs
    torch.testing.assert_close(logits(load_model(model)), logits(load_model(BASE)), atol=1e-3, rtol=1e-5)
    for name in BASE.specs:
        assert (model.read(name) - BASE.read(name)).norm() <= 1e-5 * BASE.read(name).norm()


def test_sets_that_serve_one_block_each_are_the_model_whatever_the_rank() -> None:
    model = expanded(relaxed(STORED, mapped(range(BLOCKS), 1, "cycle", "stepwise"), 4))
    assert all(torch.equal(model.read(name), STORED.read(name)) for name in STORED.specs)


def test_voices_that_start_at_zero_are_the_recursive_model_and_can_train() -> None:
    fold = mapped(range(BLOCKS), 2, "cycle", "stepwise")
    silent = relaxed(BASE, fold, 4, "zero")
    assert all(torch.equal(expanded(silent).read(name), folded(BASE, fold).read(name)) for name in BASE.specs)
    factors = {name for name in silent.specs if name.endswith("lora_A.weight")}
    assert len(factors) == 7 * BLOCKS
    assert all(silent.read(name).any() for name in factors)


def test_more_rank_is_nearer_to_the_model() -> None:
    from mergekit_plus.evaluate import compare

    rows, wanted = ROWS.flatten(), load_model(BASE)
    found = [
        compare(load_model(expanded(relaxed(BASE, mapped(range(BLOCKS), 2, "cycle", "average"), rank))), wanted, rows, window=24).kl for rank in (4, 16, 64)
    ]
    assert found == sorted(found, reverse=True)
