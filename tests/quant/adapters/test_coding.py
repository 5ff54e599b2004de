"""What codes and scales hold of a matrix, and the gradient that training sees through them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from mergekit_plus.errors import OptionError
from quant.adapters.codebooks import BITS, Codebook, levels
from quant.adapters.coding import GROUP, Coded, Coding, Scale, decode, encode, nearest, straight_through

EVERY = [Coding(bits, codebook, scale) for bits in BITS for codebook in get_args(Codebook) for scale in get_args(Scale)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_bit_by_hand() -> None:
    coded = encode(torch.tensor([[1.0, -3.0, 2.0, -2.0]]), Coding(1, "l2", "tensor"))
    assert coded.codes.tolist() == [[1, 0, 1, 0]]
    assert decode(coded)[0].tolist() == pytest.approx([2, -2, 2, -2])  # the mean of |w|
    coded = encode(torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]]), Coding(1, "k-median", "component"))
    assert coded.codes.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    spread = (16 / 3) ** 0.5  # of n - 1
    assert coded.stats.flatten().tolist() == pytest.approx([2, spread, 1, 0])
    assert decode(coded).flatten().tolist() == pytest.approx([2 - 0.6744898 * spread] * 2 + [2 + 0.6744898 * spread] * 2 + [1] * 4)


@pytest.mark.parametrize("coding", EVERY, ids=str)
def test_what_shares_a_scale(coding: Coding) -> None:
    matrix = normal(3, 300)
    matrix[1] *= 100
    matrix[:, 128:256] *= 10
    coded, owners = encode(matrix, coding), coding.owners(3, 300)
    assert coded.stats.shape == (coding.scales(3, 300), coding.columns)
    assert owners.unique().tolist() == list(range({"tensor": 1, "component": 3, "group": 9}[coding.scale]))
    for number in owners.unique():
        alone = encode(matrix[owners == number][None], Coding(coding.bits, coding.codebook, "tensor"))
        assert torch.equal(alone.codes[0], coded.codes[owners == number])
        assert torch.allclose(alone.stats[0], coded.stats[number], rtol=1e-6)
    assert GROUP == 128


@pytest.mark.parametrize("coding", EVERY, ids=str)
def test_scale_and_shift_pass_through_and_a_sign_mirrors(coding: Coding) -> None:
    matrix = normal(4, 200)
    shift = 5.0 if coding.codebook == "k-median" else 0.0
    one, other, mirrored = encode(matrix, coding), encode(3 * matrix + shift, coding), encode(-matrix, coding)
    assert torch.equal(one.codes, other.codes)
    assert torch.allclose(3 * decode(one) + shift, decode(other), atol=1e-5)
    assert torch.equal(mirrored.codes, (1 << coding.bits) - 1 - one.codes)
    assert torch.allclose(decode(mirrored), -decode(one), atol=1e-6)


@pytest.mark.parametrize("coding", EVERY, ids=str)
def test_constant_and_empty_scales_come_back_exactly(coding: Coding) -> None:
    assert not decode(encode(torch.zeros(2, 130), coding)).any()
    if coding.codebook == "k-median":
        assert torch.equal(decode(encode(torch.full((2, 130), 0.3), coding)), torch.full((2, 130), 0.3))
    assert decode(encode(torch.full((1, 1), 0.5), coding)).item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("coding", EVERY, ids=str)
def test_more_bits_lose_what_theory_says(coding: Coding) -> None:
    matrix = normal(4, 20000)
    lost = float((decode(encode(matrix, coding)) - matrix).square().mean())
    expected = {"l2": [0.3634, 0.1175, 0.03455, 0.009501], "k-median": [0.3786, 0.1338, 0.0412, 0.0120]}[coding.codebook]
    assert lost == pytest.approx(expected[coding.bits - 1], rel=0.05) if coding.bits < 8 else lost < 1e-4


def test_one_bit_codes_of_what_is_expanded_are_the_same() -> None:
    for codebook in get_args(Codebook):
        coding = Coding(1, codebook, "component")
        coded = encode(normal(3, 100), coding)
        assert torch.equal(encode(decode(coded), coding).codes, coded.codes)


def test_two_roundings_of_float32_and_no_more() -> None:
    coded = encode(normal(2, 40).float(), Coding(3, "k-median", "component"))
    level = torch.tensor(levels("k-median", 3)).float()[coded.codes.long()]
    assert torch.equal(decode(coded), level * coded.stats[:, 1:] + coded.stats[:, :1])


@pytest.mark.parametrize("coding", EVERY, ids=str)
def test_training_sees_what_is_stored(coding: Coding) -> None:
    matrix = normal(3, 200)
    assert torch.allclose(straight_through(matrix, coding), decode(encode(matrix, coding)).double(), atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_is_the_formula(bits: int) -> None:
    coding, matrix, towards = Coding(bits, "k-median", "tensor"), normal(5, 30).requires_grad_(), normal(5, 30, seed=1)
    (straight_through(matrix, coding) * towards).sum().backward()
    with torch.no_grad():
        n = (matrix - matrix.mean()) / matrix.std()
        q = torch.tensor(levels("k-median", bits), dtype=torch.float64)[nearest(n, coding).long()]
        q = q.float().double()  # as they are stored
        formula = towards - towards.mean() + towards.mean() + (towards * (q - n)).sum() / (matrix.numel() - 1) * n
    assert torch.allclose(matrix.grad, formula, atol=1e-12)


def test_a_zero_matrix_has_a_gradient() -> None:
    matrix = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    for codebook in get_args(Codebook):
        straight_through(matrix, Coding(1, codebook, "component")).sum().backward()
        assert matrix.grad is not None
        assert torch.isfinite(matrix.grad).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "bits=5: an adapter's codes have 1, 2, 3, 4 or 8 bits"),
        ((1, "l1"), "codebook='l1': one of l2, k-median"),
        ((1, "l2", "row"), "scale='row': one of tensor, component, group"),
    ],
)
def test_impossible_codings_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Coding(*arguments)  # type: ignore[arg-type]


def test_codes_are_a_byte_each_in_memory() -> None:
    coded = encode(normal(2, 9), Coding(8))
    assert isinstance(coded, Coded)
    assert coded.codes.dtype == torch.uint8
