"""A scale for each residual branch: least squares, block after block, folded into the weights that end the branch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from program import Program
from tiny import ARCHITECTURES, GROUPED, tiny_model
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from prune.fold import Fold, folded, mapped
from prune.fold.scale import fitted, rescaled, writers

MODELS = Path(__file__).parents[1] / "models"
TEXT = MODELS / "text" / "docs.val.txt"
ROWS = torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def deep(folder: Path) -> Checkpoint:
    """Five blocks whose branches matter: random weights ten times as large as those that training starts with."""
    return tiny_model("LlamaForCausalLM", folder / "deep", {**GROUPED, "num_hidden_layers": 5, "initializer_range": 0.2})


def test_the_scale_is_that_of_least_squares_within_its_limits() -> None:
    before, after = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0])  # (1, 2) is added
    assert fitted([before], [after], [torch.tensor([2.0, 3.0])]) == 1
    assert fitted([before], [after], [torch.tensor([2.5, 4.0])]) == 1.5
    assert fitted([before, before], [after, after], [torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])]) == 0.6  # (2 + 4) / (5 + 5)
    assert fitted([before], [after], [torch.tensor([9.0, 9.0])]) == 2
    assert fitted([before], [after], [torch.tensor([-9.0, -9.0])]) == 0.25
    assert fitted([before], [before], [after]) == 1


def reference(original: Checkpoint, short: Checkpoint, kept: list[int]) -> list[list[float]]:
    """The scales of a Llama in float64: the whole models run, with hooks, once for each branch."""
    models = load_model(original, torch.float64), load_model(short, torch.float64)
    scales: list[list[float]] = [[1.0, 1.0] for _ in kept]

    def run(model: Any, scale: Callable[[int, int], float]) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]], Tensor]:
        seen: dict[str, list[Tensor]] = {"input_layernorm": [], "post_attention_layernorm": [], "self_attn": [], "mlp": []}
        last: list[Tensor] = []
        handles = [model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))]
        for number, layer in enumerate(model.model.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                handles.append(getattr(layer, name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0])))
            for branch, name in enumerate(("self_attn", "mlp")):

                def hook(_: Any, __: Any, output: Any, number: int = number, branch: int = branch, name: str = name) -> Any:
                    found = output[0] if isinstance(output, tuple) else output
                    seen[name].append(found)
                    return (found * scale(number, branch), *output[1:]) if isinstance(output, tuple) else found * scale(number, branch)

                handles.append(getattr(layer, name).register_forward_hook(hook))
        with torch.no_grad():
            model(input_ids=ROWS, use_cache=False)
        for handle in handles:
            handle.remove()
        entering = list(zip(seen["input_layernorm"], seen["post_attention_layernorm"], strict=True))
        return entering, list(zip(seen["self_attn"], seen["mlp"], strict=True)), last[0]

    theirs, _, last = run(models[0], lambda *_: 1.0)
    before = [first for first, _ in theirs] + [last]
    for place, own in enumerate(kept):
        following = kept[place + 1] if place + 1 < len(kept) else len(theirs)
        for branch, target in enumerate((theirs[own][1], before[following])):
            states, added, _ = run(models[1], lambda number, which: scales[number][which])
            start, step = states[place][branch], added[place][branch]
            scales[place][branch] = min(max(float((step * (target - start)).sum() / (step * step).sum()), 0.25), 2.0)
    return scales


def test_scales_are_those_of_a_float64_reference(deep: Checkpoint) -> None:
    fold = Fold.of([0, 3, 4])
    short = folded(deep, fold)
    wanted = reference(deep, short, [0, 3, 4])
    assert max(abs(scale - 1) for row in wanted for scale in row) > 0.1
    result = rescaled(deep, short, fold, ROWS)
    for place, row in enumerate(wanted):
        for name, scale in zip(("self_attn.o_proj", "mlp.down_proj"), row, strict=True):
            weight = f"model.layers.{place}.{name}.weight"
            torch.testing.assert_close(result.read(weight), short.read(weight) * scale, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "BertForMaskedLM"])
def test_only_what_ends_a_branch_is_scaled_and_nothing_where_nothing_is_gone(name: str, folder: Path) -> None:
    model = tiny_model(name, folder)
    whole = Fold.of([0, 1])
    same = rescaled(model, folded(model, whole), whole, ROWS)
    assert all(torch.equal(same.read(tensor), model.read(tensor)) for tensor in model.specs)
    fold = Fold.of([1])
    short = folded(model, fold)
    result = rescaled(model, short, fold, ROWS)
    ends = {tensor for branch in writers(short)[0].values() for tensor in branch}
    changed = {tensor for tensor in short.specs if not torch.equal(result.read(tensor), short.read(tensor))}
    zero = {tensor for tensor in ends if not short.read(tensor).any()}  # biases, as training starts with them
    assert changed == ends - zero
    with torch.no_grad():
        output = load_model(result)(input_ids=ROWS)
    assert output[0].isfinite().all()


def test_blocks_that_share_stay_as_they_are(deep: Checkpoint) -> None:
    fold = Fold((0, 2, 3, 4), (0, 0, 1, 2), (0, 3, 4))
    short = folded(deep, fold)
    result = rescaled(deep, short, fold, ROWS)
    changed = {tensor.split(".")[2] for tensor in short.specs if not torch.equal(result.read(tensor), short.read(tensor))}
    assert changed == {"2", "3"}
    with pytest.raises(OptionError, match="these all share their weights"):
        rescaled(deep, folded(deep, mapped([0, 1], 2)), mapped([0, 1], 2), ROWS)
    with pytest.raises(OptionError, match="these are not in the order of the model"):
        rescaled(deep, folded(deep, Fold.of([1, 0])), Fold.of([1, 0]), ROWS)


def test_a_block_with_norms_behind_its_branches_is_refused(folder: Path) -> None:
    model = tiny_model("BertForMaskedLM", folder)
    fold = Fold.of([0])
    with pytest.raises(CheckpointError, match="is not the sum of what enters it and its branches"):
        rescaled(model, folded(model, fold), fold, ROWS).read("bert.encoder.layer.0.output.dense.weight")


def test_the_command_scales_and_its_recipe_does_it_again(compress: Program, tmp_path: Path) -> None:
    asked = ("fold", MODELS / "base", "--keep", "0,1,4,5", "--residual-scale", "--windows", 4, "--window", 64)
    done = compress(*asked, "--calibration", TEXT, "-o", "scaled")
    assert done.returncode == 0, done.stderr
    assert "scales, attention/mlp of each block: 1.00/1.00, " in done.stderr
    assert compress("run", "scaled/recipe.yaml", "-o", "again").returncode == 0
    scaled, again = Checkpoint.open(tmp_path / "scaled"), Checkpoint.open(tmp_path / "again")
    assert all(torch.equal(scaled.read(name), again.read(name)) for name in scaled.specs)
    assert "residual_scale is fitted on a text" in compress("fold", MODELS / "base", "--keep", "0,1", "--residual-scale").line
    assert "blocks that share their weights cannot have a scale each" in compress(*asked, "--share", 2, "--calibration", TEXT).line
