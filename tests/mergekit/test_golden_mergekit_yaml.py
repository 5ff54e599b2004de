"""Documents give what mergekit 0.1.5 gives; benchmarks/golden_mergekit_yaml.py made the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_plus.recipe import build, load

GOLDEN = Path(__file__).with_name("golden_mergekit_yaml.safetensors")
TENSORS = load_file(GOLDEN)
with safe_open(GOLDEN, "pt") as opened:
    CASES: list[dict[str, Any]] = json.loads(opened.metadata()["cases"])
    CONFIG: str = opened.metadata()["config"]


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in TENSORS.items() if name.startswith(f"{prefix}/")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models base, a and b."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        save_file(under(name), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(CONFIG)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number]["label"])
def test_a_document_gives_what_mergekit_gives(number: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "document.yaml").write_text(CASES[number]["document"])
    result, expected = build(load(tmp_path / "document.yaml")).result, under(str(number))
    assert result.specs.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result.read(name), tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert result.config["num_hidden_layers"] == CASES[number]["layers"]
