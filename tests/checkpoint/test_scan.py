"""Statistics are measured once, over pieces in an order that depends on names and shapes alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import map_step, mapped, same_bits, write_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mergekit_plus.checkpoint.plan as plans
from mergekit_plus.checkpoint import Checkpoint, Measured, Plan, SaveOptions, Scan, Step, save
from mergekit_plus.checkpoint.checkpoint import FileSource
from mergekit_plus.checkpoint.layout import preparations
from mergekit_plus.checkpoint.plan import execute
from mergekit_plus.checkpoint.scan import _sampled


def centered(source: Checkpoint, whole_model: bool, count: list[int] | None = None) -> Checkpoint:
    """Every tensor minus the mean of itself, or of the whole model."""

    def mean(scan: Scan) -> Tensor:
        if count is not None:
            count.append(threading.get_ident())
        return torch.stack(scan.map(lambda tensors: tensors[0].double().sum())).sum() / max(1, scan.size)

    shared = Measured(mean, "means", whole_model=True)
    steps = []
    for name, spec in source.specs.items():
        measured = shared if whole_model else Measured(mean)

        def run(tensors: Sequence[Tensor], first_row: int, value: Any) -> Sequence[Tensor]:
            return ((tensors[0].double() - value).to(tensors[0].dtype),)

        step = Step(((source, name),), (spec,), run, plans.row_multiple(spec), measured)
        measured.steps.append(step)
        steps.append(step)
    return Checkpoint("centered", Plan(steps), source.files)


TENSORS = {
    "layers.10.w": torch.arange(60.0).view(30, 2),
    "layers.2.w": torch.arange(60.0).view(20, 3) * 2,
    "scalar": torch.tensor(6.0),
    "empty": torch.empty(0, 4),
    "empty_rows": torch.empty(4, 0),
    "vector": torch.arange(7.0),
}
TOTAL = sum(float(tensor.double().sum()) for tensor in TENSORS.values())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "PIECE", 8)
    monkeypatch.setattr(plans, "SLAB", 24)


def steps_in(source: Checkpoint) -> list[Step]:
    return [plans.copy_step(source, name) for name in source.specs]


def test_a_scan_visits_every_row_once_in_the_order_of_names(tiny: None) -> None:
    source = Checkpoint.from_tensors(TENSORS)
    seen = Scan(steps_in(source)).map(lambda tensors: tensors[0].flatten().tolist())
    order = ["empty", "empty_rows", "layers.2.w", "layers.10.w", "scalar", "vector"]
    assert [value for piece in seen for value in piece] == [value for name in order for value in TENSORS[name].flatten().tolist()]
    assert max(map(len, seen)) <= 8


def test_the_order_does_not_depend_on_the_order_of_the_steps_or_on_who_maps(tiny: None) -> None:
    steps = steps_in(Checkpoint.from_tensors(TENSORS))

    def visit(tensors: Sequence[Tensor]) -> list[float]:
        return list(tensors[0].flatten().tolist())

    with ThreadPoolExecutor(4) as pool:
        expected = Scan(steps).map(visit)
        assert Scan(steps[::-1]).map(visit) == expected
        assert Scan(steps, parallel=pool.map).map(visit) == expected


def test_single_pieces_are_visited_by_their_numbers_and_nothing_else_is_read(tiny: None) -> None:
    read: list[object] = []

    def spy(function: Callable[[Any], Any], units: Iterable[Any]) -> Iterator[Any]:
        read.extend(units)
        return map(function, read)

    scan = Scan(steps_in(Checkpoint.from_tensors(TENSORS)), parallel=spy)
    everything = scan.map(lambda tensors: tensors[0].tolist())
    for number, expected in enumerate(everything):
        read.clear()
        assert scan.map(lambda tensors: tensors[0].tolist(), only=[number]) == [expected]
        assert len(read) == 1
    assert scan.map(len, only=[]) == []


def test_tensors_that_are_held_are_visited_like_those_that_are_read(tiny: None) -> None:
    for name, tensor in TENSORS.items():
        step = plans.copy_step(Checkpoint.from_tensors(TENSORS), name)
        for sample in (False, True):
            visits = [Scan([step], held).map(lambda tensors: tensors[0].tolist(), sample) for held in (None, [tensor])]
            assert visits[0] == visits[1]


@given(st.integers(1, 20_000), st.integers(1, 64), st.sampled_from([1, 4, 32]), st.integers(6, 16))
def test_a_sample_is_a_sixteenth_inside_the_slab_and_always_the_same(rows: int, cols: int, multiple: int, slab: int) -> None:
    step = map_step([(Checkpoint.from_tensors({"w": torch.empty(rows, cols, device="meta")}), "w")], torch.abs, multiple=multiple)
    for whole in step.slabs(1 << slab):
        runs = _sampled(step, whole)
        assert runs == _sampled(step, whole)
        if runs == [whole]:
            assert whole.stop - whole.start < 64 * multiple or (whole.stop - whole.start) * cols <= 1 << 12
            continue
        assert all(run.start % multiple == 0 and whole.start <= run.start < run.stop <= whole.stop for run in runs)
        assert all(first.stop <= second.start for first, second in zip(runs, runs[1:], strict=False))
        share = sum(run.stop - run.start for run in runs) / (whole.stop - whole.start)
        assert 1 / 32 < share <= 1 / 16
    assert step.slabs(1 << slab)[-1].stop == rows


def test_a_sample_of_a_large_tensor_reads_a_sixteenth_of_it() -> None:
    w = torch.arange(1 << 20).view(1 << 12, 1 << 8)
    (step,) = steps_in(Checkpoint.from_tensors({"w": w}))
    seen = torch.cat(Scan([step]).map(lambda tensors: tensors[0].flatten(), sample=True))
    assert len(seen) == w.numel() // 16
    assert len(seen.unique()) == len(seen)


@pytest.mark.parametrize("whole_model", [False, True])
def test_a_measured_value_is_the_same_however_steps_are_cut(tiny: None, whole_model: bool) -> None:
    source = Checkpoint.from_tensors(TENSORS)
    for name, tensor in TENSORS.items():
        result = centered(source, whole_model)
        step = result.source.step_of[name]  # type: ignore[attr-defined]
        mean = TOTAL / sum(t.numel() for t in TENSORS.values()) if whole_model else tensor.double().mean() if tensor.numel() else 0
        assert same_bits(result.read(name), (tensor.double() - mean).float())
        rows = [execute(step, rows)[0] for rows in centered(source, whole_model).source.step_of[name].slabs(8)]  # type: ignore[attr-defined]
        assert same_bits(torch.cat(rows) if tensor.ndim else rows[0], (tensor.double() - mean).float())


def test_a_value_is_measured_once_by_however_many_threads_ask(tiny: None) -> None:
    count: list[int] = []
    step = centered(Checkpoint.from_tensors(TENSORS), whole_model=True, count=count).source.step_of["vector"]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: execute(step), range(50)))
    assert len(count) == 1


def test_a_measurement_that_failed_fails_again_and_does_not_hang() -> None:
    def fail(scan: Scan) -> None:
        raise ZeroDivisionError

    measured = Measured(fail)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            measured.get()


@pytest.mark.parametrize("workers", [1, 3])
def test_saving_measures_each_statistic_once_also_behind_another(tmp_path: Path, tiny: None, workers: int) -> None:
    source = Checkpoint.open(write_model(tmp_path / "in", TENSORS, shards=3))
    inner_count: list[int] = []
    outer_count: list[int] = []
    inner = centered(source, whole_model=True, count=inner_count)
    outer = centered(mapped(inner, lambda t: t * 2), whole_model=True, count=outer_count)
    save(outer, tmp_path / "out", SaveOptions(workers=workers))
    assert (len(inner_count), len(outer_count)) == (1, 1)
    mean = TOTAL / sum(tensor.numel() for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        expected = (tensor.double() - mean).float() * 2
        assert torch.allclose(Checkpoint.open(tmp_path / "out").read(name), expected, atol=1e-4)


@pytest.mark.parametrize("whole_model", [False, True])
def test_measured_bytes_do_not_depend_on_workers_memory_or_shards(tmp_path: Path, tiny: None, whole_model: bool) -> None:
    tensors = {f"layers.{n}.w": torch.randn(40, 5, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(12)}
    shuffled = dict(reversed(list(tensors.items())))
    results = set()
    for number, (given_tensors, shards, workers) in enumerate([(tensors, 1, 1), (tensors, 5, 4), (shuffled, 3, 2), (shuffled, 2, 3)]):
        source = Checkpoint.open(write_model(tmp_path / f"in{number}", given_tensors, shards))
        save(centered(source, whole_model), tmp_path / f"{number}.safetensors", SaveOptions(workers=workers))
        results.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(results) == 1


def test_measurements_that_others_build_on_come_first() -> None:
    source = Checkpoint.from_tensors(TENSORS)
    first = centered(source, whole_model=True)
    second = centered(mapped(first, torch.abs), whole_model=True)
    third = centered(mapped(second, torch.abs), whole_model=True)
    steps = third.source.steps  # type: ignore[attr-defined]
    expected = [part.source.steps[0].measured for part in (first, second, third)]  # type: ignore[attr-defined]
    assert preparations(steps) == expected
    assert preparations(steps[:1]) == expected


def test_a_step_that_measures_its_tensor_reads_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(write_model(tmp_path / "in", {"w": torch.randn(3000, 10)}))
    reads: list[object] = []
    original = FileSource.read
    monkeypatch.setattr(FileSource, "read", lambda self, name, rows=None: reads.append(rows) or original(self, name, rows))
    save(centered(source, whole_model=False), tmp_path / "out")
    assert reads == [None]


def test_a_parallel_map_sees_steps_and_rows(tiny: None) -> None:
    """What `save` relies on to hold a scan inside its memory budget."""
    seen: list[Any] = []

    def spy(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        items = list(items)
        seen.extend(items)
        return map(function, items)

    Scan(steps_in(Checkpoint.from_tensors(TENSORS)), parallel=spy).map(len)
    assert all(isinstance(step, Step) and isinstance(rows, slice) for step, rows in seen)
