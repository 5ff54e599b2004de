"""A recipe is read strictly, runs as one stream, and the folder that it writes holds what is needed to do it again."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckFailed, CheckpointError, OutputError, RecipeError
from mergekit_plus.recipe import Recipe, build, check, load, load_all, plan, run
from mergekit_plus.steps import Execution

REPOSITORY = Path(__file__).parent.parent
MODELS = REPOSITORY / "tests" / "models"


def model(path: Path, value: float) -> Path:
    """A little model in a folder."""
    weight = torch.full((4, 64), value) + torch.arange(64) / 64
    source = Checkpoint.from_tensors({"up_proj.weight": weight, "norm.weight": torch.ones(4)})
    save(Checkpoint("m", source.source, {"config.json": b'{"dtype": "float32"}'}), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the models a (1) and b (3)."""
    model(tmp_path / "a", 1.0)
    model(tmp_path / "b", 3.0)
    return tmp_path


def written(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(textwrap.dedent(text))
    return load(folder / "recipe.yaml")


def refusal(folder: Path, text: str) -> list[str]:
    """The problems of a recipe, one by one."""
    with pytest.raises(RecipeError) as caught:
        written(folder, text)
    return str(caught.value).removeprefix(f"{folder / 'recipe.yaml'}: ").split("; ")


def tensor_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


MERGE = "inputs: {a: a, b: b}\nsteps:\n  - merge: {models: [a, b]}\n"


# ---- reading ----


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_can_be_read_and_planned(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # mergekit's are relative to where one stands; test_stream.py runs them
    for recipe in load_all(path).values():
        facts = plan(recipe, Execution(out=tmp_path / "out"))
        assert facts["tensors"]["computed"] + facts["tensors"]["copied"] >= 48 or "train_adapter" in recipe.steps[0]
    assert not (tmp_path / "out").exists()


def test_per_model_options_are_gathered_in_the_order_of_the_models(folder: Path) -> None:
    recipe = written(folder, "inputs: {a: a, b: b, c: a}\nsteps: [{merge: {models: {c: {weight: 3}, a: , b: {weight: 2}}, normalize: false}}]")
    step = recipe.steps[0]["merge"]
    assert step.options() == {"weight": [3, 1.0, 2], "normalize": False}  # type: ignore[union-attr]
    assert build(recipe).result.read("up_proj.weight")[0, 0] == 3 * 1 + 1 * 1 + 2 * 3
    rest = written(folder, "inputs: {a: a, b: b}\nsteps: [{merge: {models: {a: {weight: 3}, b: {}}, weight: 5}}]")
    assert rest.steps[0]["merge"].options() == {"weight": [3, 5]}  # type: ignore[union-attr]


def test_unknown_keys_are_answered_with_the_nearest_at_every_level(folder: Path) -> None:
    assert refusal(
        folder,
        """
        inputs: {a: {ref: a, sha265: {}}}
        stepz: []
        steps:
          - merge: {models: [a], wieght: 1}
          - merge: {models: {a: {wieht: 1}}, method: linear}
          - dequantize: {off_: a}
        checks: {windw: 1, limits: {perplexty: 3}}
        """,
    ) == [
        "inputs.a: unknown key 'sha265'. Did you mean 'sha256'?",
        "checks.limits: unknown key 'perplexty'. Did you mean 'perplexity'?",
        "checks: unknown key 'windw'. Did you mean 'window'?",
        "unknown key 'stepz'. Did you mean 'steps'?",
        "step 3, dequantize: unknown key 'off_'. Did you mean 'of'?",
        "merge: linear has no option 'wieght'. Did you mean 'weight'?",
        "merge: linear has no option 'wieht'. Did you mean 'weight'?",
    ]


def test_every_problem_of_every_step_is_reported_at_once(folder: Path) -> None:
    assert refusal(
        folder,
        """
        inputs: {a: a, b: b}
        steps:
          - merge: {models: [a, bb], method: ties, density: 50, dtype: float17}
          - quantize: {bits: 9, format: pakc-quantized, of: c}
          - quntize: {}
          - merge
          - quantize: {bits: four}
          - merge: {models: a}
        """,
    ) == [
        "step 3: unknown operation 'quntize'. Did you mean 'quantize'?",
        "step 4: a step is one operation with its options, as in `merge: {...}`, not 'merge'",
        "step 5, quantize: bits: Input should be a valid integer, unable to parse string as an integer",
        "step 6, merge: models: a list of inputs, as in [code, docs], or a table with the options of each, as in {code: {weight: 0.6}, docs: {}}",
        "merge: 'bb' is not an input. Did you mean 'b'?",
        "merge: ties works on task vectors and needs the model they start from: give it with --base",
        "merge: ties: density=50: Input should be less than or equal to 1",
        "merge: unknown dtype 'float17'. Did you mean 'float16'?",
        "quantize: bits=9: a weight has 2 to 8 bits",
        "quantize: unknown format 'pakc-quantized'. Did you mean 'pack-quantized'?",
        "quantize: 'c' is not an input. Known: a, b.",
    ]


def test_what_a_step_makes_is_never_lost(folder: Path) -> None:
    assert refusal(folder, "inputs: {a: a, b: b}\nsteps: [{quantize: {bits: 4}}, {merge: {models: [a, b]}}]") == [
        "step 1, quantize: say which input it works on, with `of:`", "there are a, b",
        "step 2, merge: it reads inputs, not the step before it, so that what step 1 makes would be lost", "make it the first, or a recipe of its own",
    ]  # fmt: skip
    assert "step 2, quantize: it reads inputs" in refusal(folder, MERGE + "  - quantize: {bits: 4, of: a}")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a recipe: it must be a table with inputs and steps"),
        ("inputs: {a: a", "recipe.yaml is not YAML that can be read: while parsing"),
        ("inputs: {a: a, b: b}", "steps: there is nothing to do"),
        ("inputs: [a]\nsteps: []", "inputs: Input should be a valid dictionary"),
        ("inputs: {a: a}\nsteps: {quantize: {bits: 4}}", "steps: Input should be a valid list"),
        ("inputs: {a: a}\nfolder: /tmp", "unknown key 'folder'"),
        ("inputs: {a: a}\nsteps: [{merge: {models: [a], seed: x}}]", "step 1, merge: seed: Input should be a valid integer"),
        ("inputs: {a: a}\nchecks: {beside: [b], against: c}", "checks: 'b' is not an input. Known: a.; checks: 'c' is not an input"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(folder: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        written(folder, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.yaml: No such file or directory"):
        load(tmp_path / "none.yaml")


# ---- running ----


def test_paths_are_relative_to_the_recipe_and_out_to_where_one_stands(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    recipe = written(folder, MERGE + "out: merged")
    monkeypatch.chdir(elsewhere)
    outcome = run(recipe)
    assert sorted(os.listdir(elsewhere / "merged")) == ["README.md", "config.json", "manifest.json", "model.safetensors", "recipe.yaml"]
    assert outcome.out == Path("merged")
    assert Checkpoint.open(elsewhere / "merged").read("up_proj.weight")[0, 0] == 2.0


def test_a_recipe_without_steps_copies_its_input(folder: Path) -> None:
    run(written(folder, "inputs: {a: a}"), Execution(out=folder / "copy"))
    assert tensor_bytes(folder / "copy") == tensor_bytes(folder / "a")


def test_without_an_output_nothing_begins(folder: Path) -> None:
    for begin in (run, plan):
        with pytest.raises(RecipeError, match="names no output; give one with -o, or `out:` in the recipe"):
            begin(written(folder, MERGE))


def test_packed_weights_are_not_written_into_one_file(folder: Path) -> None:
    recipe = written(folder, "inputs: {a: a}\nsteps: [{quantize: {bits: 4, group_size: 32}}]\nout: o.safetensors")
    for begin in (run, plan):
        with pytest.raises(RecipeError) as caught:
            begin(recipe, Execution(out=folder / "o.safetensors"))
        assert str(caught.value) == (
            f"{folder / 'o.safetensors'}: packed weights need a folder, because its config.json says how they were packed; "
            f"write to {folder / 'o'}, or quantize with the format dense"
        )
    assert not (folder / "o.safetensors").exists()
    dense = written(folder, "inputs: {a: a}\nsteps: [{quantize: {bits: 4, group_size: 32, format: dense}}]")
    run(dense, Execution(out=folder / "o.safetensors"))
    assert (folder / "o.safetensors").is_file()


def test_a_text_is_not_promised_to_be_measured_on_one_file(folder: Path) -> None:
    (folder / "t.txt").write_text("text")
    with pytest.raises(RecipeError, match=r"a text is measured on a model, which needs its config.json; write to the folder .*/o$"):
        run(written(folder, MERGE + "checks: {texts: {t: t.txt}}"), Execution(out=folder / "o.safetensors"))
    assert not (folder / "o.safetensors").exists()


# ---- the recipe that the output holds ----


def test_the_resolved_recipe_names_every_input_with_its_digests_and_gives_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    recipe = written(folder, MERGE.replace("[a, b]", "{a: {weight: 3}, b: {weight: 1}}") + "  - quantize: {bits: 3, group_size: 32, symmetric: false}")
    (folder / "deep").mkdir()
    outcome = run(recipe, Execution(SaveOptions(max_shard_size=100), out=Path("deep/out")))
    kept = yaml.safe_load((folder / "deep" / "out" / "recipe.yaml").read_text())
    assert kept["inputs"]["a"]["ref"] == "../../a"
    assert kept["inputs"]["a"]["sha256"] == {name: facts["sha256"] for name, facts in outcome.manifest.inputs["a"].items()}
    assert set(kept["inputs"]["b"]["sha256"]) == {"model.safetensors", "config.json"}
    assert kept["steps"][0]["merge"]["models"] == {"a": {"weight": 3}, "b": {"weight": 1}}
    assert kept["max_shard_size"] == "100"

    monkeypatch.chdir("/")  # its paths do not depend on where one stands
    again = run(load(folder / "deep" / "out" / "recipe.yaml"), Execution(out=folder / "again"))
    names = sorted(path.name for path in (folder / "again").glob("*.safetensors"))
    assert len(names) > 1
    assert all((folder / "again" / name).read_bytes() == (folder / "deep" / "out" / name).read_bytes() for name in names)
    assert again.manifest.outputs["config.json"] == outcome.manifest.outputs["config.json"]
    listed = json.loads((folder / "again" / "manifest.json").read_text())["outputs"]
    assert set(listed) == set(os.listdir(folder / "again")) - {"manifest.json"}


def test_an_output_behind_a_link_still_finds_its_inputs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    far = tmp_path_factory.mktemp("disk") / "some" / "where"
    far.mkdir(parents=True)
    (folder / "link").symlink_to(far)
    run(written(folder, MERGE), Execution(out=folder / "link" / "out"))
    run(load(far / "out" / "recipe.yaml"), Execution(out=folder / "again"))
    assert tensor_bytes(folder / "again") == tensor_bytes(far / "out")


def test_a_changed_input_is_refused_by_its_digest_and_nothing_is_written(folder: Path) -> None:
    run(written(folder, MERGE), Execution(out=folder / "out"))
    save(Checkpoint.open(model(folder / "other", 9.0)), folder / "b", SaveOptions(overwrite=True))
    with pytest.raises(CheckpointError, match=r"^input 'b': model.safetensors is not the file that the recipe was made with \(its SHA-256 differs\)"):
        run(load(folder / "out" / "recipe.yaml"), Execution(out=folder / "again"))
    assert not (folder / "again").exists()


def test_an_output_is_not_overwritten_unasked(folder: Path) -> None:
    recipe = written(folder, MERGE)
    run(recipe, Execution(out=folder / "out"))
    for begin in (run, plan):
        with pytest.raises(OutputError, match="exists already"):
            begin(recipe, Execution(out=folder / "out"))


# ---- checks, on a real model ----


def test_stages_and_inputs_are_measured_and_limits_that_are_not_kept_are_named(tmp_path: Path) -> None:
    parsed = {
        "inputs": {name: str(MODELS / name) for name in ("code", "docs")},
        "steps": [{"merge": {"models": ["code", "docs"]}}, {"quantize": {"bits": 2, "group_size": 32}}],
        "checks": {
            "texts": {"code": "models/text/code.test.txt"}, "windows": 2, "against": "code", "stages": True,
            "limits": {"perplexity": {"code": 1}, "perplexity_ratio": 1.01, "kl": 100, "top1": 0.99, "bits_per_weight": 2, "bytes": "1kB"},
        },
    }  # fmt: skip
    outcome = run(check(parsed, Path(__file__).parent, "test"), Execution(out=tmp_path / "out"))
    assert [row["model"] for row in outcome.table] == ["code", "after step 1, merge", str(tmp_path / "out")]
    code, merged, packed = outcome.table
    assert code["ppl code"] < merged["ppl code"] < packed["ppl code"]
    assert merged["bits/weight"] == 16 > packed["bits/weight"]
    assert [failure.partition(" is ")[0].partition(" are ")[0].partition(" take ")[0] for failure in outcome.failures] == [
        "perplexity on code", "perplexity relative to code on code", "top-1 agreement with code on code", "bits a weight", "the tensors",
    ]  # fmt: skip
    with pytest.raises(CheckFailed, match="perplexity on code is .*, at most 1 is wanted; perplexity relative"):
        outcome.raise_failures()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    kept = load(tmp_path / "out" / "recipe.yaml")
    assert kept.checks.limits == check(parsed, Path(__file__).parent, "test").checks.limits
