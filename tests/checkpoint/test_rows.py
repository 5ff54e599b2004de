"""Rows picked in any order: the right ones, from few reads, piece by piece as at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checkpoint_toys import mapped
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mergekit_plus.checkpoint.plan as plans
import mergekit_plus.checkpoint.rows as rows_module
from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec
from mergekit_plus.checkpoint.plan import execute
from mergekit_plus.checkpoint.rows import pick_rows

TABLE = torch.arange(40.0).reshape(20, 2)
SPEC = TensorSpec("x", "F32", (20, 2))


def picked(index: Sequence[int], gap: int = 0) -> tuple[Tensor, list[tuple[int, int]]]:
    """The rows, and the runs that were read; gaps of `gap` rows are read along."""
    reads = []

    def read(rows: slice) -> Tensor:
        reads.append((rows.start, rows.stop))
        return TABLE[rows]

    old, rows_module.GAP = rows_module.GAP, gap * SPEC.row_bytes
    try:
        return pick_rows(read, SPEC, torch.tensor(list(index), dtype=torch.int64)), reads
    finally:
        rows_module.GAP = old


@given(st.lists(st.integers(-1, 19), max_size=30), st.integers(0, 3))
def test_any_rows_in_any_order(index: list[int], gap: int) -> None:
    result, _ = picked(index, gap)
    expected = [TABLE[row] if row >= 0 else torch.zeros(2) for row in index]
    assert torch.equal(result, torch.stack(expected) if expected else torch.zeros(0, 2))


def test_neighbours_are_one_read_and_no_row_is_read_twice() -> None:
    assert picked([3, 4, 5])[1] == [(3, 6)]
    assert picked([5, 3, 4, 3, -1, 12, 11])[1] == [(3, 6), (11, 13)]
    assert picked([-1, -1])[1] == []


def test_a_short_gap_is_read_along() -> None:
    assert picked([0, 3], gap=3)[1] == [(0, 4)]
    assert picked([0, 4], gap=3)[1] == [(0, 1), (4, 5)]


def picking(part: Checkpoint, pick: Tensor, multiple: int = 1) -> Step:
    """A step that adds its own row's number to each picked row."""

    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        numbers = torch.arange(first_row, first_row + len(tensors[0])).float()
        return (tensors[0] + numbers[:, None],)

    return Step(((part, "x"),), (TensorSpec("y", "F32", (len(pick), 2)),), run, multiple, takes=(pick,))


@pytest.mark.parametrize("multiple", [0, 1, 4])
def test_a_step_gets_its_rows_whatever_computes_them(monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    """Behind a step that takes whole tensors only, or runs of four rows, as well as behind one that takes any rows."""
    monkeypatch.setattr(plans, "PIECE", 4)
    monkeypatch.setattr(plans, "SLAB", 16)
    pick = torch.tensor([19, 0, -1, 7, 8, 9, 3, 3, 1, -1, 12, 18, 2])
    doubled = mapped(Checkpoint.from_tensors({"x": TABLE}), lambda tensor: tensor * 2, multiple=multiple)
    step = picking(doubled, pick)
    expected = torch.where(pick[:, None] >= 0, 2 * TABLE[pick], 0) + torch.arange(13.0)[:, None]
    assert step.cut == int(multiple == 1)
    assert torch.equal(execute(step)[0], expected)
    for size in (2, 6, 100):
        assert torch.equal(torch.cat([execute(step, rows)[0] for rows in step.slabs(size)]), expected)


def test_a_plan_of_picks_is_read_by_rows() -> None:
    pick = torch.tensor([4, 4, 0])
    plan = Checkpoint("picked", Plan([picking(Checkpoint.from_tensors({"x": TABLE}), pick)]))
    assert plan.read("y", slice(1, 3)).tolist() == [[9.0, 10.0], [2.0, 3.0]]
