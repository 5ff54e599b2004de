"""Quantizing as a plan: which tensors are touched, what is refused, and the way back, bit for bit."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checkpoint import plan as plans
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import size
from quant import FORMATS, QUANTIZERS, Scheme, read_config
from quant import dequantize as values_of
from quant.floats import FP8, FP8_BLOCK, MXFP4, NVFP4, global_scale
from quant.plan import dequantize, is_packed, preset_problems, problems, quantize

MODELS = Path(__file__).parents[1] / "models"
SCHEMES = [Scheme(4, 32), Scheme(3, 32, False), Scheme(2, 0, False), Scheme(5, 64), Scheme(6, 32, False), Scheme(8, 0)]
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return Checkpoint.open(MODELS / "base")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    under = tmp_path_factory.mktemp("tiny")
    return lambda name: tiny_model(name, under)


def bare(rows: int = 33, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    generator = torch.Generator().manual_seed(rows * width)
    weight = torch.randn(rows, width, generator=generator).to(dtype)
    return Checkpoint.from_tensors({"layers.0.up_proj.weight": weight, "layers.0.norm.weight": torch.ones(width, dtype=dtype), "steps": torch.arange(3)}, "m")


def same(a: Checkpoint, b: Checkpoint, names: Any = None) -> bool:
    return all(torch.equal(a.read(name), b.read(name)) for name in (names or a.specs))


def small_slabs(monkeypatch: pytest.MonkeyPatch, piece: int, slab: int) -> None:
    for module in (plans, importlib.import_module("mergekit_plus.checkpoint.layout")):
        monkeypatch.setattr(module, "SLAB", slab)
    monkeypatch.setattr(plans, "PIECE", piece)


# ---- what is touched ----


def test_the_linear_layers_of_the_blocks_are_packed_and_nothing_else_is_touched(base: Checkpoint) -> None:
    result = quantize(base, Scheme(4, 32))
    packed = {name.removesuffix(".weight_packed") for name in result.specs if name.endswith(".weight_packed")}
    assert packed == {f"model.layers.{block}.{name}" for block in range(6) for name in PROJECTIONS}
    kept = [name for name in result.specs if "weight_" not in name.rpartition(".")[2]]
    assert {name for name in base.specs if name.removesuffix(".weight") not in packed} == set(kept)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(kept)
    assert same(result, base, kept)
    assert result.config["quantization_config"]["ignore"] == ["lm_head"]
    assert {key: value for key, value in result.config.items() if key != "quantization_config"} == base.config
    assert set(result.files) == set(base.files)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_packed_tensor_has_the_shape_that_the_plan_says(base: Checkpoint, scheme: Scheme) -> None:
    result = quantize(base, scheme)
    module = "model.layers.0.self_attn.k_proj"  # [64, 128]
    found = {name.rpartition(".")[2]: (tuple(result.read(name).shape), result.specs[name].dtype) for name in result.specs if name.startswith(f"{module}.")}
    groups = 128 // scheme.group_size if scheme.group_size else 1
    expected: dict[str, Any] = {"weight_packed": ((64, 4 * scheme.bits), "I32"), "weight_scale": ((64, groups), "BF16"), "weight_shape": ((2,), "I64")}
    if not scheme.symmetric:
        expected["weight_zero_point"] = ((2 * scheme.bits, groups), "I32")
    assert found == expected
    assert result.read(f"{module}.weight_shape").tolist() == [64, 128]


def test_excluded_layers_stay_dense_and_the_config_says_so(base: Checkpoint) -> None:
    result = quantize(base, Scheme(4, 32), exclude=("*.0.mlp.*", "*.o_proj.weight"))
    assert "model.layers.0.mlp.up_proj.weight" in result.specs
    assert "model.layers.1.mlp.up_proj.weight_packed" in result.specs
    assert set(result.config["quantization_config"]["ignore"]) == {
        "lm_head", *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")), *(f"model.layers.{block}.self_attn.o_proj" for block in range(6)),
    }  # fmt: skip


def test_layers_that_servers_fuse_stay_together(base: Checkpoint) -> None:
    with pytest.raises(OptionError) as caught:
        quantize(base, Scheme(4, 32), exclude=("*.3.self_attn.k_proj.weight",))
    assert str(caught.value) == (
        "servers fuse model.layers.3.self_attn.q_proj.weight and model.layers.3.self_attn.k_proj.weight: quantize both or neither (--exclude)"
    )
    quantize(base, Scheme(4, 32), exclude=("*.3.self_attn.[qkv]_proj.weight",))


def test_a_pattern_that_matches_nothing_is_a_mistake(base: Checkpoint) -> None:
    with pytest.raises(OptionError, match=r"--exclude 'lm_haed.weight' matches no tensor\. Did you mean 'lm_head.weight'\?"):
        quantize(base, Scheme(4, 32), exclude=("lm_haed.weight",))
    with pytest.raises(OptionError, match=r"--include 'layers.99.\*' matches no tensor"):
        quantize(base, Scheme(4, 32), include=("layers.99.*",))


def test_what_is_not_included_is_neither_in_the_result_nor_in_its_config(base: Checkpoint) -> None:
    result = quantize(base, Scheme(4, 32), include=("layers.3.self_attn.q_proj.*", "layers.3.mlp.*", "lm_head.weight"), exclude=("down_proj.weight",))
    whole = quantize(base, Scheme(4, 32))
    packed = {f"model.layers.3.{name}.weight" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")}
    assert {name.removesuffix("_packed") for name in result.specs if name.endswith("_packed")} == packed
    assert sorted(name for name in result.specs if "weight_" not in name) == ["lm_head.weight", "model.layers.3.mlp.down_proj.weight"]
    assert torch.equal(result.read("model.layers.3.mlp.up_proj.weight_packed"), whole.read("model.layers.3.mlp.up_proj.weight_packed"))
    assert set(result.config["quantization_config"]["ignore"]) == {"lm_head", "model.layers.3.mlp.down_proj"}


def test_layers_that_are_stored_turned_stay_dense_and_a_note_says_so(tiny: Any) -> None:
    gpt2 = tiny("GPT2LMHeadModel")
    with pytest.raises(CheckpointError, match=r"has no linear layer to quantize: .*8 layers store their weights \[in, out\] \('transformer.h.0"):
        quantize(gpt2, Scheme(4, 16))
    extra = Checkpoint.from_tensors({**{name: gpt2.read(name) for name in gpt2.specs}, "adapter.0.up_proj.weight": torch.randn(4, 16)})
    result = quantize(replace(extra, files=gpt2.files), Scheme(4, 16))
    assert [name for name in result.specs if name.endswith("_packed")] == ["adapter.0.up_proj.weight_packed"]
    assert any("8 layers store their weights [in, out]" in note for note in result.notes)


def test_a_tied_head_is_named_among_what_is_ignored(tiny: Any) -> None:
    gemma = tiny("GemmaForCausalLM")
    assert "lm_head.weight" not in gemma.specs
    assert "lm_head" in quantize(gemma, Scheme(4, 16)).config["quantization_config"]["ignore"]


def test_a_bare_file_is_quantized_by_names_and_shapes_and_says_how(tmp_path: Path) -> None:
    save(bare(), tmp_path / "m.safetensors")
    save(quantize(Checkpoint.open(tmp_path / "m.safetensors"), Scheme(4, 32)), tmp_path / "packed")
    packed = Checkpoint.open(tmp_path / "packed")
    assert list(packed.config) == ["quantization_config"]
    assert torch.equal(packed.read("layers.0.norm.weight"), torch.ones(64, dtype=torch.bfloat16))
    assert packed.read("steps").tolist() == [0, 1, 2]
    assert same(dequantize(packed), quantize(bare(), Scheme(4, 32), format_name="dense"))


def mixed(base: Checkpoint) -> dict[str, Scheme]:
    """Every fused group of the small Llama with a scheme of its own, o_proj of the first block and all of the last one dense."""
    schemes = {}
    for block in range(5):
        schemes |= {f"model.layers.{block}.self_attn.{name}_proj": Scheme(2 + block, 32, block != 2) for name in "qkv"}
        schemes |= {f"model.layers.{block}.mlp.{name}_proj": Scheme(3, 64) if block % 2 else Scheme(4, 0) for name in ("gate", "up")}
        schemes |= {f"model.layers.{block}.mlp.down_proj": Scheme(8, 0)}
        schemes |= {f"model.layers.{block}.self_attn.o_proj": Scheme(5, 32)} if block else {}
    return schemes


def test_a_table_gives_each_module_its_scheme_and_what_it_does_not_name_stays_dense(base: Checkpoint) -> None:
    schemes = mixed(base)
    result = quantize(base, schemes)
    assert result.label == f"{base.label} in 8 schemes"
    lookup = read_config(result.config)
    modules = {name.removesuffix(".weight") for name in base.specs}
    assert {module: lookup(module) for module in modules} == {module: schemes.get(module) for module in modules}
    assert {name.removesuffix(".weight_packed") for name in result.specs if name.endswith("_packed")} == set(schemes)
    back, dense = dequantize(result), quantize(base, schemes, format_name="dense")
    assert same(back, dense)
    for module, scheme in schemes.items():
        weight = base.read(f"{module}.weight")
        assert torch.equal(back.read(f"{module}.weight"), values_of(QUANTIZERS["rtn"].function(weight, scheme)))
    assert torch.equal(back.read("model.layers.5.mlp.up_proj.weight"), base.read("model.layers.5.mlp.up_proj.weight"))


def test_a_table_of_one_scheme_is_that_scheme(base: Checkpoint) -> None:
    whole = quantize(base, Scheme(4, 32))
    modules = [name.removesuffix(".weight_packed") for name in whole.specs if name.endswith("_packed")]
    table = quantize(base, dict.fromkeys(modules, Scheme(4, 32)))
    assert (table.specs, table.config) == (whole.specs, whole.config)


def test_the_size_of_a_mixed_model_counts_every_width(base: Checkpoint, tmp_path: Path) -> None:
    result = quantize(base, mixed(base))
    save(result, tmp_path / "out")
    expected = sum(spec.numel for spec in base.specs.values())
    assert size(result).parameters == size(Checkpoint.open(tmp_path / "out")).parameters == expected


def test_a_table_that_tears_a_fused_group_or_names_no_linear_layer_is_refused(base: Checkpoint) -> None:
    schemes = mixed(base) | {"model.layers.3.self_attn.v_proj": Scheme(8, 32)}
    with pytest.raises(OptionError) as caught:
        quantize(base, schemes)
    assert str(caught.value) == (
        "servers fuse model.layers.3.self_attn.q_proj.weight and model.layers.3.self_attn.v_proj.weight: give both one scheme, "
        "not 5 bits, groups of 32, symmetric and 8 bits, groups of 32, symmetric"
    )
    del schemes["model.layers.3.self_attn.v_proj"]
    with pytest.raises(OptionError, match=r"servers fuse .*3.self_attn.q_proj.weight and .*3.self_attn.v_proj.weight: quantize both or neither"):
        quantize(base, schemes)
    with pytest.raises(OptionError, match=r"has no linear layer 'model.layers.0.mlp.up' to quantize\. Did you mean 'model.layers.0.mlp.up_proj'\?"):
        quantize(base, {"model.layers.0.mlp.up": Scheme(4, 32)})
    with pytest.raises(OptionError, match="has no linear layer 'lm_head' to quantize"):
        quantize(base, {"lm_head": Scheme(4, 32)})
    with pytest.raises(CheckpointError, match=r"0.mlp.down_proj.weight has .* groups of 7 do not divide; give it another scheme, or leave layers out"):
        quantize(base, mixed(base) | {"model.layers.0.mlp.down_proj": Scheme(4, 7)})


FLOATS = [
    ("int-quantized", Scheme(8, 0)), ("float-quantized", FP8), ("float-quantized", FP8_BLOCK), ("nvfp4-pack-quantized", NVFP4), ("mxfp4-pack-quantized", MXFP4),
]  # fmt: skip
GPTQS = [("gptq", Scheme(3, 32)), ("gptq_v2", Scheme(4, 64, False)), ("gptq", Scheme(8, 0))]


@pytest.mark.parametrize(("layout", "scheme"), [*FLOATS, *GPTQS], ids=str)
def test_every_format_is_written_read_back_counted_and_said_in_the_config(base: Checkpoint, tmp_path: Path, layout: str, scheme: Any) -> None:
    result = quantize(base, scheme, format_name=layout)
    save(result, tmp_path / "out")
    opened = Checkpoint.open(tmp_path / "out")
    assert read_config(opened.config)("model.layers.0.mlp.up_proj") == scheme
    assert ((tmp_path / "out" / "quantize_config.json").exists()) == layout.startswith("gptq")
    assert size(result).parameters == size(opened).parameters == size(base).parameters
    back = dequantize(opened)
    assert set(back.files) == set(base.files) | ({"manifest.json"} & set(opened.files))
    assert back.config == base.config
    if not layout.startswith("gptq"):  # whose scales are float16
        assert same(back, quantize(base, scheme, format_name="dense"))
    name = "model.layers.3.self_attn.o_proj.weight"
    error = (back.read(name).float() - base.read(name).float()).norm() / base.read(name).float().norm()
    assert float(error) < (0.2 if getattr(scheme, "bits", 0) < 8 else 0.04)


@pytest.mark.parametrize(("layout", "scheme"), FLOATS, ids=str)
def test_where_a_weight_is_cut_does_not_change_a_byte_of_small_floats(tmp_path: Path, layout: str, scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bare(300)
    save(quantize(model, scheme, format_name=layout), tmp_path / "whole", SaveOptions(workers=1))
    save(dequantize(Checkpoint.open(tmp_path / "whole")), tmp_path / "dense", SaveOptions(workers=1))
    small_slabs(monkeypatch, 64 * 32, 64 * 130)
    save(quantize(model, scheme, format_name=layout), tmp_path / "cut", SaveOptions(workers=4))
    save(dequantize(quantize(model, scheme, format_name=layout)), tmp_path / "back", SaveOptions(workers=4))
    for cut, whole in (("cut", "whole"), ("back", "dense")):
        assert (tmp_path / cut / "model.safetensors").read_bytes() == (tmp_path / whole / "model.safetensors").read_bytes()


def test_what_servers_fuse_has_one_global_scale_and_the_largest_magnitude_sets_it(base: Checkpoint) -> None:
    result = quantize(base, NVFP4, format_name="nvfp4-pack-quantized")
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)):
        found = {float(result.read(f"model.layers.2.{name}.weight_global_scale")) for name in group}
        largest = max(float(base.read(f"model.layers.2.{name}.weight").abs().max()) for name in group)
        assert found == {float(global_scale(largest))}


def test_experts_have_global_scales_of_their_own_that_gate_and_up_share() -> None:
    names = [f"layers.0.mlp.experts.{expert}.{part}_proj.weight" for expert in (0, 1) for part in ("gate", "up", "down")]
    model = Checkpoint.from_tensors({name: torch.full((4, 32), float(place)) for place, name in enumerate(names, 1)}, "m")
    result = quantize(model, NVFP4, format_name="nvfp4-pack-quantized")
    found = [float(result.read(f"{name.removesuffix('weight')}weight_global_scale")) for name in names]
    assert found == [float(global_scale(largest)) for largest in (2, 2, 3, 5, 5, 6)]


def test_a_method_for_integers_makes_no_small_floats(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QUANTIZERS, "_entries", {**QUANTIZERS._entries, "other": QUANTIZERS["rtn"]})
    with pytest.raises(OptionError, match="FP8 is rounded to the nearest number; method other is for integers"):
        quantize(base, FP8, "other", format_name="float-quantized")
    with pytest.raises(OptionError, match="format pack-quantized: it holds integers, not NVFP4"):
        quantize(base, NVFP4)


# ---- what is refused ----


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does() -> None:
    two = {"a.weight": torch.ones(4, 96), "b.weight": torch.ones(4, 64), "c.weight": torch.ones(4, 48)}
    with pytest.raises(CheckpointError) as caught:
        quantize(Checkpoint.from_tensors(two, "m"), Scheme(4, 64))
    assert str(caught.value) == (
        "m: a.weight has 96 inputs, which groups of 64 do not divide (and 1 more); --group-size 16 fits all layers, or leave layers out with --exclude"
    )
    with pytest.raises(CheckpointError, match=r"--group-size 0 \(one scale a row\) fits all, or leave"):
        quantize(Checkpoint.from_tensors({"a.weight": torch.ones(4, 77)}), Scheme(4, 64))
    with pytest.raises(CheckpointError, match=r"a.weight is empty: \[0, 64\]; leave layers out with --exclude$"):
        quantize(Checkpoint.from_tensors({"a.weight": torch.ones(0, 64), "b.weight": torch.ones(4, 64)}), Scheme(4, 64))


def test_a_quantized_model_is_not_quantized_again() -> None:
    once = quantize(bare(), Scheme(4, 32))
    with pytest.raises(CheckpointError, match="is quantized already .*; unpack it first with `compress dequantize"):
        quantize(once, Scheme(4, 32))
    with pytest.raises(CheckpointError, match=r"m holds no packed weights \(….weight_packed, ….qweight\); there is nothing to dequantize"):
        dequantize(bare())


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has no linear layer to quantize"):
        quantize(Checkpoint.from_tensors({"norm.weight": torch.ones(8), "embed_tokens.weight": torch.ones(8, 8)}), Scheme(4, 0))


def test_a_nan_is_named_and_carried_where_that_is_wanted(tmp_path: Path) -> None:
    broken = bare()
    broken.read("layers.0.up_proj.weight")[2, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"m: layers.0.up_proj.weight holds a value that is NaN or infinite; mend the model, or carry"):
        save(quantize(broken, Scheme(4, 32)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    save(quantize(broken, Scheme(4, 32), allow_nonfinite=True), tmp_path / "out", SaveOptions(allow_nonfinite=True))


def test_all_problems_of_the_options_are_found_at_once() -> None:
    assert problems(9, 32, True, "rnt", "pack_quantized", {}) == [
        "bits=9: a weight has 2 to 8 bits",
        "unknown quantizer 'rnt'. Did you mean 'rtn'?",
        "unknown format 'pack_quantized'. Did you mean 'pack-quantized'?",
    ]
    assert problems(4, -1, True, "rtn", "dense", {"clp": 3}) == [
        "group_size=-1: a number of inputs, such as 32, 64 or 128; 0 for one scale a row", "rtn has no option 'clp'. Did you mean 'clip'?",
    ]  # fmt: skip


def test_a_scheme_by_its_name_has_a_format_and_no_method_for_integers() -> None:
    assert preset_problems("FP8", "rtn", None, {}) == preset_problems("W8A8", "rtn", None, {"clip": 0}) == preset_problems("NVFP4", "rtn", "dense", {}) == []
    assert preset_problems("FP9", "rtn", None, {}) == ["unknown scheme 'FP9'. Did you mean 'FP8'?"]
    assert preset_problems("MXFP4", "rtn", "gptq", {"clip": 0}) == [
        "format gptq: it holds integers of 2, 3, 4 and 8 bits, not MXFP4",
        "MXFP4 is rounded to the nearest number; method rtn and its option clip is for integers",
    ]


# ---- the values, whatever the way ----


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 32, 33, 65])
def test_unpacking_gives_the_dense_format_and_the_quantizer_itself_bit_for_bit(rows: int, scheme: Scheme) -> None:
    model = bare(rows)
    dense, back = quantize(model, scheme, format_name="dense"), dequantize(quantize(model, scheme))
    assert set(dense.specs.values()) == set(back.specs.values()) == set(model.specs.values())
    assert same(dense, back)
    weight = model.read("layers.0.up_proj.weight")
    assert torch.equal(back.read("layers.0.up_proj.weight"), values_of(QUANTIZERS["rtn"].function(weight, scheme)))
    assert is_packed(quantize(model, scheme))
    assert not is_packed(back)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, False), Scheme(2, 0, False), Scheme(8, 64, False)], ids=str)
def test_where_a_weight_is_cut_does_not_change_a_byte(tmp_path: Path, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bare(137)
    save(quantize(model, scheme), tmp_path / "whole", SaveOptions(workers=1))
    save(dequantize(Checkpoint.open(tmp_path / "whole")), tmp_path / "dense", SaveOptions(workers=1))
    for piece, slab in ((1, 1), (64 * 32, 64 * 96), (64 * 40, 64 * 100)):
        small_slabs(monkeypatch, piece, slab)
        for name, result, expected in (("packed", quantize(model, scheme), "whole"), ("back", dequantize(quantize(model, scheme)), "dense")):
            out = tmp_path / f"{name}-{piece}"
            save(result, out, SaveOptions(workers=4))
            assert (out / "model.safetensors").read_bytes() == (tmp_path / expected / "model.safetensors").read_bytes()


def test_formats_and_quantizers_have_a_summary() -> None:
    assert all(layout.summary for layout in FORMATS.values())
    assert all(re.search(r"\.$", quantizer.summary) for quantizer in QUANTIZERS.values())


def test_the_config_that_is_written_is_json_that_reads_back(tmp_path: Path) -> None:
    save(quantize(bare(), Scheme(3, 32, False)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (config["format"], config["quantization_status"]) == ("pack-quantized", "compressed")
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"], weights["strategy"]) == (3, 32, False, "group")
