"""What a scheme may say, and what a quantised weight stands for."""

from __future__ import annotations

import pytest
import torch

from mergekit_plus.errors import OptionError
from quant import QUANTIZERS, Quantized, Scheme, dequantize, quantizer


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4"])
def test_a_weight_has_two_to_eight_bits(bits: object) -> None:
    with pytest.raises(OptionError, match="a weight has 2 to 8 bits"):
        Scheme(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [-1, 2.5, None])
def test_a_group_size_is_a_number_of_inputs(size: object) -> None:
    with pytest.raises(OptionError, match="0 for one scale a row"):
        Scheme(4, size)  # type: ignore[arg-type]


def test_a_scheme_fits_a_matrix_of_whole_groups() -> None:
    assert Scheme(4, 32).fits((3, 64)) is None
    assert Scheme(4, 0).fits((3, 77)) is None
    assert "groups of 32 do not divide" in str(Scheme(4, 32).fits((3, 48)))
    assert "3 dimensions" in str(Scheme(4, 32).fits((2, 3, 64)))
    assert "empty" in str(Scheme(4, 32).fits((0, 64)))


def test_a_scheme_says_what_it_is() -> None:
    assert str(Scheme()) == "4 bits, groups of 128, symmetric"
    assert str(Scheme(3, 0, False)) == "3 bits, one scale a row, asymmetric"
    assert (Scheme(3).low, Scheme(3).high) == (-4, 3)


def test_a_value_is_its_code_less_the_zero_point_times_the_scale_of_its_group() -> None:
    codes = torch.tensor([[-2, -1, 0, 1], [1, 1, -2, -2]], dtype=torch.int8)
    scale = torch.tensor([[0.5, -2.0], [1.0, 3.0]])
    zero = torch.tensor([[-2, 1], [0, -1]], dtype=torch.int8)
    assert dequantize(Quantized(codes, scale, None, 2)).tolist() == [[-1.0, -0.5, -0.0, -2.0], [1.0, 1.0, -6.0, -6.0]]
    assert dequantize(Quantized(codes, scale, zero, 2)).tolist() == [[0.0, 0.5, 2.0, -0.0], [1.0, 1.0, -3.0, -3.0]]


def test_the_widest_difference_of_codes_does_not_overflow() -> None:
    codes = torch.tensor([[127, -128]], dtype=torch.int8)
    zero = torch.tensor([[-128, 127]], dtype=torch.int8)
    scale = torch.ones(1, 2, dtype=torch.bfloat16)
    assert dequantize(Quantized(codes, scale, zero, 8)).tolist() == [[255.0, -255.0]]


def test_a_quantiser_is_found_by_name_with_its_options_and_a_wrong_name_is_answered() -> None:
    rtn = QUANTIZERS["rtn"]
    assert rtn.summary.startswith("Round each weight to the nearest code")
    assert list(rtn.options.table) == ["clip"]
    with pytest.raises(OptionError, match=r"unknown quantizer 'rnt'\. Did you mean 'rtn'\?"):
        QUANTIZERS["rnt"]
    with pytest.raises(ValueError, match="registered twice"):
        quantizer("rtn")(rtn.function)
