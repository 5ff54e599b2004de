"""Norm tweaking on a trained model: statistics come nearer, norms are stored as trained, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_plus.calibration import Block, walk
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.deferred import Work
from mergekit_plus.errors import OptionError
from mergekit_plus.model import describe
from quant import Scheme, dequantize, rtn
from quant.calibrated import Calibration
from quant.norms import norms_of, tweak_norms
from quant.plan import quantize

BASE = Path(__file__).parents[1] / "models" / "base"
IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
PASSES = 3


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return Checkpoint.open(BASE)


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
    found = norms_of(base, describe(base), list(base.specs))
    blocks = range(base.config["num_hidden_layers"])
    assert sorted(found) == sorted(f"model.layers.{block}.{norm}.weight" for block in blocks for norm in ("input_layernorm", "post_attention_layernorm"))
    assert found["model.layers.1.input_layernorm.weight"].inside == "input_layernorm.weight"


def test_statistics_come_nearer_and_the_module_has_the_norms_that_are_stored(base: Checkpoint, tmp_path: Path) -> None:
    norms = norms_of(base, describe(base), list(base.specs))
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
    norms = norms_of(base, describe(base), list(base.specs))

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
    changed = {name for name in norms_of(base, describe(base), list(base.specs)) if not torch.equal(tuned.read(name), base.read(name))}
    assert "model.layers.0.input_layernorm.weight" in changed
    assert "model.layers.1.input_layernorm.weight" not in changed
    assert torch.equal(tuned.read("model.norm.weight"), base.read("model.norm.weight"))
    first = "model.layers.0.self_attn.q_proj.weight_packed"
    assert torch.equal(plain.read(first), tuned.read(first))


def test_norms_are_not_tuned_without_a_text(base: Checkpoint) -> None:
    with pytest.raises(OptionError, match="norms are tuned while a text flows through the model: give a text, not moments"):
        quantize(base, Scheme(4, 32), "gptq", calibration=Calibration(moments=base, norm_passes=1))
