"""Adapters as a user meets them: `compress adapter`, `MODEL+ADAPTER` in every command, recipes, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from adapter_toys import adapted, model_of, saved
from program import Ended, Program
from safetensors.torch import load_file, save_file

from mergekit_plus.adapters.extract import ExtractOptions, extract, kept
from mergekit_plus.checkpoint import Checkpoint, SaveOptions
from mergekit_plus.errors import CheckpointError, OutputError, RecipeError
from mergekit_plus.recipe import check, load, plan, run
from mergekit_plus.show import kept_lines
from mergekit_plus.steps import Execution


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A folder with a model `base`, a fine-tune `tuned`, and two adapters, `one` and `two`."""
    saved(model_of(), tmp_path / "base")
    wrapped = adapted(model_of(), tmp_path / "one", target_modules=["q_proj", "down_proj"])
    adapted(model_of(), tmp_path / "two", seed=2, target_modules=["q_proj", "v_proj"], r=2)
    saved(wrapped.merge_and_unload(), tmp_path / "tuned")
    return tmp_path


def test_extract_merge_and_apply(toys: Path, compress: Program) -> None:
    found = compress("adapter", "extract", "base", "tuned", "--rank", "4", "--json")
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert facts["out"] == "tuned-adapter"
    assert {tensor["kind"] for tensor in facts["kept"]} == {"low rank"}
    assert max(tensor["left"] / tensor["change"] for tensor in facts["kept"]) < 1e-4
    assert sorted(path.name for path in (toys / "tuned-adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "recipe.yaml"
    ]  # fmt: skip
    assert compress("adapter", "merge", "tuned-adapter", "two", "-s", "weight=1,0").stdout.startswith("wrote merged-adapter")
    assert compress("merge", "base+merged-adapter", "tuned", "-o", "same").returncode == 0
    same, tuned = (load_file(toys / name / "model.safetensors") for name in ("same", "tuned"))
    assert all(torch.allclose(same[name], tuned[name], atol=1e-5) for name in tuned)


def test_a_report_names_what_is_left_out(toys: Path) -> None:
    base, tuned = (Checkpoint.open(toys / name) for name in ("base", "tuned"))
    out = kept_lines(kept(base, tuned, extract(base, tuned, ExtractOptions(rank=1, exclude=("*.0.*",)))))
    assert out[0].startswith("model.layers.1.mlp.down_proj.weight  rank 1, relative error 0.")
    assert out[2].startswith("model.layers.0.mlp.down_proj.weight  left out: a change of norm ")
    assert out[4].endswith("over all that changed; 2 changed tensors are left out (--save-rest stores them)")


def refused(found: Ended, *words: str) -> None:
    """Exit code 2 and one line on stderr that says all of this."""
    assert (found.returncode, found.stdout, len(found.stderr.splitlines())) == (2, "", 1), found.stderr
    assert all(word in found.stderr for word in words), found.stderr


def test_mistakes_are_one_line(toys: Path, compress: Program) -> None:
    saved(model_of(hidden_size=32), toys / "wide")
    refused(compress("merge", "wide+one", "base"), "one does not fit wide", "mlp.down_proj: (16, 32) in the adapter, (32, 32) in the base")
    refused(compress("quantize", "one"), "one is an adapter, not a model", "MODEL+one", "compress adapter merge")
    refused(compress("adapter", "merge", "one", "base"), "base is a model, not an adapter")


def test_adapters_that_cannot_be_quantized_are_one_line(toys: Path, compress: Program) -> None:
    """What is no adapter, of another kind, never trained, damaged, or of another base."""
    file, config = (toys / "one" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors, said = load_file(file), config.read_text()
    (toys / "text.txt").write_text("words")
    assert compress("adapter", "quantize", "one", "--bits", "1", "-o", "packed").returncode == 0
    refused(compress("adapter", "quantize", "base"), "base is a model, not an adapter; give a folder that peft saved, or", "`compress adapter extract`")
    refused(compress("adapter", "quantize", "one", "--base", "two", "--text", "text.txt"), "two is an adapter, not a model", "MODEL+two")
    saved(model_of(hidden_size=32), toys / "wide")
    refused(compress("merge", "wide+packed", "base"), "packed does not fit wide", "mlp.down_proj: (16, 32) in the adapter, (32, 32) in the base")
    saved(model_of("GPT2LMHeadModel"), toys / "gpt2")
    refused(compress("merge", "gpt2+packed", "base"), "packed does not fit gpt2", "no 'model.layers.0.mlp.down_proj.weight'", "the base that it was trained on")
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}, file)
    refused(compress("adapter", "quantize", "one"), "one changes nothing: every B is zero", "compress adapter train")
    config.write_text(said.replace('"LORA"', '"IA3"'))
    refused(compress("adapter", "quantize", "one"), "one is an adapter of type IA3; LORA is the one that is known here", "with peft")
    config.unlink()
    refused(compress("adapter", "quantize", "one"), "there is no adapter_config.json beside it", "save it again with peft")
    codes = load_file(toys / "packed" / "adapter_model.packed.safetensors")
    codes["codes"][0] ^= 1
    save_file(codes, toys / "packed" / "adapter_model.packed.safetensors")
    refused(compress("adapter", "expand", "packed"), "down_proj.lora_A.weight are not those that were written (checksum); get the file again")
    refused(compress("adapter", "expand", "two"), "two is not packed: it is as peft and engines read it")
    assert not [path.name for path in toys.iterdir() if path.name.endswith(("-4bit", "-expanded"))]


