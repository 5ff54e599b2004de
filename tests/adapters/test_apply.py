"""A base with adapters applied is what peft's merge_and_unload makes of it, and what the adapted model computed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_toys import adapted, close, load, logits, merged, model_of, saved
from safetensors.torch import load_file, save_file

from mergekit_plus.adapters import apply, open_adapter
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checkpoint.plan import execute, steps_of
from mergekit_plus.checkpoint.references import split_reference
from mergekit_plus.errors import CheckpointError

LINEARS = ["q_proj", "v_proj", "down_proj"]
# what it is -> (class, changes to its config, options of peft.LoraConfig)
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("LlamaForCausalLM", {}, {"target_modules": LINEARS}),
    "all linears": ("LlamaForCausalLM", {}, {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "rank-stabilised": ("LlamaForCausalLM", {}, {"target_modules": LINEARS, "use_rslora": True}),
    "patterns": (
        "LlamaForCausalLM", {},
        {"target_modules": LINEARS, "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 3}, "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 9}},
    ),
    "patterns, rank-stabilised": ("LlamaForCausalLM", {}, {"target_modules": LINEARS, "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "DoRA": ("LlamaForCausalLM", {}, {"target_modules": LINEARS, "use_dora": True}),
    "DoRA on Conv1D": ("GPT2LMHeadModel", {}, {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "Conv1D": ("GPT2LMHeadModel", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "bias of the adapter": ("LlamaForCausalLM", {"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True}),
    "trained biases": ("LlamaForCausalLM", {"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "trained biases of the targets": ("LlamaForCausalLM", {"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "whole modules": ("LlamaForCausalLM", {}, {"target_modules": LINEARS, "modules_to_save": ["lm_head", "norm"]}),
    "head": ("LlamaForCausalLM", {}, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("LlamaForCausalLM", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA on an embedding": ("LlamaForCausalLM", {}, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
# what ties are broken by
UNTYING: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both at once": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_applied_as_peft_does(tmp_path: Path, kind: str) -> None:
    model_class, changes, options = KINDS[kind]
    model = model_of(model_class, **changes)
    base = saved(model, tmp_path / "base")
    before = load_file(base / "model.safetensors")
    expected = merged(adapted(model, tmp_path / "lora", **options))
    result = Checkpoint.open(f"{base}+{tmp_path / 'lora'}")
    changed = 0
    for name in result.specs:
        assert close(result.read(name), expected[name if name in expected else f"transformer.{name}"]), name
        changed += not torch.equal(result.read(name), before[name])
    assert changed >= 3
    assert set(result.specs) == set(before)


@pytest.mark.parametrize("kind", UNTYING)
def test_a_change_of_one_of_two_tied_tensors_unties_them(tmp_path: Path, kind: str) -> None:
    model = model_of(**TIED)
    base = saved(model, tmp_path / "base")
    assert "lm_head.weight" not in Checkpoint.open(base).specs
    expected = logits(adapted(model, tmp_path / "lora", **UNTYING[kind]))
    save(Checkpoint.open(f"{base}+{tmp_path / 'lora'}"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert close(logits(load(tmp_path / "out")), expected, 1e-5)


def test_tied_tensors_that_no_adapter_touches_stay_tied(tmp_path: Path) -> None:
    model = model_of(**TIED)
    base = saved(model, tmp_path / "base")
    adapted(model, tmp_path / "lora", target_modules=LINEARS)
    result = Checkpoint.open(f"{base}+{tmp_path / 'lora'}")
    assert result.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in result.specs


def test_a_convolution_is_a_matrix_for_an_adapter(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((8, 3, 2, 2), (4, 3, 2, 2), (8, 4, 1, 1)))
    lora = adapter_of(tmp_path, {"conv.lora_A.weight": a, "conv.lora_B.weight": b}, r=4, lora_alpha=2)
    result = apply(Checkpoint.from_tensors({"conv.weight": w}), [open_adapter(lora)])
    expected = w.double() + 0.5 * torch.einsum("or,rikl->oikl", b[:, :, 0, 0].double(), a.double())
    assert close(result.read("conv.weight"), expected)


def adapter_of(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter from its tensors."""
    out = folder / "lora"
    out.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}))
    return out


def test_the_sum_is_rounded_once_to_the_dtype_of_the_base(tmp_path: Path) -> None:
    """256 + 1 + 1.5 is 258.5: bfloat16 has 258 and 260 there; an adapter of 1 alone would leave 256, and 257 + 1.5 is lost as well."""
    lora = adapter_of(tmp_path, {"x.lora_A.weight": torch.ones(1, 1), "x.lora_B.weight": torch.full((1, 1), 1.5)})
    (tmp_path / "first").mkdir()
    one = adapter_of(tmp_path / "first", {"x.lora_A.weight": torch.ones(1, 1), "x.lora_B.weight": torch.full((1, 1), 1.0)})
    base = Checkpoint.from_tensors({"x.weight": torch.full((1, 1), 256.0).bfloat16()})
    assert apply(base, [open_adapter(one)]).read("x.weight").item() == 256
    assert apply(base, [open_adapter(one), open_adapter(lora)]).read("x.weight").item() == 258


def test_adapters_are_applied_one_after_the_other(tmp_path: Path) -> None:
    model = model_of()
    base = saved(model, tmp_path / "base")
    first = adapted(model, tmp_path / "one", target_modules=LINEARS, use_dora=True).merge_and_unload()
    expected = merged(adapted(first, tmp_path / "two", seed=2, target_modules=["q_proj"]))
    result = Checkpoint.open(f"{base}+{tmp_path / 'one'}+{tmp_path / 'two'}")
    assert all(close(result.read(name), expected[name]) for name in result.specs)
    with pytest.raises(CheckpointError, match=r"q_proj is a DoRA layer, .* name this adapter before the others"):
        Checkpoint.open(f"{base}+{tmp_path / 'two'}+{tmp_path / 'one'}")


