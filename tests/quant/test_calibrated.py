"""Quantising while a text flows through the model, and from moments that were measured before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

import quant.calibrated
from mergekit_plus.calibration.statistics import MomentsFile, calibrate
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import compare, load_model, load_tokenizer, tokenize
from mergekit_plus.merge.plan import merge
from mergekit_plus.recipe import build, check, load, run
from mergekit_plus.steps import Execution
from quant import QUANTIZERS, Scheme
from quant.calibrated import Calibration
from quant.plan import dequantize, quantize

Tiny = Callable[[str], Checkpoint]
MODELS = Path(__file__).parents[1] / "models"
TEXT = MODELS / "text" / "docs.val.txt"
IDS = (torch.arange(30 * 40) * 7 % 61 + 3).view(30, 40)
SCHEME = Scheme(3, 8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Opens a tiny random model of an architecture."""
    return partial(tiny_model, under=tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that are quantised, in order."""
    found: list[str] = []
    plain = quant.calibrated.Layer.quantize

    def quantize(self: Any, weight: Tensor, moments: Any = None) -> Any:
        found.append(self.name)
        return plain(self, weight, moments)

    monkeypatch.setattr(quant.calibrated.Layer, "quantize", quantize)
    return found


def gptq(checkpoint: Checkpoint, format_name: str = "pack-quantized", **calibration: Any) -> Checkpoint:
    return quantize(checkpoint, SCHEME, "gptq", format_name=format_name, calibration=Calibration(**({"ids": IDS} | calibration)))


@pytest.mark.parametrize("order", ["block", "layer"])
def test_it_is_nearer_to_the_model_than_rounding_to_nearest(order: str) -> None:
    checkpoint = Checkpoint.open(MODELS / "base")
    ids = tokenize(load_tokenizer(checkpoint), TEXT.read_text())
    rows, heldout = ids[: 24 * 64].view(24, 64), ids[24 * 64 : 40 * 64]
    scheme, model = Scheme(2, 32), load_model(checkpoint)
    rounded = quantize(checkpoint, scheme, format_name="dense")
    calibrated = quantize(checkpoint, scheme, "gptq", format_name="dense", calibration=Calibration(rows, order=order))  # type: ignore[arg-type]
    kl = {each.label: compare(load_model(each), model, heldout, window=64).kl for each in (replace(rounded, label="rtn"), replace(calibrated, label="gptq"))}
    assert kl["gptq"] < 0.8 * kl["rtn"], kl


def test_what_is_packed_is_what_the_blocks_behind_saw(tiny: Tiny) -> None:
    checkpoint = tiny("LlamaForCausalLM")
    packed, dense = gptq(checkpoint), gptq(checkpoint, "dense")
    unpacked = dequantize(packed)
    assert all(torch.equal(unpacked.read(name), dense.read(name)) for name in checkpoint.specs)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OPTForCausalLM", "GPTNeoXForCausalLM"])
def test_models_of_other_shapes_are_quantised_and_saved(tiny: Tiny, tmp_path: Path, name: str) -> None:
    checkpoint = tiny(name)
    manifest = save(gptq(checkpoint, order="layer"), tmp_path / "out", SaveOptions(workers=2))
    assert set(manifest.inputs) == {checkpoint.ref}
    out = Checkpoint.open(tmp_path / "out")
    plain = quantize(checkpoint, SCHEME)
    assert out.specs == plain.specs
    kept = [tensor for tensor in out.specs if tensor in checkpoint.specs]
    assert all(torch.equal(out.read(tensor), checkpoint.read(tensor)) for tensor in kept)  # embeddings, heads, norms, routers, biases
    assert out.config["quantization_config"] == plain.config["quantization_config"]


def test_each_weight_is_quantised_once_and_with_the_order_layer_in_the_order_of_the_forward_pass(tiny: Tiny, weights: list[str]) -> None:
    checkpoint = tiny("Qwen3MoeForCausalLM")
    made = gptq(checkpoint, order="layer")
    for name in made.specs:
        made.read(name)
    first = [name.removeprefix("model.layers.0.") for name in weights if name.startswith("model.layers.0.")]
    kinds = [name.rpartition("_proj")[0].rpartition(".")[2] for name in first]
    assert kinds == ["k", "q", "v", "o", "gate", "up", "gate", "up", "down", "down"]
    assert len(weights) == len(set(weights)) == 20


def test_a_killed_run_goes_on_to_the_same_bytes(tiny: Tiny, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny("LlamaForCausalLM")
    save(gptq(checkpoint), tmp_path / "whole")
    whole = list(weights)
    weights.clear()
    known = quant.calibrated.Layer.quantize

    def stop(self: Any, weight: Tensor, moments: Any = None) -> Any:
        if self.name == "model.layers.1.mlp.up_proj.weight":
            raise KeyboardInterrupt
        return known(self, weight, moments)

    with monkeypatch.context() as patch:
        patch.setattr(quant.calibrated.Layer, "quantize", stop)
        with pytest.raises(KeyboardInterrupt, match="1 parts of the computation, and 0 of .* are kept"):
            save(gptq(checkpoint), tmp_path / "out", SaveOptions(job="gptq"))
    weights.clear()
    save(gptq(checkpoint), tmp_path / "out", SaveOptions(job="gptq", resume=True))
    assert weights == [name for name in whole if name.startswith("model.layers.1.")]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_measured_moments_do_as_the_text_does_in_the_first_block(tiny: Tiny, tmp_path: Path) -> None:
    """There the inputs are those of the model as it was; behind it they are not."""
    checkpoint = tiny("LlamaForCausalLM")
    save(calibrate(checkpoint, IDS, {"seed": 0}), tmp_path / "moments.safetensors")
    moments = Checkpoint.open(tmp_path / "moments.safetensors")
    assert MomentsFile(moments).facts["text"] == {"seed": 0}
    assert {name.rpartition(".")[2] for name in moments.specs} == {"gram", "mean", "tokens", "calibration"}
    assert "model.layers.0.self_attn.k_proj.gram" not in moments.specs  # that of q
    ours, theirs = gptq(checkpoint, ids=None, moments=moments), gptq(checkpoint)
    assert ours.specs == theirs.specs
    same = {name: torch.equal(ours.read(name), theirs.read(name)) for name in ours.specs}
    assert all(equal for name, equal in same.items() if "layers.1" not in name)
    assert not all(same.values())


def test_moments_of_another_model_and_files_without_moments_are_refused(tiny: Tiny) -> None:
    moments = calibrate(tiny("LlamaForCausalLM"), IDS, {})
    with pytest.raises(CheckpointError, match="was measured on a model of other shapes than .*; measure this one with `compress calibrate`"):
        gptq(tiny("Qwen2ForCausalLM"), ids=None, moments=moments)
    with pytest.raises(CheckpointError, match="holds no moments; `compress calibrate MODEL --text FILE"):
        gptq(tiny("LlamaForCausalLM"), ids=None, moments=tiny("LlamaForCausalLM"))


def test_a_method_without_its_text_and_a_text_without_its_method_are_refused(tiny: Tiny) -> None:
    with pytest.raises(OptionError, match="gptq looks at the inputs of layers: give a text with --calibration FILE, or --moments FILE from"):
        quantize(tiny("LlamaForCausalLM"), SCHEME, "gptq")
    with pytest.raises(OptionError, match="rtn looks at weights only and needs no calibration; methods that use one: .*gptq"):
        quantize(tiny("LlamaForCausalLM"), SCHEME, "rtn", calibration=Calibration(IDS))


def test_a_layer_that_no_text_flows_through_is_rounded_to_nearest_and_named(tiny: Tiny) -> None:
    checkpoint = tiny("LlamaForCausalLM")
    extra = {**{name: checkpoint.read(name) for name in checkpoint.specs}, "model.projector.weight": torch.randn(16, 16)}
    model = Checkpoint("extra", Checkpoint.from_tensors(extra).source, checkpoint.files)
    made = gptq(model)
    told = "1 layer ('model.projector.weight'): no text flows through it: rounded to nearest"
    assert made.notes[-2:] == ("2 blocks, one after another, on 30 windows of 40 tokens", told)
    rounded = quantize(model, SCHEME)
    assert torch.equal(made.read("model.projector.weight_packed"), rounded.read("model.projector.weight_packed"))


def test_every_calibrated_quantiser_takes_a_text(tiny: Tiny) -> None:
    checkpoint = tiny("LlamaForCausalLM")
    for name in [name for name in QUANTIZERS if QUANTIZERS[name].calibrated]:
        made = quantize(checkpoint, SCHEME, name, calibration=Calibration(IDS))
        assert made.specs == quantize(checkpoint, SCHEME).specs
        assert bool(torch.isfinite(made.read("model.layers.1.mlp.down_proj.weight_scale")).all())


def test_a_merge_that_was_never_written_is_quantised_in_a_recipe_beside_its_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(TEXT.read_bytes()[:6000])
    step = {"bits": 3, "group_size": 32, "method": "gptq", "calibration": {"texts": "text.txt", "windows": 4, "window": 32}}
    content = {"inputs": {"base": str(MODELS / "base"), "code": str(MODELS / "code")}, "steps": [{"merge": {"models": ["base", "code"]}}, {"quantize": step}]}
    recipe = check(content, tmp_path, "recipe.yaml")
    run(recipe, Execution(out=tmp_path / "out"))
    out = Checkpoint.open(tmp_path / "out")
    merged = merge([Checkpoint.open(MODELS / "base"), Checkpoint.open(MODELS / "code")], "linear")
    ids = recipe.steps[1]["quantize"].calibration.placed(tmp_path).read(merged)[0]  # type: ignore[union-attr]
    staged = quantize(merged, Scheme(3, 32), "gptq", calibration=Calibration(ids))
    assert all(torch.equal(out.read(name), staged.read(name)) for name in staged.specs)
    again = tmp_path / "out" / "recipe.yaml"
    assert "text.txt" in again.read_text()
    (tmp_path / "text.txt").write_text("another")
    with pytest.raises(CheckpointError, match="text.txt is not the file that the recipe was made with"):
        build(load(again))
