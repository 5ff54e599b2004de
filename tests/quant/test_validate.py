"""Checkpoints that engines load wrongly, or not at all: each mistake made on purpose, and its sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError
from mergekit_plus.verify import verify
from quant import Scheme
from quant.floats import FP8, MXFP4, NVFP4
from quant.plan import quantize
from quant.validate import refuse, validate

BASE = Path(__file__).parents[1] / "models" / "base"
UP = "model.layers.0.mlp.up_proj"
W4 = Scheme(4, 32)
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def broken(change: Change, scheme: Any = W4, layout: str = "pack-quantized") -> Checkpoint:
    """The small Llama quantised, in memory as if stored, with something changed in its tensors or its quantization_config."""
    made = packed(scheme, layout) if isinstance(scheme, Hashable) else in_memory(scheme, layout)
    tensors, config = {name: made.read(name) for name in made.specs}, copy.deepcopy(made.config["quantization_config"])
    change(tensors, config)
    return replace(Checkpoint.from_tensors(tensors, "m"), files=made.files).with_config(quantization_config=config)


def in_memory(scheme: Any, layout: str) -> Checkpoint:
    made = quantize(Checkpoint.open(BASE), scheme, "rtn", {"clip": 0}, layout)
    return replace(Checkpoint.from_tensors({name: made.read(name) for name in made.specs}), files=made.files)


packed = cache(in_memory)


def problem(change: Change, scheme: Any = W4, layout: str = "pack-quantized") -> str:
    """The one problem of a broken checkpoint."""
    (found,) = validate(broken(change, scheme, layout)).problems
    return found


def weights(config: dict[str, Any]) -> Any:
    return config["config_groups"]["group_0"]["weights"]


def same(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("pack-quantized", Scheme(3, 64)), ("pack-quantized", Scheme(4, 32, False)), ("int-quantized", Scheme(8, 0)), ("float-quantized", FP8),
        ("nvfp4-pack-quantized", NVFP4), ("mxfp4-pack-quantized", MXFP4), ("gptq", Scheme(4, 32)), ("gptq_v2", Scheme(3, 32, False)),
    ],
    ids=str,
)  # fmt: skip
def test_what_we_write_has_no_problem(layout: str, scheme: Any) -> None:
    assert validate(broken(same, scheme, layout)).problems == []


def test_a_dense_model_has_neither_problems_nor_warnings() -> None:
    found = validate(Checkpoint.open(BASE))
    assert (found.problems, found.warnings) == ([], [])


@pytest.mark.parametrize("status", [None, "frozen"])
def test_a_status_for_which_transformers_loads_random_weights(status: str | None) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["quantization_status"] = status

    assert problem(change) == f"config.json: quantization_status is {status!r}, for which transformers loads random weights in silence; make it 'compressed'"


def test_no_format_anywhere() -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del config["format"], config["config_groups"]["group_0"]["format"]

    assert problem(change) == "config.json: group_0 has no format, and neither has the whole; name it in both, as in 'pack-quantized'"


def test_a_key_that_compressed_tensors_refuses() -> None:
    assert problem(lambda tensors, config: weights(config).update(sym=True)) == (
        "config.json: group_0 has the key 'sym' inside 'weights', which compressed-tensors refuses; take it out"
    )


def test_activation_order_by_group() -> None:
    assert problem(lambda tensors, config: weights(config).update(actorder="group")).startswith(
        "config.json: group_0 has actorder 'group', which compressed-tensors dropped in 0.19"
    )


def test_three_bits_under_a_version_that_laid_them_out_otherwise() -> None:
    assert problem(lambda tensors, config: config.update(version="0.17.1"), Scheme(3, 32)) == (
        "config.json: 3 bits with version '0.17.1': before 0.18 words were laid out otherwise; write the version that packed it"
    )
    assert validate(broken(lambda tensors, config: config.update(version="0.17.1"))).problems == []  # four bits were always the same


def test_a_shape_that_is_missing() -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("up_proj.weight_shape")]:
            del tensors[name]

    assert problem(change) == f"{UP} and 5 more has no weight_shape, without which it cannot be unpacked; write the model anew"


def test_zero_points_of_symmetric_codes() -> None:
    assert problem(lambda tensors, config: tensors.update({f"{UP}.weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)})) == (
        f"{UP} is symmetric by config.json, but has a weight_zero_point, which vLLM refuses; say 'symmetric': false, or take the tensor out"
    )


def test_asymmetric_codes_without_zero_points() -> None:
    found = problem(lambda tensors, config: weights(config).update(symmetric=False))
    assert found.startswith("model.layers.0.mlp.down_proj and 41 more has no weight_zero_point")


def test_a_dense_layer_that_a_target_matches() -> None:
    assert problem(lambda tensors, config: config.update(ignore=[])) == "lm_head is dense, but a target of config.json matches it; add it to 'ignore'"


def test_a_packed_layer_that_is_ignored() -> None:
    assert problem(lambda tensors, config: config["ignore"].append("model.layers.1.self_attn.o_proj")) == (
        "model.layers.1.self_attn.o_proj is packed, but config.json leaves it dense: engines would not find its weight; name it in a target, and not in ignore"
    )


def test_targets_that_overlap() -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["config_groups"]["group_1"] = config["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"]}

    assert problem(change) == (
        "model.layers.0.mlp.down_proj and 5 more is matched by targets of several config_groups, of which engines do not choose the same; make targets disjoint"
    )


def test_fused_layers_that_are_not_alike() -> None:
    schemes = {f"model.layers.{block}.mlp.{name}_proj": Scheme(4, 32) for block in range(6) for name in ("gate", "up")}
    dense = torch.zeros(384, 128, dtype=torch.bfloat16)

    def one_dense(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(f"{UP}.")]:
            del tensors[name]
        tensors[f"{UP}.weight"] = dense
        config["ignore"].append(UP)

    assert problem(one_dense, schemes) == (
        "model.layers.0.mlp.gate_proj is 4 bits, groups of 32, symmetric and model.layers.0.mlp.up_proj is dense, but servers fuse them and load one scheme; "
        "quantize them alike"
    )


def test_groups_that_do_not_divide_and_shapes_of_another_scheme() -> None:
    assert "groups of 80 do not divide" in validate(broken(lambda tensors, config: weights(config).update(group_size=80))).problems[0]
    assert problem(lambda tensors, config: weights(config).update(group_size=64)) == (
        "model.layers.0.mlp.down_proj.weight_scale is BF16 [128, 12], but 4 bits, groups of 64, symmetric of a weight [128, 384] makes it BF16 [128, 6]; "
        "config.json is another model's (and so for 41 more)"
    )


def test_a_weight_beside_its_codes() -> None:
    assert problem(lambda tensors, config: tensors.update({f"{UP}.weight": torch.zeros(384, 128)})).startswith(f"{UP} has both packed codes and a weight")


def test_packed_tensors_without_a_config_and_a_config_without_packed_tensors() -> None:
    packed = quantize(Checkpoint.open(BASE), Scheme(4, 32))
    assert validate(packed.with_config(quantization_config=None)).problems[0].endswith(
        "is packed, but config.json has no quantization_config, so that nobody can read it; restore the config.json it was written with"
    )
    dense = Checkpoint.open(BASE).with_config(quantization_config=packed.config["quantization_config"])
    assert validate(dense).problems == ["config.json has a quantization_config, but no tensor is packed; take it out if the tensors are right"]
    other = validate(packed.with_config(quantization_config={"quant_method": "hqq"}))
    assert (other.problems, other.warnings) == ([], ["quantized with 'hqq', which is not known here: how it is described was not checked"])
    for malformed in ([1], {"group_0": ["Linear"]}, {"group_0": {"weights": 3}}, 3):
        assert len(validate(packed.with_config(quantization_config={"quantization_status": "compressed", "config_groups": malformed})).problems) == 1


@pytest.mark.parametrize(("layout", "other", "step"), [("gptq", "gptq_v2", 0x11111111), ("gptq_v2", "gptq", -0x11111111)])
def test_zero_points_under_the_name_of_the_other_version(layout: str, other: str, step: int) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                tensors[name] = tensors[name] + step

    assert problem(change, Scheme(4, 32), layout) == (
        f"model.layers.0.mlp.down_proj and 41 more has zero points as {other} stores them, so that weights are off by one scale under '{layout}'; "
        f"make checkpoint_format '{other}'"
    )


def test_zero_points_that_are_not_symmetric_and_an_order_that_is_not_said() -> None:
    def other(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{UP}.qzeros"] = tensors[f"{UP}.qzeros"] + 3

    assert problem(other, layout="gptq") == f"{UP} is symmetric by config.json, but its qzeros are not all 8; say 'sym': false"

    def turned(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{UP}.g_idx"] = tensors[f"{UP}.g_idx"].flip(0)

    assert problem(turned, layout="gptq") == f"{UP} has inputs in an order of their own (g_idx), which vLLM ignores without 'desc_act': true; say so"


def test_a_dense_layer_of_a_gptq_model_without_its_rule() -> None:
    schemes = {f"model.layers.{block}.mlp.{name}_proj": Scheme(4, 32) for block in range(6) for name in ("gate", "up", "down")}
    assert problem(lambda tensors, config: config.pop("dynamic"), schemes, "gptq") == (
        "model.layers.0.self_attn.k_proj and 23 more is dense, but config.json speaks of all layers of the blocks; add it to a rule '-:' of 'dynamic'"
    )


def test_warnings_say_which_engine_cannot_load_it() -> None:
    def warnings(scheme: Any, layout: str = "pack-quantized") -> list[str]:
        return validate(quantize(Checkpoint.open(BASE), scheme, format_name=layout)).warnings

    mixed = {f"model.layers.{block}.mlp.down_proj": Scheme(4 if block else 3, 32, False) for block in range(6)}
    assert warnings(Scheme(3, 32)) == []
    assert warnings(Scheme(4, 32, False)) == ["transformers 5.23 loads zero points only with CompressedTensorsConfig(dequantize=True)"]
    assert warnings(mixed) == [
        "transformers 5.23 cannot load zero points and several schemes at once; `compress dequantize` and vLLM (4 and 8 bits) do",
        "vLLM runs zero points with 4 and 8 bits only",
    ]
    assert warnings(Scheme(3, 32), "gptq") == ["vLLM runs GPTQ's files of 4 and 8 bits, symmetric; GPTQModel runs these too"]
    assert quantize(Checkpoint.open(BASE), Scheme(4, 32, False)).notes[-1] == warnings(Scheme(4, 32, False))[0]


def test_an_operation_that_made_something_wrong_would_be_refused() -> None:
    with pytest.raises(CheckpointError, match="m: lm_head is dense, but a target of config.json matches it"):
        refuse(broken(lambda tensors, config: config.update(ignore=[])))


def test_verify_checks_what_lies_in_a_folder_ours_or_anothers(tmp_path: Path) -> None:
    out = tmp_path / "packed"
    save(quantize(Checkpoint.open(BASE), Scheme(4, 32, False)), out)
    found = verify(out)
    assert (found.problems, found.wrong) == ([], [])
    assert found.notes == ["transformers 5.23 loads zero points only with CompressedTensorsConfig(dequantize=True)"]
    (out / "manifest.json").unlink()
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["quantization_status"]
    (out / "config.json").write_text(json.dumps(config))
    found = verify(out)
    assert found.wrong == ["config.json: quantization_status is None, for which transformers loads random weights in silence; make it 'compressed'"]
    assert found.notes == ["there is no manifest.json, so that only the description of its packed weights was checked"]
    with pytest.raises(CheckpointError, match="an output without its manifest cannot be verified"):
        verify(BASE)
