"""Codebooks against their published values and their definition, and the bytes that codes become."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from quant.adapters.codebooks import BITS, Codebook, boundaries, levels, product_loss, residual
from quant.adapters.packing import pack, row_bytes, unpack

PUBLISHED = {  # the positive levels of the released 1-bit adapters (arXiv 2307.16867), and of Lloyd and Max
    ("k-median", 1): [0.674490], ("k-median", 2): [0.377754, 1.265720], ("k-median", 3): [0.202624, 0.625420, 1.113729, 1.792025],
    ("k-median", 4): [0.105550, 0.319036, 0.540072, 0.775192, 1.034006, 1.333107, 1.707738, 2.265491],
    ("l2", 1): [0.797885], ("l2", 2): [0.452780, 1.510418], ("l2", 3): [0.245094, 0.756005, 1.343909, 2.151946],
}  # fmt: skip
EVERY = [(codebook, bits) for codebook in ("k-median", "l2") for bits in BITS]


@pytest.mark.parametrize(("codebook", "bits"), list(PUBLISHED))
def test_levels_are_the_published_ones(codebook: Codebook, bits: int) -> None:
    assert levels(codebook, bits)[1 << (bits - 1) :] == pytest.approx(PUBLISHED[codebook, bits], abs=1e-6)


@pytest.mark.parametrize(("codebook", "bits"), EVERY)
def test_levels_are_antisymmetric_ascending_and_a_fixed_point(codebook: Codebook, bits: int) -> None:
    found = levels(codebook, bits)
    assert len(found) == 1 << bits
    assert list(found) == sorted(set(found))
    assert found == tuple(-value for value in reversed(found))
    assert residual(found, codebook) < 1e-12


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_level_is_the_median_or_the_mean_of_its_cell(bits: int) -> None:
    for codebook in ("k-median", "l2"):
        found = levels(codebook, bits)
        edges = np.array([-np.inf, *boundaries(found), np.inf])
        assert np.allclose(edges[1:-1], (np.array(found[1:]) + found[:-1]) / 2)
        cells = list(zip(edges[:-1], edges[1:], found, strict=True))[:: max(1, len(found) // 8)]
        for low, high, level in cells:
            mass = norm.cdf(high) - norm.cdf(low)
            if codebook == "k-median":
                assert (norm.cdf(level) - norm.cdf(low)) / mass == pytest.approx(0.5, abs=1e-6)
            else:
                assert norm.expect(lambda x: x, lb=low, ub=high) / mass == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_each_codebook_is_the_better_one_by_its_own_measure(bits: int) -> None:
    def error(codebook: Codebook, power: int) -> float:
        edges = [-9.0, *boundaries(levels(codebook, bits)), 9.0]
        cells = zip(edges[:-1], edges[1:], levels(codebook, bits), strict=True)
        return sum(quad(lambda x, level=level: abs(x - level) ** power * norm.pdf(x), low, high)[0] for low, high, level in cells)

    assert error("k-median", 1) < error("l2", 1)
    assert error("l2", 2) < error("k-median", 2)
    if bits == 1:
        assert (error("k-median", 1), error("k-median", 2)) == pytest.approx((0.47322, 0.37861), abs=1e-5)
        assert (error("l2", 1), error("l2", 2)) == pytest.approx((0.48262, 0.36338), abs=1e-5)


def test_packed_bytes_begin_with_the_lowest_bit() -> None:
    assert pack(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1).tolist() == [[0b1101, 1]]
    assert pack(torch.tensor([[3, 0, 2, 1, 1]], dtype=torch.uint8), 2).tolist() == [[0b01100011, 1]]
    assert pack(torch.tensor([[7, 0, 5]], dtype=torch.uint8), 3).tolist() == [[0b01000111, 0b1]]
    assert pack(torch.tensor([[15, 1], [2, 3]], dtype=torch.uint8), 4).tolist() == [[0x1F], [0x32]]
    assert pack(torch.tensor([[255, 128]], dtype=torch.uint8), 8).tolist() == [[255, 128]]


def test_one_bit_is_packed_as_numpy_does() -> None:
    codes = torch.randint(0, 2, (3, 45), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert (pack(codes, 1).numpy() == np.packbits(codes.numpy(), axis=1, bitorder="little")).all()


@given(bits=st.sampled_from(BITS), rows=st.integers(0, 3), count=st.integers(0, 140), seed=st.integers(0, 99))
def test_packing_is_undone_at_every_width_and_size(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, row_bytes(count, bits)) == (rows, (count * bits + 7) // 8)
    assert torch.equal(unpack(packed, bits, count), codes)
    if rows and count * bits % 8:
        assert not (packed[:, -1] >> (count * bits % 8)).any()


def test_what_a_product_of_two_coded_matrices_loses() -> None:
    assert [product_loss("l2", bits) for bits in (1, 2, 3, 4)] == pytest.approx([0.595, 0.221, 0.068, 0.019], abs=1e-3)
    assert [product_loss("k-median", bits) for bits in (1, 2, 3, 4)] == pytest.approx([0.628, 0.250, 0.081, 0.024], abs=1e-3)
