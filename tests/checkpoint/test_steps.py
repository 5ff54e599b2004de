"""A step computed row by row, piece by piece or behind other steps yields the bits that it yields at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checkpoint_toys import layouts, map_step, mapped, random_tensor, same_bits, spec_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mergekit_plus.checkpoint.plan as plans
from mergekit_plus.checkpoint import Checkpoint, Plan, Scan, Step, TensorSpec, copy_step, renamed
from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES
from mergekit_plus.checkpoint.plan import execute, gather, proportional
from mergekit_plus.errors import CheckpointError


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everything: pieces of 16 elements, slabs of 64."""
    monkeypatch.setattr(plans, "PIECE", 16)
    monkeypatch.setattr(plans, "SLAB", 64)


def by_slabs(step: Step, elements: int) -> list[Tensor]:
    """Execute a step in runs of about so many elements and put its results together again."""
    runs = [execute(step, rows) for rows in step.slabs(elements)]
    return [torch.cat(parts) if spec.shape and spec.rows > 1 else parts[-1] for spec, parts in zip(step.writes, zip(*runs, strict=True), strict=True)]


# ---- the toy packing: 3 bits of each row, 32 bits of 32 rows in 3 words


def packed_rows(rows: int) -> int:
    return -(-rows * 3 // 32)


def pack(values: Tensor) -> Tensor:
    """[rows, cols] of 0..7 -> [ceil(rows * 3 / 32), cols]."""
    rows, cols = values.shape
    bits = (values.long()[:, None, :] >> torch.arange(3)[None, :, None] & 1).reshape(rows * 3, cols)
    bits = torch.cat([bits, bits.new_zeros(packed_rows(rows) * 32 - rows * 3, cols)])
    return (bits.view(packed_rows(rows), 32, cols) << torch.arange(32)[None, :, None]).sum(1)


def unpack(words: Tensor, rows: int) -> Tensor:
    cols = words.shape[1]
    bits = (words[:, None, :] >> torch.arange(32)[None, :, None] & 1).reshape(len(words) * 32, cols)[: rows * 3]
    return (bits.reshape(rows, 3, cols) << torch.arange(3)[None, :, None]).sum(1)


class Packing:
    """w -> w / 8 and the packed w % 8; counts its runs and checks how it is fed."""

    def __init__(self, part: Checkpoint, name: str) -> None:
        spec = part.specs[name]
        self.rows, self.seen = spec.rows, []  # type: ignore[var-annotated]
        writes = (TensorSpec(f"{name}.high", "I64", spec.shape), TensorSpec(f"{name}.low", "I64", (packed_rows(spec.rows), *spec.shape[1:])))
        self.step = Step(((part, name),), writes, self.run, multiple=32)

    def run(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        (w,) = tensors
        assert first_row % 32 == 0
        assert len(w) % 32 == 0 or first_row + len(w) == self.rows
        self.seen.append((first_row, len(w)))
        return w // 8, pack(w % 8)


def unpacking(packed: Checkpoint, name: str) -> Step:
    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        high, low = tensors
        return (high * 8 + unpack(low, len(high)),)

    shape = packed.specs[f"{name}.high"].shape
    return Step(((packed, f"{name}.high"), (packed, f"{name}.low")), (TensorSpec(name, "I64", shape),), run, multiple=32)


@given(st.integers(0, 200), st.integers(0, 3), st.integers(1, 400))
def test_packed_rows_are_cut_in_proportion(rows: int, cols: int, elements: int) -> None:
    w = torch.randint(0, 1000, (rows, cols), generator=torch.Generator().manual_seed(rows))
    packing = Packing(Checkpoint.from_tensors({"w": w}), "w")
    high, low = by_slabs(packing.step, elements)
    assert torch.equal(high, w // 8)
    assert torch.equal(low, pack(w % 8))
    back = unpacking(Checkpoint("packed", Plan([packing.step])), "w")
    assert torch.equal(by_slabs(back, elements)[0], w)


@given(st.integers(0, 200), st.integers(1, 3))
def test_packing_piece_by_piece_equals_packing_at_once(rows: int, cols: int) -> None:
    w = torch.randint(0, 1000, (rows, cols), generator=torch.Generator().manual_seed(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "PIECE", 64)
        packing = Packing(Checkpoint.from_tensors({"w": w}), "w")
        packed = Checkpoint("packed", Plan([packing.step]))
        assert torch.equal(packed.read("w.low"), pack(w % 8))
        assert len(packing.seen) == max(1, -(-rows // max(32, 64 // cols // 32 * 32)))
        assert torch.equal(execute(unpacking(packed, "w"))[0], w)


def test_a_step_of_several_writes_that_another_reads_runs_once(tiny: None) -> None:
    w = torch.arange(400).view(100, 4)
    packing = Packing(Checkpoint.from_tensors({"w": w}), "w")
    back = unpacking(Checkpoint("packed", Plan([packing.step])), "w")
    for rows in back.slabs():
        packing.seen.clear()
        gather(back, rows)
        assert packing.seen == [(rows.start, rows.stop - rows.start)]
    assert [rows.start for rows in back.slabs()] == [0, 32, 64, 96]


def test_rows_of_the_shorter_write_are_read_through_rows_of_the_step(tiny: None) -> None:
    """Copying only the packed tensor still cuts the packing at multiples of 32 (of 3, along the packed rows)."""
    w = torch.arange(320).view(320, 1)
    packing = Packing(Checkpoint.from_tensors({"w": w}), "w")
    copy = copy_step(Checkpoint("packed", Plan([packing.step])), "w.low")
    assert copy.cut == 3
    assert torch.equal(by_slabs(copy, 6)[0], pack(w % 8))
    assert max(count for _, count in packing.seen) <= 64


@pytest.mark.parametrize("tag", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 0), (0, 3), (33,), (7, 3), (2, 3, 5)])
def test_every_dtype_and_shape_passes_through_copies_of_copies(tiny: None, tag: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(tag, shape)
    once = Checkpoint("copy", Plan([copy_step(Checkpoint.from_tensors({"w": tensor}), "w", "v")]))
    twice = copy_step(once, "v")
    assert same_bits(once.read("v"), tensor)
    assert same_bits(execute(twice)[0], tensor)
    assert all(same_bits(whole, tensor.reshape(whole.shape)) for whole in by_slabs(twice, 4))


shapes = st.lists(st.integers(0, 9), min_size=0, max_size=3)


@given(shapes, st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 3, 8]))
def test_elementwise_steps_are_the_same_however_they_are_cut(shape: list[int], piece: int, slab: int, multiple: int) -> None:
    a, b = random_tensor("BF16", shape, 1), random_tensor("F32", shape, 2)
    parts = Checkpoint.from_tensors({"a": a, "b": b})
    inner = Checkpoint("sum", Plan([map_step([(parts, "a"), (parts, "b")], lambda a, b: a.float() * 3 + b, "s", "F16", multiple)]))
    outer = map_step([(inner, "s"), (parts, "a")], lambda s, a: s.float().tanh() - a.float(), "t", "F32", 2 * multiple)
    expected = (a.float() * 3 + b).half().float().tanh() - a.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "PIECE", piece)
        assert same_bits(execute(outer)[0], expected)
        assert all(same_bits(result, expected.reshape(result.shape)) for result in by_slabs(outer, slab))


def test_a_step_that_wants_whole_tensors_makes_those_after_it_want_them_too(tiny: None) -> None:
    w = torch.randn(40, 4)
    source = Checkpoint.from_tensors({"w": w})
    seen = []

    def center(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor - tensor.mean(0)

    middle = mapped(mapped(source, lambda t: t * 2), center, multiple=0)
    last = map_step([(middle, "w")], lambda t: t.abs())
    assert last.cut == 0
    assert last.slabs() == [slice(0, 40)]
    assert same_bits(execute(last)[0], (w * 2 - (w * 2).mean(0)).abs())
    assert same_bits(execute(last, slice(8, 12))[0], (w * 2 - (w * 2).mean(0)).abs()[8:12])
    assert seen == [(40, 4), (40, 4)]


def test_multiples_behind_a_step_bind_it(tiny: None) -> None:
    source = Checkpoint.from_tensors({"w": torch.randn(48, 2)})
    assert map_step([(mapped(mapped(source, torch.abs, multiple=4), torch.abs, multiple=6), "w")], torch.abs, multiple=8).cut == 24


@pytest.mark.parametrize("bias", [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[1.0, 2.0]])])
def test_a_scalar_or_a_single_row_goes_whole_with_every_run(tiny: None, bias: Tensor) -> None:
    w = torch.randn(50, 2)
    parts = Checkpoint.from_tensors({"w": w, "bias": bias})
    step = map_step([(parts, "w"), (parts, "bias")], torch.add)
    assert len(step.slabs(8)) > 5
    assert same_bits(by_slabs(step, 8)[0], w + bias)
    computed = mapped(parts, lambda t: t * 2)
    assert same_bits(by_slabs(map_step([(computed, "w"), (computed, "bias")], torch.add), 8)[0], (w + bias) * 2)


def product_step(b: Checkpoint, a: Checkpoint, name: str = "p") -> Step:
    """The matrix product of the tensors `b` and `a`: rows of b, and a as a whole."""
    write = TensorSpec(name, "I64", (b.specs["b"].rows, *a.specs["a"].shape[1:]))
    return Step(((b, "b"), (a, "a")), (write,), lambda tensors, first_row, measured: (tensors[0] @ tensors[1],), 1, takes=(None, "whole"))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 60))
