"""Rotating a model: the same function in other weights, an orthogonal matrix, the same bits for any rows, and refusal where it is not certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import GROUPED, tiny_model

import cli
from mergekit_plus.checkpoint import Checkpoint, TensorTable, save
from mergekit_plus.errors import CheckpointError
from mergekit_plus.evaluate import load_model
from mergekit_plus.recipe import check
from quant import Scheme
from quant.plan import dequantize, quantize
from quant.rotate import ARCHITECTURES, READERS, Rotation, rotate

BASE = Path(__file__).parents[1] / "models" / "base"


def a_model(name: str, under: Path, **config: Any) -> Checkpoint:
    """A random float32 model whose norms have gains and whose layers have biases where the architecture knows them."""
    import transformers

    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    biases = {"attention_bias": True, "mlp_bias": True} if name == "LlamaForCausalLM" else {}
    model = model_class(model_class.config_class(**{**GROUPED, "head_dim": 8, **biases, **config}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(under / name)
    return Checkpoint.open(under / name)


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_model(checkpoint)(torch.arange(40).view(2, 20)).logits
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rotated_model_is_the_same_function(name: str, tied: bool, tmp_path: Path) -> None:
    model = a_model(name, tmp_path, tie_word_embeddings=tied, initializer_range=0.2)
    rotated = rotate(model, seed=3)
    before, after = logits(model), logits(rotated)
    assert float(before.std()) > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert rotated.config["tie_word_embeddings"] is False
    assert set(rotated.specs) == {*model.specs, "lm_head.weight"}
    assert {name: spec.dtype for name, spec in rotated.specs.items()} == dict.fromkeys(rotated.specs, "F32")


def test_a_width_that_is_no_power_of_two_is_rotated_too(tmp_path: Path) -> None:
    model = a_model("LlamaForCausalLM", tmp_path, hidden_size=24, initializer_range=0.2)
    torch.testing.assert_close(logits(rotate(model)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 7, 16, 24, 96])
def test_the_rotation_is_orthogonal_and_mixes_every_input_with_every_other(width: int) -> None:
    rotation = Rotation.of(width, 5)
    matrix = rotation.apply(torch.eye(width))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width))
    assert bool((matrix != 0).all())
    x = torch.randn(3, width)
    torch.testing.assert_close(rotation.apply(x), x @ matrix)
    assert not torch.equal(matrix, Rotation.of(width, 6).apply(torch.eye(width))) or width == 1


def test_columns_are_turned_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, x = Rotation.of(24, 5), torch.randn(24, 33)
    whole = rotation.apply_to_columns(x)
    torch.testing.assert_close(whole, rotation.apply(torch.eye(24)).T @ x)
    monkeypatch.setattr("quant.rotate.BLOCK", 100)
    assert torch.equal(rotation.apply_to_columns(x), whole)
    assert torch.equal(rotation.apply_to_columns(x[:, 3]), whole[:, 3])


def test_a_hadamard_matrix_spreads_one_outlier_evenly() -> None:
    assert Rotation.of(16, 0).apply(torch.eye(16)[3:4] * 8).abs().tolist() == [[2.0] * 16]


def test_rows_are_rotated_alike_in_any_company_and_a_saved_model_has_the_same_bytes_however_it_is_cut(tmp_path: Path) -> None:
    base = Checkpoint.open(BASE)
    rotated = rotate(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        whole = rotated.read(name)
        assert torch.equal(rotated.read(name, slice(5, 9)), whole[5:9])
    assert torch.equal(rotate(base).read("lm_head.weight"), rotated.read("lm_head.weight"))
    assert not torch.equal(rotate(base, 1).read("lm_head.weight"), rotated.read("lm_head.weight"))
    assert bool((rotated.read("model.layers.0.input_layernorm.weight") == 1).all())
    save(rotated, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(written.read(name), rotated.read(name)) for name in rotated.specs)


def test_an_input_that_weighs_more_than_others_costs_a_rotated_model_less(tmp_path: Path) -> None:
    model = a_model("LlamaForCausalLM", tmp_path, hidden_size=64, intermediate_size=64, initializer_range=0.2)
    tensors = {name: model.read(name) for name in model.specs}
    for name in tensors:
        if name.removesuffix(".weight").endswith(tuple(READERS)):
            tensors[name][:, 7] *= 20
    outlier = Checkpoint("outlier", TensorTable(tensors), model.files)
    exact = logits(outlier)
    plain, rotated = (float((logits(quantize(one, Scheme(4, 0), format_name="dense")) - exact).square().mean()) for one in (outlier, rotate(outlier)))
    assert rotated < 0.7 * plain


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GemmaForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "BertForMaskedLM"])
def test_what_is_not_certain_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"\({name}\) cannot be rotated: that is known to be exact for LlamaForCausalLM, Mistral"):
        rotate(tiny_model(name, tmp_path))


def test_a_bare_file_an_unknown_tensor_and_a_quantised_model_are_refused(tmp_path: Path) -> None:
    base = Checkpoint.open(BASE)
    with pytest.raises(CheckpointError, match=r"memory \(no architecture in config.json\) cannot be rotated"):
        rotate(Checkpoint.from_tensors({"a.weight": torch.ones(2, 2)}))
    extra = Checkpoint.from_tensors({**{name: base.read(name) for name in base.specs}, "model.layers.0.self_attn.gate.weight": torch.ones(4)}, "m")
    with pytest.raises(CheckpointError, match=r"m cannot be rotated: what model.layers.0.self_attn.gate.weight does to the residual stream is not known"):
        rotate(Checkpoint(extra.label, extra.source, base.files))
    with pytest.raises(CheckpointError, match="quantized already"):
        rotate(quantize(base, Scheme(4, 32)))


def test_the_command_rotates_what_it_quantizes_and_says_so_in_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.app(["quantize", str(BASE), "--bits", "3", "--group-size", "32", "--rotate", "-o", "out"], standalone_mode=False)
    written, expected = Checkpoint.open("out"), quantize(rotate(Checkpoint.open(BASE)), Scheme(3, 32))
    assert all(torch.equal(written.read(name), expected.read(name)) for name in expected.specs)
    assert yaml.safe_load(Path("out/recipe.yaml").read_text())["steps"][0]["quantize"]["rotate"] is True
    assert float((logits(dequantize(written)) - logits(Checkpoint.open(BASE))).square().mean()) < 1


def test_moments_of_the_model_as_it_was_do_not_fit_a_rotated_one() -> None:
    from mergekit_plus.errors import RecipeError

    steps = [{"quantize": {"bits": 4, "method": "gptq", "rotate": True, "moments": "seen", "of": "model"}}]
    with pytest.raises(RecipeError, match="moments were measured on the model as it was; a rotated one needs a calibration text"):
        check({"inputs": {"model": str(BASE), "seen": "seen.safetensors"}, "steps": steps}, Path(), "r")
