"""transformers (with compressed-tensors) loads what is written here as it is, and computes the same."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checks import Checks, measure
from mergekit_plus.evaluate import load_model
from mergekit_plus.merge.plan import MergeOptions, merge
from mergekit_plus.progress import quiet
from quant import Scheme
from quant.plan import dequantize, quantize

MODELS = Path(__file__).parent / "models"
IDS = (torch.arange(24) * 7 % 61)[None]
ARCHITECTURES = ["LlamaForCausalLM", "GemmaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"]
EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")  # stored one by one, packed into one parameter by transformers


@pytest.fixture(autouse=True)
def quiet_transformers() -> Any:
    from mergekit_plus.model import silent_transformers

    with silent_transformers():
        yield


def theirs(folder: Path, dense: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it; `dense` asks compressed-tensors to unpack it at once."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # what the model's own config does not say: dequantize
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def equal_state(model: Any, expected: Any) -> None:
    ours: Mapping[str, Tensor] = expected.state_dict()
    found: Mapping[str, Tensor] = model.state_dict()
    assert set(found) == set(ours)
    for name, value in ours.items():
        assert torch.equal(found[name], value), name


def another(first: Checkpoint) -> Checkpoint:
    """A model beside this one."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: first.read(name) + 0.01 * torch.randn(first.specs[name].shape, generator=generator) for name in first.specs}
    return Checkpoint("other", Checkpoint.from_tensors(tensors).source, first.files)


# ---- tiny models of several architectures ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_model_loads_with_our_weights_whatever_its_shards(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    tiny = tiny_model(name, tmp_path)
    save(merge([tiny, another(tiny)], "slerp", options={"t": 0.4}), tmp_path / "merged", SaveOptions(max_shard_size=9000))
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    model, ours = theirs(tmp_path / "merged"), load_model(Checkpoint.open(tmp_path / "merged"))
    equal_state(model, ours)
    assert torch.equal(logits(model), logits(ours))
    original = theirs(tmp_path / name)
    assert not torch.equal(logits(model), logits(original))


SCHEMES = (Scheme(4, 8), Scheme(8, 0), Scheme(3, 8, False))
# transformers 5.23 cannot load packed experts with zero points: it looks for them unpacked
LOADABLE = [(name, scheme) for name in ARCHITECTURES for scheme in SCHEMES if scheme.symmetric or name not in EXPERTS]


@pytest.mark.parametrize(("name", "scheme"), LOADABLE, ids=str)
def test_a_packed_model_loads_with_our_values(tmp_path: Path, name: str, scheme: Scheme) -> None:
    save(quantize(tiny_model(name, tmp_path), scheme), tmp_path / "packed", SaveOptions(max_shard_size=9000))
    ours = load_model(dequantize(Checkpoint.open(tmp_path / "packed")))
    unpacked = theirs(tmp_path / "packed", dense=True)
    for parameter, value in unpacked.named_parameters():
        assert torch.equal(value, ours.get_parameter(parameter)), parameter
    assert torch.equal(logits(unpacked), logits(ours))
    if scheme.symmetric:
        assert torch.equal(logits(theirs(tmp_path / "packed")), logits(ours))


def test_a_tied_model_stays_tied(tmp_path: Path) -> None:
    gemma = tiny_model("GemmaForCausalLM", tmp_path)
    save(quantize(merge([gemma, another(gemma)], "linear"), Scheme(4, 16)), tmp_path / "packed")
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "packed").specs
    model = theirs(tmp_path / "packed")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_tied_and_one_untied_model_make_an_untied_one(tmp_path: Path) -> None:
    tied = tiny_model("LlamaForCausalLM", tmp_path)
    both = {name: tied.read(name) for name in tied.specs}
    del both["lm_head.weight"]
    other = Checkpoint("tied", Checkpoint.from_tensors(both).source, tied.files).with_config(tie_word_embeddings=True)
    save(merge([other, tied], "linear"), tmp_path / "merged")
    model = theirs(tmp_path / "merged")
    assert torch.equal(model.lm_head.weight, ((tied.read("lm_head.weight").double() + tied.read("model.embed_tokens.weight").double()) / 2).float())
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", EXPERTS)
def test_the_dense_format_of_a_mixture_loads_with_our_values(tmp_path: Path, name: str) -> None:
    save(quantize(tiny_model(name, tmp_path), Scheme(4, 0), format_name="dense"), tmp_path / "dense")
    equal_state(theirs(tmp_path / "dense"), load_model(Checkpoint.open(tmp_path / "dense")))


# ---- the small real models ----


@pytest.mark.parametrize("kind", ["dense", "packed", "asymmetric"])
def test_a_plain_perplexity_loop_gives_the_number_of_eval(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    models = [Checkpoint.open(MODELS / name) for name in ("code", "docs")]
    merged = merge(models, "ties", Checkpoint.open(MODELS / "base"), {"density": 0.5}, MergeOptions(dtype="BF16"))
    result = merged if kind == "dense" else quantize(merged, Scheme(4, 32, symmetric=kind == "packed"))
    save(result, tmp_path / "out", SaveOptions(max_shard_size=1_000_000))
    text = MODELS / "text" / "code.test.txt"
    ours = measure(Checkpoint.open(tmp_path / "out"), Checks(texts={"code": str(text)}, windows=6), Path(), quiet())["ppl code"]

    model = theirs(tmp_path / "out", dense=kind == "asymmetric")
    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "out")(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    total = 0.0
    for window in ids[: 6 * 256].view(6, 256):
        with torch.no_grad():
            total += model(input_ids=window[None], labels=window[None]).loss.item() / 6
    assert math.exp(total) == pytest.approx(ours, rel=1e-3)
    assert ours < 25  # a model, not noise


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_unpacked_by_transformers_are_ours_bit_for_bit(tmp_path: Path, symmetric: bool) -> None:
    save(quantize(Checkpoint.open(MODELS / "c"), Scheme(4, 64, symmetric)), tmp_path / "packed")
    model = theirs(tmp_path / "packed", dense=True, dtype=torch.bfloat16)
    ours = dequantize(Checkpoint.open(tmp_path / "packed"))
    for name in ours.specs:
        assert torch.equal(model.get_parameter(name), ours.read(name)), name