def test_inspect_says_what_an_adapter_is_and_how_it_is_packed(toys: Path, compress: Program) -> None:
    assert compress("adapter", "quantize", "two", "--average-bits", "1.5", "-o", "packed").returncode == 0
    facts = json.loads(compress("inspect", "packed", "--json").stdout)
    assert facts["adapter"] == {"type": "LORA", "base": "an unnamed base", "modules": 4, "ranks": [2]}
    assert (facts["packed"]["codebook"], facts["packed"]["scale"]) == ("l2", "component")
    assert 1 <= facts["packed"]["bits"] <= 1.5
    shown = compress("inspect", "packed").stdout
    assert "packed: LORA adapter of an unnamed base, 8 tensors" in shown
    assert "4 modules of rank 2" in shown
    assert "on the disk, " in shown
    assert json.loads(compress("inspect", "base", "--json").stdout)["adapter"] is None


def test_an_adapter_is_a_folder(toys: Path) -> None:
    recipe = check({"inputs": {"one": "one"}, "steps": [{"merge_adapters": {"models": ["one"]}}]}, toys, "r")
    with pytest.raises(RecipeError, match=r"x\.safetensors: an adapter is a folder, .* write to .*x, without texts"):
        plan(recipe, Execution(out=toys / "x.safetensors"))


def test_recipes_with_adapters_run_again_from_their_outputs(toys: Path) -> None:
    (toys / "recipe.yaml").write_text("inputs: {a: base+one+two, b: tuned}\nsteps: [{merge: {models: [a, b]}}]\n")
    first = run(load(toys / "recipe.yaml"), Execution(out=toys / "out"))
    assert set(first.manifest.inputs) == {str(toys / name) for name in ("base", "one", "two")} | {"tuned"}
    written = yaml.safe_load((toys / "out" / "recipe.yaml").read_text())["inputs"]["a"]
    assert written["ref"] == "../base+../one+../two"
    assert {"0/model.safetensors", "1/adapter_model.safetensors", "2/adapter_model.safetensors"} <= set(written["sha256"])
    run(load(toys / "out" / "recipe.yaml"), Execution(out=toys / "again"))
    assert (toys / "again" / "model.safetensors").read_bytes() == (toys / "out" / "model.safetensors").read_bytes()
    adapted(model_of(), toys / "two", seed=9, target_modules=["q_proj", "v_proj"], r=2)
    with pytest.raises(CheckpointError, match=r"2/adapter_model\.safetensors is not the file that the recipe was made with"):
        run(load(toys / "out" / "recipe.yaml"), Execution(out=toys / "third"))
    assert not (toys / "third").exists()


