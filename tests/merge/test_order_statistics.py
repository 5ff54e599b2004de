"""`mergekit_plus.statistics`: the exact element of any rank, whatever the data and however little memory there is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_toys import MemoryScan, one
from torch import Tensor

from mergekit_plus.statistics import Cut, largest, order_statistics, sums

LIMITS = [{}, {"gather": 100}, {"gather": 100, "cap": 4000}, {"gather": 10, "cap": 64}, {"gather": 1, "cap": 1}]
SIZE = 20_000


def itself(base: Tensor | None, models: Sequence[Tensor]) -> Sequence[Tensor]:
    return models


def data(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(SIZE).astype(np.float32)
    if kind == "heavy ties":
        return np.round(normal)
    if kind == "half zeros":
        return np.where(rng.random(SIZE) < 0.52, np.float32(0), normal)
    if kind == "constant":
        return np.full(SIZE, 0.1, np.float32)
    if kind == "negative zeros":
        return np.where(rng.random(SIZE) < 0.5, np.float32(0), np.float32(-0.0))
    if kind == "ascending":
        return np.arange(SIZE, dtype=np.float32)
    if kind == "descending cubes":
        return -(np.arange(SIZE, dtype=np.float32) ** 3)
    if kind == "all but one block equal":
        normal[:7000], normal[7100:] = 1, 1
    if kind == "the sampled blocks mislead":
        normal.reshape(-1, 100)[::16] += 100
    if kind == "infinite ends":
        normal[:5], normal[-3:] = np.inf, -np.inf
    return normal


KINDS = [
    "normal", "heavy ties", "half zeros", "constant", "negative zeros", "ascending", "descending cubes",
    "all but one block equal", "the sampled blocks mislead", "infinite ends",
]  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_the_element_that_sorting_puts_there(kind: str, limits: dict[str, int]) -> None:
    values = data(kind)
    ranks = [0, 1, 77, SIZE // 10, SIZE // 2, int(0.9 * SIZE), SIZE - 2, SIZE - 1]
    found = order_statistics(one(torch.from_numpy(values), torch.from_numpy(-values), rows=100), itself, [ranks, [SIZE // 3]], **limits)
    assert found[0] == [float(value) for value in np.sort(values)[ranks]]
    assert found[1] == [float(np.sort(-values)[SIZE // 3])]
    assert all(math.copysign(1, value) > 0 for value in found[0] if value == 0)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_are_exactly_so_many_and_the_first_of_equal_ones(kind: str, limits: dict[str, int]) -> None:
    values = data(kind)
    order = np.lexsort((np.arange(SIZE), -values))
    for count in (1, SIZE // 10, SIZE // 2, SIZE - 1, SIZE):
        (cut,) = largest(one(torch.from_numpy(values), rows=97), itself, [count], **limits)
        kept = (values > cut.threshold) | ((values == np.float32(cut.threshold)) & (np.arange(SIZE) <= cut.last))
        assert set(np.flatnonzero(kept)) == set(order[:count])
        assert cut.tied == np.count_nonzero(kept & (values == np.float32(cut.threshold)))


def test_of_three_equal_ones_the_first_two_stay() -> None:
    assert largest(one(torch.tensor([5.0, 1, 5, 5, 2])), itself, [2]) == [Cut(threshold=5.0, last=2, tied=2)]
    assert largest(one(torch.tensor([5.0, 1, 5, 5, 2])), itself, [3]) == [Cut(threshold=5.0, last=4, tied=3)]


def test_the_usual_case_takes_one_sample_and_one_pass() -> None:
    scan = one(torch.from_numpy(data("normal")), rows=100)
    order_statistics(scan, itself, [[SIZE // 10, SIZE // 2]], gather=100)
    assert (scan.samples, scan.passes) == (1, 1)


@pytest.mark.parametrize("kind", ["normal", "heavy ties"])
def test_and_so_does_a_cut_through_equal_ones(kind: str) -> None:
    scan = one(torch.from_numpy(data(kind)), rows=100)
    largest(scan, itself, [SIZE // 2], gather=100)
    assert (scan.samples, scan.passes) == (1, 1)


def test_little_memory_costs_passes_and_never_exactness() -> None:
    values = data("the sampled blocks mislead")
    scan = one(torch.from_numpy(values), rows=100)
    assert order_statistics(scan, itself, [[SIZE // 2]], gather=10, cap=64) == [[float(np.sort(values)[SIZE // 2])]]
    assert 1 < scan.passes < 30


def test_no_piece_returns_more_than_its_share() -> None:
    scan = one(torch.from_numpy(data("normal")), rows=1000)
    returned: list[int] = []
    visit = scan.map

    def watched(function, sample=False):  # type: ignore[no-untyped-def]
        parts = visit(function, sample)
        returned.append(sum(part.kept.size for counts in parts for part in counts) if not sample else 0)
        return parts

    scan.map = watched  # type: ignore[method-assign]
    order_statistics(scan, itself, [[SIZE // 2]], gather=10, cap=100)
    assert max(returned) <= 4 * 100 + 16 * 20


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-149, 3.0e38, math.inf, -math.inf]), min_size=1, max_size=60),
    st.integers(1, 7), st.integers(1, 60), st.data(),
)  # fmt: skip
def test_any_data_any_pieces_any_limits(values: list[float], rows: int, cap: int, drawn: st.DataObject) -> None:
    array = np.array(values, np.float32)
    rank = drawn.draw(st.integers(0, len(values) - 1))
    scan = one(torch.from_numpy(array), rows=rows)
    assert order_statistics(scan, itself, [[rank]], gather=1, cap=cap) == order_statistics(scan, itself, [[rank]]) == [[np.sort(array)[rank]]]
    assert largest(scan, itself, [rank + 1], gather=1, cap=cap) == largest(scan, itself, [rank + 1])


def test_rows_of_float64_are_compared_in_float64() -> None:
    values = torch.arange(1000, dtype=torch.float64) * 1e-12 + 1
    for limits in LIMITS:
        assert order_statistics(one(values, rows=10), itself, [[500]], **limits) == [[1 + 500e-12]]


def test_tensors_of_different_dtypes_are_one_row() -> None:
    wide, narrow = torch.linspace(0, 1, 3000, dtype=torch.float64), torch.linspace(0, 1, 3000)
    expected = np.sort(np.concatenate([wide.numpy(), narrow.double().numpy()]))
    for limits in LIMITS:
        scan = MemoryScan([{"wide": wide, "narrow": narrow}], rows=100)
        assert order_statistics(scan, itself, [[1234, 5000]], **limits) == [[expected[1234], expected[5000]]]


def test_elements_may_be_left_out_when_the_length_is_given() -> None:
    def positive(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
        return [models[0][models[0] > 0]]

    values = data("normal")
    kept = np.sort(values[values > 0])
    for limits in LIMITS:
        found = order_statistics(one(torch.from_numpy(values), rows=100), positive, [[0, 5000]], size=kept.size, **limits)
        assert found == [[float(kept[0]), float(kept[5000])]]


def test_the_inputs_are_left_alone() -> None:
    values = torch.from_numpy(data("normal"))
    before = values.clone()
    for limits in LIMITS:
        order_statistics(one(values, rows=100), itself, [[3]], **limits)
    assert torch.equal(values, before)


def test_several_threads_find_the_same() -> None:
    values = torch.from_numpy(data("half zeros"))
    many = MemoryScan([{"x": values}], rows=50, workers=8)
    assert order_statistics(many, itself, [[9000]], gather=10, cap=64) == order_statistics(one(values), itself, [[9000]])


def test_a_rank_outside_is_an_error() -> None:
    with pytest.raises(IndexError, match="rank 3 of 3 elements"):
        order_statistics(one(torch.zeros(3)), itself, [[3]])


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("limits", LIMITS[1:], ids=str)
def test_nan_which_callers_refuse_does_not_hang(limits: dict[str, int], share: float) -> None:
    values = torch.from_numpy(data("normal"))
    values[:: round(1 / share)] = math.nan
    for rank in (0, SIZE // 2, SIZE - 1):
        with contextlib.suppress(ValueError, IndexError):
            order_statistics(one(values, rows=100), itself, [[rank]], **limits)


def test_sums_do_not_depend_on_the_order_of_pieces() -> None:
    values = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64)
    for order in (values, values.flip(0)):
        assert sums(one(order, rows=1), lambda base, models: [float(models[0].sum()), 1.0]) == [2.0, 4.0]
