"""A merge as a plan: what becomes of every tensor, what is refused before one is read, and the same result however it is computed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import BUSY as EVERY
from merge_toys import merged as in_memory
from merge_toys import near, random
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save, steps_of
from mergekit_plus.checkpoint import plan as plans
from mergekit_plus.checkpoint.spec import matches
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.merge import METHODS
from mergekit_plus.merge.plan import MergeOptions, account, merge, problems

BUSY: dict[str, dict[str, Any]] = {
    **EVERY,
    "linear": {"weight": [0.7, 0.3]},
    "task_arithmetic": {"weight": [0.4, 0.5], "lambda": 0.9},
    "ties": {"density": [0.3, 0.6], "weight": 0.7, "rescale": True},
    "pcb": {"ratio": 0.3, "lambda": [0.4, 0.6]},
    "passthrough": {"scale": 0.5},
}
SHAPES = {"model.layers.0.a.weight": (37, 19), "model.layers.1.a.weight": (37, 19), "model.layers.10.b.weight": (64, 5), "norm.weight": (19,), "scale": ()}


def of(label: str = "m", config: Mapping[str, Any] | None = None, /, **tensors: Any) -> Checkpoint:
    """A checkpoint of these tensors; `__` in a name is a dot."""
    made = Checkpoint.from_tensors({name.replace("__", "."): torch.as_tensor(tensor) for name, tensor in tensors.items()}, label)
    return made if config is None else replace(made, files={"config.json": json.dumps(config).encode()})


def written(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> Checkpoint:
    """A model folder in about so many shards."""
    made = Checkpoint.from_tensors(tensors)
    save(made, folder, SaveOptions(max_shard_size=made.nbytes // shards + 1))
    return Checkpoint.open(folder)


def family(dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """A base and two models near it."""
    base = {name: random(*shape, dtype=dtype, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    tuned = {name: near(tensor, 2, seed=len(name)) for name, tensor in base.items()}
    return [base, *({name: pair[index] for name, pair in tuned.items()} for index in range(2))]


def merge_of(method: str, base: Checkpoint, models: list[Checkpoint], how: MergeOptions | None = None) -> Checkpoint:
    if METHODS[method].models[1] == 1:
        models = models[:1]
    return merge(models, method, base if METHODS[method].takes_base else None, BUSY[method], how)


# ---- every tensor is merged, copied or refused ----


def test_an_account_says_what_becomes_of_every_tensor() -> None:
    a, b = (of(label, w=[1.0], ids=[1, 2], head=[2.0]) for label in "ab")
    found = account([a, b], a, ["he*"])
    assert found.merged == {"w": ("w", "w")}
    assert found.copied == {"head": "excluded", "ids": "I64, must be equal in all"}


def test_tensors_that_only_some_models_have_are_refused_by_name_and_with_the_way_out() -> None:
    a, b = of("a", w=[1.0], q_norm=[1.0]), of("b", w=[1.0], bias=[1.0])
    with pytest.raises(CheckpointError) as caught:
        merge([a, b], "linear")
    assert str(caught.value) == (
        "the models do not fit together: q_norm is missing in b; bias is missing in a. "
        "Leave tensors out with --exclude (they are then copied), or align the models first"
    )


def test_of_many_misfits_four_are_shown_and_the_rest_counted() -> None:
    a, b = of("a", **{f"t{index}": torch.ones(2) for index in range(7)}), of("b", **{f"t{index}": torch.ones(3) for index in range(7)})
    with pytest.raises(CheckpointError, match=r"t0: a has \(2,\), b has \(3,\); t1: .*; t3: a has \(2,\), b has \(3,\); and 3 more\. Leave"):
        merge([a, b], "linear")


def test_what_is_excluded_is_copied_from_the_base_or_else_from_the_first_model() -> None:
    base, a, b = of("base", w=[0.0], e=[7.0]), of("a", w=[1.0], e=[8.0, 8.0]), of("b", w=[3.0], e=[9.0])
    how = MergeOptions(exclude=("e",), dtype="F16")
    result = merge([a, b], "task_arithmetic", base, how=how)
    assert (result.read("w").tolist(), result.read("e").tolist()) == ([4.0], [7.0])
    assert (result.read("w").dtype, result.read("e").dtype) == (torch.float16, torch.float32)  # copied as it is
    assert merge([a, b], "linear", how=how).read("e").tolist() == [8.0, 8.0]
    with pytest.raises(CheckpointError, match="only_b is excluded but a, from which it would be copied, does not have it"):
        merge([a, of("b", w=[1.0], e=[9.0], only_b=[1.0])], "linear", how=MergeOptions(exclude=("only_b",)))


def test_a_pattern_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(OptionError, match=r"--exclude 'lm_haed.weight' matches no tensor\. Did you mean 'lm_head.weight'\?"):
        merge([of("a", lm_head__weight=[1.0])] * 2, "linear", how=MergeOptions(exclude=("lm_haed.weight",)))
    with pytest.raises(OptionError, match=r"--include 'layers\.9\.\*' matches no tensor\."):
        merge([of("a", lm_head__weight=[1.0])] * 2, "linear", how=MergeOptions(include=("layers.9.*",)))


def test_what_is_not_included_is_not_in_the_result_and_need_not_fit() -> None:
    a = of("a", model__layers__3__w=[1.0], model__layers__13__w=[1.0], only_a=[1.0])
    b = of("b", model__layers__3__w=[3.0], model__layers__13__w=[1.0, 2.0])
    result = merge([a, b], "linear", how=MergeOptions(include=("layers.3.*",)))
    assert {name: result.read(name).tolist() for name in result.specs} == {"model.layers.3.w": [2.0]}
    copied = merge([a, b], "linear", how=MergeOptions(include=("layers.3.*", "only_a"), exclude=("only_a",)))
    assert sorted(copied.specs) == ["model.layers.3.w", "only_a"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layers.3.*", ["model.layers.3.mlp.weight"]),
        ("layers.?.mlp.weight", ["model.layers.3.mlp.weight"]),
        ("model.layers.1*", ["model.layers.13.mlp.weight"]),
        ("mlp.weight", ["model.layers.13.mlp.weight", "model.layers.3.mlp.weight"]),
        ("head.weight", []),  # a part begins after a dot
        ("layers.3", []),  # and goes to the end
        ("*", ["lm_head.weight", "model.layers.13.mlp.weight", "model.layers.3.mlp.weight"]),
    ],
)
def test_a_pattern_matches_a_whole_name_or_its_end_after_a_dot(pattern: str, found: list[str]) -> None:
    names = ["model.layers.3.mlp.weight", "model.layers.13.mlp.weight", "lm_head.weight"]
    assert sorted(name for name in names if matches(name, [pattern])) == found


def test_integers_are_kept_where_equal_and_refused_where_not() -> None:
    a, b = of("a", w=[1.0], ids=[1, 2]), of("b", w=[2.0], ids=[1, 3])
    assert merge([a, of("c", w=[2.0], ids=[1, 2])], "linear").read("ids").tolist() == [1, 2]
    with pytest.raises(CheckpointError, match="ids is not a float tensor and differs between a and b; --exclude it to copy it"):
        merge([a, b], "linear").read("ids")
    assert merge([a, b], "linear", how=MergeOptions(exclude=("ids",))).read("ids").tolist() == [1, 2]


def test_scalars_and_empty_tensors_are_merged_like_others() -> None:
    a, b = of("a", s=1.0, e=torch.empty(0, 3), n=torch.empty(4, 0)), of("b", s=3.0, e=torch.empty(0, 3), n=torch.empty(4, 0))
    result = merge([a, b], "linear")
    assert {name: (tuple(result.read(name).shape), result.read(name).tolist()) for name in result.specs} == {
        "e": ((0, 3), []), "n": ((4, 0), [[], [], [], []]), "s": ((), 2.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "how", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, torch.float16, {}, torch.float32),
        (torch.float16, torch.float32, {}, torch.float32),
        (torch.float64, torch.bfloat16, {}, torch.float64),
        (torch.float32, torch.float32, {"dtype": "BF16"}, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, {"input_dtype": "F32"}, torch.float32),
        (torch.float32, torch.float32, {"input_dtype": "BF16", "dtype": "F32"}, torch.float32),
    ],
)
def test_the_result_has_the_dtype_that_was_asked_for_or_one_that_holds_all_inputs(
    first: torch.dtype, second: torch.dtype, how: dict[str, str], expected: torch.dtype
) -> None:
    a, b = of("a", {"dtype": "float16"}, w=torch.tensor([1.001], dtype=first)), of("b", {}, w=torch.tensor([3.0], dtype=second))
    result = merge([a, b], "linear", how=MergeOptions(**how))
    assert result.read("w").dtype == expected
    assert result.config["dtype"] == str(expected).removeprefix("torch.")
    start = torch.bfloat16 if how.get("input_dtype") == "BF16" else first  # mergekit's `dtype` rounds what comes in
    assert result.read("w").item() == torch.tensor((torch.tensor(1.001, dtype=first).to(start).item() + 3) / 2, dtype=expected).item()


def test_float64_models_are_no_packed_ones() -> None:
    tensors = random(3, 4, dtype=torch.float64)
    assert torch.equal(merge([of("a", w__weight=tensors)] * 2, "linear").read("w.weight"), tensors)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_new_dtype_under_the_key_that_it_had(key: str) -> None:
    a = of("a", {key: "float32", "hidden_size": 3}, w=[1.0])
    assert merge([a, a], "linear", how=MergeOptions(dtype="BF16")).config == {key: "bfloat16", "hidden_size": 3}


# ---- heads that are another name of the embeddings ----


def embedded(label: str, tie: bool | None, value: float, head: float | None) -> Checkpoint:
    config = {"architectures": ["LlamaForCausalLM"], **({} if tie is None else {"tie_word_embeddings": tie})}
    return of(label, config, model__embed_tokens__weight=[[value, value]], **({} if head is None else {"lm_head__weight": [[head, head]]}))


def test_a_head_that_one_model_ties_is_merged_with_the_others_and_the_config_says_untied() -> None:
    tied, silent, untied = embedded("t", True, 1.0, None), embedded("s", None, 1.0, None), embedded("u", False, 3.0, 5.0)
    for one, two in ((tied, untied), (untied, tied), (silent, untied)):
        result = merge([one, two], "linear")
        assert result.read("model.embed_tokens.weight").tolist() == [[2.0, 2.0]]
        assert result.read("lm_head.weight").tolist() == [[3.0, 3.0]]
        assert result.config["tie_word_embeddings"] is False


def test_of_tied_models_no_head_is_written() -> None:
    result = merge([embedded("a", True, 1.0, None), embedded("b", True, 3.0, None)], "linear")
    assert list(result.specs) == ["model.embed_tokens.weight"]
    assert result.config["tie_word_embeddings"] is True


# ---- what is refused before a tensor is read ----


def test_quantized_models_are_refused_with_what_to_do() -> None:
    codes = torch.zeros(2, 2).to(torch.float8_e4m3fn)
    eight = of("deepseek", q__weight=codes, q__weight_scale_inv=torch.ones(1, 1))
    with pytest.raises(CheckpointError, match=r"deepseek is quantized already \(q.weight_scale_inv\); use the unquantized model"):
        merge([eight, eight], "linear")
    from quant import Scheme
    from quant.plan import quantize

    packed = quantize(of("m", {"dtype": "float32"}, q__weight=torch.randn(8, 32)), Scheme(4, 32))
    with pytest.raises(CheckpointError, match="unpack it first with `compress dequantize"):
        merge([packed, packed], "linear")


W = of("w", w=[1.0, 2.0])


@pytest.mark.parametrize(
    ("method", "models", "base", "options", "message"),
    [
        ("tise", 2, True, {}, "unknown merge method 'tise'. Did you mean 'ties'?"),
        ("ties", 2, False, {}, "ties works on task vectors and needs the model they start from: give it with --base"),
        ("slerp", 3, False, {}, "slerp goes from one model to another: give two models, or a base and one model, not 3"),
        ("slerp", 2, True, {}, "slerp goes from one model to another: give two models, or a base and one model, not 2 and a base"),
        ("linear", 0, False, {}, "linear merges 1 or more models, not 0"),
        ("ties", 2, True, {"density": 50}, "ties: density=50: Input should be less than or equal to 1"),
        ("ties", 2, True, {"desnity": 0.5}, "ties has no option 'desnity'. Did you mean 'density'?"),
        ("linear", 2, False, {"weight": [1, 2, 3]}, "linear: weight has 3 values for 2 models; give one, or one for each"),
        ("linear", 2, False, {"weight": [1, -1]}, "weight: 1, -1 sum to zero, so they cannot be normalized; set normalize to false, or other weights"),
    ],
)  # fmt: skip
def test_an_impossible_merge_is_refused_in_a_sentence(method: str, models: int, base: bool, options: dict[str, Any], message: str) -> None:
    assert problems(method, options, models, base) == [message]
    with pytest.raises(OptionError) as caught:
        merge([W] * models, method, W if base else None, options)
    assert str(caught.value) == message


def test_what_problems_finds_possible_is_possible() -> None:
    for method, options in BUSY.items():
        count = METHODS[method].models[1] or 2
        assert problems(method, options, count, METHODS[method].needs_base) == []
        merge([W] * count, method, W if METHODS[method].needs_base else None, options)


def test_slerp_of_two_models_starts_at_the_first() -> None:
    a, b = of("a", w=[1.0, 0.0]), of("b", w=[0.0, 1.0])
    assert merge([a, b], "slerp", options={"t": 0}).read("w").tolist() == [1.0, 0.0]
    assert torch.equal(merge([a, b], "slerp", options={"t": 0.2}).read("w"), merge([b], "slerp", a, {"t": 0.2}).read("w"))


def test_a_method_may_take_a_base_or_do_without() -> None:
    base, a, b = of("base", w=[1.0, 1.0]), of("a", w=[3.0, 1.0]), of("b", w=[1.0, 3.0])
    alone, from_base = merge([a, b], "nuslerp"), merge([a, b], "nuslerp", base)
    torch.testing.assert_close(from_base.read("w"), torch.tensor([1 + 2**0.5, 1 + 2**0.5]))  # between (2, 0) and (0, 2)
    assert not torch.equal(alone.read("w"), from_base.read("w"))
    assert problems("nuslerp", {}, 3, True) == ["nuslerp merges 2 models besides the base, not 3"]
    assert problems("nuslerp", {}, 3, False) == ["nuslerp merges 2 models, not 3"]
    assert problems("model_stock", {}, 1, True) == ["model_stock merges 2 or more models besides the base, not 1"]
    assert problems("passthrough", {}, 2, False) == ["passthrough merges 1 model, not 2"]


def test_rows_and_tensors_are_whole_where_a_method_asks_for_it() -> None:
    base, model = (Checkpoint.from_tensors({"w": random(6, 4, seed=seed), "v": random(24, seed=seed)}) for seed in (0, 1))
    steps = {method: steps_of(merge([model], method, base)) for method in ("task_arithmetic", "della", "tsv")}
    found = {method: {step.writes[0].name: step.multiple for step in plan} for method, plan in steps.items()}
    assert found == {"task_arithmetic": {"v": 1, "w": 1}, "della": {"v": 0, "w": 1}, "tsv": {"v": 0, "w": 0}}


def test_merges_of_whole_tensors_are_read_in_pieces_by_what_comes_after(tmp_path: Path) -> None:
    from quant import Scheme
    from quant.plan import quantize

    base, *models = (Checkpoint.from_tensors({"a.weight": random(64, 128, seed=seed), "norm.weight": random(64, seed=seed)}) for seed in range(3))
    for method in ("tsv", "nuslerp"):
        merged = merge(models, method, base)
        save(merged, tmp_path / f"{method}.safetensors")
        staged = quantize(Checkpoint.open(tmp_path / f"{method}.safetensors"), Scheme(4, 32))
        streamed = quantize(merged, Scheme(4, 32))
        assert all(torch.equal(streamed.read(name), staged.read(name)) for name in staged.specs)


# ---- NaN ----


@pytest.mark.parametrize("method", BUSY)
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_nan_or_an_infinity_is_named_with_the_model_and_carried_where_that_is_wanted(tmp_path: Path, method: str, culprit: int) -> None:
    tensors = family()
    tensors[culprit]["model.layers.10.b.weight"][7, 2] = torch.inf if method == "linear" else torch.nan
    base, *models = (Checkpoint.from_tensors(part, label) for part, label in zip(tensors, ("base", "a", "b"), strict=True))
    result = merge_of(method, base, models)
    if (culprit == 0 and not METHODS[method].takes_base) or culprit > (METHODS[method].models[1] or 2):
        save(result, tmp_path / "fine.safetensors")  # it does not take part
        return
    expected = rf"^{('base', 'a', 'b')[culprit]}: model.layers.10.b.weight holds a value that is NaN or infinite; mend the model, or carry"
    with pytest.raises(CheckpointError, match=expected):
        save(result, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []
    save(merge_of(method, base, models, MergeOptions(allow_nonfinite=True)), tmp_path / "out.safetensors", SaveOptions(allow_nonfinite=True))
    carried = Checkpoint.open(tmp_path / "out.safetensors")
    assert int((~torch.isfinite(carried.read("model.layers.10.b.weight"))).sum()) <= 1
    assert all(bool(torch.isfinite(carried.read(name)).all()) for name in carried.specs if "10" not in name)


# ---- the same result however it is computed ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", BUSY)
def test_a_plan_gives_what_the_method_gives_in_memory(method: str, dtype: torch.dtype) -> None:
    base, *models = family(dtype)
    models = models[: METHODS[method].models[1]]
    result = merge_of(method, Checkpoint.from_tensors(base), [Checkpoint.from_tensors(model) for model in models])
    expected = in_memory(method, base if METHODS[method].takes_base else None, models, **BUSY[method])
    for name in SHAPES:
        assert result.read(name).dtype == dtype
        assert torch.equal(result.read(name), expected[name].to(dtype)), name


@pytest.mark.parametrize("method", BUSY)
def test_pieces_workers_memory_and_shards_do_not_change_a_byte(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, layouts = family(torch.bfloat16), importlib.import_module("mergekit_plus.checkpoint.layout")
    found: list[bytes] = []
    for shards, piece, slab, options in ((1, 1 << 18, 1 << 22, {"workers": 1}), (2, 57, 200, {"workers": 4}), (3, 19, 64, {"workers": 2, "memory": 1 << 27})):
        for module in (plans, layouts):
            monkeypatch.setattr(module, "SLAB", slab)
        monkeypatch.setattr(plans, "PIECE", piece)
        base, *models = (written(tmp_path / f"{shards}-{index}", part, shards) for index, part in enumerate(parts))
        save(merge_of(method, base, models), tmp_path / f"out{shards}.safetensors", SaveOptions(**options))
        found.append((tmp_path / f"out{shards}.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]
    assert (tmp_path / "2-0" / "model.safetensors.index.json").exists()


def test_pcb_of_a_sharded_model_is_pcb_of_one_flat_vector(tmp_path: Path) -> None:
    tensors = family()
    base, *models = (written(tmp_path / f"{index}", part, index + 1) for index, part in enumerate(tensors))
    result = merge(models, "pcb", base, BUSY["pcb"])
    flat = [torch.cat([part[name].reshape(-1) for name in SHAPES]) for part in tensors]
    expected = in_memory("pcb", {"w": flat[0]}, [{"w": vector} for vector in flat[1:]], **BUSY["pcb"])["w"]
    assert torch.equal(torch.cat([result.read(name).reshape(-1) for name in SHAPES]), expected)
    alone = merge([of("m", w=tensors[1]["norm.weight"]), of("n", w=tensors[2]["norm.weight"])], "pcb", of("b", w=tensors[0]["norm.weight"]), BUSY["pcb"])
    assert not torch.equal(alone.read("w"), result.read("norm.weight"))  # it competes with the whole model


def test_a_seed_changes_what_dare_drops_and_the_name_of_a_tensor_too() -> None:
    base, model = of("b", w=torch.zeros(100), v=torch.zeros(100)), of("m", w=torch.ones(100), v=torch.ones(100))
    one, again, other = (merge([model], "dare_linear", base, {"density": 0.5}, MergeOptions(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.read("w"), again.read("w"))
    assert not torch.equal(one.read("w"), other.read("w"))
    assert not torch.equal(one.read("w"), one.read("v"))


# ---- options that vary ----


def test_options_may_be_a_function_of_the_tensor_s_name() -> None:
    a, b = of("a", x=[0.0], y=[0.0], z=[0.0]), of("b", x=[8.0], y=[8.0], z=[8.0])
    asked: list[str] = []

    def options(name: str) -> dict[str, object]:
        asked.append(name)
        return {"weight": [1, 3] if name == "x" else [3, 1]}

    result = merge([a, b], "linear", options=options)
    assert [result.read(name).item() for name in "xyz"] == [6, 2, 2]
    assert asked == ["x", "y", "z"]


def test_the_same_options_are_checked_once_and_wrong_ones_are_refused_with_the_tensor_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"w{number}": [0.0] for number in range(50)}
    checked: list[object] = []
    check = METHODS["ties"].options.check
    monkeypatch.setattr(METHODS["ties"].options, "check", lambda given, models: checked.append(given) or check(given, models))
    models = of("base", **names), of("a", **names)
    merge([models[1]], "ties", models[0], lambda name: {"density": 0.5 if int(name[1:]) % 2 else 0.25})
    assert checked == [{"density": 0.25}, {"density": 0.5}]
    with pytest.raises(OptionError, match="w1: ties: density=2: Input should be less than or equal to 1"):
        merge([models[1]], "ties", models[0], lambda name: {"density": 2 if name == "w1" else 1})


def test_an_option_that_measures_the_whole_model_may_not_vary_but_the_others_may() -> None:
    base, a, b = (of(label, x=random(4, 4, seed=seed), y=random(4, 4, seed=seed + 9)) for seed, label in enumerate(("base", "a", "b")))
    with pytest.raises(OptionError, match="y: ties_global measures the whole model by density, which may not vary from tensor to tensor"):
        merge([a, b], "ties_global", base, lambda name: {"density": 0.3 if name == "x" else 0.4})
    halved = merge([a, b], "ties_global", base, lambda name: {"density": 0.5, "lambda": 0.5 if name == "x" else 1})
    whole = merge([a, b], "ties_global", base, {"density": 0.5, "lambda": 1})
    torch.testing.assert_close(halved.read("x"), (base.read("x") + whole.read("x")) / 2)
    assert torch.equal(halved.read("y"), whole.read("y"))
