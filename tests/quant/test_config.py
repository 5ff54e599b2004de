"""What config.json says about packed weights: written out once, read back, and refused where it is not ours to read."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st

from mergekit_plus.errors import CheckpointError
from quant import Scheme, read_config
from quant.formats.config import config

W4, W3, W8 = Scheme(4, 128), Scheme(3, 64), Scheme(8, 0)


def llama(blocks: int = 12) -> list[str]:
    return [f"model.layers.{block}.{part}" for block in range(blocks) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


def test_one_scheme_is_written_out() -> None:
    assert config(dict.fromkeys(llama(), W4), ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.20.0",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def test_one_scale_a_row_is_the_strategy_channel() -> None:
    written: Any = config({"up": Scheme(8, 0, False)}, [])
    weights = written["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == ("channel", None, False)


def test_no_quantised_module_no_config() -> None:
    assert config({}, ["lm_head"]) is None


def targets_of(layers: dict[str, Scheme], ignore: list[str]) -> list[list[str]]:
    written: Any = config(layers, ignore)
    return [group["targets"] for group in written["config_groups"].values()]


def test_several_schemes_have_targets_that_read_well() -> None:
    layers = {name: W3 if "mlp" in name else W4 for name in llama()} | {"model.layers.0.mlp.down_proj": W8}
    assert targets_of(layers, ["lm_head"]) == [
        [r"re:model\.layers\.\d+\.self_attn\.q_proj$"],
        [r"re:model\.layers\.\d+\.mlp\.up_proj$", r"re:model\.layers\.(?:1|2|3|4|5|6|7|8|9|10|11)\.mlp\.down_proj$"],
        [r"re:model\.layers\.(?:0)\.mlp\.down_proj$"],
    ]


def test_experts_of_one_block_share_a_target_and_lone_names_stay_names() -> None:
    experts = {f"layers.{block}.experts.{expert}.up": W4 if block else W8 for block in range(3) for expert in range(4)}
    assert targets_of({**experts, "out": W8}, []) == [
        [r"re:layers\.(?:0)\.experts\.\d+\.up$", "out"],
        [r"re:layers\.(?:1|2)\.experts\.\d+\.up$"],
    ]
    experts["layers.1.experts.2.up"] = W3
    assert "layers.1.experts.2.up" in targets_of(experts, [])[2]


SCHEME = st.sampled_from([W4, W3, W8, Scheme(4, 32, False), None])


@given(st.lists(SCHEME, min_size=24, max_size=24))
def test_whatever_the_schemes_each_module_reads_back_its_own_and_matches_one_target(chosen: list[Scheme | None]) -> None:
    names = [f"model.layers.{b}.experts.{e}.{part}" for b, e, part in itertools.product(range(3), (1, 10), ("up", "down"))]
    names += [f"model.layers.{b}.{part}" for b, part in itertools.product((0, 1, 11), ("q.w1", "q.w2", "k"))] + ["a", "b", "lm_head"]
    layers = {name: scheme for name, scheme in zip(names, chosen, strict=True) if scheme is not None}
    ignore = [name for name in names if name not in layers]
    written = config(layers, ignore)
    if written is None:
        return
    lookup = read_config({"quantization_config": written})
    assert {name: lookup(name) for name in names} == dict(zip(names, chosen, strict=True))
    targets = [target for group in written["config_groups"].values() for target in group["targets"]]
    if targets != ["Linear"]:
        for name in names:
            hits = [target for target in targets if target == name or (target.startswith("re:") and re.match(target[3:], name))]
            assert len(hits) == (name in layers)
    assert QuantizationConfig.model_validate(written).quantization_status == "compressed"


def test_a_model_without_quantization_reads_as_dense() -> None:
    assert read_config({"model_type": "llama"})("model.layers.0.mlp.up_proj") is None


def llm_compressor() -> dict[str, Any]:
    """As llm-compressor 0.14 writes it."""
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4, "observer": "minmax",
        "observer_kwargs": {}, "scale_dtype": None, "strategy": "group", "symmetric": True, "type": "int", "zp_dtype": None,
    }  # fmt: skip
    group = {"format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group}, "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.19.0",
    }  # fmt: skip


def test_what_llm_compressor_writes_is_read() -> None:
    lookup = read_config({"quantization_config": llm_compressor()})
    assert lookup("model.layers.0.mlp.up_proj") == W4
    assert lookup("lm_head") is None
    assert lookup("model.layers.0.mlp.gate") is None


def test_a_name_goes_before_a_regex_and_a_regex_before_linear() -> None:
    found = llm_compressor()
    eight, three = copy.deepcopy(found["config_groups"]["group_0"]), copy.deepcopy(found["config_groups"]["group_0"])
    eight["targets"], eight["weights"] = ["re:.*down$"], {"num_bits": 8, "strategy": "channel"}
    three["targets"], three["weights"]["num_bits"] = ["layers.0.down"], 3
    found["config_groups"] |= {"group_1": eight, "group_2": three}
    lookup = read_config({"quantization_config": found})
    assert [lookup(name) for name in ("layers.0.up", "layers.1.down", "layers.0.down")] == [W4, W8, Scheme(3, 128)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized with 'bitsandbytes'"),
        ({"format": "marlin-24"}, "format 'marlin-24'"),
        ({"format": "float-quantized"}, "weights of type 'int' with 4 bits and strategy 'group' in format 'float-quantized'"),
        ({"strategy": "tensor", "group_size": None}, "strategy 'tensor'"),
        ({"type": "float"}, "type 'float'"),
        ({"actorder": "group"}, "actorder 'group'"),
        ({"preset": True}, "preset"),
        ({"num_bits": 3, "version": "0.17.1"}, r"3 bits in the layout that compressed-tensors 0\.17\.1 had before 0\.18"),
        ({"num_bits": 3, "version": None}, "compressed-tensors unknown"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason_and_the_way_out(change: dict[str, Any], reason: str) -> None:
    found = llm_compressor()
    group = found["config_groups"]["group_0"]
    for key, value in change.items():
        if key == "preset":
            found["config_groups"] = {"W4A16": ["Linear"]}
        elif key == "format":
            group["format"] = found["format"] = value
        elif key in group["weights"]:
            group["weights"][key] = value
        else:
            found[key] = value
    with pytest.raises(CheckpointError, match=f"{reason}.*Start from the model"):
        read_config({"quantization_config": found})


@pytest.mark.parametrize(
    "found",
    [
        {"config_groups": [1]}, {"config_groups": {"a": {"weights": 3, "format": "pack-quantized"}}}, {"ignore": ["re:("]}, {"ignore": 3},
        {"config_groups": {"a": {"format": "float-quantized", "weights": {"type": "float", "strategy": "block"}}}},
        {"config_groups": {"a": {"format": "float-quantized", "weights": {"type": "float", "strategy": "block", "block_structure": [0, 4]}}}},
        {"config_groups": {"a": {"format": "pack-quantized", "weights": {"group_size": "x", "strategy": "group"}, "targets": ["Linear"]}}},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {}}}, {"quant_method": "gptq", "bits": 4, "group_size": None},
        {"quant_method": "gptq", "bits": [4]}, {"quant_method": "awq", "group_size": "x"}, {"quant_method": ["gptq"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_config_is_refused_in_one_line(found: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config: .*Start from the model"):
        read_config({"quantization_config": found})


def test_widths_stored_alike_by_all_versions_are_read_from_any() -> None:
    found = llm_compressor() | {"version": "0.9.2"}
    assert read_config({"quantization_config": found})("up") == W4
