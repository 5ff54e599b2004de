"""The whole stream on the small real models: merge, quantize, save; the same bytes by every way; loaded by the tools people already use."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_plus import recipe as recipes
from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.checks import Checks, measure
from mergekit_plus.errors import CheckpointError, RecipeError
from mergekit_plus.merge.plan import merge
from mergekit_plus.progress import quiet
from mergekit_plus.steps import Execution
from quant import Scheme
from quant.plan import dequantize, quantize

REPOSITORY = Path(__file__).parent.parent
MODELS = REPOSITORY / "tests" / "models"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.7, 0.3]},
    "slerp": {"t": 0.3},
    "ties": {"density": 0.4},
    "dare_ties": {"density": [0.5, 0.8]},
    "pcb": {"lambda": 0.5, "ratio": 0.3},
}


def opened(name: str) -> Checkpoint:
    return Checkpoint.open(MODELS / name)


def merged(method: str) -> Checkpoint:
    base = None if method in ("linear", "slerp") else opened("base")
    return merge([opened("code"), opened("docs")], method, base, METHODS[method])


def tensor_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("method", METHODS)
def test_one_stream_equals_the_staged_run_byte_for_byte(tmp_path: Path, method: str) -> None:
    scheme = Scheme(4, 32, symmetric=method != "pcb")
    save(merged(method), tmp_path / "merged")
    save(quantize(Checkpoint.open(tmp_path / "merged"), scheme), tmp_path / "staged")
    save(quantize(merged(method), scheme), tmp_path / "streamed")
    assert tensor_bytes(tmp_path / "staged") == tensor_bytes(tmp_path / "streamed")
    assert (tmp_path / "staged" / "config.json").read_bytes() == (tmp_path / "streamed" / "config.json").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_do_not_depend_on_workers_memory_or_how_the_inputs_are_sharded(tmp_path: Path, method: str) -> None:
    for name in ("base", "code", "docs"):
        save(opened(name), tmp_path / name, SaveOptions(max_shard_size=200_000 if name == "code" else 10**9))
    base = None if method in ("linear", "slerp") else Checkpoint.open(tmp_path / "base")
    again = merge([Checkpoint.open(tmp_path / "code"), Checkpoint.open(tmp_path / "docs")], method, base, METHODS[method])
    save(merged(method), tmp_path / "one", SaveOptions(workers=1))
    save(again, tmp_path / "other", SaveOptions(workers=3, memory=210_000_000))
    assert tensor_bytes(tmp_path / "one") == tensor_bytes(tmp_path / "other")


RECIPES = [(path, name) for path in sorted((REPOSITORY / "recipes").rglob("*.yaml")) for name in recipes.load_all(path)]


@pytest.mark.parametrize(("path", "combination"), RECIPES, ids=lambda part: str(part.relative_to(REPOSITORY)) if isinstance(part, Path) else part)
def test_every_recipe_runs_and_its_checks_hold(tmp_path: Path, path: Path, combination: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # mergekit's files are relative to where one stands
    outcome = recipes.run(recipes.load_all(path)[combination], Execution(out=tmp_path / "out"))
    assert outcome.failures == []
    again = recipes.run(recipes.load(tmp_path / "out" / "recipe.yaml"), Execution(out=tmp_path / "again"))
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "again")
    assert {name: file for name, file in again.manifest.outputs.items() if name.endswith("safetensors")} == {
        name: file for name, file in outcome.manifest.outputs.items() if name.endswith("safetensors")
    }


def test_a_recipe_refuses_an_input_that_is_not_the_one_it_was_made_with(tmp_path: Path) -> None:
    shutil.copytree(MODELS / "code", tmp_path / "model")
    written = {"inputs": {"m": "model"}, "steps": [{"quantize": {"bits": 8}}]}
    recipes.run(recipes.check(written, tmp_path, "test"), Execution(out=tmp_path / "out"))
    shard = next((tmp_path / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(CheckpointError, match=r"input 'm': model-.* is not the file that the recipe was made with"):
        recipes.run(recipes.load(tmp_path / "out" / "recipe.yaml"), Execution(out=tmp_path / "again"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("recipe", "problems"),
    [
        (
            {"inputs": {"a": "a", "b": "b"}, "steps": [{"merge": {"models": ["a", "c"], "density": 50, "wieght": 1, "method": "ties", "base": "a"}}]},
            ["'c' is not an input", "no option 'wieght'", "'weight'", "density", "less than or equal to 1"],
        ),
        (
            {"inputs": {"a": "a"}, "steps": [{"quantize": {"bits": 9, "method": "rnt"}}], "checks": {"limits": {"kl": 1}}, "outt": "x"},
            ["unknown key 'outt'. Did you mean 'out'?"],
        ),
        ({"inputs": {"a": "a"}, "steps": [{"quantise": {"bits": 4}}]}, ["unknown operation 'quantise'. Did you mean 'quantize'?"]),
        (
            {"inputs": {"a": "a"}, "steps": [{"quantize": {"bits": 9, "method": "rnt"}}], "checks": {"limits": {"kl": 1}}},
            ["bits=9", "unknown quantizer 'rnt'. Did you mean 'rtn'?", "kl need `against`", "need `texts`"],
        ),
        ({"merge_method": "ties", "models": [{"model": "a", "paramaters": {}}], "base_model": "b"}, ["unknown key 'paramaters'. Did you mean 'parameters'?"]),
        (
            {"merge_method": "ties", "models": [{"model": "a", "parameters": {"desnity": 1}}], "base_model": "b"},
            ["no option 'desnity'. Did you mean 'density'?"],
        ),
        ({"merge_method": "ties", "models": [{"model": "a"}], "base_model": "b", "normalize": True}, ["normalize is an option of ties"]),
        ({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": [0, "x"]}}]}, ["weight='x': Input should be a valid number"]),
        ({"merge_method": "slerp", "slices": [], "base_model": "a"}, ["give exactly one of models, slices and modules"]),
    ],
)
def test_all_problems_of_a_recipe_are_reported_at_once(tmp_path: Path, recipe: dict[str, Any], problems: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    for problem in problems:
        assert problem in str(caught.value)


def test_every_tensor_is_accounted_for_or_refused(tmp_path: Path) -> None:
    a = {"w": torch.ones(4, 2), "embed.weight": torch.ones(4, 2), "ids": torch.arange(3)}
    b = {"w": torch.zeros(4, 2), "embed.weight": torch.ones(5, 2), "ids": torch.arange(3)}
    one, two = Checkpoint.from_tensors(a, "a"), Checkpoint.from_tensors(b, "b")
    with pytest.raises(CheckpointError, match=r"embed.weight: a has \(4, 2\), b has \(5, 2\)\. Leave tensors out with --exclude"):
        merge([one, two], "linear")
    with pytest.raises(CheckpointError, match=r"w is missing in b"):
        merge([one, Checkpoint.from_tensors({"ids": torch.arange(3)}, "b")], "linear")
    from mergekit_plus.merge.plan import MergeOptions

    result = merge([one, two], "linear", how=MergeOptions(exclude=("embed.*",)))
    assert {name: result.read(name).tolist() for name in ("w", "embed.weight", "ids")} == {
        "w": [[0.5, 0.5]] * 4, "embed.weight": [[1.0, 1.0]] * 4, "ids": [0, 1, 2],
    }  # fmt: skip
    two.source.tensors["ids"] = torch.zeros(3, dtype=torch.int64)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"ids is not a float tensor and differs between a and b"):
        merge([one, two], "linear", how=MergeOptions(exclude=("embed.*",))).read("ids")


def test_transformers_loads_what_is_written_and_its_perplexity_is_ours(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = MODELS / "text" / "docs.test.txt"
    save(merged("pcb"), tmp_path / "dense", SaveOptions(max_shard_size=1_000_000))
    save(quantize(merged("pcb"), Scheme(4, 32)), tmp_path / "packed")
    for name in ("dense", "packed"):
        ours = measure(Checkpoint.open(tmp_path / name), Checks(texts={"docs": str(text)}, windows=8), Path(), quiet())["ppl docs"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        tokens = AutoTokenizer.from_pretrained(tmp_path / name)(text.read_text(), add_special_tokens=False)["input_ids"]
        windows = torch.tensor(tokens[: 8 * 256]).view(8, 256)
        with torch.no_grad():
            loss = model(input_ids=windows, labels=windows).loss.item()
        assert math.exp(loss) == pytest.approx(ours, rel=1e-3)
    weight = "model.layers.2.mlp.down_proj.weight"
    unpacked = dequantize(Checkpoint.open(tmp_path / "packed")).read(weight)
    assert torch.equal(model.get_parameter(weight).to(torch.bfloat16), unpacked)


def test_merging_shows_in_perplexity(tmp_path: Path) -> None:
    checks = Checks(texts={name: str(MODELS / "text" / f"{name}.test.txt") for name in ("code", "docs")}, windows=12)
    rows = {name: measure(opened(name), checks, Path(), quiet()) for name in ("base", "code", "docs")}
    both = measure(merge([opened("code"), opened("docs")], "pcb", opened("base"), {"ratio": 0.4, "lambda": 0.4}), checks, Path(), quiet())
    for text, other in (("code", "docs"), ("docs", "code")):
        assert rows[text][f"ppl {text}"] < rows["base"][f"ppl {text}"] < rows[other][f"ppl {text}"]
        assert both[f"ppl {text}"] < rows["base"][f"ppl {text}"]
