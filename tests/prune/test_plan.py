"""A pruned checkpoint: which tensors, how many zeros, compared with what; everything else as it was, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prune_toys import a_model, linears_of
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, OptionError
from prune import Sparsity, has_pattern, unpack
from prune.plan import PruneOptions, apply_masks, choose, masks_of, problems, prune
from quant import Scheme
from quant import dequantize as values_of
from quant.plan import dequantize, quantize
from quant.rtn import rtn

HALF = Sparsity.of(0.5)
TWO_OF_FOUR = Sparsity.of(pattern="2:4")


def one_block(**weights: list[list[float]]) -> Checkpoint:
    return Checkpoint.from_tensors({f"layers.0.{name}.weight": torch.tensor(values) for name, values in weights.items()}, "toy")


def test_the_smallest_go_compared_within_a_row_a_tensor_or_everything() -> None:
    model = one_block(a=[[1.0, -2, 3, 4], [5, 6, -7, 8]], b=[[10.0, 20, -30, 40]])

    def pruned(scope: Any) -> list[Any]:
        return [prune(model, HALF, scope=scope).read(f"layers.0.{name}.weight").tolist() for name in ("a", "b")]

    assert pruned("row") == [[[0, 0, 3, 4], [0, 0, -7, 8]], [[0, 0, -30, 40]]]
    assert pruned("tensor") == [[[0, 0, 0, 0], [5, 6, -7, 8]], [[0, 0, -30, 40]]]
    assert pruned("block") == pruned("global") == [[[0, 0, 0, 0], [0, 0, -7, 8]], [[10, 20, -30, 40]]]


def test_of_equal_weights_the_first_in_the_order_of_names_and_places_go() -> None:
    model = one_block(l10=[[1.0, 1, 1]], l2=[[1.0, 1], [1, 1]])
    pruned = prune(model, Sparsity.of(0.75), scope="global")
    assert pruned.read("layers.0.l2.weight").tolist() == [[0, 0], [0, 0]]  # l2 stands before l10
    assert pruned.read("layers.0.l10.weight").tolist() == [[0, 1, 1]]


def test_only_the_linear_layers_of_blocks_are_pruned_and_all_else_is_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", tmp_path)
    pruned = prune(model, HALF, scope="global")
    weights = linears_of(model)
    assert len(weights) == 14
    assert sum(int((pruned.read(name) == 0).sum()) for name in weights) == sum(weight.numel() for weight in weights.values()) // 2
    assert list(pruned.specs.values()) == list(model.specs.values())
    for name in model.specs.keys() - weights.keys():
        assert torch.equal(pruned.read(name), model.read(name))
    for name, weight in weights.items():
        kept = pruned.read(name)
        assert torch.equal(kept, weight * (kept != 0))


def test_weights_stored_in_out_are_pruned_along_their_inputs(tmp_path: Path) -> None:
    model = tiny_model("GPT2LMHeadModel", tmp_path)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert choose(model, PruneOptions()).turned(name)
    pruned = prune(model, TWO_OF_FOUR).read(name)
    assert has_pattern(pruned.T.contiguous(), 2, 4)
    assert (prune(model, HALF, scope="row").read(name) == 0).sum(0).tolist() == [8] * 64


@pytest.mark.parametrize("name", ["OPTForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM", "BertForMaskedLM", "Qwen2MoeForCausalLM"])
def test_every_architecture_is_pruned_to_the_count(tmp_path: Path, name: str) -> None:
    model = tiny_model(name, tmp_path)
    pruned = prune(model, Sparsity.of(0.3), scope="global")
    weights = linears_of(model)
    assert sum(int((pruned.read(each) == 0).sum()) for each in weights) == int(sum(weight.numel() for weight in weights.values()) * 0.3)


def test_pruning_is_by_block_of_the_main_stack_or_any_other() -> None:
    model = a_model()
    pruned = prune(model, HALF, scope="block")
    for block in (0, 1):
        zeros = [int((pruned.read(name) == 0).sum()) for name in linears_of(model) if f"layers.{block}." in name]
        assert sum(zeros) == (7 * 24 + 8 + 5 * 16) // 2
        assert len(set(zeros)) == 3


def test_excluded_layers_stay_and_include_leaves_tensors_out() -> None:
    model = a_model()
    pruned = prune(model, HALF, how=PruneOptions(exclude=("layers.1.*",)))
    assert all(bool((pruned.read(name) != 0).all()) for name in linears_of(model) if "layers.1." in name)
    assert set(prune(model, HALF, how=PruneOptions(include=("l0.weight",))).specs) == {"model.layers.0.l0.weight", "model.layers.1.l0.weight"}


# ---- masks ----


def test_a_saved_mask_prunes_another_model_alike_and_so_does_the_pruned_model_itself(tmp_path: Path) -> None:
    pruned, other = prune(a_model(), HALF), a_model(seed=7)
    save(masks_of(pruned), tmp_path / "masks.safetensors")
    save(pruned, tmp_path / "pruned.safetensors")
    masks = Checkpoint.open(tmp_path / "masks.safetensors")
    for given in (masks, Checkpoint.open(tmp_path / "pruned.safetensors")):
        again = apply_masks(other, given)
        for name, weight in linears_of(pruned).items():
            assert torch.equal(again.read(name), other.read(name) * (weight != 0))
    packed = masks.read("model.layers.0.l0.weight_mask")
    assert (tuple(packed.shape), packed.dtype) == ((7, 3), torch.uint8)
    assert torch.equal(unpack(packed, 24), pruned.read("model.layers.0.l0.weight") != 0)


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has no mask of model\.layers\.1\.l0\.weight; leave the layer out with --exclude"):
        apply_masks(a_model(), masks_of(a_model(blocks=1)))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.l0\.weight_mask is U8 \[7, 1\], no mask of a weight of \[7, 24\]"):
        apply_masks(a_model(), masks_of(a_model(sizes=((7, 8), (1, 8), (5, 16)))))


# ---- with quantisation ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation_after_pruning_keeps_every_zero(bits: int, symmetric: bool) -> None:
    """A symmetric code 0 is 0; an asymmetric one is 0 at its zero point, which is a code."""
    model = a_model(sizes=((7, 24), (1, 8), (5, 16)))
    model.source.tensors["model.layers.0.l0.weight"] += 3  # type: ignore[attr-defined]  # all of one sign, so that 0 is the end of their range
    pruned = prune(model, TWO_OF_FOUR)
    found = dequantize(quantize(pruned, Scheme(bits, 8, symmetric)))
    for name, weight in linears_of(pruned).items():
        assert bool((found.read(name)[weight == 0] == 0).all()), name
        assert has_pattern(found.read(name), 2, 4)


def test_a_zero_is_exact_for_any_group_that_holds_one() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + torch.linspace(-3, 3, 64)[:, None]
    weight[:, ::3] = 0
    for bits in range(2, 9):
        assert float(values_of(rtn(weight, Scheme(bits, 32, False)))[:, ::3].abs().max()) == 0


# ---- what is refused ----


def test_everything_wrong_with_the_options_is_said() -> None:
    assert problems(1.5, None, "magnitud", None, {}) == [
        "sparsity 1.5: a share of zeros from 0 to below 1, as in 0.5",
        "unknown pruner 'magnitud'. Did you mean 'magnitude'?",
    ]
    assert problems(0.5, None, "wanda", "global", {"damp": 1}, text=True) == [
        "wanda compares weights within 'row' or 'tensor' or 'block', not within 'global'",
        "wanda has no option 'damp'.",
    ]
    assert problems(None, "2:4", "magnitude", "row", {}) == ["a pattern says itself what is compared: 2:4 inputs of a row; leave out the scope 'row'"]
    assert problems(0.5, None, "magnitude", "rows", {}) == ["unknown scope 'rows'. Did you mean 'row'?"]
    assert problems(0.5, None, "sparsegpt", None, {"damp": 0.1}) == ["sparsegpt looks at the inputs of layers: give it a text with --calibration"]
    assert problems(0.5, None, "magnitude", None, {}, text=True) == ["magnitude needs no calibration text"]


def test_a_pattern_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(CheckpointError, match=r"toy: model\.layers\.0\.l0\.weight has 24 inputs, which groups of 16 do not divide \(and 3 more\)"):
        prune(a_model(), Sparsity.of(pattern="8:16"))


def test_nothing_to_prune_is_refused() -> None:
    with pytest.raises(CheckpointError, match="toy has nothing to prune: no linear layer in a block is left"):
        prune(a_model(), HALF, how=PruneOptions(exclude=("layers.*",)))
    with pytest.raises(CheckpointError, match="nothing to prune"):
        prune(Checkpoint.from_tensors({"model.norm.weight": torch.ones(3)}, "toy"), HALF)
    with pytest.raises(OptionError, match="--exclude 'layer' matches no tensor"):
        prune(a_model(), HALF, how=PruneOptions(exclude=("layer",)))


def test_a_quantised_model_and_a_method_without_its_text_are_refused() -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        prune(quantize(a_model(), Scheme(4, 8)), HALF)
    with pytest.raises(OptionError, match="wanda looks at the inputs of layers: give it a text"):
        prune(a_model(), HALF, "wanda")


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_a_value_that_is_not_finite_is_refused_by_name_or_kept(scope: Any, tmp_path: Path) -> None:
    model = a_model()
    model.source.tensors["model.layers.1.l2.weight"][2, 3] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"toy: model\.layers\.1\.l2\.weight holds a value that is NaN or infinite"):
        save(prune(model, HALF, scope=scope), tmp_path / "out.safetensors")
    pruned = prune(model, HALF, scope=scope, how=PruneOptions(allow_nonfinite=True))
    save(pruned, tmp_path / "out.safetensors", SaveOptions(allow_nonfinite=True))
    assert bool(Checkpoint.open(tmp_path / "out.safetensors").read("model.layers.1.l2.weight")[2, 3].isnan())
