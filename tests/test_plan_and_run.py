"""What --dry-run says is what happens: bytes read and written, and nothing in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_plus.checkpoint import SaveOptions
from mergekit_plus.recipe import Recipe, check, plan, run
from mergekit_plus.steps import Execution

MODELS = Path(__file__).parent / "models"
INPUTS = {name: str(MODELS / name) for name in ("base", "code", "docs")}
STEPS: list[dict[str, Any]] = [
    {"merge": {"method": "ties", "base": "base", "models": ["code", "docs"], "density": 0.5}},
    {"prune": {"sparsity": 0.3}},
    {"fold": {"keep": [0, 1, 2, 3, 5]}},
    {"quantize": {"bits": 4, "group_size": 32}},
]


def recipe(steps: list[dict[str, Any]], **inputs: str) -> Recipe:
    return check({"inputs": inputs or INPUTS, "steps": steps}, Path(), "test")


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def test_four_operations_in_one_stream_are_those_operations_one_by_one(tmp_path: Path) -> None:
    run(recipe(STEPS), Execution(out=tmp_path / "stream"))
    previous = ""
    for number, step in enumerate(STEPS):
        run(recipe([step], **({"m": previous} if previous else INPUTS)), Execution(out=tmp_path / str(number)))
        previous = str(tmp_path / str(number))
    assert weights(tmp_path / "stream") == weights(Path(previous))
    assert (tmp_path / "stream" / "config.json").read_bytes() == (Path(previous) / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("steps", "again"),
    [
        (STEPS[:1], 0.0),
        (STEPS[:2], 1.0),  # the output is read once more, for the report of its zeros
        (STEPS, 0.0),
        ([{"merge": {"method": "pcb", "base": "base", "models": ["code", "docs"]}}, STEPS[3]], 0.0),
    ],
)
def test_the_bytes_that_a_plan_names_are_those_that_are_moved(tmp_path: Path, steps: list[dict[str, Any]], again: float) -> None:
    facts = plan(recipe(steps), Execution(out=tmp_path / "out"))
    before = _io()
    run(recipe(steps), Execution(SaveOptions(workers=1), out=tmp_path / "out"))
    after = _io()
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert facts["bytes_written"] <= written < facts["bytes_written"] + 20_000  # headers
    named = facts["bytes_read"] + facts["bytes_measured"] + facts["bytes_hashed"] + again * written
    assert 0.98 * named <= after["rchar"] - before["rchar"] < named + 1_500_000  # headers, config.json, tokenizer.json of each input
    assert written <= after["wchar"] - before["wchar"] < written + 150_000


def _io() -> dict[str, int]:
    """Bytes that this process asked the system to read and write."""
    return {name: int(value) for name, _, value in (line.partition(": ") for line in Path("/proc/self/io").read_text().splitlines())}
