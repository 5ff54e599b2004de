"""`noise`: the same element has the same bits, wherever the pieces are cut."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_plus.noise import Noise

WHOLE = Noise(7, "layer.weight").bits(0, 300)


@given(st.integers(0, 250), st.integers(0, 50))
def test_a_piece_has_the_bits_of_the_whole(first: int, count: int) -> None:
    assert np.array_equal(Noise(7, "layer.weight", first).bits(0, count), WHOLE[first : first + count])


def test_the_bits_are_pinned_so_that_old_recipes_repeat() -> None:
    assert Noise(0, "x").bits(0, 3).tolist() == [510821512, 3977359911, 3327857656]


def test_seed_name_and_model_each_change_the_bits() -> None:
    others = [Noise(8, "layer.weight").bits(0, 300), Noise(7, "layer.weights").bits(0, 300), Noise(7, "layer.weight").bits(1, 300)]
    assert all(np.count_nonzero(other == WHOLE) == 0 for other in others)


def test_a_far_start_costs_nothing() -> None:
    assert Noise(0, "x", 10**15 + 3).bits(0, 5).size == 5


def test_the_share_of_kept_elements_is_the_density() -> None:
    for density in (0.1, 0.5, 0.99):
        kept = Noise(0, "x").keep(0, density, torch.empty(1000, 1000)).double().mean().item()
        assert abs(kept - density) < 4 * (density * (1 - density) / 1e6) ** 0.5


def test_neighbours_are_independent() -> None:
    kept = Noise(3, "x").keep(0, 0.5, torch.empty(1_000_000)).double()
    for distance in (1, 2, 4, 8, 4096):
        assert abs((kept[distance:] * kept[:-distance]).mean().item() - 0.25) < 0.002


def test_a_mask_has_the_shape_it_is_asked_for() -> None:
    for shape in ((), (0,), (3, 0), (2, 3, 5), (1,)):
        mask = Noise(0, "x").keep(0, 0.5, torch.empty(shape))
        assert (mask.shape, mask.dtype) == (torch.Size(shape), torch.bool)


def test_density_one_keeps_all_and_a_higher_density_keeps_more() -> None:
    like = torch.empty(10_000)
    low, high, all_ = (Noise(0, "x").keep(0, density, like) for density in (0.2, 0.6, 1.0))
    assert bool((low <= high).all())
    assert bool(all_.all())
