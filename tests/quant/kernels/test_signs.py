"""Products with signs: by hand, and every instruction set against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import SETS, inputs

from mergekit_plus.errors import OptionError
from quant.kernels import cpu, ops, reference, signs_linear, signs_linear_batched


def test_three_signs_by_hand() -> None:
    signs = torch.tensor([[0b101], [0b010]], dtype=torch.uint8)  # + - + and - + -
    assert signs_linear(torch.tensor([1.0, 2.0, 4.0]), signs, 3).tolist() == [3.0, -3.0]
    assert signs_linear(torch.tensor([10.0, 1.0]), signs, 3, transposed=True).tolist() == [9.0, -9.0, 9.0]


@given(
    st.integers(1, 40), st.integers(1, 700), st.integers(1, 9), st.booleans(), st.integers(0, len(SETS) - 1),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_any_shape_is_the_exact_product_but_for_float32_sums(rows: int, width: int, tokens: int, transposed: bool, isa: int, dtype: torch.dtype) -> None:
    signs = torch.randint(0, 256, (rows, -(-width // 8)), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))  # the bits after a row's end too
    x = inputs(tokens, rows if transposed else width, dtype=dtype)
    exact = reference.signs_of(signs, width).double()
    y = cpu.signs_linear(x, signs, width, transposed, isa=isa)
    assert y.dtype == torch.float32
    assert ((y - x.double() @ (exact if transposed else exact.T)).abs() <= 1e-6 * x.double().abs().sum(1, keepdim=True)).all()


def test_signs_may_begin_at_any_byte_and_lie_apart() -> None:
    blob = torch.randint(0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    signs, x = blob[3:603].view(20, 30)[:, 1:26], inputs(2, 3, 200)  # [20, 25], 30 apart
    torch.testing.assert_close(signs_linear(x, signs, 200), reference.signs_linear(x, signs, 200, False))
    assert signs_linear(x[:, :0], signs, 200).shape == (2, 0, 20)


def test_shapes_that_do_not_fit_are_refused() -> None:
    signs = torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(OptionError, match=r"signs \[4, 2\] of width 20 do not fit inputs \[1, 20\]: ceil\(width/8\) bytes a row"):
        signs_linear(inputs(1, 20), signs, 20)
    with pytest.raises(OptionError, match="4 numbers an input"):
        signs_linear(inputs(1, 16), signs, 16, transposed=True)


def test_a_derivative_by_x_exists() -> None:
    signs = torch.tensor([[0b01], [0b11]], dtype=torch.uint8)
    x = torch.tensor([[3.0, 5.0]], requires_grad=True)
    signs_linear(x, signs, 2).sum().backward()  # both rows: (+1 -1) + (+1 +1)
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("transposed", [False, True])
def test_each_row_of_a_batch_has_the_signs_of_its_owner_or_none(transposed: bool) -> None:
    signs = torch.randint(0, 256, (3, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, owner = inputs(2, 3, 5 if transposed else 20), torch.tensor([[2, -1, 0], [2, 1, 3]])
    y = signs_linear_batched(x, signs, owner, 20, transposed)
    for row, number in enumerate(owner.flatten().tolist()):
        expected = reference.signs_linear(x.flatten(0, 1)[row], signs[number % 3], 20, transposed) * (0 <= number < 3)
        torch.testing.assert_close(y.flatten(0, 1)[row], expected)
    torch.library.opcheck(ops.signs_linear_batched, (x, signs, owner, 20, transposed))
    x.requires_grad_()
    signs_linear_batched(x, signs, owner, 20, transposed).sum().backward()
    assert x.grad is not None
    assert not x.grad[0, 1].any()
    assert x.grad[0, 0].any()
    with pytest.raises(OptionError, match=r"owners \[2\] do not fit inputs \[2, 3, \d+\]: an owner for each input"):
        signs_linear_batched(x, signs, owner[:, 0], 20, transposed)
