"""The operators in torch, and the libraries behind them: compiled graphs, threads, derivatives, memory beyond the output, and a library that is not there."""

from __future__ import annotations

import ctypes
import logging
import math
import threading
from pathlib import Path

import pytest
import torch
from kernel_toys import SETS, a_toy, agrees, inputs

from quant.kernels import cpu, ops, packed_linear, reference, signs_linear
from quant.kernels import library as libraries
from quant.kernels.library import Rows, Weight, library


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_operators_are_what_torch_asks_of_operators(symmetric: bool) -> None:
    toy = a_toy(12, 96, group_size=32, symmetric=symmetric)
    for x in (inputs(3, 96), inputs(2, 2, 96, dtype=torch.bfloat16), inputs(96)):
        torch.library.opcheck(ops.packed_linear, (x, *toy.stored))
    signs = torch.randint(0, 256, (5, 12), dtype=torch.uint8)
    torch.library.opcheck(ops.signs_linear, (inputs(2, 96), signs, 96, False))
    torch.library.opcheck(ops.signs_linear, (inputs(2, 5), signs, 96, True))


def test_a_compiled_graph_holds_them_whole_for_any_number_of_tokens() -> None:
    toy = a_toy(16, 64, group_size=32)
    signs = torch.randint(0, 256, (16, 2), dtype=torch.uint8)
    eager = lambda x: signs_linear(packed_linear(x, *toy.stored), signs, 16) * 2  # noqa: E731
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (1, 2, 7, 40):
            x = inputs(tokens, 64)
            assert torch.equal(compiled(x), eager(x))


def test_derivatives_by_inputs_and_scales_are_right() -> None:
    toy = a_toy(4, 12, group_size=4, symmetric=False)
    x, scale = inputs(2, 12).double().requires_grad_(), toy.scale.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, scale: packed_linear(x, toy.packed, scale, toy.zero_point, 4, 4), (x, scale), eps=1e-3, atol=1e-3)
    x = inputs(2, 12).requires_grad_()
    packed_linear(x, *toy.stored).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, toy.exact.sum(0).float().expand(2, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", range(len(SETS)), ids=SETS)
def test_no_bit_depends_on_the_run_the_threads_or_the_other_tokens(isa: int, dtype: torch.dtype) -> None:
    toy, x = a_toy(603, 512, group_size=64, symmetric=False), inputs(13, 512, dtype=dtype)  # enough weights for threads
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = cpu.packed_linear(x, *toy.stored, isa=isa, direct=16)
        for count in (2, 3, 1) * 3:
            torch.set_num_threads(count)
            assert torch.equal(cpu.packed_linear(x, *toy.stored, isa=isa, direct=16), first)
        alone = torch.cat([cpu.packed_linear(x[i : i + 1], *toy.stored, isa=isa) for i in range(13)])
        assert torch.equal(alone, first)
    finally:
        torch.set_num_threads(threads)


def test_two_python_threads_do_not_disturb_each_other() -> None:
    toys = [a_toy(300, 1024, seed=seed) for seed in (1, 2)]
    x = inputs(3, 1024)
    wrong: list[int] = []

    def work(number: int) -> None:
        wrong.extend(number for _ in range(20) if not agrees(packed_linear(x, *toys[number].stored), x, toys[number]))

    both = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("isa", range(len(SETS)), ids=SETS)
def test_all_of_the_output_is_written_and_nothing_beside_it(isa: int) -> None:
    opened = library("cpu")
    assert opened is not None
    for rows, tokens in ((1, 1), (7, 3), (18, 9), (33, 2)):
        toy, x = a_toy(rows, 160, group_size=32, symmetric=False), inputs(tokens, 160)
        around = torch.full((tokens + 2, rows + 5), math.nan)
        y = around[1:-1, 2:-3]
        weight = Weight.of(*toy.stored, 160)
        assert opened.mkp_cpu_linear(weight, Rows.of(x), Rows.of(y), 2, isa) == 0
        assert agrees(y, x, toy)
        y.fill_(math.nan)
        assert around.isnan().all()


def test_what_the_library_cannot_do_it_says_and_writes_nothing() -> None:
    opened = library("cpu")
    assert opened is not None
    toy, x, y = a_toy(4, 32), inputs(2, 32), torch.full((2, 4), math.nan)
    for field, value in (("bits", 9), ("bits", 0), ("group_size", 0), ("scale_dtype", 7)):
        weight = Weight.of(*toy.stored, 32)
        setattr(weight, field, value)
        assert opened.mkp_cpu_linear(weight, Rows.of(x), Rows.of(y), 1, 99) == libraries.UNSUPPORTED
    assert y.isnan().all()


def test_the_structs_are_as_long_as_the_header_says() -> None:
    assert [ctypes.sizeof(struct) for struct in (Weight, Rows, libraries.Signs)] == [72, 32, 32]


@pytest.mark.parametrize("broken", ["missing", "not a library"])
def test_a_library_that_is_not_there_is_named_once_and_done_without(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken != "missing":
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libmergekit_plus_cpu.so").write_text("text")
    toy, x = a_toy(4, 64), inputs(2, 64)
    monkeypatch.setattr(libraries, "_roots", lambda: [str(tmp_path)])
    library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert torch.equal(packed_linear(x, *toy.stored), reference.packed_linear(x, *toy.stored))
        assert len(caplog.messages) == 1
        assert "no CPU kernels: " in caplog.messages[0]
        assert ("it needs a C++ compiler" if broken == "missing" else "cannot be loaded") in caplog.messages[0]
    finally:
        library.cache_clear()
