"""An adapter extracted from a fine-tune gives the fine-tune back, as far as its rank goes, here and in peft."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_toys import adapted, close, load, logits, model_of, saved
from torch import Tensor

from mergekit_plus.adapters import apply, read_adapter
from mergekit_plus.adapters.extract import ExtractOptions, extract, kept, overall
from mergekit_plus.adapters.lowrank import EXACT, leading, rank_for
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize

MODELS = Path(__file__).parents[1] / "models"
FULL = ExtractOptions(rank=1000, save_rest=True)


def shaken(model: Any, size: float = 0.02) -> Any:
    """The model with every parameter moved a little."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def opened(model: Any, folder: Path) -> Checkpoint:
    return Checkpoint.open(saved(model, folder))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("LlamaForCausalLM", {}), ("LlamaForCausalLM", {"attention_bias": True}), ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("GPT2LMHeadModel", {}), ("Qwen2ForCausalLM", {}),
    ],
)  # fmt: skip
def test_at_full_rank_and_with_the_rest_nothing_is_lost(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    base = opened(model_of(kind, **changes), tmp_path / "base")
    model = shaken(model_of(kind, **changes))
    tuned = opened(model, tmp_path / "tuned")
    out = tmp_path / "lora"
    save(extract(base, tuned, FULL), out)
    result = Checkpoint.open(f"{base.label}+{out}")
    assert all(close(result.read(name), tuned.read(name)) for name in tuned.specs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.PeftModel.from_pretrained(load(tmp_path / "base"), out)
    assert close(logits(wrapped.eval()), logits(model), 1e-4)


def test_of_a_merged_adapter_its_products_come_back_exactly(tmp_path: Path) -> None:
    base = opened(model_of(), tmp_path / "base")
    wrapped = adapted(model_of(), tmp_path / "lora", target_modules=["q_proj", "down_proj"], r=3)
    tuned = opened(wrapped.merge_and_unload(), tmp_path / "tuned")
    for options in (ExtractOptions(rank=3), ExtractOptions(energy=1)):
        found = read_adapter(extract(base, tuned, options))
        assert {module.rpartition(".")[2] for module in found.lowrank} == {"q_proj", "down_proj"}
        result = apply(base, [found])
        assert all(close(result.read(name), tuned.read(name)) for name in tuned.specs)
        if options.rank:
            assert {lowrank.rank for lowrank in found.lowrank.values()} == {3}


@pytest.fixture(scope="module")
def real() -> tuple[Checkpoint, Checkpoint]:
    return Checkpoint.open(MODELS / "base"), Checkpoint.open(MODELS / "code")


def difference(base: Checkpoint, tuned: Checkpoint, name: str) -> Tensor:
    return tuned.read(name).double() - base.read(name).double()


@pytest.mark.parametrize("rank", [1, 16])
def test_each_module_loses_what_the_best_approximation_loses(tmp_path: Path, real: tuple[Checkpoint, Checkpoint], rank: int) -> None:
    base, tuned = real
    save(extract(base, tuned, ExtractOptions(rank=rank)), tmp_path / "lora")
    report = kept(base, tuned, Checkpoint.open(tmp_path / "lora"))
    assert {tensor.kind for tensor in report} == {"low rank", "left out"}
    assert len(report) == len(base.specs)
    for tensor in report:
        change = difference(base, tuned, tensor.name)
        assert tensor.change == pytest.approx(float(change.norm()), rel=1e-6)
        if tensor.kind == "low rank":
            assert tensor.rank == rank
            assert tensor.left == pytest.approx(float(torch.linalg.svdvals(change)[rank:].norm()), rel=1e-4)
        else:
            assert tensor.left == tensor.change
            assert tensor.relative == 1
    assert 0 < overall(report) < 1


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_the_energy_is_kept_by_the_least_rank_that_does(real: tuple[Checkpoint, Checkpoint], energy: float) -> None:
    base, tuned = real
    found = read_adapter(extract(base, tuned, ExtractOptions(energy=energy)))
    ranks = set()
    for module, lowrank in found.lowrank.items():
        squares = torch.linalg.svdvals(difference(base, tuned, f"{module}.weight")).square()
        assert lowrank.rank == int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
        ranks.add(lowrank.rank)
    assert len(ranks) > 1
    assert found.config["r"] == found.config["lora_alpha"] == max(ranks)
    assert {lowrank.scale for lowrank in found.lowrank.values()} == {1}


def test_the_round_trip_speaks_like_the_fine_tune(tmp_path: Path, real: tuple[Checkpoint, Checkpoint]) -> None:
    base, tuned = real
    ids = tokenize(load_tokenizer(base), (MODELS / "text" / "code.test.txt").read_text())

    def measure(model: Checkpoint) -> float:
        return perplexity(load_model(model), ids, limit=8).value

    measured = {}
    for name, options in {"low": ExtractOptions(rank=8), "rest": ExtractOptions(rank=48, save_rest=True)}.items():
        save(extract(base, tuned, options), tmp_path / name)
        measured[name] = measure(Checkpoint.open(f"{base.label}+{tmp_path / name}"))
    before, after = map(measure, real)
    assert after < measured["low"] < before
    assert measured["rest"] == pytest.approx(after, rel=0.02)


def test_names_of_what_is_written(tmp_path: Path) -> None:
    base, tuned = opened(model_of(), tmp_path / "base"), opened(shaken(model_of()), tmp_path / "tuned")
    result = extract(base, tuned, ExtractOptions(rank=2, save_rest=True, exclude=("layers.1.*", "lm_head*"), dtype="BF16"))
    prefix = "base_model.model.model"
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert set(result.specs) == {
        *(f"{prefix}.layers.0.{linear}.lora_{part}.weight" for linear in linears for part in "AB"),
        f"{prefix}.embed_tokens.weight", f"{prefix}.norm.weight", f"{prefix}.layers.0.input_layernorm.weight",
        f"{prefix}.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
    assert result.specs[f"{prefix}.layers.0.mlp.down_proj.lora_A.weight"].dtype == "BF16"
    config = json.loads(result.file("adapter_config.json"))
    assert config["target_modules"] == read_order(linears)
    assert config["modules_to_save"] == [
        "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"
    ]  # fmt: skip
    assert (config["task_type"], config["bias"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "none", base.label)
    assert json.loads(extract(base, tuned, ExtractOptions(rank=2)).file("adapter_config.json"))["modules_to_save"] is None


def read_order(linears: list[str]) -> list[str]:
    return sorted(f"model.layers.0.{linear}" for linear in linears)


def test_the_bytes_do_not_depend_on_workers_or_memory(tmp_path: Path, real: tuple[Checkpoint, Checkpoint]) -> None:
    base, tuned = (Checkpoint.from_tensors({"x.weight": torch.randn(600, 500, generator=torch.Generator().manual_seed(n))}) for n in (1, 2))
    assert min(base.specs["x.weight"].shape) > EXACT
    outs = []
    for number, options in enumerate((SaveOptions(workers=1), SaveOptions(workers=3, memory=100 << 20))):
        save(extract(base, tuned, ExtractOptions(rank=5)), tmp_path / str(number), options)
        outs.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert outs[0] == outs[1]


# ---- the decomposition ----


def spectrum(rows: int, columns: int, power: float) -> Tensor:
    """A random matrix whose singular values fall as 1, 2^-power, 3^-power, ..."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(length, min(rows, columns), generator=generator)).Q for length in (rows, columns))
    return (u * torch.arange(1, min(rows, columns) + 1).float() ** -power) @ v.T


@pytest.mark.parametrize("shape", [(600, 500), (500, 900)])
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_the_random_decomposition_is_nearly_the_best(shape: tuple[int, int], power: float) -> None:
    matrix = spectrum(*shape, power)
    u, s, v = leading(matrix, 20, "x")
    best = torch.linalg.svdvals(matrix)[20:].norm()
    assert float((matrix - (u * s) @ v.T).norm()) < 1.005 * float(best)
    assert close(matrix.square().sum() - s.square().sum(), (matrix - (u * s) @ v.T).square().sum(), 1e-4)
    assert torch.equal(leading(matrix, 20, "x")[1], s)


def test_small_matrices_are_decomposed_exactly() -> None:
    matrix = spectrum(300, 40, 0.1)
    u, s, v = leading(matrix, 1000, "x")
    assert s.shape == (40,)
    assert close((u * s) @ v.T, matrix)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_directions_are_added_until_the_share_is_kept(share: float) -> None:
    matrix = spectrum(450, 500, 0.4)
    squares = torch.linalg.svdvals(matrix.double()).square()
    best = int((squares.cumsum(0) < share * squares.sum()).sum()) + 1
    rank, count = rank_for(matrix, share, "x")
    assert best <= rank <= 1.02 * best + 1
    assert float(leading(matrix, count, "x")[1][:rank].double().square().sum()) >= share * float(squares.sum()) * (1 - 1e-5)


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ExtractOptions(), "give a rank, or an energy from which ranks follow, and not both"),
        (ExtractOptions(rank=4, energy=0.9), "and not both"),
        (ExtractOptions(rank=0), "rank must be 1 or more, not 0"),
        (ExtractOptions(energy=1.5), "energy is a share, above 0 and up to 1, not 1.5"),
        (ExtractOptions(rank=1, exclude=("nothing*",)), "--exclude 'nothing\\*' matches no tensor"),
    ],
)
def test_impossible_options_are_refused(real: tuple[Checkpoint, Checkpoint], options: ExtractOptions, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        extract(*real, options)


def test_models_that_do_not_fit_or_do_not_differ_are_refused(tmp_path: Path, real: tuple[Checkpoint, Checkpoint]) -> None:
    base, _ = real
    rank = ExtractOptions(rank=1)
    with pytest.raises(CheckpointError, match=r"there is no adapter between .*base and .*base: they are equal"):
        extract(base, base, rank)
    x = Checkpoint.from_tensors({"x.weight": torch.ones(3, 2), "y.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"y\.weight is missing in b; .*|x\.weight: a has \(3, 2\), b has \(2, 2\)"):
        extract(replace(x, label="a"), replace(Checkpoint.from_tensors({"x.weight": torch.ones(2, 2)}), label="b"), rank)
    other = Checkpoint.from_tensors({"x.weight": torch.ones(3, 2), "y.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="no linear layer differs"):
        extract(x, other, rank)
    broken = Checkpoint.from_tensors({"x.weight": torch.full((3, 2), float("nan")), "y.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"x\.weight holds values that are NaN or infinite"):
        extract(x, broken, rank)
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        extract(base, extract(*real, rank), rank)
