"""Pruning while a text flows through a real model: the inputs that the released code sees, exact counts, and what must not change a mask."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_toys import linears_of, moments_of, obs, released_wanda_mask
from tiny import tiny_model
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.training import TrainOptions
from prune import PRUNERS, Sparsity, has_pattern
from prune.calibrated import Repair, prune_on, shrink_on
from prune.plan import PruneOptions, prune
from prune.reconstruct import ReconstructOptions
from prune.structured import by_gram, sites
from quant import Scheme
from quant.calibrated import Calibration
from quant.plan import dequantize, quantize

MODELS = Path(__file__).parents[1] / "models"
IDS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
HALF = Sparsity.of(0.5)
CALIBRATED = [(name, scope) for name, pruner in PRUNERS.items() if pruner.calibrated for scope in pruner.scopes]


def inputs_of(checkpoint: Checkpoint, weights: Mapping[str, Tensor], name: str, ids: Tensor = IDS) -> Tensor:
    """What reaches a layer [tokens, in] in the transformers model with some of its weights replaced."""
    model = load_model(checkpoint)
    seen: list[Tensor] = []
    with torch.no_grad():
        for other, weight in weights.items():
            model.get_parameter(other).copy_(weight)
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, 1)))
        model(input_ids=ids)
    return torch.cat(seen)


def test_every_block_sees_what_the_pruned_blocks_before_it_yield_and_is_whole_itself(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", tmp_path)
    pruned = linears_of(prune_on(model, IDS, HALF, "wanda"))
    before = {name: weight for name, weight in pruned.items() if ".layers.0." in name}
    for name, weight in linears_of(model).items():
        samples = inputs_of(model, before if ".layers.1." in name else {}, name)
        assert torch.equal(pruned[name] == 0, released_wanda_mask(weight, samples.square().mean(0).sqrt(), 0.5)), name


def test_sparsegpt_solves_each_layer_on_these_inputs(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", tmp_path)
    pruned = linears_of(prune_on(model, IDS, HALF, "sparsegpt", options={"columns": 8}))
    before = {name: weight for name, weight in pruned.items() if ".layers.0." in name}
    name = "model.layers.1.mlp.down_proj.weight"
    expected, removed = obs(model.read(name), moments_of(inputs_of(model, before, name)).gram, 0.01, 8, 0.5)
    assert torch.equal(pruned[name] == 0, removed)
    assert torch.allclose(pruned[name].double(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("method", "scope"), CALIBRATED)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2MoeForCausalLM"])
def test_the_asked_number_of_zeros_is_met_exactly(tmp_path: Path, method: str, scope: Any, name: str) -> None:
    model = tiny_model(name, tmp_path)
    pruned = prune_on(model, IDS, Sparsity.of(0.3), method, scope)
    weights = linears_of(pruned)
    if scope == "row" and not name.startswith("GPT2"):
        assert all((weight == 0).sum(1).tolist() == [int(Fraction("0.3") * weight.shape[1])] * len(weight) for weight in weights.values())
    elif scope in ("tensor", "columns"):
        assert all(int((weight == 0).sum()) == int(Fraction("0.3") * weight.numel()) for weight in weights.values())
    elif scope == "block":
        for block in ("0", "1"):
            inside = [weight for key, weight in weights.items() if key.split(".")[2] == block]
            assert sum(int((weight == 0).sum()) for weight in inside) == int(Fraction("0.3") * sum(weight.numel() for weight in inside))
    for key in model.specs.keys() - weights.keys():
        assert torch.equal(pruned.read(key), model.read(key))


@pytest.mark.parametrize("method", sorted({method for method, _ in CALIBRATED}))
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_a_pattern_is_met_in_every_group_along_the_inputs(tmp_path: Path, method: str, pattern: str) -> None:
    kept, group = map(int, pattern.split(":"))
    sparsity = Sparsity.of(pattern=pattern)
    assert all(has_pattern(weight, kept, group) for weight in linears_of(prune_on(tiny_model("LlamaForCausalLM", tmp_path), IDS, sparsity, method)).values())
    turned = linears_of(prune_on(tiny_model("GPT2LMHeadModel", tmp_path), IDS, sparsity, method))
    assert all(has_pattern(weight.T.contiguous(), kept, group) for weight in turned.values())


@pytest.mark.parametrize(("method", "scope"), CALIBRATED)
def test_the_text_twice_is_the_text_once(tmp_path: Path, method: str, scope: Any) -> None:
    model = tiny_model("LlamaForCausalLM", tmp_path)
    once, twice = (linears_of(prune_on(model, ids, HALF, method, scope)) for ids in (IDS, torch.cat([IDS, IDS])))
    assert all(torch.equal(once[name] == 0, twice[name] == 0) for name in once)


@pytest.mark.parametrize(("method", "scope"), CALIBRATED)
def test_pruning_again_adds_zeros_to_zeros(tmp_path: Path, method: str, scope: Any) -> None:
    model = tiny_model("LlamaForCausalLM", tmp_path)
    first = prune(model, HALF, "random", "tensor")
    again = linears_of(prune_on(first, IDS, Sparsity.of(0.7), method, scope))
    assert all(bool((again[name][weight == 0] == 0).all()) for name, weight in linears_of(first).items())


def test_a_text_prunes_a_real_model_better_than_magnitude(tmp_path: Path) -> None:
    from mergekit_plus.calibration import read_text
    from mergekit_plus.checks import Checks, measure
    from mergekit_plus.evaluate import load_tokenizer
    from mergekit_plus.progress import quiet

    model = Checkpoint.open(MODELS / "docs")
    ids = read_text([MODELS / "text" / "docs.val.txt"], load_tokenizer(model), 16, 128, 0)
    checks = Checks(texts={"docs": str(MODELS / "text" / "docs.test.txt")}, windows=8)
    sparsity = Sparsity.of(pattern="2:4")
    made = {"magnitude": prune(model, sparsity), "wanda": prune_on(model, ids, sparsity, "wanda"), "sparsegpt": prune_on(model, ids, sparsity, "sparsegpt")}
    found = {name: measure(each, checks, Path(), quiet())["ppl docs"] for name, each in made.items()}
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"]


# ---- with quantisation ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_pruning_then_quantising_keeps_every_zero(tmp_path: Path, method: str, symmetric: bool) -> None:
    pruned = prune_on(tiny_model("LlamaForCausalLM", tmp_path), IDS, Sparsity.of(pattern="2:4"), "sparsegpt")
    calibration = Calibration(IDS) if method == "gptq" else None
    found = dequantize(quantize(pruned, Scheme(4, 8, symmetric), method, calibration=calibration))
    for name, weight in linears_of(pruned).items():
        assert bool((found.read(name)[weight == 0] == 0).all()), name


# ---- structured ----


def test_units_go_that_their_readers_lose_least_by_and_the_rest_makes_up_for_them(tmp_path: Path) -> None:
    model = Checkpoint.open(MODELS / "docs")
    ids = torch.randint(0, 1024, (4, 64), generator=torch.Generator().manual_seed(0))
    smaller = shrink_on(model, ids, {"mlp": 0.5, "heads": 0.5})
    save(smaller, tmp_path / "smaller")
    assert load_model(Checkpoint.open(tmp_path / "smaller")).config.intermediate_size == 192
    site = next(site for site in sites(model, {"mlp": 0.5}) if site.block == "model.layers.0")
    heads = next(site for site in sites(model, {"heads": 0.5}) if site.block == "model.layers.0")
    reader, samples = model.read(site.reader).float(), inputs_of(model, {}, site.reader, ids)
    least = by_gram(site, reader, moments_of(samples)).argsort()[:192]
    gate, rows = site.makers[0], torch.tensor([row for row in range(384) if row not in least.tolist()])
    assert torch.equal(smaller.read(gate), model.read(gate)[rows])
    outputs = samples @ reader.T
    lost = [float((samples[:, rows] @ weight.T - outputs).square().sum()) for weight in (smaller.read(site.reader).float(), reader[:, rows])]
    assert lost[0] < lost[1]
    assert smaller.read(heads.makers[0]).shape == (64, 128)


# ---- repair ----


def test_a_model_whose_head_is_its_embeddings_is_repaired_too(tmp_path: Path) -> None:
    model = tiny_model("GPT2LMHeadModel", tmp_path)
    assert "lm_head.weight" not in model.specs
    options = ReconstructOptions(training=TrainOptions(steps=4, lr=1e-3, batch=1, dropout=False))
    plain, repaired = prune_on(model, IDS, HALF), prune_on(model, IDS, HALF, repair=Repair(options=options))
    assert repaired.specs == model.specs
    for name in linears_of(model):
        assert int((repaired.read(name) == 0).sum()) == int((plain.read(name) == 0).sum())
    assert torch.equal(repaired.read("transformer.wte.weight"), model.read("transformer.wte.weight"))
    assert not torch.equal(repaired.read("transformer.h.0.mlp.c_fc.bias"), model.read("transformer.h.0.mlp.c_fc.bias"))


# ---- what is refused, and what does not matter ----


def test_a_model_through_which_no_text_can_flow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has nothing to prune on a text: none of its linear layers stands in blocks that transformers knows"):
        prune_on(Checkpoint.from_tensors({"layers.0.a.weight": torch.ones(4, 4)}, "toy"), IDS, HALF)
    with pytest.raises(OptionError, match="wanda compares weights within"):
        prune_on(tiny_model("LlamaForCausalLM", tmp_path), IDS, HALF, "wanda", "global")


def test_the_bytes_do_not_depend_on_workers_or_shards(tmp_path: Path) -> None:
    save(tiny_model("LlamaForCausalLM", tmp_path), tmp_path / "many", SaveOptions(max_shard_size=4000))
    for number, (folder, options) in enumerate([("LlamaForCausalLM", SaveOptions(workers=1)), ("many", SaveOptions(workers=3))]):
        made = prune_on(Checkpoint.open(tmp_path / folder), IDS, HALF, "sparsegpt", how=PruneOptions(exclude=("layers.1.mlp.*",)))
        save(made, tmp_path / f"{number}.safetensors", options)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
