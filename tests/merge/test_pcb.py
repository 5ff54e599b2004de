"""`pcb`: the properties of specs/merge_prune_fold.md section 8, and every element against a reference in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_toys import MemoryScan, merge_tensors, merged, near, random
from pcb_reference import Reference
from pcb_reference import pcb as reference
from torch import Tensor, tensor, zeros

from mergekit_plus.merge import pcb as module
from mergekit_plus.merge.pcb import Bounds, measure

INTERS = ["sum", "normalized", "pairwise"]
SIZE = 5000


def tau(*vectors: Tensor, **options: object) -> Tensor:
    """The merged task vector of these task vectors."""
    return merge_tensors("pcb", torch.zeros_like(vectors[0]), *vectors, **options)


def tasks(count: int, size: int = SIZE, step: float = 0.01) -> list[Tensor]:
    """Task vectors in float64."""
    return near(zeros(size, dtype=torch.float64), count, step=step)


def by_hand(vectors: list[Tensor], lambdas: list[float] | None = None, **options: object) -> Reference:
    return reference([vector.numpy() for vector in vectors], lambdas or [1.0] * len(vectors), **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def warnings_about_idle_tasks_are_expected():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pcb: model")
        yield


# ---- against the reference


@pytest.mark.parametrize("exclude_frozen", [False, True])
@pytest.mark.parametrize("winsor", [0.0, 1e-5, 1e-2, 0.3])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("inter", INTERS)
def test_every_element_is_the_reference_s(inter: str, count: int, ratio: float, winsor: float, exclude_frozen: bool) -> None:
    vectors = tasks(count)
    for vector in vectors:
        vector[:700] = 0
    lambdas = [0.8, 1.2, 0.5, 1.0, -0.3][:count]
    expected = by_hand(vectors, lambdas, ratio=ratio, winsor=winsor, inter=inter, exclude_frozen=exclude_frozen)
    result = tau(*vectors, ratio=ratio, winsor=winsor, inter=inter, exclude_frozen=exclude_frozen, lambda_=lambdas, rows=333)
    np.testing.assert_allclose(result.numpy(), expected.tau, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("inter", INTERS)
def test_float32_differs_from_the_reference_only_next_to_the_cut(inter: str) -> None:
    vectors = tasks(3)
    expected = by_hand([vector.float().double() for vector in vectors], inter=inter)
    result = tau(*[vector.float() for vector in vectors], inter=inter).double().numpy()
    close = np.isclose(result, expected.tau, rtol=1e-4, atol=1e-8)
    clear = np.max(expected.weights, axis=0) > 1e-5  # weights begin at zero, and a lone survivor counts whole however small its weight
    assert np.all(close[clear])
    assert np.count_nonzero(~close) <= 3


@given(st.integers(1, 40), st.integers(1, 4), st.floats(0.01, 1), st.floats(0, 0.49), st.sampled_from(INTERS), st.booleans(), st.integers(1, 9))
def test_small_models_with_many_ties_agree_with_the_reference(
    size: int, count: int, ratio: float, winsor: float, inter: str, exclude_frozen: bool, rows: int
) -> None:
    vectors = [torch.randint(-2, 3, (size,), generator=torch.Generator().manual_seed(31 * size + seed)).double() / 8 for seed in range(count)]
    expected = by_hand(vectors, ratio=ratio, winsor=winsor, inter=inter, exclude_frozen=exclude_frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = tau(*vectors, ratio=ratio, winsor=winsor, inter=inter, exclude_frozen=exclude_frozen, rows=rows)
    assert bool(torch.isfinite(result).all())
    np.testing.assert_allclose(result.numpy(), expected.tau, rtol=1e-6, atol=1e-9)


def test_an_example_in_the_head() -> None:
    # the magnitudes 1..4 without winsorising; of 4 elements int(4 * (1 - 0.5)) = 2 scores are at or below the cut, so the third is dropped too
    assert merge_tensors("pcb", tensor([10.0, 10, 10, 10]), tensor([11.0, 12, 13, 14]), ratio=0.5).tolist() == [10, 10, 10, 14]


# ---- section 8


def test_1_one_task_keeps_its_largest_magnitudes_winsorised() -> None:
    (vector,) = tasks(1)
    result = tau(vector, ratio=0.1, lambda_=1.5)
    magnitude = vector.abs()
    high = magnitude.sort().values[int(SIZE * 0.99 - 1)]
    kept = magnitude > magnitude.sort().values[int(SIZE * (1 - 0.1))]
    torch.testing.assert_close(result, torch.where(kept, 1.5 * vector.sign() * magnitude.clamp(max=high), 0))


@pytest.mark.parametrize("inter", INTERS)
def test_2_identical_tasks_give_what_one_gives(inter: str) -> None:
    (vector,) = tasks(1)
    torch.testing.assert_close(tau(vector, vector, vector, inter=inter), tau(vector, inter=inter))


@pytest.mark.parametrize("inter", INTERS)
def test_3_the_order_of_tasks_does_not_matter(inter: str) -> None:
    a, b, c = tasks(3)
    torch.testing.assert_close(tau(a, b, c, lambda_=[1, 2, 3], inter=inter), tau(c, a, b, lambda_=[3, 1, 2], inter=inter), rtol=1e-6, atol=1e-12)


def test_4_lambda_zero_gives_the_base_and_lambda_is_linear() -> None:
    base = random(SIZE)
    models = near(base, 3)
    assert torch.equal(merge_tensors("pcb", base, *models, lambda_=0), base)
    vectors = tasks(3)
    torch.testing.assert_close(tau(*vectors, lambda_=[0.5, 1.5, 1]), 0.5 * tau(*vectors, lambda_=[1, 3, 2]))


@pytest.mark.parametrize("inter", INTERS)
def test_5_flipping_every_sign_flips_the_result_exactly(inter: str) -> None:
    vectors = [vector.float() for vector in tasks(3)]
    assert torch.equal(tau(*[-vector for vector in vectors], inter=inter), -tau(*vectors, inter=inter))


@pytest.mark.parametrize("inter", INTERS)
def test_6_every_element_lies_among_the_survivors_and_is_the_only_one_s(inter: str) -> None:
    vectors = tasks(3)
    result, expected = tau(*vectors, inter=inter).numpy(), by_hand(vectors, inter=inter)
    clipped, survives = np.stack(expected.clipped), np.stack(expected.weights) > 0
    low, high = np.where(survives, clipped, np.inf).min(0), np.where(survives, clipped, -np.inf).max(0)
    count = survives.sum(0)
    assert np.all(result[count == 0] == 0)
    assert np.all((result >= low - 1e-12)[count > 0])
    assert np.all((result <= high + 1e-12)[count > 0])
    np.testing.assert_allclose(result[count == 1], low[count == 1], rtol=1e-6)
    assert set(np.unique(count)) == {0, 1, 2, 3}


@pytest.mark.parametrize("inter", INTERS)
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2])
def test_7_so_many_survive_and_a_larger_ratio_keeps_all_of_them(inter: str, ratio: float) -> None:
    vectors = tasks(4)
    survivors = []
    for share in (ratio, 2 * ratio):
        bounds = measure(MemoryScan([{"x": v} for v in vectors], {"x": zeros(SIZE).double()}), models=4, ratio=share, winsor=0.0,
                         inter=inter, exclude_frozen=False)  # fmt: skip
        scores = module._scores(vectors, [bound for bound in bounds if bound], inter)
        for score, bound in zip(scores, bounds, strict=True):
            assert bound is not None
            assert score.max().item() == bound.best
        survivors.append([score > bound.drop for score, bound in zip(scores, bounds, strict=True) if bound])
        # without ties; the winsorised ends do tie, so nothing is winsorised here
        assert all(int(kept.sum()) == SIZE - int(SIZE * (1 - share)) - 1 for kept in survivors[-1])
    assert all(bool((few <= many).all()) for few, many in zip(*survivors, strict=True))


def test_8_scale_does_not_matter_where_tanh_is_straight_and_never_for_pairwise() -> None:
    vectors = tasks(3, step=1e-3)

    def apart(factor: float, inter: str) -> float:
        scaled = tau(*[factor * vector for vector in vectors], inter=inter) / factor
        whole = tau(*vectors, inter=inter)
        return ((scaled - whole).norm() / whole.norm()).item()

    assert apart(0.1, "sum") < 1e-4
    assert apart(1000, "sum") > 0.05
    assert all(apart(factor, "pairwise") < 1e-6 for factor in (1e-3, 1000))


def test_9_names_pieces_and_workers_do_not_change_a_bit() -> None:
    base = {"b": random(37, 11), "a": random(64, seed=5), "c": random(1, seed=6).reshape(())}
    models = [{name: near(tensor, 3, seed=7)[index] for name, tensor in base.items()} for index in range(3)]
    whole = merged("pcb", base, models)
    for rows, workers in ((1, 1), (5, 4), (64, 2)):
        cut = merged("pcb", base, models, rows=rows, workers=workers)
        assert all(torch.equal(cut[name], whole[name]) for name in base)
    order = ["a", "c", "b"]
    shuffled = merged("pcb", {name: base[name] for name in order}, [{name: model[name] for name in order} for model in models])
    assert all(torch.equal(shuffled[name], whole[name]) for name in base)


def test_9_the_whole_model_competes_not_each_tensor() -> None:
    base = {"quiet": zeros(100), "loud": zeros(100)}
    model = {"quiet": random(100) * 1e-3, "loud": random(100, seed=1)}
    result = merged("pcb", base, [model], ratio=0.3)
    assert int((result["quiet"] != 0).sum()) == 0
    assert int((result["loud"] != 0).sum()) > 50


def test_10_permuting_elements_permutes_the_result() -> None:
    vectors = [vector.float() for vector in tasks(3)]
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tau(*[vector[order] for vector in vectors]), tau(*vectors)[order])


def test_10_unchanged_elements_count_unless_they_are_excluded() -> None:
    vectors = [vector.float() for vector in tasks(3)]
    longer = [torch.cat([vector, zeros(1000)]) for vector in vectors]
    assert not torch.equal(tau(*longer)[:SIZE], tau(*vectors))
    assert torch.equal(tau(*longer, exclude_frozen=True)[:SIZE], tau(*vectors))
    assert bool((tau(*longer)[SIZE:] == 0).all())


@pytest.mark.parametrize("inter", INTERS)
@pytest.mark.parametrize("idle", [zeros(SIZE), torch.full((SIZE,), 0.01), 0.01 * random(SIZE).sign()], ids=["zero", "constant", "constant magnitude"])
def test_11_a_task_without_contrast_changes_nothing(inter: str, idle: Tensor) -> None:
    vectors = [vector.float() for vector in tasks(2)]
    with pytest.warns(UserWarning, match="model 2 differs from the base nowhere, or everywhere as much"):
        result = tau(vectors[0], idle, vectors[1], inter=inter)
    assert torch.equal(result, tau(*vectors, inter=inter))


def test_11_where_no_task_has_contrast_the_base_comes_back() -> None:
    base = random(50)
    assert torch.equal(merge_tensors("pcb", base, base + 0, base + 0), base)
    assert merge_tensors("pcb", tensor([2.0]), tensor([3.0])).tolist() == [2.0]


def test_11_a_ratio_below_one_element_keeps_the_best_of_each_task() -> None:
    vectors = tensor([1.0, 2, 3, 4]), tensor([4.0, 3, 2, 1])
    assert tau(*vectors, ratio=0.01, winsor=0).tolist() == [4, 0, 0, 4]


def test_11_many_tasks_do_not_overflow() -> None:
    assert bool(torch.isfinite(tau(*[vector.float() for vector in tasks(100, size=200, step=3)])).all())


def test_11_negative_scores_survive_where_too_few_are_positive() -> None:
    vectors = tasks(4)
    result = tau(*vectors, ratio=1.0)
    np.testing.assert_allclose(result.numpy(), by_hand(vectors, ratio=1.0).tau, rtol=1e-9, atol=1e-15)
    assert bool(torch.isfinite(result).all())


def test_12_opposite_equals_score_zero_and_the_dissenter_scores_below() -> None:
    a, b, c = tensor([0.5, 0.3]), tensor([-0.5, 0.3]), tensor([0.0, -0.4])
    bounds = [Bounds(0.0, 1.0)] * 3
    two = module._scores([a, b], bounds[:2], "sum")
    assert (two[0][0].item(), two[1][0].item()) == (0.0, 0.0)
    for inter in INTERS:
        three = module._scores([a, b, c], bounds, inter)
        assert three[0][1] > 0
        assert three[1][1] > 0
        if inter != "pairwise":  # with itself a dissenter always agrees
            assert three[2][1] < 0


# ---- streaming


def test_measuring_takes_two_passes_and_one_more_to_count_frozen_elements() -> None:
    base = zeros(SIZE)
    scan = MemoryScan([{"x": vector.float()} for vector in tasks(3)], {"x": base}, rows=100)
    options = {"models": 3, "ratio": 0.1, "winsor": 0.01, "inter": "sum"}
    measure(scan, **options, exclude_frozen=False)
    assert scan.passes == 2
    measure(scan, **options, exclude_frozen=True)
    assert scan.passes == 2 + 3


def test_in_little_memory_the_measurement_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random(SIZE, dtype=torch.bfloat16)
    models = near(base, 3, step=0.003)
    expected = merge_tensors("pcb", base, *models, rows=100)
    exact = module.order_statistics
    monkeypatch.setattr(module, "order_statistics", lambda *given, **known: exact(*given, **known, gather=10, cap=400))
    assert torch.equal(merge_tensors("pcb", base, *models, rows=100), expected)
