"""A packed checkpoint as a transformers model that stays packed, against the model that it dequantizes to, and against transformers' own."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import PEAK_OF
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError
from mergekit_plus.evaluate import load_model
from mergekit_plus.merge.plan import MergeOptions, merge
from quant import Scheme
from quant.experts import QuantExperts
from quant.formats import modules_of
from quant.formats.awq import ORDER
from quant.linear import QuantLinear
from quant.loading import as_pack_quantized, load
from quant.plan import PRESETS, dequantize, quantize

BASE = Checkpoint.open(Path(__file__).parents[1] / "models" / "base")
IDS = (torch.arange(24) * 7 % 61)[None]
SCHEMES = [Scheme(bits, group, symmetric) for bits in range(2, 9) for group in (0, 32) for symmetric in (True, False)]
PACKABLE = [name for name in ARCHITECTURES if not name.startswith("GPT2")]  # whose weights are stored [in, out], and are not quantized


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = next(iter(model(input_ids=IDS).values()))
    return found


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def in_float32(checkpoint: Checkpoint) -> Checkpoint:
    """The same with all floats in float32, scales too, so that dequantized weights are rounded no more than products of integers are."""
    return merge([checkpoint], "linear", options={}, how=MergeOptions(dtype="F32"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_packed_model_computes_what_the_dequantized_one_does(scheme: Scheme) -> None:
    packed = quantize(in_float32(BASE), scheme, options={"clip": 0})
    model, dense = load(packed), load_model(dequantize(packed))
    assert len(packed_layers(model)) == 6 * 7
    torch.testing.assert_close(outputs(model), outputs(dense), rtol=0, atol=2e-4)
    assert torch.equal(outputs(load(packed, as_dequantized=True)), outputs(dense))


@pytest.mark.parametrize("name", PACKABLE)
def test_every_architecture_runs_packed_experts_and_biases_too(tmp_path: Path, name: str) -> None:
    packed = quantize(tiny_model(name, tmp_path), Scheme(4, 8, False))
    model, dense = load(packed), load_model(dequantize(packed))
    assert len(packed_layers(model)) == len(list(modules_of(packed)))
    assert type(model) is type(dense)
    assert not model.training
    torch.testing.assert_close(outputs(model), outputs(dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_may_be_in_half_precision(dtype: torch.dtype) -> None:
    packed = quantize(BASE, Scheme(4, 32))
    model, wanted = load(packed, dtype), outputs(load(packed))
    assert {module.weight_scale.dtype for module in packed_layers(model).values()} == {torch.bfloat16}  # as stored
    assert outputs(model).dtype == model.lm_head.weight.dtype == dtype
    assert (outputs(model).float() - wanted).norm() < 20 * torch.finfo(dtype).eps * wanted.norm()


def test_layers_of_several_schemes_stand_beside_dense_ones() -> None:
    schemes = {f"model.layers.{block}.mlp.down_proj": Scheme(2 + block, 32 * (block % 2), block % 2 == 0) for block in range(5)}
    packed = quantize(in_float32(BASE), schemes)
    model = load(packed)
    assert {name: layer.scheme for name, layer in packed_layers(model).items()} == schemes
    torch.testing.assert_close(outputs(model), outputs(load_model(dequantize(packed))), rtol=0, atol=2e-4)


# ---- other layouts ----


def as_awq(checkpoint: Checkpoint, packed: Checkpoint) -> Checkpoint:
    """A checkpoint of four asymmetric bits as AWQ stores it."""
    tensors = {name: packed.read(name) for name in packed.specs if ".weight_" not in name}

    def words(codes: Tensor) -> Tensor:
        nibbles = (codes.T.to(torch.int64) + 8).unflatten(1, (-1, 8))[..., list(ORDER)] << torch.arange(0, 32, 4)
        return nibbles.sum(-1).to(torch.int32)

    for module in modules_of(packed):
        codes: Any = module.decode({part: packed.read(f"{module.name}.{part}") for part in module.row_parts})
        tensors |= {f"{module.name}.qweight": words(codes.codes), f"{module.name}.qzeros": words(codes.zero_point)}
        tensors[f"{module.name}.scales"] = codes.scale.T.half().contiguous()
    found = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return replace(Checkpoint.from_tensors(tensors, "awq"), files=checkpoint.files).with_config(quantization_config=found)


LAYOUTS = [
    ("gptq", Scheme(4, 32)), ("gptq", Scheme(3, 32)), ("gptq_v2", Scheme(2, 0, False)), ("gptq_v2", Scheme(8, 64, False)), ("int-quantized", Scheme(8, 0)),
    ("awq", Scheme(4, 32, False)),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "scheme"), LAYOUTS, ids=str)
def test_other_layouts_are_turned_and_nothing_is_lost(layout: str, scheme: Scheme) -> None:
    packed = as_awq(BASE, quantize(BASE, scheme)) if layout == "awq" else quantize(BASE, scheme, format_name=layout)
    module = next(modules_of(packed))
    tensors = {part: packed.read(f"{module.name}.{part}") for part in module.row_parts}
    turned, codes = as_pack_quantized(module, tensors), module.decode(tensors)
    assert torch.equal(QuantLinear(turned, scheme).weight, module.values(tensors))
    assert torch.equal(turned["weight_scale"], codes.scale)
    model, dense = load(packed, as_dequantized=True), load_model(dequantize(packed))
    assert len(packed_layers(model)) == 6 * 7
    assert torch.equal(outputs(model), outputs(dense))


# ---- what cannot run packed ----


def test_small_floats_are_dequantized_and_this_is_said() -> None:
    scheme, layout = PRESETS["FP8"]
    packed = quantize(BASE, scheme, format_name=layout)
    with pytest.warns(UserWarning, match="42 of 42 packed layers run dequantized: .*down_proj.weight holds FP8, and integers are what is multiplied as it is"):
        model = load(packed)
    assert packed_layers(model) == {}
    assert torch.equal(outputs(model), outputs(load_model(dequantize(packed))))


def test_inputs_in_an_order_of_their_own_are_dequantized() -> None:
    packed = quantize(BASE, Scheme(4, 32), format_name="gptq")
    name = "model.layers.2.mlp.down_proj.g_idx"
    tensors = {each: packed.read(each) for each in packed.specs}
    tensors[name] = tensors[name].flip(0).contiguous()
    packed = replace(packed, source=Checkpoint.from_tensors(tensors).source)
    with pytest.warns(UserWarning, match=r"1 of 42 packed layers run dequantized: \S+layers.2.mlp.down_proj.weight cannot be laid out as pack-quantized: its"):
        model = load(packed)
    assert "model.layers.2.mlp.down_proj" not in packed_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(outputs(load(packed, as_dequantized=True)), outputs(load_model(dequantize(packed))))


def test_experts_that_are_not_all_packed_are_dequantized(tmp_path: Path) -> None:
    moe = tiny_model("Qwen3MoeForCausalLM", tmp_path)
    packed = quantize(moe, Scheme(4, 8), exclude=["layers.1.mlp.experts.*"])
    model = load(packed)
    assert [name for name, module in model.named_modules() if isinstance(module, QuantExperts)] == ["model.layers.0.mlp.experts"]
    torch.testing.assert_close(outputs(model), outputs(load_model(dequantize(packed))), rtol=0, atol=1e-5)
    tensors = {name: packed.read(name) for name in packed.specs if "layers.0.mlp.experts.1." not in name}
    with pytest.raises(CheckpointError, match=r"misshapen model.layers.0.mlp.experts.down_proj \[1, 16, 8\], not \[2, 16, 8\]"):
        load(replace(packed, source=Checkpoint.from_tensors(tensors).source))


def test_a_tensor_too_few_or_too_many_is_refused() -> None:
    packed = quantize(BASE, Scheme(4, 32))
    tensors = {name: packed.read(name) for name in packed.specs}

    def changed(drop: str = "", **extra: Tensor) -> Checkpoint:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(drop or "-")}
        return replace(packed, source=Checkpoint.from_tensors({**kept, **extra}).source, label="changed")

    with pytest.raises(CheckpointError, match=r"changed does not fit LlamaForCausalLM: missing model\.layers\.3\.mlp\.up_proj\.weight"):
        load(changed("model.layers.3.mlp.up_proj."))
    with pytest.raises(CheckpointError, match="unexpected surplus"):
        load(changed(surplus=torch.ones(3)))
    with pytest.raises(CheckpointError, match="its weight_scale is missing"):
        load(changed("model.layers.3.mlp.up_proj.weight_scale"))


# ---- from plans, to files ----


def test_what_a_recipe_makes_runs_without_a_file_and_each_step_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_plus import evaluate

    runs: list[str] = []
    execute = evaluate.execute

    def counted(step: Any) -> list[Tensor]:
        runs.append(step.writes[0].name)
        return execute(step)

    monkeypatch.setattr(evaluate, "execute", counted)
    models = [BASE, Checkpoint.open(Path(BASE.label).parent / "code")]
    packed = quantize(merge(models, "slerp", options={"t": 0.5}), Scheme(4, 32))
    model = load(packed)
    assert len(runs) == len(set(runs)) == 42
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, packed.read(name).to(value.dtype))} == set()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 0), Scheme(4, 32, False)], ids=str)
def test_its_state_is_the_checkpoint_and_what_it_saves_loads_again(tmp_path: Path, scheme: Scheme) -> None:
    packed = quantize(BASE, scheme)
    model = load(packed, torch.bfloat16)
    state = model.state_dict()
    assert state.keys() == packed.specs.keys()
    assert all(torch.equal(state[name], packed.read(name)) for name in packed.specs)
    model.save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    assert again.specs == packed.specs
    assert again.config["quantization_config"] == packed.config["quantization_config"]
    assert torch.equal(outputs(load(again)), outputs(load(packed)))


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_mixture_that_was_loaded_is_saved_by_its_own_names(tmp_path: Path, name: str) -> None:
    packed = quantize(tiny_model(name, tmp_path), Scheme(4, 8))
    load(packed).save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    assert again.specs == packed.specs
    assert torch.equal(outputs(load(again)), outputs(load(packed)))


def test_what_was_gptq_is_saved_as_pack_quantized(tmp_path: Path) -> None:
    packed = quantize(BASE, Scheme(4, 32), format_name="gptq")
    load(packed, torch.float16).save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    assert {module.stored.layout for module in modules_of(again)} == {"pack-quantized"}
    assert torch.equal(outputs(load(again)), outputs(load(packed, torch.float16).float()))


# ---- transformers' own ----


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, 0)], ids=str)
@pytest.mark.filterwarnings("ignore")  # those of the libraries that load
def test_it_writes_the_text_that_transformers_writes(tmp_path: Path, scheme: Scheme) -> None:
    """compressed-tensors unpacks the weights at the first forward pass; greedy tokens are those of the integers."""
    from transformers import AutoModelForCausalLM

    save(quantize(in_float32(BASE), scheme), tmp_path / "packed")
    prompt = torch.tensor([[5, 80, 200, 301, 17, 90]])
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 1}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ours = load(Checkpoint.open(tmp_path / "packed"))
    assert torch.equal(ours.generate(prompt, **settings), theirs.generate(prompt, **settings))


# ---- memory ----

LOAD = """
import sys
import torch
from mergekit_plus.checkpoint import Checkpoint
from quant.loading import load

torch.set_num_threads(1)
load(Checkpoint.open(sys.argv[1]))
start, models = anonymous(), []
peak = peak_of(lambda: models.append(load(Checkpoint.open(sys.argv[2]))))
print(anonymous() - start, peak - start)
"""


def test_memory_holds_the_packed_bytes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(tmp_path / "dense")  # 78 MB
    save(quantize(BASE, Scheme(4, 32)), tmp_path / "warm")
    save(quantize(Checkpoint.open(tmp_path / "dense"), Scheme(4, 128), options={"clip": 0}), tmp_path / "packed")
    nbytes = Checkpoint.open(tmp_path / "packed").nbytes
    done = subprocess.run([sys.executable, "-c", PEAK_OF + LOAD, tmp_path / "warm", tmp_path / "packed"], capture_output=True, text=True, check=True)
    after, peak = map(int, done.stdout.split())
    assert nbytes == pytest.approx(11e6, rel=0.1)
    assert after < nbytes + 8e6
    assert peak < nbytes + 16e6
