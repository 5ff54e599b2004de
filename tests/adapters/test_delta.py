"""The difference of a fine-tune at one bit a weight, against the formula and with its scales trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_toys import adapted, model_of, saved
from safetensors.torch import load_file, save_file

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError, RecipeError
from mergekit_plus.evaluate import load_model
from mergekit_plus.inspection import inspect
from mergekit_plus.recipe import check, plan
from mergekit_plus.steps import Execution
from mergekit_plus.training import TrainOptions
from quant.adapters.coding import Coding, decode, encode
from quant.adapters.container import apart_specs, entries_of
from quant.adapters.delta import DeltaOptions, delta, encode_difference
from quant.adapters.train import Lesson

Q = "model.layers.0.self_attn.q_proj.weight"
IDS = (torch.arange(24)[:, None] * 7 + 5 * torch.arange(12)) % 64


@pytest.fixture
def models(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    """A base, and a fine-tune that differs in every tensor."""
    saved(model_of(initializer_range=0.3), tmp_path / "base")
    tuned = model_of(initializer_range=0.3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    saved(tuned, tmp_path / "tuned")
    return Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")


def test_one_bit_by_hand() -> None:
    before, after = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [6.0, 4.0]])
    assert decode(encode_difference(before, after, Coding(1, "l2", "tensor"))).flatten().tolist() == pytest.approx([1.5, -1.5, 1.5, -1.5])
    assert decode(encode_difference(before, after, Coding(1, "l2", "component"))).flatten().tolist() == pytest.approx([1.5, -1.5, 1.5, -1.5])
    assert not decode(encode_difference(before, before, Coding(1, "l2", "tensor"))).any()


@pytest.mark.parametrize("scale", ["tensor", "component"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_blocks_of_rows_change_nothing(scale: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.adapters.delta.BLOCK", 30)
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn((7, 13), generator=generator) for _ in range(2))
    coding = Coding(bits, "l2", scale)  # type: ignore[arg-type]
    here, whole = encode_difference(before, after, coding), encode(after - before, coding)
    assert torch.equal(here.codes, whole.codes)
    assert torch.allclose(here.stats, whole.stats)


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_base_and_difference_are_the_formula(scale: str, models: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    base, tuned = models
    save(delta(base, tuned, DeltaOptions(scale=scale)), tmp_path / "delta")  # type: ignore[arg-type]
    again = Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'delta'}")
    assert again.specs == base.specs
    for name in base.specs:
        change = tuned.read(name) - base.read(name)
        if "proj" in name:
            size = change.abs().mean() if scale == "tensor" else change.abs().mean(1, keepdim=True)
            assert torch.allclose(again.read(name), base.read(name) + size * change.sign(), atol=1e-6)
        else:
            assert torch.equal(again.read(name), tuned.read(name))
    lost = (again.read(Q) - tuned.read(Q)).square().sum() / (tuned.read(Q) - base.read(Q)).square().sum()
    assert float(lost) == pytest.approx(0.363, abs=0.06)  # 1 - 2 / pi of a normal difference
    save(Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'delta'}"), tmp_path / "model")
    assert load_model(Checkpoint.open(tmp_path / "model")).config.vocab_size == 64


def test_the_file_has_a_bit_a_weight_and_says_what_it_is(models: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    base, tuned = models
    save(delta(base, tuned, DeltaOptions(rest=False)), tmp_path / "delta")
    assert sorted(path.name for path in (tmp_path / "delta").iterdir()) == ["delta.packed.safetensors", "delta_quant.json", "manifest.json"]
    stored = load_file(tmp_path / "delta/delta.packed.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"codes", "stats", "checksum", "1"}
    assert (stored[f"{Q}.codes"].shape, stored[f"{Q}.stats"].shape) == ((16, 2), (1, 1))
    assert json.loads((tmp_path / "delta/delta_quant.json").read_text())["base"] == base.label
    opened = Checkpoint.open(tmp_path / "delta")
    assert inspect(opened)["packed"]["bits"] == 1
    assert len(opened.specs) == 14
    raw = Checkpoint("raw", Checkpoint.from_tensors(stored).source, {"delta_quant.json": (tmp_path / "delta/delta_quant.json").read_bytes()})
    entries = entries_of(raw, "delta_quant.json")
    assert sum(spec.nbytes for entry in entries for spec in apart_specs(entry)) == sum(tensor.nbytes for tensor in stored.values()) - 8


def test_trained_scales_give_logits_nearer_to_the_fine_tune(models: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    base, tuned = models
    lesson = Lesson(IDS, TrainOptions(30, 3e-2, clip=None))
    save(delta(base, tuned, DeltaOptions()), tmp_path / "plain")
    save(delta(base, tuned, DeltaOptions(), lesson), tmp_path / "trained")
    with torch.no_grad():
        wanted = load_model(tuned)(IDS).logits
        error = {
            name: (load_model(Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / name}"))(IDS).logits - wanted).square().mean() for name in ("plain", "trained")
        }
    assert error["trained"] < error["plain"]
    plain, trained = (load_file(tmp_path / name / "delta.packed.safetensors") for name in error)
    assert all(torch.equal(plain[name], trained[name]) for name in plain if name.endswith(".codes"))
    assert not torch.equal(plain[f"{Q}.stats"], trained[f"{Q}.stats"])


def test_adapters_and_differences_follow_each_other(models: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    adapted(model_of(initializer_range=0.3), tmp_path / "lora", target_modules=["q_proj"])
    save(delta(*models, DeltaOptions()), tmp_path / "delta")
    one = Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'lora'}+{tmp_path / 'delta'}")
    two = Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'delta'}+{tmp_path / 'lora'}")
    assert torch.allclose(one.read(Q), two.read(Q), atol=1e-6)
    assert not torch.allclose(one.read(Q), Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'delta'}").read(Q), atol=1e-3)


def test_what_does_not_fit_is_refused(models: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    base, tuned = models
    saved(model_of(hidden_size=32), tmp_path / "wide")
    with pytest.raises(CheckpointError, match="the models do not fit together: .*shape|has \\(64, 32\\)"):
        delta(base, Checkpoint.open(tmp_path / "wide"), DeltaOptions())
    with pytest.raises(OptionError, match="scale='group': tensor or row"):
        delta(base, tuned, DeltaOptions(scale="group"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="has no linear weights to take the difference of"):
        delta(base, tuned, DeltaOptions(exclude=("*proj*",)))
    save(delta(base, tuned, DeltaOptions()), tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"delta does not fit .*wide: .*is \(16, 32\) in the difference and \(32, 32\) in the base.*Give the base that"):
        Checkpoint.open(f"{tmp_path / 'wide'}+{tmp_path / 'delta'}")
    recipe = check({"inputs": {"delta": "delta"}}, tmp_path, "r")
    with pytest.raises(RecipeError, match="is the difference of a fine-tune, not a model; .* BASE\\+delta; name the base with --base"):
        plan(recipe, Execution(out=tmp_path / "out"))
    stored = load_file(tmp_path / "delta/delta.packed.safetensors")
    stored[f"{Q}.codes"][0, 0] ^= 1
    save_file(stored, tmp_path / "delta/delta.packed.safetensors")
    broken = Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'delta'}")
    with pytest.raises(CheckpointError, match=f"the codes of {Q} are not those that were written"):
        broken.read(Q)
