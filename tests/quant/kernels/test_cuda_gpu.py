"""The CUDA kernels on a GPU. None was at hand when they were written; test_cuda_layout.py runs the same sources on a processor.

Where there is one, run this file once under compute-sanitizer as well, with memcheck and with racecheck:

    compute-sanitizer --tool memcheck python -m pytest -q tests/quant/kernels/test_cuda_gpu.py
"""

from __future__ import annotations

from threading import Thread

import kernel_toys
import pytest
import torch
from kernel_toys import Toy, a_toy
from torch import Tensor
from torch.nn import functional

from quant.kernels import ops, packed_linear, reference, signs_linear, signs_linear_batched
from quant.kernels.library import library

WHY = "no GPU of sm_80 or newer here" if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0) else ""
WHY = WHY or ("libmergekit_plus_cuda.so was not built" if library("cuda") is None else "")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}  # of the norm; the rounding of the result alone is 1.7e-3 in bfloat16
Stored = tuple[Tensor, Tensor, Tensor | None, int, int]


def on_gpu(toy: Toy) -> Stored:
    """What packed_linear takes after x."""
    return toy.packed.cuda(), toy.scale.cuda(), None if toy.zero_point is None else toy.zero_point.cuda(), toy.bits, toy.group_size


def inputs(*shape: int, dtype: torch.dtype) -> Tensor:
    return kernel_toys.inputs(*shape, dtype=dtype).cuda()


def near(found: Tensor, x: Tensor, toy: Toy) -> bool:
    """Whether a product is that of the integers in float64, but for its rounding."""
    exact = x.cpu().double() @ toy.exact.T
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    return bool((found.cpu().double() - exact).norm() <= TOLERANCE[x.dtype] * exact.norm())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_products_are_near_float64(bits: int, dtype: torch.dtype, symmetric: bool) -> None:
    for rows, width, group in [(1, 8, 0), (7, 32, 32), (17, 136, 128), (100, 96, 24), (64, 4096, 32), (4104, 4096, 64), (256, 11008, 128), (136, 14336, 0)]:
        toy = a_toy(rows, width, bits, group, symmetric, dtype)
        weight = on_gpu(toy)
        for tokens in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 200):
            x = inputs(tokens, width, dtype=dtype)
            assert near(packed_linear(x, *weight), x, toy), (rows, width, group, tokens)


def test_no_tokens_and_one_token_without_a_dimension() -> None:
    toy = a_toy(64, 256, symmetric=False, dtype=torch.float16)
    assert packed_linear(inputs(0, 256, dtype=torch.float16), *on_gpu(toy)).shape == (0, 64)
    x = inputs(256, dtype=torch.float16)
    assert near(packed_linear(x, *on_gpu(toy)), x, toy)


def test_inputs_and_weights_that_are_parts_of_others() -> None:
    toy = a_toy(64, 1024, dtype=torch.bfloat16)
    packed, scale, *rest = on_gpu(toy)
    fused, crooked = torch.full((192, 128), -1, dtype=torch.int32, device="cuda"), torch.full((64, 131), -1, dtype=torch.int32, device="cuda")
    fused[64:128], crooked[:, 3:] = packed, packed
    large = inputs(1024, 1026, dtype=torch.bfloat16)
    for x in (large[:16:2, :1024], large[:5, 1:1025], large[:, :5].T, large[:1, :1024].expand(5, -1), large[:12, :1024].view(3, 4, 1024)):
        for part in (fused[64:128], crooked[:, 3:]):
            assert near(packed_linear(x, part, scale, *rest), x, toy)  # type: ignore[arg-type]


