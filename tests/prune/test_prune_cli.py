"""`compress prune` and the step `prune:`: what a user types, sees, and finds in the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from prune_toys import linears_of

from mergekit_plus import recipe as recipes
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import RecipeError
from mergekit_plus.steps import Execution, PruneStep
from prune import has_pattern
from quant.plan import dequantize

if TYPE_CHECKING:
    from program import Program

MODELS = Path(__file__).parents[1] / "models"
TEXT = MODELS / "text" / "docs.val.txt"
BASE = str(MODELS / "base")


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in linears_of(Checkpoint.open(folder)).items()}


def test_half_of_the_weights_go_and_the_output_says_how_many(compress: Program, tmp_path: Path) -> None:
    run = compress("prune", BASE, "--sparsity", "0.5", "--scope", "global", "-o", "out")
    assert "589824 of 1179648 weights in 42 linear layers are zero: 50.00%, asked: 0.5" in run.stdout
    report = json.loads((tmp_path / "out" / "sparsity.json").read_bytes())
    found = zeros(tmp_path / "out")
    assert (report["asked"], report["zeros"], report["weights"], report["share"]) == ("0.5", 589824, 1179648, 0.5)
    assert {name: counts["zeros"] for name, counts in report["tensors"].items()} == {name: int(mask.sum()) for name, mask in found.items()}
    assert len({int(mask.sum()) / mask.numel() for mask in found.values()}) > 10  # compared over the whole model
    assert "50.00% of 1179648 weights in 42 linear layers are zero (asked: 0.5)" in (tmp_path / "out" / "README.md").read_text()
    assert "sparsity.json" in json.loads((tmp_path / "out" / "manifest.json").read_bytes())["outputs"]


def test_masks_are_written_and_prune_another_model(compress: Program, tmp_path: Path) -> None:
    compress("prune", BASE, "--pattern", "2:4", "-o", "one", "--masks", "masks.safetensors")
    compress("prune", str(MODELS / "code"), "--mask", "masks.safetensors", "-o", "two")
    assert all(torch.equal(mask, found) for mask, found in zip(zeros(tmp_path / "one").values(), zeros(tmp_path / "two").values(), strict=True))
    again = compress("prune", str(MODELS / "code"), "--mask", "one", "-o", "three.safetensors")
    assert "50.00%, asked: as in mask" in again.stdout
    assert (tmp_path / "three.safetensors").exists()


def test_neurons_and_heads_go_into_a_smaller_model(compress: Program, tmp_path: Path) -> None:
    compress("prune", BASE, "--structured", "mlp=0.25,heads=0.5", "-o", "small")
    assert json.loads((tmp_path / "small" / "config.json").read_bytes())["intermediate_size"] == 288
    assert not (tmp_path / "small" / "sparsity.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sparsity", "1"], "sparsity 1: a share of zeros from 0 to below 1, as in 0.5"),
        ([], "say what goes with one of sparsity, pattern, structured and mask, not with none of them"),
        (["--sparsity", "0.5", "--pattern", "2:4"], "not with sparsity and pattern"),
        (["--pattern", "5:7"], "has 384 inputs, which groups of 7 do not divide (and 41 more)"),
        (["--sparsity", "0.5", "-m", "wanda"], "wanda looks at the inputs of layers: give it a text with --calibration"),
        (["--sparsity", "0.5", "-m", "wnada"], "unknown pruner 'wnada'. Did you mean 'wanda'?"),
        (["--sparsity", "0.5", "--calibration", str(TEXT)], "magnitude needs no calibration text"),
        (["--sparsity", "0.5", "--reconstruct", "block"], "reconstruction and allocation need a text: give it with --calibration"),
        (["--sparsity", "0.5", "--allocate"], "reconstruction and allocation need a text: give it with --calibration"),
        (["--pattern", "2:4", "--allocate", "--calibration", str(TEXT)], "allocate deals out a sparsity to layers"),
        (["--sparsity", "0.5", "--reconstruct", "layer", "--calibration", str(TEXT)], "Input should be 'block', 'sublayer' or 'linear'"),
        (["--sparsity", "0.5", "--retrain", "norms"], "--retrain trains on a text: give it with --calibration"),
        (["--sparsity", "0.5", "-m", "wanda", "--calibration", str(TEXT), "--window", "512", "--exclude", "layers.*"], "nothing to prune"),
        (["--structured", "mlp"], "--structured mlp: write name=value"),
        (["--sparsity", "0.5", "--window", "32"], "--window says how a text is read: give one with --calibration FILE"),
        (["--sparsity", "0.5", "--masks", str(TEXT)], "exists already; name another file with --masks"),
        (["--structured", "mpl=0.5"], "unknown part 'mpl'. Did you mean 'mlp'?"),
        (["--sparsity", "0.5", "--scope", "blok"], "unknown scope 'blok'. Did you mean 'block'?"),
        (["--sparsity", "0.5", "-s", "damp=1"], "magnitude has no option 'damp'"),
        (["--mask", str(MODELS / "docs"), "--exclude", "nothing"], "--exclude 'nothing' matches no tensor"),
    ],
)
def test_mistakes_are_told_in_one_line(compress: Program, arguments: list[str], says: str) -> None:
    assert says in compress("prune", BASE, *arguments, "-o", "out").line


def test_a_text_shorter_than_a_window_is_refused(compress: Program, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    run = compress("prune", BASE, "--sparsity", "0.5", "-m", "sparsegpt", "--calibration", "short.txt", "-o", "out")
    assert "tokens, a window is 256; give a longer text or a smaller --window" in run.line


def test_yaml_reads_two_of_four_as_minutes_and_is_understood(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"inputs: {{model: {BASE}}}\nsteps: [{{prune: {{pattern: 2:4}}}}]\nout: o\n")
    (step,) = recipes.load(tmp_path / "recipe.yaml").steps
    options = step["prune"]
    assert isinstance(options, PruneStep)
    assert options.pattern == "2:4"


def test_everything_wrong_with_a_step_is_said_at_once(tmp_path: Path) -> None:
    step = {"sparsity": 2, "method": "sparsegpt", "scope": "row", "mask": "m", "reconstruct": {"train": ["normz"], "stepz": 3}}
    with pytest.raises(RecipeError) as caught:
        recipes.check({"inputs": {"a": "a"}, "steps": [{"prune": step}]}, tmp_path, "test")
    for problem in ("not with sparsity and mask", "'m' is not an input", "unknown retraining variant 'normz'", "there is no option 'stepz'"):
        assert problem in str(caught.value)


def test_blocks_are_reconstructed_under_the_mask(compress: Program, tmp_path: Path) -> None:
    """Magnitude needs no text, its repair does; what is zero stays so, and the norms have changed."""
    compress("prune", BASE, "--pattern", "2:4", "-o", "plain")
    step = {"pattern": "2:4", "calibration": {"texts": [str(TEXT)], "windows": 4, "window": 32}, "reconstruct": {"train": ["norms", "mask_lora"], "steps": 3}}
    recipes.run(recipes.check({"inputs": {"model": BASE}, "steps": [{"prune": step}]}, tmp_path, "test"), Execution(out=tmp_path / "repaired"))
    plain, repaired = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "repaired")
    for name, weight in linears_of(plain).items():
        assert torch.equal(weight == 0, repaired.read(name) == 0)
    assert not torch.equal(plain.read("model.layers.0.mlp.up_proj.weight"), repaired.read("model.layers.0.mlp.up_proj.weight"))
    assert not torch.equal(plain.read("model.layers.0.input_layernorm.weight"), repaired.read("model.layers.0.input_layernorm.weight"))
    assert torch.equal(plain.read("model.norm.weight"), repaired.read("model.norm.weight"))


def test_sparsity_is_dealt_out_to_the_layers_and_adds_up(compress: Program, tmp_path: Path) -> None:
    text = ["--calibration", TEXT, "--windows", "2", "--window", "32"]
    rest = ["--exclude", "layers.[0-3].*", "--exclude", "layers.4.mlp.*"]  # few layers, so that it is quick
    for method in ("magnitude", "wanda"):
        run = compress("prune", BASE, "--sparsity", "0.5", "--method", method, "--scope", "tensor", "--allocate", *text, *rest, "-o", method)
        assert "122880 of 245760 weights in 11 linear layers are zero: 50.00%, asked: 0.5" in run.stdout
        shares = {counts["zeros"] / counts["weights"] for counts in json.loads((tmp_path / method / "sparsity.json").read_bytes())["tensors"].values()}
        assert len(shares) > 2


def test_retraining_may_follow_at_once(compress: Program) -> None:
    arguments = ["prune", BASE, "--sparsity", "0.5", "--calibration", TEXT, "-o", "out", "--dry-run"]  # magnitude itself needs no text
    assert compress(*arguments, "--retrain", "norms").returncode == 0
    assert "retrain: unknown retraining variant 'normz'. Did you mean 'norms'?" in compress(*arguments, "--retrain", "normz").line


def test_the_recipe_of_pruning_retraining_and_quantising_keeps_two_of_four(tmp_path: Path) -> None:
    recipe = recipes.load(Path(__file__).parents[2] / "recipes" / "prune-perp-quantize.yaml")
    steps = [{name: options.model_dump(mode="json", exclude_none=True) for name, options in step.items()} for step in recipe.steps]
    steps[1]["retrain"] |= {"steps": 2}
    short = recipes.check({"inputs": {"model": str(MODELS / "docs")}, "steps": steps}, recipe.folder, "test")
    recipes.run(short, Execution(out=tmp_path / "out"))
    weights = linears_of(dequantize(Checkpoint.open(tmp_path / "out")))
    assert len(weights) == 42
    assert all(has_pattern(weight, 2, 4) for weight in weights.values())
