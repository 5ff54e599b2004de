"""Tensors that one long computation makes: made once, part by part, in a folder that a kill leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_toys import files_in, write_model
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Deferred, Measured, Plan, SaveOptions, Step, TensorSpec, Work, copy_step, save
from mergekit_plus.checkpoint.layout import plan_save
from mergekit_plus.checkpoint.stage import partial_of
from mergekit_plus.errors import CheckpointError, OptionError

TENSORS = {f"layers.{n}.w": torch.arange(60.0).view(20, 3) + n for n in range(3)}


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    write_model(tmp_path / "in", {**TENSORS, "norm": torch.ones(4)}, 2)
    return Checkpoint.open(tmp_path / "in")


class Walk:
    """Running sums of the layers: each needs those before it, as in a calibration. Counts what it computes, and fails where it is told to."""

    def __init__(self, model: Checkpoint, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.model, self.fail_at, self.error, self.computed = model, fail_at, error or OSError(28, "No space left on device"), [0, 0, 0]

    def __call__(self, work: Work) -> None:
        total = torch.zeros(20, 3)
        for number in range(3):
            total = work.part(f"block-{number}", lambda number=number, total=total: self.block(number, total)).read(f"layers.{number}.w")  # type: ignore[misc]

    def block(self, number: int, total: Tensor) -> dict[str, Tensor]:
        if number == self.fail_at:
            raise self.error
        self.computed[number] += 1
        return {f"layers.{number}.w": total + self.model.read(f"layers.{number}.w")}


def walked(model: Checkpoint, walk: Callable[[Work], None], **facts: int) -> Checkpoint:
    """The layers as the walk makes them, and the norm as it is."""
    made = Checkpoint("walked", Deferred([model.specs[name] for name in TENSORS], [model], walk, **facts))
    return Checkpoint("result", Plan([*(copy_step(made, name) for name in TENSORS), copy_step(model, "norm")]), model.files)


def test_a_save_computes_once_and_keeps_nothing(model: Checkpoint, tmp_path: Path) -> None:
    walk = Walk(model)
    manifest = save(walked(model, walk), tmp_path / "out", SaveOptions(workers=3))
    out = Checkpoint.open(tmp_path / "out")
    assert torch.equal(out.read("layers.2.w"), sum(TENSORS.values(), torch.zeros(20, 3)))
    assert torch.equal(out.read("norm"), torch.ones(4))
    assert walk.computed == [1, 1, 1]
    assert not partial_of(tmp_path / "out").exists()
    assert len(manifest.inputs) == 1  # the model behind the computation


def test_nothing_is_computed_before_a_tensor_is_read_and_then_everything_once(model: Checkpoint, tmp_path: Path) -> None:
    walk = Walk(model)
    result = walked(model, walk, memory=1000, passes=2)
    layout = plan_save(result, tmp_path / "out", SaveOptions(memory=1 << 30))
    assert walk.computed == [0, 0, 0]
    assert layout.disk_needed - layout.bytes_written == 3 * 240
    assert layout.bytes_measured == 2 * sum(spec.nbytes for spec in model.specs.values())
    assert torch.equal(result.read("layers.0.w"), TENSORS["layers.0.w"])
    assert torch.equal(result.read("layers.1.w", slice(2, 4)), (TENSORS["layers.0.w"] + TENSORS["layers.1.w"])[2:4])
    assert walk.computed == [1, 1, 1]


def test_a_model_that_was_saved_can_be_read_again(model: Checkpoint, tmp_path: Path) -> None:
    walk = Walk(model)
    result = walked(model, walk)
    save(result, tmp_path / "out")
    assert torch.equal(result.read("layers.0.w"), TENSORS["layers.0.w"])  # its folder is gone: computed again
    assert walk.computed == [2, 2, 2]


@pytest.mark.parametrize("spoil", [False, True])
def test_a_save_that_was_interrupted_goes_on_with_the_parts_that_are_as_they_were(model: Checkpoint, tmp_path: Path, spoil: bool) -> None:
    save(walked(model, Walk(model)), tmp_path / "whole")
    with pytest.raises(Exception, match="2 parts of the computation, and 0 of .* are kept, go on with --resume"):
        save(walked(model, Walk(model, fail_at=2)), tmp_path / "out", SaveOptions(job="walk"))
    if spoil:
        part = partial_of(tmp_path / "out") / "work" / "0" / "block-1.safetensors"
        part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    walk = Walk(model)
    save(walked(model, walk), tmp_path / "out", SaveOptions(job="walk", resume=True))
    assert walk.computed == [0, int(spoil), 1]
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_what_refuses_keeps_nothing(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="^cannot$"):
        save(walked(model, Walk(model, 1, CheckpointError("cannot"))), tmp_path / "out", SaveOptions(job="walk"))
    assert not partial_of(tmp_path / "out").exists()


def test_computations_and_measurements_wait_for_each_other(model: Checkpoint, tmp_path: Path) -> None:
    first = walked(model, Walk(model))
    largest = Measured(lambda scan: max(scan.map(lambda tensors: float(tensors[0].max()))), whole_model=True)
    steps = [Step(((first, name),), (first.specs[name],), lambda tensors, first_row, measured: [tensors[0] / measured], 1, largest) for name in TENSORS]
    largest.steps.extend(steps)
    second = Checkpoint("scaled", Plan(steps))
    walk = Walk(second)
    third = Checkpoint("walked twice", Deferred([second.specs[name] for name in TENSORS], [second], walk))
    save(third, tmp_path / "out")
    sums = torch.stack(list(TENSORS.values())).cumsum(0)
    torch.testing.assert_close(Checkpoint.open(tmp_path / "out").read("layers.2.w"), (sums / sums.max()).cumsum(0)[2])
    assert walk.computed == [1, 1, 1]


def test_a_computation_that_makes_something_else_is_refused(model: Checkpoint) -> None:
    made = Checkpoint("made", Deferred([TensorSpec("w", "F32", (2,))], [model], lambda work: work.part("all", lambda: {"w": torch.ones(3)}) and None))
    with pytest.raises(CheckpointError, match=r"a computation made .*shape=\(3,\).*, not .*shape=\(2,\).*; 1 tensors are not as planned"):
        made.read("w")


def test_a_computation_says_how_much_memory_it_needs(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--memory 500 MB is too little: a block at a time takes 900 MB"):
        plan_save(walked(model, Walk(model), memory=900_000_000), tmp_path / "out", SaveOptions(memory=500_000_000))
