"""Adapters trained for few bits: what trains is what is stored, distillation beats post-hoc codes, and the whole way through peft and back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapter_toys import adapted, load, model_of, saved
from program import Program
from safetensors.torch import load_file

from mergekit_plus.adapters import open_adapter, read_adapter
from mergekit_plus.checkpoint import Checkpoint, Work, save
from mergekit_plus.errors import CheckpointError, OptionError, RecipeError
from mergekit_plus.evaluate import load_model
from mergekit_plus.recipe import check
from mergekit_plus.training import TrainOptions, distillation, loss_on, next_token
from quant.adapters.coding import Coding
from quant.adapters.latent import Latent, Teacher, attached
from quant.adapters.plan import QuantizeOptions, quantize_adapter
from quant.adapters.scratch import TrainAdapterOptions, train_adapter
from quant.adapters.train import Lesson

MODELS = Path(__file__).parents[1] / "models"
LINEAR = {"target_modules": ["q_proj", "down_proj"]}


def lively(**changes: int) -> object:
    """A tiny model whose logits are far from even, so that what is trained shows."""
    return model_of(**{"initializer_range": 0.3, **changes})


def rows(windows: int = 24, window: int = 12, seed: int = 0) -> torch.Tensor:
    """Windows of a language in which every token follows from the one before: 5 more, of 64."""
    starts = torch.randint(64, (windows, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + 5 * torch.arange(window)) % 64


def lesson(steps: int = 30, lr: float = 3e-2, windows: int = 24, **options: object) -> Lesson:
    return Lesson(rows(windows), TrainOptions(steps, lr, clip=None, **options))  # type: ignore[arg-type]


def test_latents_add_what_is_stored_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = load_model(Checkpoint.open(saved(lively(), tmp_path / "base")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(rows()).logits
    generator = torch.Generator().manual_seed(0)
    a, rows_b = (torch.randn((3, 16), generator=generator) for _ in range(2))
    latent = Latent(a, rows_b, 0.5, None, (torch.tensor(2.0), torch.tensor(3.0)))
    with attached(model, {"model.layers.0.self_attn.q_proj": latent}) as parameters:
        assert sorted(parameters) == ["model.layers.0.self_attn.q_proj.a", "model.layers.0.self_attn.q_proj.rows_b"]
        changed = model(rows()).logits
        latent.plain = (torch.zeros_like(a), rows_b)
        assert torch.equal(Teacher(model, {"q": latent})(input_ids=rows()).logits, plain)
        assert not latent.off
    assert torch.equal(model(rows()).logits, plain)
    assert before.keys() == model.state_dict().keys()
    model.model.layers[0].self_attn.q_proj.weight.data += 0.5 * rows_b.T @ a
    assert torch.allclose(model(rows()).logits, changed, atol=1e-5)
    for name, message in (("model.layers.7.q", "the model has no module 'model.layers.7.q'"), ("model.norm", "the model has LlamaRMSNorm")):
        with pytest.raises(CheckpointError, match=message), attached(model, {name: latent}):
            pass


@pytest.mark.parametrize("bits", [1, 2, 16])
def test_an_adapter_learns_from_scratch_and_predicts_as_it_did_in_training(bits: int, tmp_path: Path) -> None:
    base = Checkpoint.open(saved(lively(), tmp_path / "base"))
    made = train_adapter(base, lesson(60, 3e-2), TrainAdapterOptions(bits, 4))
    save(made, tmp_path / "adapter")
    before, after = (loss_on(load_model(Checkpoint.open(ref)), rows(seed=1)) for ref in (tmp_path / "base", f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
    assert after < before - 0.5
    opened = open_adapter(tmp_path / "adapter")
    assert len(opened.lowrank) == 14
    assert {module.rank for module in opened.lowrank.values()} == {4}
    stored = load_file(tmp_path / "adapter" / ("adapter_model.safetensors" if bits == 16 else "adapter_model.packed.safetensors"))
    assert sorted(stored)[0] == ("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" if bits == 16 else "checksums")
    for module in opened.lowrank.values():
        values = opened.checkpoint.read(module.a)
        assert bits == 16 or all(len(row.unique()) <= 2**bits for row in values)


def test_the_same_lesson_gives_the_same_bytes_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    base = Checkpoint.open(saved(lively(), tmp_path / "base"))
    for name in ("one", "two"):
        save(train_adapter(base, lesson(4), TrainAdapterOptions(1, 2, target=("q_proj",))), tmp_path / name)
    one, two = ((tmp_path / name / "adapter_model.packed.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    deferred = next(iter(train_adapter(base, lesson(4), TrainAdapterOptions(1, 2, target=("q_proj",))).source.steps)).reads[0][0].source  # type: ignore[attr-defined]
    work = Work(tmp_path / "work")
    deferred.compute(work)
    assert {path.name for path in work.folder.iterdir()} == {"adapter.safetensors", "training.pt"}
    latents_gone = load_file(work.folder / "adapter.safetensors")
    assert sorted(latents_gone) == ["checksums", "codes", "levels.1", "stats"]


KINDS: dict[str, dict[str, object]] = {
    "plain": LINEAR,
    "rslora and patterns": {**LINEAR, "use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 9}},
    "dora": {**LINEAR, "use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_latents_that_are_not_coded_are_the_adapter(kind: str, architecture: str, tmp_path: Path) -> None:
    options = dict(KINDS[kind]) if architecture == "LlamaForCausalLM" else {**KINDS[kind], "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    saved(model_of(architecture), tmp_path / "base")
    expected = adapted(model_of(architecture), tmp_path / "lora", **options)(rows()).logits
    adapter, model = open_adapter(tmp_path / "lora"), load_model(Checkpoint.open(tmp_path / "base"))
    read = adapter.checkpoint.read
    sizes = torch.tensor(2.0), torch.tensor(3.0)
    latents = {
        name: Latent(read(module.a), read(module.b).T, module.scale, None, sizes, read(module.magnitude) if module.magnitude else None)
        for name, module in adapter.lowrank.items()
    }
    with attached(model, latents):
        assert torch.allclose(model(rows()).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_distilled_codes_are_nearer_to_the_adapter_than_those_found_post_hoc(kind: str, tmp_path: Path) -> None:
    base = Checkpoint.open(saved(lively(), tmp_path / "base"))
    adapted(lively(), tmp_path / "lora", **KINDS[kind])
    adapter = open_adapter(tmp_path / "lora")
    save(quantize_adapter(adapter, QuantizeOptions(1)), tmp_path / "post-hoc")
    save(quantize_adapter(adapter, QuantizeOptions(1), base, lesson(40, windows=96)), tmp_path / "distilled")
    teacher = load_model(Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'lora'}"))
    divergence = {
        name: loss_on(load_model(Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / name}")), rows(seed=2), distillation(teacher))
        for name in ("post-hoc", "distilled")
    }
    assert divergence["distilled"] < 0.8 * divergence["post-hoc"]
    sizes = {name: (tmp_path / name / "adapter_model.packed.safetensors").stat().st_size for name in divergence}
    assert sizes["distilled"] == sizes["post-hoc"]


def test_codes_that_train_for_the_text_learn_what_the_adapter_does_not_know(tmp_path: Path) -> None:
    base = Checkpoint.open(saved(lively(), tmp_path / "base"))
    adapted(lively(), tmp_path / "lora", **LINEAR)
    losses = {}
    for distill in (0.0, 0.5, 1.0):
        save(quantize_adapter(open_adapter(tmp_path / "lora"), QuantizeOptions(1, distill=distill), base, lesson(40)), tmp_path / str(distill))
        losses[distill] = loss_on(load_model(Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / str(distill)}")), rows(seed=2))
    assert losses[0.0] < losses[0.5] < losses[1.0]


def test_what_cannot_be_distilled_or_trained_is_refused(tmp_path: Path) -> None:
    base = Checkpoint.open(saved(lively(), tmp_path / "base"))
    adapted(lively(), tmp_path / "tables", target_modules=["embed_tokens"])
    adapted(lively(hidden_size=32), tmp_path / "wide", **LINEAR)
    with pytest.raises(CheckpointError, match="is more than a product B A beside a linear layer, which cannot be distilled; leave --text out"):
        quantize_adapter(open_adapter(tmp_path / "tables"), QuantizeOptions(1), base, lesson())
    with pytest.raises(CheckpointError, match="wide does not fit .*base"):
        quantize_adapter(open_adapter(tmp_path / "wide"), QuantizeOptions(1), base, lesson())
    with pytest.raises(OptionError, match="to distil, give both a text and the base"):
        quantize_adapter(open_adapter(tmp_path / "tables"), QuantizeOptions(1), base)
    with pytest.raises(OptionError, match="distill=2: a share of the loss, 0 to 1"):
        quantize_adapter(open_adapter(tmp_path / "tables"), QuantizeOptions(1, distill=2))
    with pytest.raises(OptionError, match="rank must be 1 or more, not 0; alpha must be positive, not 0; bits=5: .*; 16 trains a plain LoRA"):
        train_adapter(base, lesson(), TrainAdapterOptions(5, 0, alpha=0))
    with pytest.raises(OptionError, match=r"--target 'q_prj' matches no linear layer of .*base. Did you mean 'q_proj'\?"):
        train_adapter(base, lesson(), TrainAdapterOptions(target=("q_prj",)))
    with pytest.raises(OptionError, match="training needs two windows of text or more"):
        train_adapter(base, Lesson(rows(1)), TrainAdapterOptions())
    diverging = train_adapter(base, lesson(6, 1e30, schedule="constant", warmup=0.0), TrainAdapterOptions(1, 2))
    with pytest.raises(CheckpointError, match="is not finite; train with a smaller learning rate"):
        save(diverging, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_problems_of_the_steps_are_told(tmp_path: Path) -> None:
    of_delta = {"base": "base", "tuned": "t", "scale": "group"}
    steps = [{"train_adapter": {"base": "base", "bits": 7}}, {"quantize_adapter": {"bits": 6, "base": "bsae"}}, {"delta": of_delta}]
    with pytest.raises(RecipeError) as caught:
        check({"inputs": {"base": "base"}, "steps": steps}, tmp_path, "r")
    for problem in (
        "train_adapter: bits=7", "train_adapter: give it a text to train on", "quantize_adapter: bits=6",
        "quantize_adapter: 'bsae' is not an input. Did you mean 'base'?", "to distil, give both a text and the base",
        "delta: 't' is not an input", "delta: scale='group': tensor or row", "step 3, delta: it reads inputs, not the step before it",
    ):  # fmt: skip
        assert problem in str(caught.value)


def test_train_quantize_expand_peft_merge(compress: Program, tmp_path: Path) -> None:
    """The whole way, as a user goes it, on a real small model."""

    def printed(*arguments: object) -> str:
        ended = compress(*arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    base, text = MODELS / "base", MODELS / "text" / "docs.val.txt"
    short = ["--text", text, "--window", 32, "--steps", 3]
    printed("adapter", "train", base, "--bits", 16, "--rank", 2, *short, "-o", "lora")
    printed("adapter", "quantize", "lora", "--bits", 1, "--base", base, *short, "--distill", 0.5, "--autocast", "-o", "packed")
    assert "packed: " in printed("inspect", "packed")
    printed("adapter", "expand", "packed", "-o", "expanded")
    printed("adapter", "merge", "packed", "lora", "-s", "weight=1,0", "-o", "both")
    printed("merge", f"{base}+packed", "-o", "merged")
    facts = json.loads(printed("verify", "packed", "--inputs", "--json"))
    assert not facts["problems"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_peft = peft.PeftModel.from_pretrained(load(base).float(), tmp_path / "expanded").merge_and_unload().state_dict()
    merged = Checkpoint.open(tmp_path / "merged")
    assert all(torch.equal(merged.read(name), with_peft[name].to(merged.read(name).dtype)) for name in merged.specs)
    expanded, packed = read_adapter(Checkpoint.open(tmp_path / "expanded")), read_adapter(Checkpoint.open(tmp_path / "packed"))
    assert all(torch.equal(expanded.checkpoint.read(name), packed.checkpoint.read(name)) for name in packed.checkpoint.specs)
    sizes = [(tmp_path / name).stat().st_size for name in ("packed/adapter_model.packed.safetensors", "lora/adapter_model.safetensors")]
    assert sizes[0] < sizes[1] / 4


def test_the_loss_of_training_is_the_text_s(tmp_path: Path) -> None:
    model = load_model(Checkpoint.open(saved(lively(), tmp_path / "base")))
    assert next_token(model, rows()).item() == pytest.approx(loss_on(model, rows()), rel=1e-5)
    assert Coding(1).columns == 1
