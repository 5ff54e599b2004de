"""Calibrated quantisation from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from program import Program

from mergekit_plus.checkpoint import Checkpoint

MODELS = Path(__file__).parents[1] / "models"
BASE = MODELS / "base"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes((MODELS / "text" / "docs.val.txt").read_bytes()[:8000])
    return path


SMALL = ("--group-size", 32, "--bits", 3, "--method", "gptq")
WINDOWS = ("--windows", 4, "--window", 32)


def test_a_model_is_quantised_with_a_text_and_its_recipe_makes_it_again(compress: Program, text: Path, tmp_path: Path) -> None:
    done = compress("quantize", BASE, *SMALL, "--calibration", "text.txt", *WINDOWS, "-o", "out")
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    told = recipe["steps"][0]["quantize"]["calibration"]
    assert told["texts"] == ["../text.txt"]
    assert (told["windows"], told["window"], told["seed"], list(told["sha256"])) == (4, 32, 0, ["text.txt"])
    assert compress("run", "out/recipe.yaml", "-o", "again").returncode == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_dry_run_says_what_it_would_take(compress: Program, text: Path, tmp_path: Path) -> None:
    done = compress("quantize", BASE, *SMALL, "--calibration", "text.txt", "--windows", 100, "--window", 64, "-o", "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "before that for a computation over the whole model" in done.stdout
    assert "blocks, one after another, on" in done.stdout
    assert "windows of 64 tokens, not 100; all of it is used" in done.stdout
    assert not (tmp_path / "out").exists()


def test_moments_are_measured_once_and_used_for_any_scheme(compress: Program, text: Path, tmp_path: Path) -> None:
    assert compress("calibrate", BASE, "--text", "text.txt", *WINDOWS, "-o", "moments.safetensors").returncode == 0
    for bits in (2, 4):
        done = compress("quantize", BASE, "--group-size", 32, "--bits", bits, "--method", "gptq", "--moments", "moments.safetensors", "-o", f"out-{bits}")
        assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((tmp_path / "out-4" / "recipe.yaml").read_text())
    assert recipe["inputs"]["moments"]["ref"] == "../moments.safetensors"
    assert len(recipe["inputs"]["moments"]["sha256"]) == 1
    out = Checkpoint.open(tmp_path / "out-2")
    assert torch.equal(out.read("model.embed_tokens.weight"), Checkpoint.open(BASE).read("model.embed_tokens.weight"))


def test_mistakes_are_told_before_anything_is_read(compress: Program, text: Path) -> None:
    assert "gptq looks at the inputs of layers: give a text with --calibration FILE" in compress("quantize", BASE, *SMALL).line
    assert "rtn looks at weights only" in compress("quantize", BASE, "--calibration", "text.txt").line
    assert "quantize: calibration: the text none.txt is not there" in compress("quantize", BASE, *SMALL, "--calibration", "none.txt").line
    both = compress("quantize", BASE, *SMALL, "--calibration", "text.txt", "--moments", "text.txt")
    assert "give a calibration text, or moments that were measured on one, not both" in both.line
    long = compress("quantize", BASE, *SMALL, "--calibration", "text.txt", "--window", 100000)
    assert "a window of 100000 tokens: the model takes 512 at most; give a smaller --window" in long.line
    text.write_text("short")
    assert "the text (text.txt) has" in compress("quantize", BASE, *SMALL, "--calibration", "text.txt", "--dry-run").line
    without = compress("quantize", BASE, "--windows", 4, "--order", "layer").line
    assert without == "compress: --windows and --order say how a text is read: give one with --calibration FILE"
    assert "--device tpuu: no such device; write cpu, cuda or cuda:1" in compress("quantize", BASE, "--device", "tpuu").line
    assert compress("quantize", BASE, "--bits", 9).line == "compress: quantize: bits=9: a weight has 2 to 8 bits"


def test_moments_of_a_packed_model_are_refused_with_the_way_out(compress: Program, text: Path) -> None:
    assert compress("quantize", BASE, "-o", "packed").returncode == 0
    assert "packed is quantized already" in compress("calibrate", "packed", "--text", "text.txt").line
    assert "\npacked is quantized already (compressed-tensors pack-quantized" in compress("inspect", "packed").stdout
