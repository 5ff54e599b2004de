"""Neurons that train beside those of every MLP: at few bits packed, and with their base an ordinary model that is wider."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from adapter_toys import adapted, close, load, logits, model_of, saved
from program import Program
from safetensors.torch import load_file
from torch import Tensor

from mergekit_plus.adapters import read_adapter
from mergekit_plus.adapters.neurons import mlps, widened
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError, RecipeError
from mergekit_plus.evaluate import load_model
from mergekit_plus.recipe import check
from mergekit_plus.training import TrainOptions, loss_on
from quant.adapters.neurons import NeuronOptions, Neurons, attached, train_neurons
from quant.adapters.train import Lesson

MODELS = Path(__file__).parents[1] / "models"
OPT = {
    "vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
    "word_embed_proj_dim": 16, "init_std": 0.3,
}  # fmt: skip


def base_of(folder: Path, kind: str = "LlamaForCausalLM") -> Checkpoint:
    if kind == "OPTForCausalLM":
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT)).eval()
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.bias += 0.5
        return Checkpoint.open(saved(model, folder / "base"))
    return Checkpoint.open(saved(model_of(kind, initializer_range=0.3), folder / "base"))


def rows(windows: int = 24, seed: int = 0) -> Tensor:
    """Windows of a language in which every token follows from the one before: 5 more, of 64."""
    return (torch.randint(64, (windows, 1), generator=torch.Generator().manual_seed(seed)) + 5 * torch.arange(12)) % 64


def lesson(steps: int = 60) -> Lesson:
    return Lesson(rows(), TrainOptions(steps, 3e-2, clip=None))


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_what_trains_is_the_wider_model(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, kind)
    model = load_model(base)
    before = logits(model)
    generator = torch.Generator().manual_seed(0)
    tensors, neurons = {}, {}
    for mlp in mlps(base):
        specs = mlp.specs(base, 3, "F32")
        values = [0.3 * torch.randn(spec.shape, generator=generator) for spec in specs]
        tensors |= {spec.name: value for spec, value in zip(specs, values, strict=True)}
        neurons[mlp] = Neurons([*values[:-1]], values[-1].T, None)
    with attached(model, neurons) as parameters:
        assert len(parameters) == 2 * (3 if kind == "LlamaForCausalLM" else 2)
        during = logits(model)
    assert torch.equal(logits(model), before)
    wider = widened(base, Checkpoint.from_tensors(tensors))
    width = "ffn_dim" if kind == "OPTForCausalLM" else "intermediate_size"
    assert wider.config[width] == base.config[width] + 3
    save(wider, tmp_path / "wider")
    assert close(logits(load(tmp_path / "wider")), during, 1e-5)
    assert not close(during, before, 1e-2)


@pytest.mark.parametrize("bits", [16, 1])
def test_they_learn_and_predict_as_they_did_in_training(bits: int, tmp_path: Path) -> None:
    base = base_of(tmp_path)
    save(train_neurons(base, lesson(), NeuronOptions(8, bits)), tmp_path / "neurons")
    wider = Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'neurons'}")
    assert loss_on(load_model(wider), rows(seed=1)) < loss_on(load_model(base), rows(seed=1)) - 0.2
    stored = load_file(tmp_path / "neurons" / ("adapter_model.safetensors" if bits == 16 else "adapter_model.packed.safetensors"))
    if bits == 1:
        assert stored["codes"].shape == (2 * 8 * 3 * 16 // 8,)  # two blocks of 8 neurons, three layers of width 16
        opened = Checkpoint.open(tmp_path / "neurons")
        assert all(len(row.unique()) == 2 for row in opened.read("base_model.model.model.layers.1.mlp.gate_proj.weight"))
        assert all(len(row.unique()) == 2 for row in opened.read("base_model.model.model.layers.1.mlp.down_proj.weight").T)


def test_the_same_lesson_gives_the_same_bytes(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    for name in ("one", "two"):
        save(train_neurons(base, lesson(3), NeuronOptions(4)), tmp_path / name)
    one, two = ((tmp_path / name / "adapter_model.packed.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    made = train_neurons(base, lesson(2), NeuronOptions(4, 16))
    save(made, tmp_path / "neurons")
    with pytest.raises(CheckpointError, match=r"neurons holds neurons, not products B A: it is no LoRA; with its base it is the model BASE\+.*neurons"):
        read_adapter(Checkpoint.open(tmp_path / "neurons"))
    saved(model_of(hidden_size=32), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"neurons does not fit .*other: .*gate_proj.weight is \(4, 16\) in the adapter and \(32, 32\) in the base"):
        Checkpoint.open(f"{tmp_path / 'other'}+{tmp_path / 'neurons'}")
    lacking = Checkpoint.from_tensors({name: made.read(name) for name in made.specs if "layers.1" not in name} | {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"the base has no 'x' that makes neurons or reads them; it holds no model\.layers\.1\.mlp\.gate_proj"):
        widened(base, lacking)
    with pytest.raises(CheckpointError, match=r"stands in a block whose MLP is not gate_proj \+ up_proj \+ down_proj or fc1 \+ fc2; train a LoRA"):
        train_neurons(base_of(tmp_path / "gpt2", "GPT2LMHeadModel"), lesson(2), NeuronOptions())
    with pytest.raises(OptionError, match="neurons must be 1 or more, not 0; bits=5: .*; 16 trains plain neurons"):
        train_neurons(base, lesson(2), NeuronOptions(0, 5))
    steps = [{"train_adapter": {"base": "base", "neurons": 0, "target": ["q_proj"], "text": "none.txt"}}]
    with pytest.raises(RecipeError) as caught:
        check({"inputs": {"base": "base"}, "steps": steps}, tmp_path, "r")
    for problem in ("neurons must be 1 or more, not 0", "neurons stand beside those of every MLP; target, init, budget and pools are for LoRA"):
        assert problem in str(caught.value)


def test_train_expand_apply(compress: Program, tmp_path: Path) -> None:
    """The whole way, as a user goes it, on a real small model."""

    def printed(*arguments: object) -> str:
        ended = compress(*arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    base, text = MODELS / "base", MODELS / "text" / "docs.val.txt"
    printed("adapter", "train", base, "--neurons", 8, "--text", text, "--window", 32, "--steps", 2, "-o", "packed")
    assert "packed: " in printed("inspect", "packed")
    printed("adapter", "expand", "packed", "-o", "plain")
    for name in ("packed", "plain"):
        printed("merge", f"{base}+{name}", "-o", f"with-{name}")
    packed, plain = (load_file(tmp_path / f"with-{name}" / "model.safetensors") for name in ("packed", "plain"))
    assert all(torch.equal(packed[name], plain[name]) for name in packed)
    assert load(tmp_path / "with-plain").config.intermediate_size == 384 + 8
    assert json.loads(printed("verify", "with-packed", "--inputs", "--json"))["problems"] == []
    adapted(model_of(), tmp_path / "lora", target_modules=["q_proj"])
    assert "packed holds neurons, not products B A" in compress("adapter", "merge", "packed", "lora").line
