"""The CUDA kernels without a GPU: their sources, compiled for this processor, give exactly the product of the stored integers, whatever the order of threads.

emulation.h says what else is checked while they run: bounds, alignment, unwritten shared memory, copies that land late, banks.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from ctypes import CDLL, byref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import COUNTERS, SOURCES, WIDTHS, Emulated, built
from torch import Tensor

from quant.formats.bits import pack
from quant.kernels import cuda, reference
from quant.kernels.library import OK, UNSUPPORTED, Rows, Weight

ORDERS = [(0, False), (1, True), (7, True), (8, False)]  # of threads, and whether copies land late


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def library(folder: Path) -> CDLL:
    return built(folder)


@pytest.fixture(autouse=True)
def own_workspaces() -> Iterator[None]:
    cuda.WORKSPACES.clear()
    yield
    cuda.WORKSPACES.clear()


def stored(rows: int, width: int, bits: int, group: int, asymmetric: bool, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes and zero points; scales are powers of two, so that products of small integers have no rounding before the last."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-width // group) if group else 1
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, width), generator=generator, dtype=torch.int8)
    zeros = torch.randint(low, high, (groups, rows), generator=generator, dtype=torch.int8)
    scale = (2.0 ** torch.randint(-2, 2, (rows, groups), generator=generator)).to(dtype)
    return pack(codes, bits), scale, pack(zeros, bits).T.contiguous() if asymmetric else None


def integers(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, (tokens, width), generator=torch.Generator().manual_seed(tokens)).to(dtype)


def exact(x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bits: int, group: int) -> Tensor:
    """The product in float64, before any rounding."""
    return x.double() @ reference.dequantized(*weight, bits, group, x.shape[1], torch.float64).T


def from_codes(emulated: Emulated, x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bits: int, group: int) -> Tensor:
    """The product by the kernel that multiplies codes, and no other."""
    before = emulated.launches
    assert int(emulated.mkp_cuda_workspace(byref(Weight.of(*weight, bits, group, x.shape[1])), len(x))) >= 0
    found = cuda.multiplied(emulated, 0, x, *weight, bits, group)  # type: ignore[arg-type]
    assert found is not None
    assert emulated.launches == before + 1
    return found


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_product_is_that_of_the_integers(library: CDLL, bits: int, dtype: torch.dtype, asymmetric: bool) -> None:
    """Every group size; rows of codes that can be copied by 16 bytes (384 inputs) and that cannot (200, 136); every number of token tiles; ragged ends."""
    shapes = [(1, 130, 384, 128), (9, 33, 384, 32), (17, 16, 384, 64), (40, 65, 384, 0), (8, 7, 200, 8), (33, 20, 136, 128), (3, 40, 200, 24), (2, 1, 8, 0)]
    for number, (tokens, rows, width, group) in enumerate(shapes):
        order, late = ORDERS[number % len(ORDERS)]
        emulated = Emulated(library, order, late, multiprocessors=1 + 3 * (number % 2))
        weight, x = stored(rows, width, bits, group, asymmetric, dtype, seed=number), integers(tokens, width, dtype)
        found = from_codes(emulated, x, weight, bits, group)
        assert torch.equal(found, exact(x, weight, bits, group).to(dtype)), (tokens, rows, width, group)
        assert emulated.banks == 1, "lanes of a load from shared memory waited for each other"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_and_every_zero_point_becomes_its_difference(library: CDLL, bits: int, dtype: torch.dtype) -> None:
    """A row for each zero point, an input for each code, and a token that looks at one input: y = code - zero point, bit for bit."""
    count = 1 << bits
    width = max(count, 8)
    codes = torch.arange(width).remainder(count).sub(count // 2).to(torch.int8)
    zeros = torch.arange(-count // 2, count // 2)
    weight = pack(codes.repeat(count, 1), bits), torch.ones((count, 1), dtype=dtype), pack(zeros[None].to(torch.int8), bits).T.contiguous()
    for first in range(0, width, 64):
        x = torch.eye(width, dtype=dtype)[first : first + 64]
        found = from_codes(Emulated(library), x, weight, bits, 0)
        assert torch.equal(found, (codes[first : first + 64, None] - zeros.float()).to(dtype))


@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64])
def test_every_number_of_tokens_up_to_64(library: CDLL, tokens: int) -> None:
    weight, x = stored(20, 128, 4, 64, True, torch.bfloat16), integers(tokens, 128, torch.bfloat16)
    assert torch.equal(from_codes(Emulated(library), x, weight, 4, 64), exact(x, weight, 4, 64).bfloat16())


@pytest.mark.parametrize(
    ("tokens", "width", "group", "scale"),
    [(2, 1280, 128, torch.float32), (20, 1280, 32, torch.float16), (33, 2304, 0, torch.bfloat16), (5, 640, 40, torch.float32)],
)
def test_slices_are_added_in_one_order_whoever_comes_last(library: CDLL, tokens: int, width: int, group: int, scale: torch.dtype) -> None:
    """Real numbers: the same bits for every order of threads and blocks; as near to float64 as sums in float32 are; the workspace as it was."""
    generator = torch.Generator().manual_seed(tokens)
    packed, _, zeros = stored(70, width, 4, group, True, torch.float32)
    weight = packed, torch.rand((70, width // group if group else 1), generator=generator).to(scale), zeros
    x = torch.randn((tokens, width), generator=generator).half()
    found = []
    for order, late in ORDERS:
        emulated = Emulated(library, order, late, multiprocessors=16)
        size = emulated.mkp_cuda_workspace(byref(Weight.of(*weight, 4, group, width)), tokens)
        assert size > COUNTERS, "one slice: nothing is tested"
        found.append(from_codes(emulated, x, weight, 4, group))
        assert not cuda.WORKSPACES[None, 0][1][:COUNTERS].any()
    assert all(torch.equal(found[0], other) for other in found[1:])
    dense = reference.dequantized(*weight, 4, group, width, torch.float64)
    bound = x.double().abs() @ dense.abs().T
    error = (found[0].double() - x.double() @ dense.T).abs()
    assert (error <= 2**-11 * (x.double() @ dense.T).abs() + 2**-22 * bound).all()


def test_one_stream_has_one_workspace_which_any_call_may_use_next(library: CDLL) -> None:
    emulated = Emulated(library, multiprocessors=8)
    for rows, width, tokens in [(70, 1024, 3), (200, 512, 1), (16, 2048, 8), (70, 1024, 3)]:
        weight, x = stored(rows, width, 4, 128, False, torch.float16), integers(tokens, width, torch.float16)
        assert torch.equal(from_codes(emulated, x, weight, 4, 128), exact(x, weight, 4, 128).half())
    assert len(cuda.WORKSPACES) == 1


def test_the_slices_of_real_layers_fill_the_device_and_cost_little(library: CDLL) -> None:
    """For 132 multiprocessors: two blocks for each at one token, and no more traffic for partial sums than half of the weight's."""
    emulated = Emulated(library, multiprocessors=132)
    for (rows, width), tokens in product([(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 8192), (57344, 8192)], [1, 8, 16, 32, 64]):
        size = emulated.mkp_cuda_workspace(byref(Weight(n=rows, k=width, group_size=128, packed_stride=width // 8, scale_stride=width // 128, bits=4)), tokens)
        splits = (size - COUNTERS) // (4 * tokens * rows) if size else 1
        blocks = splits * -(-rows // (64 if tokens > 32 else 128))
        assert tokens > 1 or blocks >= 0.75 * 264 or splits == width // 256
        assert splits == 1 or 8 * splits * tokens * rows <= rows * width * 4 / 8 / 2


def test_tensors_that_are_parts_of_others_are_read_where_they_lie(library: CDLL) -> None:
    """Codes whose rows begin at any word, scales with gaps, inputs that are every second token, begin at an odd place, or are one token many times."""
    emulated = Emulated(library)
    packed, scale, zeros = stored(40, 256, 4, 64, True, torch.float16)
    wide = torch.full((40, 40), -1, dtype=torch.int32)
    wide[:, 3:35] = packed
    weight = wide[:, 3:35], torch.stack([scale, scale * 0], 2).view(40, 8)[:, :4].copy_(scale), zeros
    whole = integers(256, 257, torch.float16)
    for x in (whole[:10:2, :256], whole[:5, 1:], whole[:, :5].T, whole[:1, :256].expand(5, -1)):
        assert torch.equal(from_codes(emulated, x, weight, 4, 64), exact(x, weight, 4, 64).half())


def test_inputs_that_are_no_numbers_spoil_their_own_token_only(library: CDLL) -> None:
    weight = stored(20, 136, 4, 32, True, torch.bfloat16)
    x = integers(3, 136, torch.bfloat16)
    expected = exact(x, weight, 4, 32).bfloat16()
    x[1, 135] = torch.nan
    found = from_codes(Emulated(library), x, weight, 4, 32)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("tokens", "bits", "group", "dtype"), [(65, 4, 128, torch.float16), (3, 5, 32, torch.bfloat16), (3, 4, 12, torch.float16), (3, 4, 64, torch.float32)]
)
def test_what_the_tensor_cores_do_not_take_is_unpacked(library: CDLL, tokens: int, bits: int, group: int, dtype: torch.dtype) -> None:
    """More tokens, other widths, groups that cut an octet, float32."""
    weight, x = stored(24, 192, bits, group, True, dtype), integers(tokens, 192, dtype)
    found = cuda.multiplied(Emulated(library), 0, x, *weight, bits, group)  # type: ignore[arg-type]
    assert found is not None
    assert torch.equal(found, exact(x, weight, bits, group).to(dtype))


def test_no_tokens_no_rows_and_what_no_kernel_takes(library: CDLL) -> None:
    emulated: Any = Emulated(library)
    weight = stored(24, 64, 4, 32, False, torch.float16)
    empty = cuda.multiplied(emulated, 0, torch.empty((2, 0, 64), dtype=torch.float16), *weight, 4, 32)
    assert empty is not None
    assert empty.shape == (2, 0, 24)
    assert cuda.multiplied(emulated, 0, torch.empty((2, 64), dtype=torch.float64), *weight, 4, 32) is None
    x, y = torch.zeros((2, 64), dtype=torch.float16), torch.full((2, 24), torch.nan, dtype=torch.float16)
    stored_weight, misaligned = Weight.of(*weight, 4, 32, 64), Rows(x.data_ptr() + 2, 1, 64, 1)
    assert emulated.mkp_cuda_linear(byref(stored_weight), byref(misaligned), byref(Rows.of(y[:1])), None, 0, 0) == UNSUPPORTED
    assert y.isnan().all()
    assert emulated.mkp_cuda_linear(byref(stored_weight), byref(Rows.of(x)), byref(Rows.of(y)), None, 0, 0) == OK
    assert not y.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_an_unpacked_weight_is_the_reference_bit_for_bit(library: CDLL, bits: int, dtype: torch.dtype) -> None:
    """Any group, one that cuts octets too; rows that end in the middle of a word; a group of all."""
    for width, group, asymmetric in [(64, 32, False), (77, 5, True), (40, 0, True), (2056, 128, False)]:
        weight = stored(9, width, bits, group, asymmetric, dtype) if bits > 1 else _one_bit(9, width, group, asymmetric, dtype)
        out = torch.full((9, width), torch.nan, dtype=dtype)
        assert Emulated(library, order=3).mkp_cuda_dequantize(byref(Weight.of(*weight, bits, group, width)), byref(Rows.of(out)), 0) == OK
        assert torch.equal(out, reference.dequantized(*weight, bits, group, width, dtype))


def _one_bit(rows: int, width: int, group: int, asymmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(width)
    groups = -(-width // group) if group else 1
    words = torch.randint(-(1 << 31), 1 << 31, (rows, -(-width // 32)), generator=generator).int()
    zeros = torch.randint(-(1 << 31), 1 << 31, (-(-rows // 32), groups), generator=generator).int()
    return words, torch.rand((rows, groups), generator=generator).to(dtype), zeros if asymmetric else None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_signs_of_one_adapter_and_of_many(library: CDLL, dtype: torch.dtype, transposed: bool) -> None:
    emulated: Any = Emulated(library, order=5)
    for rows, width in [(1, 1), (8, 640), (13, 2077)]:
        signs = torch.randint(0, 256, (3, rows, -(-width // 8)), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)
        x = integers(5, rows if transposed else width, dtype)
        found = cuda.signed(emulated, 0, x, signs[1], None, width, transposed)
        assert found is not None
        assert torch.equal(found, reference.signs_linear(x, signs[1], width, transposed))
        owner = torch.tensor([2, -1, 0, 2, 1])
        batched = cuda.signed(emulated, 0, x, signs, owner, width, transposed)
        assert batched is not None
        assert torch.equal(batched, reference.signs_linear_batched(x, signs, owner, width, transposed))
        assert not batched[1].any()


@pytest.mark.parametrize(
    ("mistake", "instead"),
    [
        (r"^    __syncthreads\(\);  .*everyone's is", "    // everyone's is"),
        (r"copies_wait<depth - 2>", "copies_wait<depth - 1>"),
        (r"first_row \+ row >= call.weight.rows \|\| ", ""),
        (r"__syncthreads\(\);  // of all threads", "// of all threads"),
    ],
    ids=["no barrier before a stage is used", "a wait for one copy too few", "rows beyond the last are read", "a slice is said to be there before it is"],
)
def test_the_emulator_notices(library: CDLL, folder: Path, tmp_path: Path, mistake: str, instead: str) -> None:
    """What would be a race or a wild read on a GPU."""
    shutil.copytree(SOURCES.parent, tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "small_m.cu"
    changed, count = re.subn(mistake, instead, source.read_text(), flags=re.MULTILINE)
    assert count == 1
    source.write_text(changed)
    wrong = built(tmp_path, source.parent, widths=(4,), rest=folder)
    weight, x = stored(127, 1280, 4, 128, False, torch.float16), integers(3, 1280, torch.float16)
    expected = exact(x, weight, 4, 128).half()

    def right(order: int) -> bool:
        try:
            return torch.equal(from_codes(Emulated(wrong, order, late=True, multiprocessors=16), x, weight, 4, 128), expected)
        except AssertionError:
            return False

    assert not all(map(right, range(8)))
