"""A save may be killed at any moment: what is visible is whole, and --resume ends in the bytes of a run that nobody disturbed.

Processes are killed by SIGKILL before a call that changes the disk, or in the middle of a write. `benchmarks/crash.py` does the same to whole programs.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from crash_toys import CALLS, CASES, SMALL, carry_out, in_a_child, write_inputs

from mergekit_plus.checkpoint.journal import read

UNIT = 600  # bytes that are computed at once
BYTES = 6 * 32 * 32 * 2  # of all tensors


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in SMALL:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path / "in")
    return tmp_path


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything beside the inputs that has a visible name."""
    paths = [path for top in folder.glob("out*") for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def forget(folder: Path) -> None:
    """Delete all outputs, partial ones too."""
    for path in (*folder.glob("out*"), *folder.glob(".out*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Case:
    """A case with its undisturbed result, to be killed again and again."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.overwrites = CASES[name][2]
        self.start()
        self.before = outputs(folder)
        assert in_a_child(name, folder) == 0
        self.calls = int((folder / "calls").read_text())
        self.expected = outputs(folder)
        assert self.expected != self.before

    def start(self) -> None:
        """The folder as it is before the run."""
        forget(self.folder)
        if self.overwrites:
            other = "quantize" if CASES[self.name][1] == "out" else "file"
            carry_out(other, self.folder)
            if other == "file":
                (self.folder / "out.safetensors").write_bytes(b"older")

    def kill(self, number: int, calls: tuple[str, ...] = CALLS, **options: Any) -> None:
        """Kill a run before this call; whatever is visible then is the old output, none, or the new one."""
        code = in_a_child(self.name, self.folder, number, calls, **options)
        assert code in (-9, 0)
        visible = outputs(self.folder)
        if CASES[self.name][1] == "out":
            assert visible in (self.before, {}, self.expected)
        else:  # a file and its manifest get their names one after the other
            assert all(visible[name] in (self.before.get(name), self.expected[name]) for name in visible)

    def finish(self) -> None:
        """Resume here, and compare; what the journal says is finished is not computed again."""
        done = read(self.folder / f".{CASES[self.name][1]}.partial" / "journal")
        if outputs(self.folder) == self.expected and not done.publishing:
            return  # killed at the very end, when there was nothing left to do
        sizes = {path.name: path.stat().st_size for path in self.folder.glob(".out*/files/*.safetensors")}
        whole = self.name == "quantize"  # a unit's scales lie at the end of the file: only files that are finished spare work
        kept = sum(length for name, (length, _) in done.shards.items() if not whole or length == sizes[name])
        counted = carry_out(self.name, self.folder, resume=True, workers=1)  # on a smaller machine
        assert outputs(self.folder) == self.expected
        assert not list(self.folder.glob(".out*"))
        computed = counted.amounts.get("writing", 0)
        assert computed <= done.total - kept + 3 * UNIT if done.total else computed <= BYTES  # the unit in which a file's finished part ends is not kept
        if done.publishing:
            assert not counted.amounts


@pytest.mark.parametrize("name", CASES)
def test_killed_anywhere_and_resumed_the_bytes_are_those_of_an_undisturbed_run(inputs: Path, name: str) -> None:
    case = Case(name, inputs)
    draw = random.Random(name)
    moments = {draw.randint(1, case.calls) for _ in range(6)} | {draw.randint(case.calls - 12, case.calls) for _ in range(3)}
    for moment in sorted(moments):
        case.start()
        case.kill(moment)
        case.finish()


def test_killed_at_every_boundary_of_the_journal_and_at_every_rename(inputs: Path) -> None:
    case = Case("overwrite", inputs)
    calls = ("write", "replace", "unlink", "rmdir")
    case.start()
    in_a_child("overwrite", inputs, None, calls)
    for moment in range(1, int((inputs / "calls").read_text()) + 1):
        case.start()
        case.kill(moment, calls)
        case.finish()


def test_killed_again_and_again_it_arrives(inputs: Path) -> None:
    case = Case("pcb", inputs)
    case.start()
    kills = 0
    for moment in range(20, 1000, 14):
        case.kill(moment, resume=True)
        if outputs(inputs) and not (inputs / ".out.partial").exists():
            break
        kills += 1
    assert kills >= 4
    assert outputs(inputs) == case.expected
