"""Masks: exact counts, ties, patterns, and one bit a weight; literal, then against a loop."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_plus.errors import OptionError
from prune import Sparsity, has_pattern, pack, unpack
from prune.masks import lowest, lowest_of_rows, packed_shape


def test_a_share_is_taken_as_it_is_written() -> None:
    assert Sparsity.of(0.29).count(100) == 29  # int(0.29 * 100) is 28
    assert Sparsity.of(0.5).count(7) == 3
    assert Sparsity.of(0).count(10) == 0
    assert [str(Sparsity.of(0.5)), str(Sparsity.of(pattern="2:4")), str(Sparsity.of(pattern="1:3"))] == ["0.5", "2:4", "1:3"]
    assert Sparsity.of(pattern="1:3") == Sparsity(Fraction(2, 3), 3)


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan"), "a half", True])
def test_a_sparsity_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(OptionError, match=r"sparsity .*: a share of zeros from 0 to below 1, as in 0\.5"):
        Sparsity.of(share)


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2", "2:4:8", "a:b", "2/4"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match=f"pattern '{pattern}': n:m for at most n weights that are not zero in every m, as in 2:4"):
        Sparsity.of(pattern=pattern)


def test_one_of_sparsity_and_pattern_is_asked_for() -> None:
    for given_ in ({}, {"sparsity": 0.5, "pattern": "2:4"}):
        with pytest.raises(OptionError, match="one of the two"):
            Sparsity.of(**given_)  # type: ignore[arg-type]


def test_of_equal_scores_the_first_go() -> None:
    assert lowest(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), 3).tolist() == [False, True, True, False, True]
    assert lowest(torch.zeros(2, 3), 1).tolist() == [[True, False, False]] * 2


def test_two_of_four_is_two_of_each_four_inputs() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4, 8, 7, 6, 5]])
    assert lowest_of_rows(scores, Sparsity.of(pattern="2:4")).tolist() == [[True, True, False, False, False, False, True, True]]
    assert lowest_of_rows(scores, Sparsity.of(pattern="1:4")).tolist() == [[True, True, True, False, False, True, True, True]]
    assert lowest_of_rows(scores, Sparsity.of(0.5)).tolist() == [[True] * 4 + [False] * 4]


def test_a_pattern_holds_where_no_group_has_more() -> None:
    weight = torch.tensor([[0.0, 1, 0, 2], [0, 0, 0, 3]])
    assert has_pattern(weight, 2, 4)
    assert not has_pattern(weight, 1, 4)
    assert not has_pattern(weight, 2, 3)


def test_the_first_input_is_the_lowest_bit_of_the_first_byte() -> None:
    mask = torch.tensor([[True, False, True, False, False, False, False, False, True], [False] * 8 + [True]])
    assert pack(mask).tolist() == [[0b101, 1], [0, 1]]
    assert packed_shape((2, 9)) == (2, 2)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32))
def test_unpack_undoes_pack(rows: int, inputs: int, seed: int) -> None:
    mask = torch.rand(rows, inputs, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.shape == packed_shape(mask.shape)
    assert torch.equal(unpack(packed, inputs), mask)


@given(st.integers(1, 4), st.integers(1, 30), st.floats(0, 0.99), st.integers(0, 2**32))
def test_the_least_of_a_row_are_those_of_a_sort_by_score_and_place(rows: int, inputs: int, share: float, seed: int) -> None:
    scores = torch.randint(0, 4, (rows, inputs), generator=torch.Generator().manual_seed(seed)).float()
    sparsity = Sparsity.of(round(share, 2))
    for row, chosen in zip(scores.tolist(), lowest_of_rows(scores, sparsity).tolist(), strict=True):
        order = sorted(range(inputs), key=lambda place: (row[place], place))
        assert {place for place in range(inputs) if chosen[place]} == set(order[: sparsity.count(inputs)])