def test_what_is_no_number_spoils_its_own_token_only_and_float16_overflows_as_it_must() -> None:
    toy = a_toy(64, 256, group_size=64, dtype=torch.float16)
    packed, scale, *rest = on_gpu(toy)
    x = inputs(3, 256, dtype=torch.float16)
    expected = packed_linear(x, packed, scale, *rest)  # type: ignore[arg-type]
    x[1, 7] = torch.nan
    found = packed_linear(x, packed, scale, *rest)  # type: ignore[arg-type]
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    least = torch.zeros_like(packed)  # every code -8
    assert (packed_linear(torch.full_like(x, 60000), least, torch.ones_like(scale), None, 4, 64) == -torch.inf).all()


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_ten_runs_give_the_same_bits_on_every_stream(tokens: int) -> None:
    weight, x = on_gpu(a_toy(1024, 8192, symmetric=False, dtype=torch.bfloat16)), inputs(tokens, 8192, dtype=torch.bfloat16)
    first = packed_linear(x, *weight)
    for _ in range(10):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = packed_linear(x, *weight)
        stream.synchronize()
        assert torch.equal(again, first)


def test_two_threads_on_two_streams_do_not_meet() -> None:
    cases = [(on_gpu(a_toy(1024, 8192, symmetric=False, dtype=torch.float16)), inputs(tokens, 8192, dtype=torch.float16)) for tokens in (1, 16)]
    expected = [packed_linear(x, *weight) for weight, x in cases]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(number: int) -> None:
        weight, x = cases[number]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(packed_linear(x, *weight), expected[number]):
                    wrong.append(number)

    threads = [Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_graph_is_captured_replayed_and_leaves_the_stream_usable() -> None:
    weight, x = on_gpu(a_toy(1024, 8192, symmetric=False, dtype=torch.float16)), inputs(8, 8192, dtype=torch.float16)
    expected = packed_linear(x, *weight)
    graph, fixed = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        first = packed_linear(fixed, *weight)
        second = packed_linear(fixed, *weight)
    for _ in range(3):
        first.fill_(torch.nan)
        fixed.copy_(x)
        graph.replay()
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        assert torch.equal(packed_linear(x, *weight), expected)


@pytest.mark.skipif(not WHY and torch.cuda.device_count() < 2, reason="one GPU only")
def test_a_second_gpu() -> None:
    weight, x = on_gpu(a_toy(64, 256, symmetric=False, dtype=torch.float16)), inputs(5, 256, dtype=torch.float16)
    there = [part.to("cuda:1") if isinstance(part, Tensor) else part for part in weight]
    assert torch.equal(packed_linear(x.to("cuda:1"), *there).cpu(), packed_linear(x, *weight).cpu())  # type: ignore[arg-type]


def test_the_operator_is_one_that_torch_can_compile() -> None:
    weight, x = on_gpu(a_toy(64, 256, symmetric=False, dtype=torch.float16)), inputs(5, 256, dtype=torch.float16)
    torch.library.opcheck(ops.packed_linear, (x, *weight))
    compiled = torch.compile(lambda x: packed_linear(x, *weight), fullgraph=True, dynamic=True)
    for tokens in (5, 70):
        x = inputs(tokens, 256, dtype=torch.float16)
        assert torch.equal(compiled(x), packed_linear(x, *weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_signs_of_one_adapter_and_of_many(dtype: torch.dtype) -> None:
    signs = torch.randint(0, 256, (3, 16, 512), generator=torch.Generator().manual_seed(0)).to(torch.uint8).cuda()
    owner = torch.tensor([2, -1, 0, 2, 1], device="cuda")
    for transposed, x in ((False, inputs(5, 4090, dtype=dtype)), (True, inputs(5, 16, dtype=dtype))):
        one, many = signs_linear(x, signs[1], 4090, transposed), signs_linear_batched(x, signs, owner, 4090, transposed)
        values = [reference.signs_of(own, 4090).double() for own in signs]
        for number, row in enumerate(owner.tolist()):
            expected = functional.linear(x[number].double(), values[row].T if transposed else values[row]) * (row >= 0)
            torch.testing.assert_close(many[number].double(), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(one.double(), functional.linear(x.double(), values[1].T if transposed else values[1]), rtol=1e-5, atol=1e-3)
