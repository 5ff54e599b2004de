"""`breadcrumbs` and `della`, which thin task vectors out by magnitude, and `ties_global`, which trims them over the whole model."""

from __future__ import annotations

import pytest
import torch
from merge_toys import merge_tensors, merged, near, random
from torch import ones, tensor, zeros

from mergekit_plus.errors import OptionError
from mergekit_plus.merge.della import chances
from mergekit_plus.noise import Noise

TEN = torch.arange(1.0, 11.0)


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.2, [4, 5, 6, 7, 8]), (0.5, 0.0, [6, 7, 8, 9, 10]), (0.5, 0.9, [1, 2, 3, 4, 5]), (0.05, 0.1, []),
        (0.9, 0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (1.0, 0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)  # fmt: skip
def test_breadcrumbs_drops_the_largest_then_the_smallest(density: float, gamma: float, kept: list[float]) -> None:
    result = merge_tensors("breadcrumbs", zeros(10), TEN, density=density, gamma=gamma)
    assert result[result != 0].tolist() == kept


def test_of_equal_magnitudes_the_first_are_the_outliers_and_the_last_are_dropped() -> None:
    assert merge_tensors("breadcrumbs", zeros(6), ones(6), density=0.5, gamma=0.2).tolist() == [0, 1, 1, 1, 0, 0]
    for rows in (1, 2, 5):
        values = torch.randint(-3, 4, (101, 7), generator=torch.Generator().manual_seed(0)).float()
        whole = merge_tensors("breadcrumbs", zeros(101, 7), values, density=0.4, gamma=0.3)
        assert torch.equal(merge_tensors("breadcrumbs", zeros(101, 7), values, density=0.4, gamma=0.3, rows=rows), whole)


def test_rescaled_breadcrumbs_have_the_l1_norm_of_the_whole() -> None:
    result = merge_tensors("breadcrumbs", zeros(10), TEN, density=0.5, gamma=0.2, rescale=True)
    torch.testing.assert_close(result.sum(), TEN.sum())
    assert merge_tensors("breadcrumbs", zeros(10), zeros(10), density=0.5, gamma=0.2, rescale=True).tolist() == [0] * 10


def test_breadcrumbs_in_float16_do_not_overflow() -> None:
    model = torch.full((1000,), 3e4, dtype=torch.float16)  # whose sum is infinite in float16: mergekit writes NaN
    result = merge_tensors("breadcrumbs", torch.zeros_like(model), model, density=0.5, rescale=True)
    assert result.abs().max().item() == pytest.approx(6e4)


def test_della_ranks_each_row_from_the_least_chance_to_the_greatest() -> None:
    vector = tensor([[3.0, -1.0, 2.0], [0.0, 0.0, -5.0]])
    torch.testing.assert_close(chances(vector, 0.5, 0.2).float(), tensor([[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]]))
    torch.testing.assert_close(chances(vector.flatten(), 0.5, 0.25)[[1, 5]].float(), tensor([0.45, 0.75]))  # one row of six
    assert chances(tensor(3.0), 0.5, 0.2).tolist() == 0.5
    assert chances(tensor([[1.0], [2.0]]), 0.5, 0.2).tolist() == [[0.5], [0.5]]


def test_what_stays_follows_the_chances_and_changes_nothing_in_expectation() -> None:
    vector = torch.arange(1.0, 5.0).repeat(50000, 1)
    result = merge_tensors("della", zeros(50000, 4), vector, density=0.5, epsilon=0.3, rescale=False)
    assert (result != 0).double().mean(0).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.01)
    unbiased = merge_tensors("della", zeros(50000, 4), vector, density=0.5, epsilon=0.3)
    assert unbiased.mean(0).tolist() == pytest.approx([1, 2, 3, 4], rel=0.03)
    restored = merge_tensors("della", zeros(50000, 4), vector, density=0.5, epsilon=0.3, rescale="l1")
    factor = 10 / (0.2 + 0.8 + 1.8 + 3.2)  # the L1 norm over what stays of it in expectation
    assert restored.mean(0).tolist() == pytest.approx([0.2 * factor, 0.8 * factor, 1.8 * factor, 3.2 * factor], rel=0.03)


def test_della_with_epsilon_zero_is_dare() -> None:
    base, models = random(31, 17), near(random(31, 17), 3)
    for della, dare in (("della", "dare_ties"), ("della_linear", "dare_linear")):
        options = {"density": 0.5, "weight": [0.5, 0.7, 0.2], "normalize": True}
        torch.testing.assert_close(merge_tensors(della, base, *models, epsilon=0, **options), merge_tensors(dare, base, *models, **options))


def test_chances_beyond_certainty_are_refused_before_anything_is_read() -> None:
    with pytest.raises(OptionError, match=r"density 0\.9 with epsilon 0\.15: density - epsilon and density \+ epsilon must lie between 0 and 1"):
        merge_tensors("della", zeros(3), ones(3), density=0.9)
    merge_tensors("della", zeros(3), ones(3), density=1.0)  # nothing is dropped


def test_uniform_numbers_are_those_whose_bits_decide_the_masks() -> None:
    noise = Noise(3, "x", 5)
    assert torch.equal(noise.uniform(1, zeros(40, 10)) < 0.3, noise.keep(1, 0.3, zeros(40, 10)))


def test_ties_global_trims_over_the_whole_model() -> None:
    base = {"a": zeros(4), "b": zeros(2, 3)}
    model = {"a": tensor([1.0, 2.0, 3.0, 4.0]), "b": tensor([[5.0, -6.0, 7.0], [8.0, 9.0, -10.0]])}
    result = merged("ties_global", base, [model], density=0.5)
    assert {name: found.tolist() for name, found in result.items()} == {"a": [0, 0, 0, 0], "b": [[0, -6, 7], [8, 9, -10]]}
    assert merged("ties", base, [model], density=0.5)["a"].tolist() == [0, 0, 3, 4]  # tensor by tensor


def test_ties_global_keeps_all_that_tie_with_the_cut() -> None:
    assert merge_tensors("ties_global", zeros(5), tensor([3.0, 1.0, -1.0, 1.0, 0.5]), density=0.4).tolist() == [3, 1, -1, 1, 0]
    assert merge_tensors("ties_global", zeros(3), zeros(3), density=0.4).tolist() == [0, 0, 0]
