"""Products with packed weights: every width, group, type and instruction set against float64 products of the integers themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_toys import SETS, Toy, a_toy, agrees, inputs

from mergekit_plus.errors import OptionError
from quant import Scheme, rtn
from quant.formats.bits import unpack
from quant.formats.pack_quantized import encode
from quant.kernels import available, cpu, grouped, packed_linear, reference
from quant.kernels.library import library

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # rows, width, group size: groups that divide a vector, fill it, span several, are odd; ends of all lengths
    (1, 8, 8), (7, 32, 32), (17, 96, 32), (16, 136, 128), (33, 256, 64), (5, 300, 100), (19, 1024, 0), (6, 1100, 16), (8, 2304, 1152), (3, 33, 7), (2, 1, 1),
    (32, 200, 0), (37, 520, 128), (75, 320, 64), (64, 264, 32),
]  # fmt: skip


def test_the_library_was_built_where_these_tests_run() -> None:
    assert available()["cpu"]


def test_two_rows_of_four_bits_by_hand() -> None:
    # codes -8 -7 .. -1 and 0 1 .. 7 (stored 0 .. 15), scales 1 and 0.5, x = 1 2 .. 8
    packed = torch.tensor([[0x76543210], [0xFEDCBA98 - (1 << 32)]], dtype=torch.int32)
    x = torch.arange(1.0, 9.0)
    assert packed_linear(x, packed, torch.tensor([[1.0], [0.5]]), None, 4, 8).tolist() == [-120.0, 84.0]
    # with zero point -8 (stored 0), the codes count from 0: 0 1 .. 7 and 8 9 .. 15
    zeros = torch.zeros(1, 1, dtype=torch.int32)
    assert packed_linear(x, packed, torch.tensor([[1.0], [0.5]]), zeros, 4, 8).tolist() == [168.0, 228.0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("isa", range(len(SETS)), ids=SETS)
def test_every_width_and_group_is_the_exact_product_but_for_float32_sums(isa: int, bits: int) -> None:
    for number, (rows, width, group_size) in enumerate(SHAPES):
        for symmetric in (True, False):
            toy = a_toy(rows, width, bits, group_size, symmetric, DTYPES[number % 3], seed=number)
            for tokens in (1, 2, 3, 9, 16):
                for dtype in DTYPES:
                    x = inputs(tokens, width, dtype=dtype)
                    assert agrees(cpu.packed_linear(x, *toy.stored, isa=isa), x, toy), (rows, width, group_size, symmetric, tokens, dtype)


@given(
    st.integers(1, 80), st.integers(1, 700), st.integers(1, 8), st.integers(0, 200), st.booleans(), st.integers(1, 40), st.sampled_from(DTYPES),
    st.integers(0, len(SETS) - 1),
)  # fmt: skip
def test_any_shape(rows: int, width: int, bits: int, group_size: int, symmetric: bool, tokens: int, dtype: torch.dtype, isa: int) -> None:
    toy, x = a_toy(rows, width, bits, group_size, symmetric), inputs(tokens, width, dtype=dtype)
    assert agrees(cpu.packed_linear(x, *toy.stored, isa=isa, direct=64), x, toy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("isa", range(len(SETS)), ids=SETS)
def test_many_tokens_take_panels_of_unpacked_rows(monkeypatch: pytest.MonkeyPatch, isa: int, symmetric: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cpu, "PANEL", 64 * 256)  # several panels, the last one short
    for bits, width, group_size in ((3, 256, 128), (4, 256, 64), (8, 200, 8)):
        toy, x = a_toy(150, width, bits, group_size, symmetric, torch.bfloat16), inputs(65, width, dtype=dtype)
        # bfloat16 weights are rounded once, as those of a dense model are
        assert agrees(cpu.packed_linear(x, *toy.stored, isa=isa), x, toy, more=2.0**-8 if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_a_quantizer_makes_and_a_format_stores_runs(bits: int, symmetric: bool) -> None:
    quantized = rtn(inputs(24, 256).bfloat16(), Scheme(bits, 64, symmetric))
    stored = encode(quantized)
    zeros = torch.zeros(24, 4) if quantized.zero_point is None else quantized.zero_point
    exact = (quantized.codes.double().view(24, 4, 64) - zeros.double().unsqueeze(-1)) * quantized.scale.double().unsqueeze(-1)
    x = inputs(5, 256, seed=2)
    y = packed_linear(x, stored["weight_packed"], stored["weight_scale"], stored.get("weight_zero_point"), bits, 64)
    torch.testing.assert_close(y.double(), x.double() @ exact.view(24, 256).T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", range(len(SETS)), ids=SETS)
def test_unpacked_weights_are_the_exact_ones_rounded_once(isa: int, dtype: torch.dtype) -> None:
    opened = library("cpu")
    assert opened is not None
    from quant.kernels.library import Rows, Weight

    for bits, width, group_size, symmetric in ((4, 256, 128, True), (4, 128, 64, False), (3, 100, 20, False), (8, 320, 64, False), (1, 65, 0, True)):
        toy = a_toy(9, width, bits, group_size, symmetric)
        out = torch.full((9, width), math.nan, dtype=dtype)
        assert opened.mkp_cpu_dequantize(Weight.of(toy.packed, toy.scale, toy.zero_point, bits, group_size, width), Rows.of(out), 1, isa) == 0
        assert torch.equal(out, toy.exact.float().to(dtype))
        assert torch.equal(out, reference.dequantized(*toy.stored, width, dtype))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0, 64), (64,), (1, 64), (2, 3, 64), (1, 1, 1, 64)])
def test_any_number_of_dimensions_and_of_tokens(shape: tuple[int, ...]) -> None:
    toy, x = a_toy(10, 64, group_size=32), inputs(*shape)
    y = packed_linear(x, *toy.stored)
    assert y.shape == (*shape[:-1], 10)
    assert agrees(y.reshape(-1, 10), x.reshape(-1, 64), toy)


def test_no_rows_and_no_inputs() -> None:
    for run in (packed_linear, reference.packed_linear):
        assert run(inputs(3, 64), torch.zeros(0, 8, dtype=torch.int32), torch.ones(0, 1), None, 4, 64).shape == (3, 0)
        assert run(inputs(3, 0), torch.zeros(5, 0, dtype=torch.int32), torch.ones(5, 0), None, 4, 128).tolist() == [[0.0] * 5] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_weights_may_be_views_of_any_kind(dtype: torch.dtype) -> None:
    toy = a_toy(12, 256, group_size=64, symmetric=False)
    wide = inputs(6, 600, dtype=dtype)
    views = [
        inputs(256, 5, dtype=dtype).T,  # columns are neighbours
        wide[:, 1:257],  # not where a vector would begin
        wide[::2, 3:515:2],  # gaps between elements
        inputs(1, 256, dtype=dtype).expand(4, 256),  # one row, four times
    ]
    for x in views:
        before = x.clone()
        assert agrees(cpu.packed_linear(x, *toy.stored), x, toy)
        assert torch.equal(x, before)
    fused = torch.cat([torch.full_like(toy.packed, -1), toy.packed, torch.full_like(toy.packed, -1)])
    scales = torch.cat([torch.full_like(toy.scale, math.nan), toy.scale, torch.full_like(toy.scale, math.nan)], dim=1)
    x = views[0]
    assert agrees(cpu.packed_linear(x, fused[12:24], scales[:, 4:8], toy.zero_point, 4, 64), x, toy)
    beside = torch.cat([torch.full_like(toy.packed, -1), toy.packed], dim=1)
    assert agrees(cpu.packed_linear(x, beside[:, 32:], toy.scale, toy.zero_point, 4, 64), x, toy)


def test_scales_of_zero_give_zero_and_what_is_not_finite_stays_so() -> None:
    toy = a_toy(20, 256, group_size=64)
    for isa in range(len(SETS)):
        assert not cpu.packed_linear(inputs(3, 256), toy.packed, torch.zeros_like(toy.scale), None, 4, 64, isa=isa).any()
        for value in (math.inf, math.nan):
            x = inputs(3, 256)
            x[1, 77] = value
            y = cpu.packed_linear(x, *toy.stored, isa=isa)
            assert not y[1].isfinite().any()
            assert y[[0, 2]].isfinite().all()


def test_the_greatest_codes_and_inputs_that_overflow_float16() -> None:
    for bits in range(1, 9):
        for stored in (0, -1):  # all bits clear, all set
            packed = torch.full((4, 128 * bits // 32), stored, dtype=torch.int32)
            value = float(unpack(packed, bits, 128)[0, 0])
            for isa in range(len(SETS)):
                y = cpu.packed_linear(torch.ones(2, 128), packed, torch.ones(4, 1), None, bits, 128, isa=isa)
                assert y.tolist() == [[128 * value] * 4] * 2
                y = cpu.packed_linear(torch.full((1, 128), 60000.0, dtype=torch.float16), packed, torch.ones(4, 1), None, bits, 128, isa=isa)
                assert y.tolist() == [[math.copysign(math.inf, value) if value else 0.0] * 4]


def test_the_smallest_numbers_are_not_worse_than_flushed() -> None:
    toy = a_toy(8, 128)
    for isa in range(len(SETS)):
        for dtype, tiny in ((torch.float32, 1e-41), (torch.bfloat16, 1e-40), (torch.float16, 6e-8)):
            x = torch.full((2, 128), tiny).to(dtype)
            y = cpu.packed_linear(x, *toy.stored, isa=isa)
            assert (y.double() - x.double() @ toy.exact.T).abs().max() <= (1e-36 if dtype != torch.float16 else 6e-8)


def test_groups_in_the_order_of_activations_are_gathered() -> None:
    toy: Toy = a_toy(6, 256, group_size=64)
    index = torch.randperm(256, generator=torch.Generator().manual_seed(3)) // 64
    # the weight whose input k is of group index[k]: codes as they are, scales by that
    exact = unpack(toy.packed, 4, 256).double() * toy.scale.double()[:, index]
    packed, order = grouped(toy.packed, index, 4, 64)
    assert order is not None
    x = inputs(3, 256)
    torch.testing.assert_close(packed_linear(x[:, order], packed, toy.scale, None, 4, 64).double(), x.double() @ exact.T, atol=1e-4, rtol=1e-5)
    assert grouped(toy.packed, torch.arange(256) // 64, 4, 64) == (toy.packed, None)
    with pytest.raises(OptionError, match="g_idx does not give each group 64 of 256 inputs"):
        grouped(toy.packed, torch.zeros(256, dtype=torch.int32), 4, 64)


def test_what_the_library_does_not_take_the_reference_does() -> None:
    toy = a_toy(5, 64, group_size=32, dtype=torch.float64)
    x = inputs(2, 64).double()
    torch.testing.assert_close(packed_linear(x, *toy.stored), x @ toy.exact.T, atol=1e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    packed, scale, _, bits, group_size = a_toy(8, 256).stored
    with pytest.raises(OptionError, match=r"packed is \[8, 32\], but 4 bits of a weight \[8, 248\] in groups of 128 make it \[8, 31\]"):
        packed_linear(inputs(1, 248), packed, scale, None, bits, group_size)
    with pytest.raises(OptionError, match=r"scale is \[8, 2\], but .* make it \[8, 4\]"):
        packed_linear(inputs(1, 256), packed, scale, None, bits, 64)
    with pytest.raises(OptionError, match=r"zero_point is \[8, 2\], but .* make it \[1, 2\]"):
        packed_linear(inputs(1, 256), packed, scale, torch.zeros(8, 2, dtype=torch.int32), bits, group_size)
    with pytest.raises(OptionError, match="packed codes and zero points are int32 words"):
        packed_linear(inputs(1, 256), packed.long(), scale, None, bits, group_size)
