"""`compress fold --share` with all that goes with it, and `compress retrain` of a compact model, as users call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from program import Program

from mergekit_plus import training as trainer
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.steps import FoldStep
from mergekit_plus.training import TrainOptions
from prune.fold import fold_of, mapped, relaxed, stack_of, stored
from prune.retrain import RetrainOptions, retrain

MODELS = Path(__file__).parents[1] / "models"
BASE = Checkpoint.open(MODELS / "base")
BLOCKS = len(stack_of(BASE).layers)
TEXT = MODELS / "text" / "docs.val.txt"
PLAN = {"blocks": 2, "kept": [0, 1], "groups": [0, 0], "parents": [0]}
SHARED = "model.layers.0.mlp.up_proj.weight"


def ran(ended: Any) -> Any:
    assert ended.returncode == 0, ended.stderr
    return ended


def test_a_model_is_folded_cured_and_handed_to_peft(compress: Program, tmp_path: Path) -> None:
    ran(compress("fold", MODELS / "base", "--share", 2, "--map", "cycle", "--parent", "average", "--relax", "lora:4", "--compact", "-o", "compact"))
    compact = stored(Checkpoint.open(tmp_path / "compact"))
    assert fold_of(compact) == mapped(range(BLOCKS), 2, "cycle", "average")
    cure = ["--train", "norms,lora", "--text", TEXT, "--window", 48, "--steps", 4, "-s", "batch=2"]
    ended = ran(compress("retrain", "compact", *cure, "--teacher", MODELS / "base", "--tail", 2, "--tail-weight", 0.1, "-o", "cured"))
    assert f"in {2 * BLOCKS + 1 + 14 * BLOCKS} tensors" in ended.stderr
    cured = stored(Checkpoint.open(tmp_path / "cured"))
    assert cured.specs == compact.specs
    assert fold_of(cured) == fold_of(compact)
    assert torch.equal(cured.read(SHARED), compact.read(SHARED))
    ran(compress("fold", "cured", "--export", "lora", "-o", "out"))
    whole, parts = Checkpoint.open(tmp_path / "cured"), Checkpoint.open(f"{tmp_path / 'out-base'}+{tmp_path / 'out-adapter'}")
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.specs)
    assert list(json.loads(ran(compress("fold", "cured", "--export", "peft", "-o", "few", "--json")).stdout)) == ["base", "adapter"]
    assert Checkpoint.open(tmp_path / "few-base").config["num_hidden_layers"] == BLOCKS // 2
    assert "is not a compact model" in compress("fold", MODELS / "base", "--export", "peft").line
    assert "in a run of its own" in compress("fold", "cured", "--export", "peft", "--share", 2).line
    assert "--export writes two folders" in compress("fold", "cured", "--export", "peft", "-o", "hf://org/name").line


def test_without_compact_the_voices_are_in_the_weights(compress: Program, tmp_path: Path) -> None:
    ran(compress("fold", MODELS / "base", "--share", 2, "--relax", "lora:4", "-o", "out"))
    out = Checkpoint.open(tmp_path / "out")
    assert out.specs == BASE.specs
    assert not torch.equal(out.read(SHARED), out.read(SHARED.replace(".0.", ".1.")))


def test_the_parents_that_a_text_chose_are_in_the_recipe(compress: Program, tmp_path: Path) -> None:
    reading = ["--calibration", TEXT, "--windows", 2, "--window", 48]
    ended = ran(compress("fold", MODELS / "base", "--share", 3, "--parent", "loss", *reading, "-o", "out"))
    assert "fold: groups have the weights of the blocks " in ended.stderr
    step = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"][0]["fold"]
    assert [parent // 3 for parent in step["parents"]] == [0, 1]
    ran(compress("run", "out/recipe.yaml", "-o", "again"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_the_recipe_folds_cures_and_stays_compact(compress: Program, tmp_path: Path) -> None:
    ran(compress("run", MODELS.parents[1] / "recipes" / "fold-relax.yaml", "-o", "out"))
    assert fold_of(stored(Checkpoint.open(tmp_path / "out"))) == mapped(range(BLOCKS), 2, "cycle", "average")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", 2, "--relax", "lora"], "relax lora: write lora:RANK, as in lora:8"),
        (["--keep", "0,1", "--relax", "lora:8"], "relax is for blocks that share; say how many do with --share"),
        (["--keep", "0,1", "--map", "cycle"], "map and parent are for blocks that share; say how many do with --share"),
        (["--remove", 1, "--calibration", TEXT, "--parent", "loss"], "map and parent are for blocks that share; say how many do with --share"),
        (["--expand", "--residual-scale"], "--expand writes out what a compact model stands for; fold that in a run of its own"),
        (["--export", "lora", "--push", "org/name"], "--export writes two folders; write them here, and publish each of them"),
        (["--export", "lora", "--map", "cycle"], "--export writes out what a compact model stands for; fold, or expand, in a run of its own"),
        (["--budget", 0.5, "--parent", "average"], "a budget is for finding a plan, on which nothing else bears; fold with --plan then"),
        (["--budget", 0.5, "--by", "gates"], "a budget is for finding a plan, on which nothing else bears; fold with --plan then"),
        (["--budget", 0.5, "--calibration", TEXT, "--dry-run"], "a plan is one small file, which is written here; leave out --dry-run and --push"),
        (["--share", 4, "--map", "cycle"], f"{BLOCKS} blocks cannot be run through 4 times"),
        (["--share", 2, "--parent", "loss"], "the parents that lose least are found on a text: give one with --calibration FILE"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[Any], message: str, compress: Program) -> None:
    assert message in compress("fold", MODELS / "base", *arguments, "-o", "out").line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": PLAN, "parent": "loss"}, "a plan says which blocks share, and whose weights; leave map and parent out"),
        ({"plan": PLAN, "map": "cycle"}, "a plan says which blocks share, and whose weights; leave map and parent out"),
        ({"keep": [0, 1], "pinned": [0]}, "pinned keeps blocks that remove would take; say how many it takes, or leave pinned out"),
    ],
)
def test_what_would_not_be_looked_at_is_a_problem_of_the_step(options: dict[str, Any], message: str) -> None:
    assert f"fold: {message}" in list(FoldStep.model_validate(options).problems({}))


def test_the_tail_is_refused_without_a_teacher(compress: Program) -> None:
    ended = compress("retrain", MODELS / "base", "--train", "norms", "--text", TEXT, "--tail", 1)
    assert "the tail is drawn towards a teacher's blocks; name one, or leave tail out" in ended.line


# ---- kills and several processes ----


def test_a_killed_cure_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer.train.__kwdefaults__, "keep_every", 0.0)  # type: ignore[arg-type]
    compact = relaxed(BASE, mapped(range(BLOCKS), 2, "cycle"), 2)
    options = RetrainOptions(("full",), (TEXT,), training=TrainOptions(steps=3, batch=2, evaluations=1), window=32, tail=1)
    save(retrain(compact, options, BASE), tmp_path / "whole")
    made, step = [0], trainer._Run.step

    def interrupted(run: Any, *arguments: Any) -> float:
        made[0] += 1
        if made[0] == 3:
            raise KeyboardInterrupt
        return step(run, *arguments)

    monkeypatch.setattr(trainer._Run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        save(retrain(compact, options, BASE), tmp_path / "out", SaveOptions(job="cure"))
    save(retrain(compact, options, BASE), tmp_path / "out", SaveOptions(job="cure", resume=True))
    assert made[0] == 4  # the last of three steps was left
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_several_processes_cure_one_set_of_shared_weights(tmp_path: Path) -> None:
    save(relaxed(BASE, mapped(range(BLOCKS), 2, "cycle"), 2), tmp_path / "compact")
    arguments = [str(tmp_path / "compact"), "--train", "full", "--text", str(TEXT), "--window", "32", "--steps", "2", "--lr", "0.001", "-s", "batch=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mergekit_plus"]
    for out, launcher in (("two", torchrun), ("one", [sys.executable, "-m", "mergekit_plus"])):
        done = subprocess.run([*launcher, "retrain", *arguments, "-o", str(tmp_path / out)], capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr
    one, two, before = (stored(Checkpoint.open(tmp_path / name)) for name in ("one", "two", "compact"))
    assert not torch.equal(one.read(SHARED), before.read(SHARED))
    for name in one.specs:
        torch.testing.assert_close(one.read(name), two.read(name), rtol=0.01, atol=0.01)
