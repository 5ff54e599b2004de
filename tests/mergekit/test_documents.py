"""Several documents in one file: made of each other, nothing written between them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit_toys import layers, llama, result_of

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import RecipeError
from mergekit_plus.mergekit.schema import Reference, reference
from mergekit_plus.recipe import load, run
from mergekit_plus.steps import Execution


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models a, b and c of two layers where one stands."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abc", 1):
        llama(name, number, layers=2)


def mean(*models: object, name: str | None = None) -> dict[str, Any]:
    return {**({"name": name} if name else {}), "merge_method": "linear", "models": [{"model": model} for model in models]}


STACK = {"merge_method": "passthrough", "slices": [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in ("ab", "c")]}


def test_a_document_may_be_made_of_others_in_any_order() -> None:
    assert layers(result_of(mean("a", "b", name="ab"), STACK)) == [150, 151, 300, 301]
    assert layers(result_of(mean("abc", "c", name="last"), mean("ab", "c", name="abc"), mean("a", "b", name="ab"))) == [262.5, 263.5]


def test_nothing_but_the_last_is_written_and_the_recipe_beside_it_makes_it_again() -> None:
    before = set(os.listdir())
    Path("file.yaml").write_text(yaml.safe_dump_all([mean("a", "b", name="ab"), STACK]))
    run(load(Path("file.yaml")), Execution(out=Path("out")))
    assert set(os.listdir()) - before == {"file.yaml", "out"}
    run(load(Path("out/recipe.yaml")), Execution(out=Path("again")))
    assert layers(Checkpoint.open("again")) == [150, 151, 300, 301]
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert Checkpoint.open("again").config["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("documents", "problem"),
    [
        ([mean("a", "b", name="x"), mean("a", "c", name="y")], "no other document is made of x, y; a run has one result, so that one may be left"),
        ([mean("a", "b"), mean("a", "c")], "two documents have no name"),
        ([mean("a", "b", name="x"), mean("a", "c", name="x")], "two documents are called x"),
        ([mean("y", "b", name="x"), mean("x", "c", name="y")], "the documents are made of each other: "),
        ([mean("a", "b", name="x"), {**mean("x", "c"), "dtpye": "float32"}], "document 2: unknown key 'dtpye'. Did you mean 'dtype'?"),
        ([mean("a", "b", name="x"), {"inputs": {"a": "a"}}], "document 2: unknown key 'inputs'"),
    ],
)
def test_documents_that_do_not_go_together_are_refused(documents: list[dict[str, Any]], problem: str) -> None:
    Path("file.yaml").write_text(yaml.safe_dump_all(documents))
    with pytest.raises(RecipeError) as caught:
        load(Path("file.yaml"))
    assert problem in str(caught.value)


def test_a_step_of_a_recipe_takes_a_document_whose_models_are_inputs() -> None:
    step = {"mergekit": mean("one", "two")}
    Path("recipe.yaml").write_text(yaml.safe_dump({"inputs": {"one": "a", "two": "b"}, "steps": [step], "out": "out"}))
    run(load(Path("recipe.yaml")))
    assert layers(Checkpoint.open("out")) == [150, 151]
    Path("recipe.yaml").write_text(yaml.safe_dump({"inputs": {"one": "a"}, "steps": [step]}))
    with pytest.raises(RecipeError, match="mergekit: 'two' is not an input. Known: one."):
        load(Path("recipe.yaml"))


@pytest.mark.parametrize(
    ("written", "ref"),
    [
        ("org/name@v1+org/lora@v2", "org/name@v1+org/lora@v2"),
        ({"model": {"path": "org/name", "revision": "v1"}, "lora": {"path": "org/lora", "revision": "v2"}}, "org/name@v1+org/lora@v2"),
        ({"model": {"path": "org/name"}, "lora": None, "override_architecture": None}, "org/name"),
        ({"model": "org/name"}, "org/name"),
    ],
)
def test_a_model_is_named_by_a_word_or_a_table(written: object, ref: str) -> None:
    assert reference(written) == Reference(ref)


def test_a_folder_whose_name_has_a_plus_or_an_at_is_a_folder() -> None:
    """mergekit takes these for adapters and revisions."""
    llama("c++", 4, layers=2)
    llama("me@home", 6, layers=2)
    assert layers(result_of(mean("c++", "me@home"))) == [500, 501]
    assert layers(result_of(mean({"model": {"path": "c++"}}, {"model": "me@home"}))) == [500, 501]


def test_an_architecture_may_be_overridden() -> None:
    table = {"model": {"path": "a"}, "override_architecture": "MistralForCausalLM"}
    assert result_of(mean(table, "b")).config["architectures"] == ["MistralForCausalLM"]
    assert result_of({**mean(table, "b"), "base_model": "b"}).config["architectures"] == ["LlamaForCausalLM"]


def test_flat_files_merge_as_with_mergekit_pytorch() -> None:
    files = [f"{name}/model.safetensors" for name in "ab"]
    Path("file.yaml").write_text(yaml.safe_dump(mean(*files)))
    run(load(Path("file.yaml")), Execution(out=Path("out.safetensors")))
    assert layers(Checkpoint.open("out.safetensors")) == [150, 151]