def test_what_goes_whole_goes_whole_with_every_run(rows: int, middle: int, columns: int, slab: int) -> None:
    parts = Checkpoint.from_tensors({"b": torch.arange(rows * middle).view(rows, middle), "a": torch.arange(middle * columns).view(middle, columns)})
    expected = parts.read("b") @ parts.read("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "PIECE", 16)
        for step in (product_step(parts, parts), product_step(mapped(parts, lambda t: t), mapped(parts, lambda t: t, multiple=0))):
            assert step.cut == 1
            assert torch.equal(by_slabs(step, slab)[0], expected)
        outer = map_step([(Checkpoint("product", Plan([product_step(parts, mapped(parts, lambda t: t, multiple=0))])), "p")], torch.neg)
        assert outer.cut == 1
        assert torch.equal(by_slabs(outer, slab)[0], -expected)


def test_one_tensor_may_be_read_in_rows_and_whole(tiny: None) -> None:
    w = torch.arange(400).view(100, 4)
    part = mapped(Checkpoint.from_tensors({"w": w}), lambda t: t)
    write = TensorSpec("s", "I64", (100, 4))
    step = Step(((part, "w"), (part, "w")), (write,), lambda tensors, first_row, measured: (tensors[0] + tensors[1].sum(),), 1, takes=(None, "whole"))
    assert len(step.slabs()) > 5
    assert torch.equal(by_slabs(step, 16)[0], w + w.sum())
    assert Scan([step]).map(lambda tensors: len(tensors[1])) == [100] * len(Scan([step]).map(len))


def test_what_goes_whole_counts_for_every_run() -> None:
    parts = Checkpoint.from_tensors({"b": torch.ones(1000, 2, dtype=torch.int64), "a": torch.ones(2, 500, dtype=torch.int64)})
    step = product_step(parts, parts)
    assert layouts.cost(step, slice(0, 10)) - layouts.FIXED_COST == 10 * 2 * 8 + 2 * 500 * 8 + 10 * 500 * 8
    room = 2 * 500 * 8 + 100 * (2 * 8 + 500 * 8)  # for `a` and 100 rows
    assert layouts._units(step, layouts.FIXED_COST + room) == [slice(n, n + 100) for n in range(0, 1000, 100)]
    for computed in (product_step(parts, mapped(parts, lambda t: t)), product_step(mapped(parts, lambda t: t), parts)):
        assert layouts.cost(computed, slice(0, 10)) > layouts.cost(step, slice(0, 10))


def test_a_write_of_a_single_row_comes_with_every_run(tiny: None) -> None:
    def run(tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        return tensors[0], torch.tensor(3.0), torch.tensor([4.0])

    source = Checkpoint.from_tensors({"w": torch.randn(50, 2)})
    step = Step(((source, "w"),), (source.specs["w"], TensorSpec("s", "F32", ()), TensorSpec("v", "F32", (1,))), run, 1)
    assert [tensor.tolist() for tensor in execute(step, slice(4, 8))[1:]] == [3, [4]]
    assert [tensor.tolist() for tensor in execute(step)[1:]] == [3, [4]]


def test_rows_of_a_plan_are_computed_from_those_rows_where_they_may_be(tiny: None) -> None:
    w = torch.arange(320).view(160, 2)
    packing = Packing(Checkpoint.from_tensors({"w": w}), "w")
    packed = Checkpoint("packed", Plan([packing.step]))
    for rows, runs in ((slice(32, 96), [(32, 32), (64, 32)]), (slice(128, 160), [(128, 32)]), (slice(5, 6), [(n, 32) for n in range(0, 160, 32)])):
        packing.seen.clear()
        assert torch.equal(packed.read("w.high", rows), w[rows] // 8)
        assert packing.seen == runs
    assert torch.equal(packed.read("w.low", slice(4, 9)), pack(w % 8)[4:9])


@pytest.mark.parametrize(
    ("rows", "of", "to", "expected"),
    [
        (slice(32, 64), 100, 100, slice(32, 64)),
        (slice(32, 64), 100, 10, slice(3, 6)),
        (slice(96, 100), 100, 10, slice(9, 10)),
        (slice(0, 0), 0, 5, slice(0, 5)),
        (slice(0, 0), 0, 0, slice(0, 0)),
        (slice(3, 4), 100, 1, slice(0, 1)),
        (slice(0, 1), 1, 64, slice(0, 64)),
    ],
)
def test_rows_in_proportion(rows: slice, of: int, to: int, expected: slice) -> None:
    assert proportional(rows, of, to) == expected


@given(st.integers(1, 3000), st.sampled_from([(32, 3), (32, 4), (4, 1), (8, 3)]), st.integers(1, 50))
def test_proportional_runs_of_a_packed_tensor_join_without_gap_or_overlap(rows: int, packing: tuple[int, int], runs: int) -> None:
    k, words = packing
    to = -(-rows * words // k)
    bounds = sorted({0, rows, *(n * k for n in range(0, rows // k + 1, runs))})
    parts = [proportional(slice(start, stop), rows, to) for start, stop in zip(bounds, bounds[1:], strict=False)]
    if to > 1:
        assert [part.start for part in parts] == [start * words // k for start in bounds[:-1]]
        assert [part.stop for part in parts] == [*(part.start for part in parts[1:]), to]


@pytest.mark.parametrize("wrong", [torch.ones(4, 2, dtype=torch.float64), torch.ones(1, 2), torch.ones(4, 3), torch.ones(8), torch.tensor(1.0)])
def test_a_result_that_is_not_what_the_step_promised_is_never_written(wrong: Tensor) -> None:
    source = Checkpoint.from_tensors({"w": torch.ones(4, 2)})
    step = Step(((source, "w"),), (source.specs["w"],), lambda tensors, first_row, measured: (wrong,), 1)
    for rows in (None, slice(0, 4)):
        with pytest.raises(ValueError, match=r"w: the step must yield torch\.float32 \(4, 2\), not"):
            execute(step, rows)


def test_a_step_yields_as_many_tensors_as_it_writes() -> None:
    source = Checkpoint.from_tensors({"w": torch.ones(4, 2)})
    with pytest.raises(ValueError, match="zip"):
        execute(Step(((source, "w"),), (source.specs["w"],), lambda tensors, first_row, measured: [*tensors, *tensors], 1))


def test_two_steps_of_a_plan_may_not_write_one_tensor() -> None:
    source = Checkpoint.from_tensors({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(CheckpointError, match="two steps of one plan write the tensor 'a'"):
        Plan([copy_step(source, "a"), copy_step(source, "b", "a")])


def test_a_view_has_some_tensors_under_new_names_and_the_same_small_files() -> None:
    source = Checkpoint("model", Checkpoint.from_tensors({"a": torch.ones(2), "b": torch.zeros(3, 2), "c": torch.ones(1)}).source, {"config.json": b"{}"})
    view = renamed(source, {"x": "b", "y": "b", "a": "c"})
    assert {name: view.read(name).shape for name in view.specs} == {"x": (3, 2), "y": (3, 2), "a": (1,)}
    assert view.read("x", slice(1, 2)).shape == (1, 2)
    assert (view.label, view.files) == ("model", source.files)


def test_a_plan_computes_nothing_before_it_is_read() -> None:
    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("read")

    plan = mapped(Checkpoint.from_tensors({"w": torch.ones(4)}), refuse)
    assert plan.specs == {"w": spec_of("w", torch.ones(4))}
    assert plan.nbytes == 16
    with pytest.raises(AssertionError):
        plan.read("w")


def test_a_step_may_read_nothing() -> None:
    constant = Step((), (TensorSpec("c", "I64", (2,)),), lambda tensors, first_row, measured: (torch.tensor([4, 2]),))
    assert Checkpoint("constant", Plan([constant])).read("c").tolist() == [4, 2]
