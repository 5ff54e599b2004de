"""Norms and biases beside quantised weights: statistics come nearer, what is stored is what the walk went on with, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from mergekit_plus.calibration import Block, walk
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.deferred import Work
from mergekit_plus.errors import OptionError
from mergekit_plus.model import describe
from mergekit_plus.moments import Moments
from quant import Scheme, dequantize, rtn
from quant.calibrated import Calibration
from quant.inner import Inner, inner_parameters
from quant.norms import tweak_norms
from quant.plan import dequantize as unpacked
from quant.plan import quantize

BASE = Path(__file__).parents[1] / "models" / "base"
IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
PASSES = 3


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """With biases in q, k and v."""
    model = tiny_model("Qwen2ForCausalLM", tmp_path_factory.getbasetemp() / "tiny")
    noise = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(model.specs[name].shape, generator=noise) if name.endswith("bias") else model.read(name) for name in model.specs}
    return replace(Checkpoint.from_tensors(tensors), files=model.files)


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return Checkpoint.open(BASE)


def norms_of(model: Checkpoint) -> dict[str, Inner]:
    return {name: inner for name, inner in inner_parameters(model, describe(model), list(model.specs)).items() if inner.role == "norm"}


def distance(block: Block) -> float:
    """How far means and variances of the outputs' channels are from those of the dense model, batch by batch, in float64."""
    total, batches = 0.0, 0
    for now, dense in zip(block.outputs(), block.dense_outputs(), strict=True):
        y, goal = now.double().flatten(0, 1), dense.double().flatten(0, 1)
        means, variances = (y.mean(0) - goal.mean(0)).abs().mean(), (y.var(0, correction=0) - goal.var(0, correction=0)).abs().mean()
        typical = goal.var(0, correction=0).mean()
        total, batches = total + float(means / typical.sqrt() + variances / typical), batches + 1
    return total / batches


def test_the_norms_of_a_block_are_found_and_nothing_else(base: Checkpoint) -> None:
    found = norms_of(base)
    blocks = range(base.config["num_hidden_layers"])
    assert sorted(found) == sorted(f"model.layers.{block}.{norm}.weight" for block in blocks for norm in ("input_layernorm", "post_attention_layernorm"))
    assert found["model.layers.1.input_layernorm.weight"].inside == "input_layernorm.weight"


def test_statistics_come_nearer_and_the_module_has_the_norms_that_are_stored(base: Checkpoint, tmp_path: Path) -> None:
    norms = norms_of(base)
    seen: list[tuple[float, float]] = []

    def process(block: Block) -> dict[str, Tensor]:
        for weight in block.weights.values():
            weight.copy_(dequantize(rtn(weight.bfloat16(), Scheme(2, 32))))
        before = distance(block)
        found = tweak_norms(block, {name: norms[name] for name in block.names if name in norms}, PASSES)
        seen.append((before, distance(block)))
        for name, norm in found.items():
            assert norm.dtype == torch.bfloat16
            assert torch.equal(block.module.get_parameter(norms[name].inside), norm.float())
            assert not block.module.get_parameter(norms[name].inside).requires_grad
        return found

    walk(base, IDS, process, Work(tmp_path), cross=True)
    assert all(after < before for before, after in seen)


def test_norms_that_no_training_brings_nearer_stay_as_they_are(base: Checkpoint, tmp_path: Path) -> None:
    norms = norms_of(base)

    def process(block: Block) -> dict[str, Tensor]:
        return tweak_norms(block, {name: norms[name] for name in block.names if name in norms}, PASSES)

    for part in walk(base, IDS, process, Work(tmp_path), cross=True):
        for name in part.specs:
            assert torch.equal(part.read(name), base.read(name))


def test_a_plan_writes_trained_norms_and_leaves_out_those_that_it_is_told_to(base: Checkpoint) -> None:
    calibration = Calibration(IDS, norm_passes=PASSES)
    arguments: dict[str, Any] = {"scheme": Scheme(2, 32), "method": "gptq"}
    plain = quantize(base, **arguments, calibration=replace(calibration, norm_passes=0))
    tuned = quantize(base, **arguments, calibration=calibration, exclude=("*.1.input_layernorm.weight",))
    assert dict(plain.specs) == dict(tuned.specs)
    changed = {name for name in norms_of(base) if not torch.equal(tuned.read(name), base.read(name))}
    assert "model.layers.0.input_layernorm.weight" in changed
    assert "model.layers.1.input_layernorm.weight" not in changed
    assert torch.equal(tuned.read("model.norm.weight"), base.read("model.norm.weight"))
    first = "model.layers.0.self_attn.q_proj.weight_packed"
    assert torch.equal(plain.read(first), tuned.read(first))


def test_norms_are_not_tuned_without_a_text(base: Checkpoint) -> None:
    with pytest.raises(OptionError, match="norms and biases are tuned while a text flows through the model: give a text, not moments"):
        quantize(base, Scheme(4, 32), "gptq", calibration=Calibration(moments=base, norm_passes=1))


# ---- biases ----


def test_biases_are_corrected_where_there_are_some_and_outputs_have_the_right_mean(qwen: Checkpoint) -> None:
    """In the first block the inputs of q, k and v are those of the model that nothing was done to."""
    ids = IDS % 64
    plain, corrected = (quantize(qwen, Scheme(2, 16), "gptq", calibration=Calibration(ids, biases=biases)) for biases in (False, True))
    assert dict(plain.specs) == dict(corrected.specs)
    layer = "model.layers.0.self_attn.q_proj"
    found: dict[str, Moments] = {}

    def look(block: Block) -> dict[str, Tensor]:
        found.update(block.moments())
        return {}

    with TemporaryDirectory() as folder:
        walk(qwen, ids, look, Work(Path(folder)))
    mean = found[f"{layer}.weight"].mean.double()
    weight, bias = qwen.read(f"{layer}.weight").double(), qwen.read(f"{layer}.bias").double()
    decoded = unpacked(corrected)
    now = decoded.read(f"{layer}.weight").double() @ mean + decoded.read(f"{layer}.bias").double()
    torch.testing.assert_close(now, weight @ mean + bias, rtol=0, atol=1e-5)
    assert torch.equal(plain.read(f"{layer}.bias"), qwen.read(f"{layer}.bias"))


def test_biases_are_not_corrected_with_two_models_inputs(qwen: Checkpoint) -> None:
    with pytest.raises(OptionError, match="biases are corrected for the inputs as they are, not with `cross`"):
        quantize(qwen, Scheme(4, 16), "gptq", calibration=Calibration(IDS % 64, cross=True, biases=True))