def test_mergekits_recipes_name_adapters_too(toys: Path) -> None:
    models = [{"model": str(toys / name), "parameters": {"weight": 1}} for name in (f"base+{toys / 'one'}", "tuned")]
    (toys / "mergekit.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    run(load(toys / "mergekit.yaml"), Execution(out=toys / "out"))
    tuned, out = (Checkpoint.open(toys / name) for name in ("tuned", "out"))
    assert all(torch.allclose(out.read(name), tuned.read(name), atol=1e-6) for name in tuned.specs)


def test_a_plan_of_merged_adapters_reads_nothing(toys: Path) -> None:
    step = {"merge_adapters": {"method": "ties", "models": ["one", "two"], "density": 0.5}}
    recipe = check({"inputs": {"one": "one", "two": "two"}, "steps": [step]}, toys, "r")
    facts = plan(recipe, Execution(out=toys / "out"))
    assert (facts["files"], facts["tensors"]) == (1, {"computed": 12, "copied": 0})


def test_an_adapter_may_have_options_of_its_own(toys: Path) -> None:
    for method in ("linear", "svd", "task_arithmetic"):
        step = {"merge_adapters": {"method": method, "models": {"one": {"weight": 3}, "two": {}}, "rank": 6, "normalize": False}}
        recipe = check({"inputs": {"one": "one", "two": "two"}, "steps": [step]}, toys, "r")
        run(recipe, Execution(out=toys / method))
    results = [Checkpoint.open(f"{toys / 'base'}+{toys / method}") for method in ("linear", "svd", "task_arithmetic")]
    weights = [result.read("model.layers.0.self_attn.q_proj.weight") for result in results]
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert torch.allclose(weights[0], weights[2], atol=1e-6)
    assert json.loads((toys / "svd" / "adapter_config.json").read_text())["r"] == 6


def test_every_problem_of_a_step_is_told(toys: Path) -> None:
    steps = [
        {"merge_adapters": {"method": "tise", "models": ["one", "tow"], "base": "one", "rank": 0, "dtype": "float12"}},
        {"extract_adapter": {"base": "one", "tuned": "tuend", "rank": 1, "energy": 1}},
    ]
    with pytest.raises(RecipeError) as caught:
        check({"inputs": {"one": "one", "tuned": "tuned"}, "steps": steps}, toys, "r")
    for problem in (
        "merge_adapters: 'tow' is not an input", "merge_adapters: 'base' is for models", "rank must be 1 or more",
        "unknown merge method 'tise'. Did you mean 'ties'", "merge_adapters: unknown dtype 'float12'",
        "extract_adapter: 'tuend' is not an input. Did you mean 'tuned'", "give a rank, or an energy",
        "step 2, extract_adapter: it reads inputs, not the step before it",
    ):  # fmt: skip
        assert problem in str(caught.value)


def test_texts_are_not_measured_on_adapters(toys: Path) -> None:
    (toys / "text.txt").write_text("words")
    step = {"extract_adapter": {"base": "base", "tuned": "tuned", "rank": 1}}
    recipe = check({"inputs": {"base": "base", "tuned": "tuned"}, "steps": [step], "checks": {"texts": {"t": "text.txt"}}}, toys, "r")
    with pytest.raises(RecipeError, match="texts are measured on models"):
        plan(recipe, Execution(out=toys / "out"))


def test_overwrite_replaces_an_adapter(toys: Path) -> None:
    recipe = check({"inputs": {"one": "one", "two": "two"}, "steps": [{"merge_adapters": {"models": ["one", "two"]}}]}, toys, "r")
    for _ in range(2):
        run(recipe, Execution(SaveOptions(overwrite=True), out=toys / "out"))
    with pytest.raises(OutputError, match="exists already"):
        run(recipe, Execution(out=toys / "out"))
