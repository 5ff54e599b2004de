"""What differs between two checkpoints."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint import plan as plans
from mergekit_plus.diff import diff
from mergekit_plus.merge.plan import merge

MODELS = Path(__file__).parent / "models"


def of(**tensors: Any) -> Checkpoint:
    return Checkpoint.from_tensors({name: torch.as_tensor(tensor) for name, tensor in tensors.items()})


def only(a: Any, b: Any) -> tuple[float, float, float]:
    """changed, max_abs and relative of one tensor."""
    (found,) = diff(of(w=a), of(w=b)).tensors
    assert found.name == "w"
    return astuple(found)[1:]


def test_equal_checkpoints_are_the_same() -> None:
    a = of(w=[1.0, -2.0], i=[1, 2], e=torch.empty(0, 2), s=3.0, b=[True])
    found = diff(a, of(**{name: a.read(name).clone() for name in a.specs}))
    assert found.same
    assert [tensor.changed for tensor in found.tensors] == [0, 0, 0, 0, 0]


def test_a_change_has_a_share_a_size_and_a_norm() -> None:
    assert only([3.0, 0.0, 0.0, 4.0], [3.0, 1.0, 0.0, 2.0]) == (0.5, 2.0, pytest.approx(math.sqrt(5) / 5))
    assert only([0.0, 0.0], [0.0, 2.0]) == (0.5, 2.0, 1.0)
    assert not diff(of(w=[1.0]), of(w=[2.0])).same


def test_tensors_that_only_one_has_are_listed() -> None:
    found = diff(of(w=[1.0], a=[1.0]), of(w=[1.0], b=[1.0], c=[1.0]))
    assert (found.only_a, found.only_b, found.unlike, found.same) == (("a",), ("b", "c"), (), False)


def test_another_shape_is_named_and_not_compared() -> None:
    found = diff(of(w=torch.ones(2, 3)), of(w=torch.ones(3, 2)))
    assert (found.unlike, found.tensors, found.same) == (("w",), (), False)


def test_another_dtype_is_named_and_the_values_compared_all_the_same() -> None:
    found = diff(of(w=torch.tensor([1.0, 1.001])), of(w=torch.tensor([1.0, 1.001]).bfloat16()))
    assert (found.unlike, found.same) == (("w",), False)
    assert found.tensors[0].changed == 0.5
    assert found.tensors[0].max_abs == pytest.approx(0.001, rel=1e-3)


def test_nan_equals_nan_and_differs_from_everything_else() -> None:
    nan, inf = math.nan, math.inf
    assert only([nan, 1.0], [nan, 1.0]) == (0, 0, 0)
    assert only([1.0, 1.0], [nan, 1.0]) == (0.5, inf, inf)
    assert only([inf, 1.0], [inf, 1.0]) == (0, 0, 0)
    assert only([inf, 1.0], [-inf, 1.0]) == (0.5, inf, inf)


def test_large_integers_are_told_apart() -> None:
    assert only([2**53, 5], [2**53 + 1, 5])[0] == 0.5
    assert only(torch.tensor([2**63 + 1], dtype=torch.uint64), torch.tensor([2**63], dtype=torch.uint64))[0] == 1
    assert only([True, False], [True, True]) == (0.5, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64, torch.float16, torch.int8, torch.uint16], ids=str)
def test_every_dtype_can_be_compared(dtype: torch.dtype) -> None:
    a, b = torch.tensor([1.0, 2.0, 4.0, 8.0]).to(dtype), torch.tensor([1.0, 2.0, 4.0, 2.0]).to(dtype)
    assert only(a, a.clone()) == (0, 0, 0)
    assert only(a, b)[:2] == (0.25, 6.0)


def test_where_a_tensor_is_cut_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(50, 7), torch.randn(50, 7)
    whole = only(a, b)
    monkeypatch.setattr(plans, "PIECE", 7)
    monkeypatch.setattr(plans, "SLAB", 21)
    assert only(a, b) == (whole[0], whole[1], pytest.approx(whole[2]))


def test_a_checkpoint_that_is_only_planned_is_compared_with_real_ones() -> None:
    base, code = Checkpoint.open(MODELS / "base"), Checkpoint.open(MODELS / "code")
    found = diff(base, merge([base, code], "linear", options={"weight": [1, 0]}))
    assert found.same
    assert len(found.tensors) == 57
    half = {tensor.name: tensor.relative for tensor in diff(base, merge([base, code], "linear")).tensors}
    full = {tensor.name: tensor.relative for tensor in diff(base, code).tensors}
    assert all(half[name] == pytest.approx(full[name] / 2, rel=0.02, abs=1e-3) for name in full)
