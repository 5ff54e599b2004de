"""Memory holds what is in flight, never a model: measured from inside a fresh process, as anonymous memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from checkpoint_toys import header_bytes, layouts, mapped, python, saving
from memory import PEAK_OF

import mergekit_plus.checkpoint.plan as plans
import mergekit_plus.checkpoint.scan as scans
from mergekit_plus.checkpoint import Checkpoint, Measured, Plan, SaveOptions, Scan, save
from mergekit_plus.checkpoint.save import _Budget

MIB = 1 << 20

SAVE = PEAK_OF + """
import sys
from pathlib import Path
import torch
from checkpoint_toys import layouts, mapped, saving
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save

folder = Path(sys.argv[1])
torch.set_num_threads(1)
checkpoint = mapped(mapped(Checkpoint.open(folder / "warm.safetensors"), lambda t: t.float() * 2), torch.neg)
save(checkpoint, folder / f"warm {sys.argv[2]}", SaveOptions(workers=2))
start = anonymous()
name = sys.argv[2]
checkpoint = mapped(mapped(Checkpoint.open(folder / f"{name}.safetensors"), lambda t: t.float() * 2), torch.neg)
print(peak_of(lambda: save(checkpoint, folder / name, SaveOptions(workers=2, memory=150 * 2**20))) - start)
"""


def sparse_model(path: Path, tensors: int, rows: int) -> None:
    """Zeros that take no time to write: BF16 tensors of `rows` KiB."""
    size = rows * 1024
    table = {f"layers.{n}.w": {"dtype": "BF16", "shape": [rows, 512], "data_offsets": [n * size, (n + 1) * size]} for n in range(tensors)}
    header = header_bytes(table)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + tensors * size)


def test_peak_memory_is_bounded_and_does_not_grow_with_the_model(tmp_path: Path) -> None:
    sparse_model(tmp_path / "warm.safetensors", 1, 1024)
    sparse_model(tmp_path / "small.safetensors", 6, 16 * 1024)
    sparse_model(tmp_path / "large.safetensors", 18, 16 * 1024)
    growth = {}
    for name in ("small", "large"):
        result = python(SAVE, tmp_path, name)
        assert result.returncode == 0, result.stderr
        growth[name] = int(result.stdout)
    assert 16 * MIB < growth["small"] < 150 * MIB, growth  # something is measured
    assert growth["large"] < growth["small"] + 24 * MIB, growth


class Watched(_Budget):
    """A budget that knows how much of it was ever taken at once."""

    peak = 0
    takes = 0

    def take(self, amount: int):  # type: ignore[no-untyped-def]
        Watched.takes += 1
        return super().take(amount)

    @property
    def free(self) -> int:
        return self._left

    @free.setter
    def free(self, value: int) -> None:
        self._left = value
        Watched.peak = max(Watched.peak, self.total - value)


@pytest.mark.parametrize("whole_model", [False, True])
def test_what_is_measured_stays_inside_the_budget_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_model: bool) -> None:
    monkeypatch.setattr(plans, "SLAB", 256)
    monkeypatch.setattr(layouts, "SLAB", 256)
    monkeypatch.setattr(layouts, "HELD", 0)
    monkeypatch.setattr(layouts, "FIXED_COST", 1000)
    monkeypatch.setattr(saving, "_Budget", Watched)
    monkeypatch.setattr(Watched, "peak", 0)
    monkeypatch.setattr(Watched, "takes", 0)
    lock, most = threading.Lock(), 0
    gather = plans.gather

    def watched(step, rows):  # type: ignore[no-untyped-def]
        nonlocal most
        tensors = gather(step, rows)
        with lock:
            most = max(most, sum(tensor.nbytes for tensor in tensors))
        return tensors

    for module in (plans, scans):
        monkeypatch.setattr(module, "gather", watched)
    source = Checkpoint.from_tensors({f"{n}.w": torch.randn(64, 32, generator=torch.Generator().manual_seed(n)) for n in range(4)})

    def largest(scan: Scan) -> float:
        return max(scan.map(lambda tensors: float(tensors[0].abs().max())))

    shared = Measured(largest, whole_model=True)
    steps = []
    for name, spec in source.specs.items():
        measured = shared if whole_model else Measured(largest)
        step = plans.Step(((source, name),), (spec,), lambda tensors, first_row, value: (tensors[0] / value,), 1, measured)
        measured.steps.append(step)
        steps.append(step)
    save(Checkpoint("scaled", Plan(steps)), tmp_path / "out", SaveOptions(workers=4, memory=13_000))
    assert most <= 1024  # a slab
    assert 2000 < Watched.peak <= 13_000
    assert Watched.takes == (4 * 8 * 2 if whole_model else 4)
    values = Checkpoint.open(tmp_path / "out")
    bound = max(float(source.read(name).abs().max()) for name in source.specs)
    for name in source.specs:
        assert torch.equal(values.read(name), source.read(name) / (bound if whole_model else source.read(name).abs().max()))


def test_what_is_larger_than_the_budget_is_let_in_alone() -> None:
    budget = _Budget(10)
    inside: list[int] = []
    most = []

    def work(amount: int) -> None:
        with budget.take(amount):
            inside.append(amount)
            most.append(sum(inside))
            inside.remove(amount)

    threads = [threading.Thread(target=work, args=(amount,), daemon=True) for amount in [100, 3, 50, 10, 1] * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert max(total for total in most if total not in (50, 100)) <= 10
    assert budget.free == 10


def test_a_budget_is_given_back_by_those_that_fail() -> None:
    budget = _Budget(10)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), budget.take(10):
            raise ZeroDivisionError
    assert budget.free == 10


def test_mapped_whole_tensors_count_what_is_behind_them() -> None:
    source = Checkpoint.from_tensors({"w": torch.zeros(10, 100)})
    (step,) = mapped(mapped(source, torch.neg), torch.neg).source.steps  # type: ignore[attr-defined]
    assert layouts._bytes_held(step, None) == 4 * 4000
    assert layouts._bytes_held(step, slice(0, 5)) == 4 * 2000