@pytest.mark.parametrize(("kind", "shape"), [("straight", (700, 300)), ("turned", (700, 300)), ("DoRA", (700, 300)), ("turned DoRA", (700, 300))])
def test_the_bytes_do_not_depend_on_how_the_rows_are_cut(tmp_path: Path, kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator)
    out, width = shape[::-1] if "turned" in kind else shape
    tensors = {"x.lora_A.weight": torch.randn(8, width, generator=generator), "x.lora_B.weight": torch.randn(out, 8, generator=generator)}
    if "DoRA" in kind:
        tensors["x.lora_magnitude_vector"] = torch.rand(out, generator=generator)
    lora = open_adapter(adapter_of(tmp_path, tensors, r=8, fan_in_fan_out="turned" in kind))
    result = apply(Checkpoint.from_tensors({"x.weight": w}), [lora])
    (step,) = steps_of(result)
    whole = result.read("x.weight")
    if kind != "turned DoRA":  # whose lengths are those of columns
        assert step.cut == 256
    for elements in (1, 100_000):
        assert torch.equal(torch.cat([execute(step, rows)[0] for rows in step.slabs(elements)]), whole)
    outs = []
    for number, options in enumerate((SaveOptions(workers=1), SaveOptions(workers=3, memory=80 << 20))):
        save(result, tmp_path / f"{number}.safetensors", options)
        outs.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_a_path_with_a_plus_is_a_path(tmp_path: Path) -> None:
    model = model_of()
    base = saved(model, tmp_path / "c++" / "base")
    adapted(model, tmp_path / "a+b", target_modules=LINEARS)
    assert split_reference(f"{base}+{tmp_path / 'a+b'}") == [str(base), str(tmp_path / "a+b")]
    assert split_reference(str(base)) == [str(base)]
    assert split_reference("org/model@v1+org/lora@v2+org/other") == ["org/model@v1", "org/lora@v2", "org/other"]
    assert Checkpoint.open(f"{base}+{tmp_path / 'a+b'}").label == f"{base}+{tmp_path / 'a+b'}"
    assert split_reference("a+b", tmp_path) == ["a+b"]
    for wrong in ("+lora", "base+", "base++lora"):
        with pytest.raises(CheckpointError, match="stands between a model and an adapter"):
            split_reference(wrong)


def test_files_in_place_of_folders(tmp_path: Path) -> None:
    model = model_of()
    base = saved(model, tmp_path / "base")
    adapted(model, tmp_path / "lora", target_modules=LINEARS)
    result = Checkpoint.open(f"{base / 'model.safetensors'}+{tmp_path / 'lora' / 'adapter_model.safetensors'}")
    expected = Checkpoint.open(f"{base}+{tmp_path / 'lora'}")
    assert all(torch.equal(result.read(name), expected.read(name)) for name in expected.specs)
    assert not result.config


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = model_of()
    saved(model, tmp_path / "base")
    wide = model_of(intermediate_size=48)
    adapted(wide, tmp_path / "wide", target_modules=["down_proj"])
    with pytest.raises(CheckpointError, match=r"wide does not fit .*base: model\.layers\.0\.mlp\.down_proj: \(16, 48\) in the adapter, \(16, 32\) in the base"):
        Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'wide'}")
    deep = model_of(num_hidden_layers=3)
    adapted(deep, tmp_path / "deep", target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"the base has no 'model\.layers\.2\.self_attn\.q_proj\.weight'\. Did you mean"):
        Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'deep'}")
    with pytest.raises(CheckpointError, match=r"base is a model, not an adapter"):
        Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / 'base'}")


def test_adapters_of_other_types_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model_of(), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    with pytest.raises(CheckpointError, match=r"ia3 is an adapter of type IA3; LORA is the one that is known here"):
        open_adapter(tmp_path / "ia3")


A, B = torch.ones(2, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({}, {}, "holds no tensors: the adapter is empty"),
        ({"x.lora_A.weight": A}, {"r": 2}, r"x has lora_A\.weight but no lora_B\.weight"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {"r": 4}, r"x has rank 4 by adapter_config\.json, but its A is \(2, 3\) and its B \(4, 2\)"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {"r": 0}, r"impossible r or rank_pattern: 0 for x"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {"r": 2, "alpha_pattern": {"(": 1}}, r"impossible lora_alpha or alpha_pattern"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {"r": 2, "use_qalora": True}, r"sets use_qalora, which is not known here"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {"r": 2, "init_lora_weights": "pissa_niter_4"}, r"initialisation \(pissa_niter_4\) changed"),
        ({"x.lora_C.weight": A}, {"r": 2}, r"what base_model\.model\.x\.lora_C\.weight is for is not known here"),
        ({"x.token_adapter.trainable_tokens_delta": A}, {}, r"trainable_tokens_delta is for is not known here"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_adapter(adapter_of(tmp_path, tensors, **config))


def test_tensors_that_are_no_factors_must_be_the_bases(tmp_path: Path) -> None:
    lora = adapter_of(tmp_path, {"y.weight": A, "x.scores": B})
    with pytest.raises(CheckpointError, match=r"has no 'x\.scores' to put .*; y\.weight is \(2, 3\) in the adapter and \(2, 2\) in the base"):
        apply(Checkpoint.from_tensors({"y.weight": torch.ones(2, 2)}), [open_adapter(lora)])
