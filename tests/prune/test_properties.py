"""What holds for every pruner, scope, pattern and size."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_toys import a_model, a_weight, linears_of, moments_of, some_inputs

from mergekit_plus import statistics
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.moments import Moments
from prune import PRUNERS, Scope, Sparsity, has_pattern
from prune.calibrated import prune_block
from prune.plan import PruneOptions, prune

DATA_FREE = [(name, scope) for name, pruner in PRUNERS.items() if not pruner.calibrated for scope in pruner.scopes]
CALIBRATED = [(name, scope) for name, pruner in PRUNERS.items() if pruner.calibrated for scope in pruner.scopes]
PATTERNS = ["2:4", "4:8", "1:4", "1:1", "3:4"]


def zeros(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in linears_of(checkpoint).items()}


def groups(checkpoint: Checkpoint, scope: Scope) -> list[list[torch.Tensor]]:
    """The runs of weights, pruned, that were compared with one another."""
    weights = linears_of(checkpoint)
    if scope == "row":
        return [[row] for weight in weights.values() for row in weight]
    key = {"tensor": lambda name: name, "block": lambda name: name.split(".")[2], "global": lambda name: ""}[scope]
    return [[weights[name] for name in names] for _, names in itertools.groupby(weights, key)]


@pytest.mark.parametrize(("method", "scope"), DATA_FREE)
@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 13)), min_size=1, max_size=4),
    st.integers(0, 99),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 9),
)
def test_the_asked_number_of_zeros_is_met_exactly(method: str, scope: Scope, sizes: list[tuple[int, int]], percent: int, dtype: torch.dtype, seed: int) -> None:
    pruned = prune(a_model(sizes, dtype=dtype, seed=seed), Sparsity.of(percent / 100), method, scope)
    for group in groups(pruned, scope):
        assert sum(int((part == 0).sum()) for part in group) == int(Fraction(percent, 100) * sum(part.numel() for part in group))


@pytest.mark.parametrize(("method", "scope"), CALIBRATED)
@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 13)), min_size=1, max_size=3),
    st.integers(0, 99),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 40),
)
def test_and_so_it_is_by_those_that_look_at_inputs(
    method: str, scope: Scope, sizes: list[tuple[int, int]], percent: int, dtype: torch.dtype, tokens: int
) -> None:
    """Whatever the number of tokens: fewer than inputs, or none."""
    weights = {str(number): a_weight(*size, number, dtype) for number, size in enumerate(sizes)}
    moments = {name: moments_of(some_inputs(tokens, weight.shape[1])) if tokens else nothing(weight.shape[1]) for name, weight in weights.items()}
    sparsity = Sparsity.of(percent / 100)
    pruned = prune_block(weights, moments, PRUNERS[method], dict.fromkeys(weights, sparsity), scope, PRUNERS[method].options.check({}))
    counts = [int((weight == 0).sum()) for weight in pruned.values()]
    if scope == "row":
        assert all((weight == 0).sum(1).tolist() == [sparsity.count(weight.shape[1])] * len(weight) for weight in pruned.values())
    elif scope == "block":
        assert sum(counts) == sparsity.count(sum(weight.numel() for weight in pruned.values()))
    else:
        assert counts == [sparsity.count(weight.numel()) for weight in pruned.values()]
    assert all(weight.dtype == dtype for weight in pruned.values())


def nothing(width: int) -> Moments:
    return Moments(torch.zeros(width, width), torch.zeros(width), 0)


@pytest.mark.parametrize("method", sorted({method for method, _ in DATA_FREE}))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_met_in_every_group_of_every_row(method: str, pattern: str) -> None:
    kept, group = map(int, pattern.split(":"))
    pruned = prune(a_model(), Sparsity.of(pattern=pattern), method)
    for weight in linears_of(pruned).values():
        assert has_pattern(weight, kept, group)
        assert int((weight != 0).sum()) == weight.numel() * kept // group


@pytest.mark.parametrize(("method", "scope"), DATA_FREE)
@pytest.mark.parametrize(("first", "then"), [(0.4, 0.4), (0.4, 0.7), (0.7, 0.4)])
def test_pruning_twice_adds_zeros_to_zeros(method: str, scope: Scope, first: float, then: float) -> None:
    once = prune(a_model(), Sparsity.of(first), method, scope)
    twice = prune(once, Sparsity.of(then), method, scope)
    before, after = zeros(once), zeros(twice)
    assert all(bool(after[name][before[name]].all()) for name in before)
    directly = zeros(prune(a_model(), Sparsity.of(max(first, then)), method, scope))
    assert sum(int(found.sum()) for found in after.values()) == sum(int(found.sum()) for found in directly.values())
    if then <= first:
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("method", "scope"), DATA_FREE)
def test_a_scaled_model_is_pruned_to_the_scaled_result(method: str, scope: Scope) -> None:
    model = a_model()
    scaled = Checkpoint.from_tensors({name: model.read(name) * -4 for name in model.specs}, "toy")
    once, other = prune(model, Sparsity.of(0.6), method, scope), prune(scaled, Sparsity.of(0.6), method, scope)
    assert all(torch.equal(once.read(name) * -4, other.read(name)) for name in linears_of(model))


@pytest.mark.parametrize(("method", "scope"), DATA_FREE)
def test_nothing_goes_at_a_sparsity_of_0(method: str, scope: Scope) -> None:
    model = a_model()
    assert all(torch.equal(prune(model, Sparsity.of(0), method, scope).read(name), model.read(name)) for name in model.specs)


@pytest.mark.parametrize(("method", "scope"), DATA_FREE)
def test_the_bytes_do_not_depend_on_workers_pieces_or_shards(method: str, scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(sizes=((130, 72), (64, 8), (5, 16)))
    model.source.tensors["model.layers.0.l0.weight"].clamp_(-0.3, 0.3)  # type: ignore[attr-defined]  # ties: thousands of equal magnitudes
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", SaveOptions(max_shard_size=9000))
    save(prune(Checkpoint.open(tmp_path / "one"), Sparsity.of(0.6), method, scope), tmp_path / "a.safetensors", SaveOptions(workers=1))
    monkeypatch.setattr("mergekit_plus.checkpoint.plan.PIECE", 500)
    monkeypatch.setattr("mergekit_plus.checkpoint.plan.SLAB", 2000)
    monkeypatch.setattr(statistics.largest, "__kwdefaults__", {"gather": 100, "cap": 400})  # selection by brackets, as for large models
    save(prune(Checkpoint.open(tmp_path / "many"), Sparsity.of(0.6), method, scope), tmp_path / "b.safetensors", SaveOptions(workers=3))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_random_draws_belong_to_the_seed() -> None:
    one, again, other = (zeros(prune(a_model(), Sparsity.of(0.5), "random", how=PruneOptions(seed=seed))) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["model.layers.0.l0.weight"], one["model.layers.1.l0.weight"])
