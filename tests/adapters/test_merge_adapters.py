"""Adapters merged into one: against the float64 formula, against peft's add_weighted_adapter, and as peft loads what is written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_toys import adapted, close, load, logits, model_of, saved
from torch import Tensor

from mergekit_plus.adapters import Adapter, apply, open_adapter, read_adapter
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.merge import METHODS
from mergekit_plus.merge.adapters import adapter_problems, merge_adapters
from mergekit_plus.merge.plan import merge

FIRST = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}
SECOND = {"target_modules": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"down_proj": 3}}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter, Adapter]:
    """A base and two adapters of other modules, ranks, alphas and scalings."""
    folder = tmp_path_factory.mktemp("toys")
    saved(model_of(), folder / "base")
    adapted(model_of(), folder / "one", seed=1, **FIRST)
    adapted(model_of(), folder / "two", seed=2, **SECOND)
    return folder / "base", open_adapter(folder / "one"), open_adapter(folder / "two")


def delta(adapter: Adapter, module: str) -> Tensor:
    """`s B A` in float64; zero where the adapter does not have the module."""
    if module not in adapter.lowrank:
        return torch.zeros((), dtype=torch.float64)
    lowrank = adapter.lowrank[module]
    a, b = (adapter.checkpoint.read(name).double() for name in (lowrank.a, lowrank.b))
    return lowrank.scale * (a.T @ b.T if lowrank.embedding else b @ a)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_the_weighted_sum_is_exact_and_ranks_add_up(toys: tuple[Path, Adapter, Adapter]) -> None:
    _, one, two = toys
    result = read_adapter(merge_adapters([one, two], options={"weight": [0.5, -2], "normalize": False}))
    assert set(result.lowrank) == set(one.lowrank) | set(two.lowrank)
    assert {module.rpartition(".")[2]: part.rank for module, part in result.lowrank.items()} == {"q_proj": 6, "v_proj": 4, "down_proj": 3}
    for module in result.lowrank:
        assert close(delta(result, module), 0.5 * delta(one, module) - 2 * delta(two, module))
        assert result.lowrank[module].scale == 1


def test_an_average_is_what_merging_the_models_gives(toys: tuple[Path, Adapter, Adapter]) -> None:
    base, *adapters = toys
    model = Checkpoint.open(base)
    averaged = merge([apply(model, [adapter]) for adapter in adapters], "linear")
    result = apply(model, [read_adapter(merge_adapters(adapters))])
    assert all(close(result.read(name), averaged.read(name)) for name in result.specs)


@pytest.mark.parametrize("rank", [1, 3, 5, 6, 40])
def test_with_fewer_ranks_the_sum_is_the_best_approximation(toys: tuple[Path, Adapter, Adapter], rank: int) -> None:
    _, one, two = toys
    result = read_adapter(merge_adapters([one, two], "linear", {"normalize": False}, rank=rank))
    for module, part in result.lowrank.items():
        total = delta(one, module) + delta(two, module)
        assert part.rank <= rank
        assert close(delta(result, module), truncated(total, rank))


PRODUCTS = [name for name in METHODS if name != "linear" and not adapter_problems(name, {}, 2, None)]  # those that take two models and need no option


@pytest.mark.parametrize("method", PRODUCTS)
def test_every_method_works_on_the_products(toys: tuple[Path, Adapter, Adapter], method: str) -> None:
    _, *adapters = toys
    options = {"density": 0.5} if "density" in METHODS[method].options.table and method != "task_arithmetic" else {}
    result = read_adapter(merge_adapters(adapters, method, options, rank=3))
    modules = list(result.lowrank)
    dense = [Checkpoint.from_tensors({module: delta(part, module).float() + torch.zeros(_shape(adapters, module)) for module in modules}) for part in adapters]
    zeros = Checkpoint.from_tensors({module: torch.zeros(_shape(adapters, module)) for module in modules})
    base = zeros if METHODS[method].needs_base and METHODS[method].models != (1, 1) else None
    expected = merge(dense, method, base, options)
    for module in modules:  # singular values may be equal (iso_c makes them so): what is lost is unique, what is kept is not
        wanted = expected.read(module).double()
        lost, least = (float((wanted - kept).norm() / wanted.norm().clamp(min=1e-9)) for kept in (delta(result, module), truncated(wanted, 3)))
        assert abs(lost - least) < 1e-5, module


def _shape(adapters: list[Adapter], module: str) -> tuple[int, ...]:
    return next(tuple(delta(part, module).shape) for part in adapters if module in part.lowrank)


@pytest.mark.parametrize(
    ("combination", "method", "options", "rank"),
    [("cat", "linear", {"normalize": False}, None), ("svd", "svd", {"normalize": False}, None), ("svd", "svd", {"normalize": False}, 2)],
)
def test_sums_are_those_of_peft(tmp_path: Path, combination: str, method: str, options: dict[str, Any], rank: int | None) -> None:
    model = model_of()
    for name, seed, alpha in (("one", 1, 6), ("two", 2, 3)):
        adapted(model_of(), tmp_path / name, seed=seed, target_modules=["q_proj", "v_proj"], lora_alpha=alpha)
    weights = [0.7, 0.4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "one", "one")
        wrapped.load_adapter(tmp_path / "two", "two")
        wrapped.add_weighted_adapter(["one", "two"], weights, "sum", combination_type=combination, svd_rank=rank)
        wrapped.set_adapter("sum")
    result = read_adapter(merge_adapters([open_adapter(tmp_path / name) for name in ("one", "two")], method, {"weight": weights, **options}, rank))
    for module in result.lowrank:
        assert close(delta(result, module), wrapped.base_model.model.get_submodule(module).get_delta_weight("sum"), 1e-6)


@pytest.mark.parametrize("options", [FIRST, {"target_modules": ["embed_tokens", "lm_head"], "r": 6}])
def test_what_is_written_loads_in_peft(tmp_path: Path, toys: tuple[Path, Adapter, Adapter], options: dict[str, Any]) -> None:
    base, _, two = toys
    adapted(model_of(), tmp_path / "one", **options)
    one = open_adapter(tmp_path / "one")
    out = tmp_path / "out"
    manifest = save(merge_adapters([one, two]), out)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert sorted(manifest.inputs) == sorted([one.label, two.label])
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
        wrapped = peft.PeftModel.from_pretrained(load(base), out)
    save(Checkpoint.open(f"{base}+{out}"), tmp_path / "merged")
    assert close(logits(wrapped.eval()), logits(load(tmp_path / "merged")), 1e-5)


def test_the_dtype_is_that_of_the_inputs_or_the_one_asked_for(toys: tuple[Path, Adapter, Adapter]) -> None:
    from mergekit_plus.merge.plan import MergeOptions

    _, one, two = toys
    assert {spec.dtype for spec in merge_adapters([one, two]).specs.values()} == {"F32"}
    assert {spec.dtype for spec in merge_adapters([one, two], how=MergeOptions("BF16")).specs.values()} == {"BF16"}


def test_what_cannot_be_merged_says_why(tmp_path: Path, toys: tuple[Path, Adapter, Adapter]) -> None:
    base, one, two = toys
    adapted(model_of(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_magnitude_vector is no product B A; apply the adapter \(MODEL\+.*dora\) and merge models"):
        merge_adapters([one, open_adapter(tmp_path / "dora")])
    adapted(model_of(intermediate_size=48), tmp_path / "wide", target_modules=["down_proj"])
    adapted(model_of(), tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"whole holds lm_head\.weight whole, which cannot be merged without its base; apply the adapter \(MODEL\+"):
        merge_adapters([one, open_adapter(tmp_path / "whole")])
    with pytest.raises(CheckpointError, match=r"do not fit together: model\.layers\.0\.mlp\.down_proj: .*two has \(16, 32\), .*wide has \(16, 48\)"):
        merge_adapters([two, open_adapter(tmp_path / "wide")])
    for method, options, rank, reason in (
        ("linaer", {}, None, "unknown merge method 'linaer'. Did you mean 'linear'"),
        ("svd", {"density": 1}, None, "linear has no option 'density'"),
        ("linear", {}, 0, "rank must be 1 or more, not 0"),
        ("linear", {"weight": [1, -1]}, None, "sum to zero"),
    ):
        with pytest.raises(OptionError, match=reason):
            merge_adapters([one, two], method, options, rank)
    for wrong in (one.checkpoint, Checkpoint.open(base)):
        with pytest.raises(CheckpointError, match="is an adapter, not a model"):
            merge([one.checkpoint, wrong], "linear")
