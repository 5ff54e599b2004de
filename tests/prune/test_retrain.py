"""`compress retrain`: what trains changes, zeros stay, all else is copied; the report, the refusals, a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from perp_toys import Headers, pruned
from program import Program

from mergekit_plus import training as trainer
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checkpoint.stage import partial_of
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize
from mergekit_plus.model import describe
from mergekit_plus.progress import on
from mergekit_plus.training import TrainOptions
from prune.retrain import RetrainOptions, retrain, trainable

MODELS = Path(__file__).parents[1] / "models"
TRAINING = TrainOptions(steps=4, lr=3e-3, batch=2, evaluations=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model with half of its linear weights zero."""
    dense, folder = Checkpoint.open(MODELS / "base"), tmp_path_factory.mktemp("pruned") / "pruned"
    tensors = pruned({name: dense.read(name) for name in dense.specs}, describe(dense).linears)
    save(replace(Checkpoint.from_tensors(tensors), files=dense.files), folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few windows of text."""
    file = tmp_path_factory.mktemp("text") / "code.txt"
    file.write_text((MODELS / "text" / "code.val.txt").read_text()[:4000])
    return file


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def options_for(text: Path, *variants: str, **more: Any) -> RetrainOptions:
    return RetrainOptions(variants, (text,), **{"training": TRAINING, "window": 48, **more})


def test_what_trains_changes_and_zeros_stay_and_all_else_is_copied(small: Path, text: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(small)
    save(retrain(before, options_for(text, "norms", "mask_lora")), tmp_path / "out")
    after = Checkpoint.open(tmp_path / "out")
    roles = describe(before)
    trained = {*roles.linears, *roles.names("norm")}
    assert after.specs == before.specs
    changed = {name for name in before.specs if not torch.equal(before.read(name), after.read(name))}
    assert changed <= trained
    assert len(changed) > len(trained) / 2
    for name in roles.linears:
        was, now = before.read(name), after.read(name)
        assert torch.equal(was == 0, now == 0)
        assert torch.equal(was[was == 0].view(torch.int16), now[was == 0].view(torch.int16))
    load_model(after)


def test_retraining_lowers_perplexity(small: Path, text: Path) -> None:
    before = Checkpoint.open(small)
    ids = tokenize(load_tokenizer(before), text.read_text())
    was = perplexity(load_model(before), ids, window=48).value
    after = retrain(before, options_for(text, "norms", "mask_lora", training=replace(TRAINING, steps=12)))
    assert perplexity(load_model(after), ids, window=48).value < 0.95 * was


def test_the_same_seed_gives_the_same_bytes_and_another_others(small: Path, text: Path) -> None:
    before = Checkpoint.open(small)
    first, again, other = (retrain(before, options_for(text, "mask_lora", training=replace(TRAINING, steps=2, seed=seed))) for seed in (0, 0, 1))
    name = describe(before).linears[0]
    assert torch.equal(first.read(name), again.read(name))
    assert not torch.equal(first.read(name), other.read(name))


def test_a_teacher_draws_the_model_towards_itself(small: Path, text: Path) -> None:
    from mergekit_plus.evaluate import compare

    before, dense = Checkpoint.open(small), Checkpoint.open(MODELS / "base")
    teacher, ids = load_model(dense), tokenize(load_tokenizer(before), text.read_text())
    after = retrain(before, options_for(text, "mask_lora", training=replace(TRAINING, steps=12)), dense)
    assert compare(load_model(after), teacher, ids, window=48).kl < 0.8 * compare(load_model(before), teacher, ids, window=48).kl


def test_a_tuned_rate_is_the_one_that_does_best_on_what_was_held_out(small: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune.retrain.RATES", (1e-9, 3e-3))
    before, name = Checkpoint.open(small), "model.layers.0.mlp.up_proj.weight"
    tuned = retrain(before, options_for(text, "mask_lora", tune_lr=True))
    chosen = retrain(before, options_for(text, "mask_lora"))  # at 3e-3
    assert torch.equal(tuned.read(name), chosen.read(name))


# ---- before anything is read ----


def test_the_report_and_the_plan_read_no_tensor(small: Path, text: Path) -> None:
    opened = Checkpoint.open(small)
    headers = Checkpoint("headers", Headers(opened.specs), opened.files)
    rows = {row.variant: row for row in trainable(headers, options_for(text, "norms", "mask_lora"))}
    config = opened.config
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    assert (rows["norms"].tensors, rows["norms"].parameters) == (2 * layers + 1, (2 * layers + 1) * hidden)
    linears = [opened.specs[name].shape for name in describe(opened).linears]
    assert rows["mask_lora"].parameters == sum(16 * (out + inputs) for out, inputs in linears)
    assert rows["total"].parameters == rows["norms"].parameters + rows["mask_lora"].parameters
    planned = retrain(headers, options_for(text, "norms", "mask_lora"))
    assert planned.specs == opened.specs
    assert planned.notes[-1].startswith(f"trains {rows['total'].parameters:,} parameters in {2 * layers + 1 + len(linears)} tensors")


def test_a_dry_run_shows_the_report_and_writes_nothing(small: Path, text: Path, compress: Program, tmp_path: Path) -> None:
    ended = compress("retrain", small, "--train", "norms,mask_lora", "--rank", 4, "--text", text, "-o", "out", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "% of the model: norms " in ended.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "norm"], "unknown retraining variant 'norm'. Did you mean 'norms'?"),
        (["--train", "biases"], "biases: the model has nothing of the kind to train; leave it out"),
        (["--train", "norms", "-s", "stepz=3"], "there is no option 'stepz'. Did you mean 'steps'?"),
        (["--train", "norms", "-s", "schedule=stairs"], "schedule='stairs': Input should be 'linear', 'cosine' or 'constant'"),
        (["--train", "norms", "--steps", "0"], "steps is 0; it must be at least 1"),
        (["--train", "norms", "--lr", "0.1", "--tune-lr"], "tune_lr finds the rate; leave out lr, or tune_lr"),
        (["--train", "sara"], "sara trains the smallest weights, zeros first, so that what was pruned comes back; allow it with --allow-densify"),
        (["--train", "norms", "--window", "4000"], "a window of 4000 tokens: the model takes 512 at most; give a smaller --window"),
        (["--train", "norms", "--text", "short.txt"], "has 2 tokens, a window is 48; give a longer text"),
        (["--train", "norms", "--text", "one.txt"], "the text is one window of 48 tokens; retraining needs one to train on and one to choose by"),
        (["--train", "norms", "--text", "missing.txt"], "retrain: text: the text missing.txt is not there"),
        (["--train", "norms", "--lr", "1e30", "--text", "code.txt"], "is not finite, and nothing was gained before; give a smaller --lr"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], message: str, small: Path, text: Path, compress: Program, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x y")
    (tmp_path / "one.txt").write_text(text.read_text()[:200])
    (tmp_path / "code.txt").write_text(text.read_text())
    rest = [] if "--text" in arguments else ["--text", text]
    steps = [] if "--steps" in arguments else ["--steps", 3]
    window = [] if "--window" in arguments else ["--window", 48]
    ended = compress("retrain", small, "-o", "out", *rest, *steps, *window, *arguments)
    assert message in ended.line
    assert not (tmp_path / "out").exists()


def test_quantized_models_are_refused(small: Path, text: Path, tmp_path: Path) -> None:
    from quant import Scheme
    from quant.plan import quantize

    save(quantize(Checkpoint.open(small), Scheme(4, 32)), tmp_path / "packed")
    with pytest.raises(CheckpointError, match="is quantized already"):
        retrain(Checkpoint.open(tmp_path / "packed"), options_for(text, "norms"))


def test_densifying_is_done_where_it_is_asked_for(small: Path, text: Path) -> None:
    before = Checkpoint.open(small)
    with pytest.raises(OptionError, match="--allow-densify"):
        retrain(before, options_for(text, "sara"))
    after = retrain(before, options_for(text, "sara", allow_densify=True))
    log = StringIO()
    load_model(after, progress=on(log))
    linears = describe(before).linears
    lost = sum(int((before.read(name) == 0).sum() - (after.read(name) == 0).sum()) for name in linears)
    assert lost > 0
    assert f"; {lost} weights that were zero are not any more" in log.getvalue()


# ---- tied heads, recipes, kills ----


def test_a_tied_head_becomes_a_matrix_of_its_own(text: Path, tmp_path: Path) -> None:
    import transformers

    base = Checkpoint.open(MODELS / "base")
    config = transformers.GPT2Config(vocab_size=base.config["vocab_size"], n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    saved = Checkpoint.open(tmp_path / "gpt2")
    model = replace(saved, files={**base.files, **saved.files})
    assert "lm_head.weight" not in model.specs
    save(retrain(model, options_for(text, "head")), tmp_path / "out")
    after = Checkpoint.open(tmp_path / "out")
    assert set(after.specs) - set(model.specs) == {"lm_head.weight"}
    assert after.config["tie_word_embeddings"] is False
    loaded = load_model(after)
    assert torch.equal(loaded.transformer.wte.weight, model.read("transformer.wte.weight"))
    assert torch.equal(loaded.lm_head.weight, after.read("lm_head.weight"))
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)


def test_a_recipe_retrains_and_the_one_in_the_output_runs_again(small: Path, text: Path, compress: Program, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "code.txt").write_text(text.read_text())
    step = {"train": ["norms"], "text": {"texts": "code.txt", "window": 48}, "steps": 2, "batch": 2, "lr": 0.01}
    (tmp_path / "here" / "recipe.yaml").write_text(yaml.safe_dump({"inputs": {"model": str(small)}, "steps": [{"retrain": step}], "out": "out"}))
    assert compress("run", "here/recipe.yaml").returncode == 0
    ended = compress("run", "out/recipe.yaml", "-o", "again")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    told = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"][0]["retrain"]["text"]
    assert (told["texts"], told["window"], list(told["sha256"])) == (["../here/code.txt"], 48, ["code.txt"])
    dry = compress("run", "out/recipe.yaml", "-o", "third", "--dry-run").stdout
    assert "trains for 2 steps of 2 windows of 48 tokens; " in dry
    (tmp_path / "here" / "code.txt").write_text("another text " * 100)
    assert "the text code.txt is not the file that the recipe was made with" in compress("run", "out/recipe.yaml", "-o", "third", "--dry-run").line
    shown = json.loads(compress("methods", "mask_lora", "--json").stdout)["mask_lora"]
    assert [option["name"] for option in shown["options"]] == ["rank", "alpha"]


def test_a_killed_retraining_goes_on_to_the_same_bytes(small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer.train.__kwdefaults__, "keep_every", 0.0)  # type: ignore[arg-type]
    before, options = Checkpoint.open(small), options_for(text, "norms", "mask_lora")
    save(retrain(before, options), tmp_path / "whole")
    made, step = [0], trainer._Run.step

    def interrupted(run: Any, *arguments: Any) -> float:
        made[0] += 1
        if made[0] == 4:
            raise KeyboardInterrupt
        return step(run, *arguments)

    monkeypatch.setattr(trainer._Run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        save(retrain(before, options), tmp_path / "out", SaveOptions(job="retrain"))
    assert (partial_of(tmp_path / "out") / "work" / "0" / "training" / trainer.STATE).exists()
    made[0] = 10
    save(retrain(before, options), tmp_path / "out", SaveOptions(job="retrain", resume=True))
    assert made[0] == 11  # the last of four steps was left
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_several_processes_retrain_with_the_same_command(small: Path, text: Path, tmp_path: Path) -> None:
    """As one process does, but for rounding; the second one writes nothing."""
    arguments = [str(small), "--train", "norms", "--text", str(text), "--window", "48", "--steps", "2", "--lr", "0.01", "-s", "batch=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mergekit_plus"]
    for out, launcher in (("two", torchrun), ("one", [sys.executable, "-m", "mergekit_plus"])):
        done = subprocess.run([*launcher, "retrain", *arguments, "-o", str(tmp_path / out)], capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote") == 1
    one, two = (Checkpoint.open(tmp_path / out) for out in ("one", "two"))
    name = describe(one).names("norm")[0]
    assert not torch.equal(one.read(name), Checkpoint.open(small).read(name))
    torch.testing.assert_close(one.read(name), two.read(name), rtol=0.01, atol=0.01)


def test_pruned_retrained_and_quantized_zeros_are_zeros(compress: Program, tmp_path: Path) -> None:
    from quant.plan import dequantize

    ended = compress("run", MODELS.parents[1] / "recipes" / "prune-perp-quantize.yaml", "-o", "out")
    assert ended.returncode == 0, ended.stderr
    after = dequantize(Checkpoint.open(tmp_path / "out"))
    for name in describe(Checkpoint.open(MODELS / "base")).linears:
        weight = after.read(name)
        assert (weight == 0).sum() >= weight.numel() // 2
