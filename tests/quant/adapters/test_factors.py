"""The gauge of a LoRA update, and codes that are fitted to its product, against the dense formula."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from quant.adapters.coding import Coding, Scale, decode, encode, rescaled
from quant.adapters.factors import Gauge, encode_pair, lost, scale_factors, turned


def factors(rank: int = 4, n: int = 150, m: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A and B with components of very unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** -torch.arange(rank, dtype=torch.float64)
    a = torch.randn((rank, n), generator=generator, dtype=torch.float64)
    return a * sizes[:, None], torch.randn((m, rank), generator=generator, dtype=torch.float64)


def dense_loss(a: Tensor, b: Tensor, pair: tuple) -> float:
    coded_a, coded_b = (decode(part).double() for part in pair)
    return float((b @ a - coded_b.T @ coded_a).square().sum() / (b @ a).square().sum())


@pytest.mark.parametrize("gauge", get_args(Gauge))
@pytest.mark.parametrize(("rank", "n", "m"), [(4, 150, 40), (3, 7, 5), (6, 4, 9), (1, 3, 1)])
def test_a_gauge_leaves_the_product(gauge: Gauge, rank: int, n: int, m: int) -> None:
    a, b = factors(rank, n, m)
    turned_a, turned_b = turned(a, b, gauge)
    assert (turned_a.shape, turned_b.shape) == (a.shape, b.shape)
    assert torch.allclose(turned_b @ turned_a, b @ a, atol=1e-12)


def test_the_gauge_of_the_svd_is_orthogonal_and_the_balanced_one_is_level() -> None:
    a, b = turned(*factors(), "svd")
    assert torch.allclose(a @ a.T, b.T @ b, atol=1e-10)
    assert torch.allclose(a @ a.T, torch.diag((a @ a.T).diagonal()), atol=1e-10)
    sizes = a.square().sum(1)
    assert (sizes[:-1] >= sizes[1:]).all()
    level = turned(*factors(), "balanced")[0].square().sum(1)
    assert level.max() / level.min() < sizes.max() / sizes.min() / 5


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_svd_gauge_loses_what_theory_says(bits: int) -> None:
    a, b = torch.randn((4, 4000), generator=torch.Generator().manual_seed(0)), torch.randn((4000, 4), generator=torch.Generator().manual_seed(1))
    pair = encode_pair(a, b, Coding(bits), "svd", refit=False)
    expected = {1: 0.595, 2: 0.221, 3: 0.068, 4: 0.019, 8: 0.0000826}[bits]
    assert dense_loss(a.double(), b.double(), pair) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("scale", get_args(Scale))
def test_the_loss_is_the_dense_one(scale: Scale) -> None:
    a, b = factors()
    pair = encode_pair(a, b, Coding(2, "l2", scale), "none", refit=False)
    assert lost(a, b.T, pair) == pytest.approx(dense_loss(a, b, pair), rel=1e-9)
    assert lost(a * 0, b.T, pair) == 0


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("codebook", ["l2", "k-median"])
def test_scales_are_those_of_dense_least_squares(scale: Scale, codebook: str) -> None:
    a, b = factors()
    coding = Coding(1, codebook, scale)  # type: ignore[arg-type]
    coded_a, coded_b = encode(a, coding), encode(b.T, coding)
    found = scale_factors(a, b.T, coded_a, coded_b)
    values, against, owners = decode(coded_a).double(), decode(coded_b).double(), coding.owners(*a.shape)
    columns = [(against.T @ (values * (owners == number))).flatten() for number in range(coding.scales(*a.shape))]
    expected = torch.linalg.lstsq(torch.stack(columns, 1), (b @ a).flatten()[:, None]).solution.flatten()
    assert torch.allclose(found, expected, atol=1e-6)
    assert dense_loss(a, b, (rescaled(coded_a, found), coded_b)) <= dense_loss(a, b, (coded_a, coded_b))


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("codebook", ["l2", "k-median"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_refit_never_loses_more_and_at_one_bit_much_less(scale: Scale, codebook: str, bits: int) -> None:
    a, b = factors()
    for gauge in get_args(Gauge):
        coding = Coding(bits, codebook, scale)  # type: ignore[arg-type]
        plain, fitted = (dense_loss(a, b, encode_pair(a, b, coding, gauge, refit)) for refit in (False, True))
        assert fitted <= plain + 1e-12
        if bits == 1:
            assert fitted < 0.9 * plain


def test_zero_components_stay_zero() -> None:
    a, b = factors()
    b[:, 1:] = 0
    pair = encode_pair(a, b, Coding(1), "svd")
    assert not decode(pair[1])[1:].any()
    assert not any(torch.isnan(decode(part)).any() for part in pair)
