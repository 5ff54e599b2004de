"""Whole neurons and heads go: an ordinary model is left, which computes what the dense one does with those units set to zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prune_toys import a_weight, moments_of, some_inputs
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from prune.structured import Site, by_gram, by_norm, problems, refit, shrink, sites

MODELS = Path(__file__).parents[1] / "models"
ROWS = torch.arange(40).view(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ROWS).logits
    return found


def without(checkpoint: Checkpoint, site: Site) -> dict[str, torch.Tensor]:
    """The reading weight of a site with zeros in the columns of the units that count least, found by their norms one by one."""
    weights = {name: checkpoint.read(name).double() for name in site.names}

    def norm(unit: int) -> float:
        width = {name: weight.shape[site.dim(name)] // site.units for name, weight in weights.items()}
        parts = (weight.narrow(site.dim(name), unit * width[name], width[name]) for name, weight in weights.items())
        return sum(float(part.square().sum()) for part in parts)

    least = sorted(range(site.units), key=norm)[: site.removed]
    reader = checkpoint.read(site.reader).clone()
    for unit in least:
        reader.view(len(reader), site.units, -1)[:, unit] = 0
    return {site.reader: reader}


@pytest.mark.parametrize("structured", [{"mlp": 0.25}, {"heads": 0.5}, {"mlp": 0.5, "heads": 0.5}])
def test_the_smaller_model_is_an_ordinary_one_that_computes_what_the_masked_one_does(tmp_path: Path, structured: dict[str, float]) -> None:
    from transformers import AutoModelForCausalLM

    dense = Checkpoint.open(MODELS / "base")
    smaller = shrink(dense, structured)
    save(smaller, tmp_path / "smaller")
    masked = load_model(dense)
    with torch.no_grad():
        for site in sites(dense, structured):
            for name, weight in without(dense, site).items():
                masked.get_parameter(name).copy_(weight)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype=torch.float32).eval()
    assert torch.allclose(logits(loaded), logits(masked), atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(load_model(dense)), atol=1e-1)
    config = smaller.config
    assert config["intermediate_size"] == int(384 * (1 - structured.get("mlp", 0)))
    heads = (2, 1, 32) if "heads" in structured else (4, 2, 32)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == heads
    assert torch.equal(smaller.read("model.embed_tokens.weight"), dense.read("model.embed_tokens.weight"))


@pytest.mark.parametrize(("name", "structured"), [
    ("Qwen2ForCausalLM", {"mlp": 0.5}), ("GemmaForCausalLM", {"mlp": 0.5}), ("MistralForCausalLM", {"mlp": 0.3}), ("OPTForCausalLM", {"mlp": 0.5}),
])  # fmt: skip
def test_other_architectures_are_made_smaller_too(tmp_path: Path, name: str, structured: dict[str, float]) -> None:
    """Biases of the layers that make a unit go with it."""
    from transformers import AutoModelForCausalLM

    save(shrink(tiny_model(name, tmp_path), structured), tmp_path / "smaller")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype=torch.float32).eval()
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize(
    ("name", "structured", "reason"),
    [
        ("GPT2LMHeadModel", {"mlp": 0.5}, "transformer.h.0 is not known to have mlp that can be taken out"),
        ("OPTForCausalLM", {"heads": 0.5}, r"is not known to have heads that can be taken out \(one each of q_proj \+ k_proj \+ v_proj \+ o_proj\)"),
        ("Qwen3MoeForCausalLM", {"mlp": 0.5}, "model.layers.0 is not known to have mlp"),
    ],
)
def test_a_model_without_such_units_is_refused(tmp_path: Path, name: str, structured: dict[str, float], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        shrink(tiny_model(name, tmp_path), structured)


def test_what_cannot_go_is_refused() -> None:
    assert problems({"mlps": 0.5, "heads": 1}) == ["structured: unknown part 'mlps'. Did you mean 'mlp'?", "structured: heads=1: a share from 0 to below 1"]
    assert problems({"mlp": 0}) == ["structured: say what goes, as in mlp=0.25 or heads=0.5"]
    with pytest.raises(OptionError, match="unknown part"):
        shrink(Checkpoint.open(MODELS / "base"), {"mpl": 0.5})
    with pytest.raises(CheckpointError, match=r"of a model with blocks and a config\.json only"):
        shrink(Checkpoint.from_tensors({"layers.0.mlp.fc1.weight": torch.ones(4, 4)}, "toy"), {"mlp": 0.5})


def test_the_norm_of_a_unit_is_that_of_its_rows_and_columns() -> None:
    site = Site("b", ("up", "up.bias"), "down", 2, 1)
    tensors = {"up": torch.tensor([[1.0, 2], [3, 4]]), "up.bias": torch.tensor([1.0, 1]), "down": torch.tensor([[1.0, 0], [0, 2]])}
    assert by_norm(site, tensors).tolist() == [1 + 4 + 1 + 1, 9 + 16 + 1 + 4]
    kept = site.kept(by_norm(site, tensors))
    assert kept.tolist() == [1]
    assert [site.take(name, tensor, kept).tolist() for name, tensor in tensors.items()] == [[[3, 4]], [1], [[0], [2]]]


@pytest.mark.parametrize("width", [1, 4])
def test_the_gram_weighted_cost_of_a_unit_is_what_the_outputs_lose(width: int) -> None:
    reader, samples = a_weight(6, 24), some_inputs(100, 24)
    site = Site("b", (), "down", 24 // width, 1)
    for unit, cost in enumerate(by_gram(site, reader, moments_of(samples)).tolist()):
        columns = slice(unit * width, (unit + 1) * width)
        assert cost == pytest.approx(float((samples[:, columns] @ reader[:, columns].T).square().sum() / 100), rel=1e-4)


def test_the_columns_that_are_left_are_fitted_to_the_outputs() -> None:
    reader, samples = a_weight(6, 24), some_inputs(400, 24)
    kept = torch.arange(0, 24, 2)
    outputs = samples @ reader.T
    plain, fitted = reader[:, kept], refit(reader, moments_of(samples).gram, kept, damp=1e-9)
    best = torch.linalg.lstsq(samples[:, kept].double(), outputs.double()).solution.T
    assert torch.allclose(fitted.double(), best, rtol=1e-2, atol=1e-2)
    assert float((samples[:, kept] @ fitted.T - outputs).square().sum()) < 0.8 * float((samples[:, kept] @ plain.T - outputs).square().sum())
    assert torch.equal(refit(reader, torch.zeros(24, 24), kept), plain)  # nothing known of the inputs
