"""The tokenizer of a merge as users ask for it: on the command line and in a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner
from vocabulary_toys import A, B, C, bpe, toy

from cli import app
from mergekit_plus.errors import CheckpointError, RecipeError
from mergekit_plus.recipe import check, load, run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, (name, content) in enumerate({"a": A, "b": B, "c": C}.items()):
        toy(tmp_path / name, content, seed)
    return tmp_path


def compress(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0


def rows(folder: Path) -> int:
    """Rows of the embeddings; config.json must agree."""
    count = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == count
    return count


def test_the_command_line(here: Path) -> None:
    compress("merge", "a", "b", "-b", "a", "--tokenizer", "union", "--pad-to-multiple-of", "32", "--chat-template", "chatml", "-o", "padded")
    assert rows(here / "padded") == 32
    assert "im_start" in (here / "padded" / "chat_template.jinja").read_text()
    compress("merge", "a", "b", "--tokenizer", "./b", "-o", "as-b")
    compress("merge", "a", "b", "--tokenizer", "c", "-o", "as-c")
    assert (rows(here / "as-b"), rows(here / "as-c")) == (29, 29)
    assert (here / "as-c" / "tokenizer.json").read_bytes() == (here / "c" / "tokenizer.json").read_bytes()


def test_the_recipe_in_the_output_runs_again(here: Path) -> None:
    compress("merge", "a", "b", "--tokenizer", "c", "--chat-template", "llama3", "-o", "first")
    recipe = yaml.safe_load((here / "first" / "recipe.yaml").read_text())
    assert recipe["steps"][0]["merge"]["tokenizer"] == {"source": "tokenizer", "tokens": {}, "chat_template": "llama3"}
    compress("run", "first/recipe.yaml", "-o", "second")
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        assert (here / "first" / name).read_bytes() == (here / "second" / name).read_bytes()


def test_a_recipe(here: Path) -> None:
    tokens = {"<x>": {"source": "other"}, "<new>": {"source": {"kind": "zero"}}}
    step = {"models": ["a", "b"], "tokenizer": {"source": "union", "tokens": tokens}}
    (here / "recipe.yaml").write_text(yaml.safe_dump({"inputs": {"a": "a", "b": "b", "other": "c"}, "steps": [{"merge": step}], "out": "out"}))
    run(load(here / "recipe.yaml"))
    assert rows(here / "out") == 31


def test_a_document_of_mergekit(here: Path) -> None:
    tokens = {"<x>": {"source": {"kind": "model_token", "model": "c", "token": "<x>"}}, "<new>": {"source": {"kind": "zero"}}}
    document = {"merge_method": "linear", "base_model": "a", "models": [{"model": name, "parameters": {"weight": 1}} for name in "ab"], "dtype": "float32"}
    (here / "union.yml").write_text(yaml.safe_dump({**document, "tokenizer": {"tokens": tokens}, "chat_template": "exaone"}, sort_keys=False))
    (here / "as-c.yml").write_text(yaml.safe_dump({**document, "tokenizer_source": "c"}))
    compress("run", "union.yml", "-o", "union")
    compress("run", "as-c.yml", "-o", "as-c")
    assert rows(here / "union") == 31
    assert "[|assistant|]" in (here / "union" / "chat_template.jinja").read_text()
    assert (here / "as-c" / "tokenizer.json").read_bytes() == (here / "c" / "tokenizer.json").read_bytes()
    step = {"models": ["a", "b"], "base": "a", "tokenizer": {"source": "union", "tokens": tokens}}
    run(check({"inputs": {name: name for name in "abc"}, "steps": [{"merge": step}], "out": "by-step"}, here, "recipe"))
    assert (here / "by-step" / "model.safetensors").read_bytes() == (here / "union" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("unoin", "merge, tokenizer: 'unoin' is not an input. Did you mean 'union'?"),
        ({"sauce": "union"}, "tokenizer: unknown key 'sauce'. Did you mean 'source'?"),
        ({"source": "base", "tokens": {"x": {"source": "d"}}}, "merge, tokenizer: 'd' is not an input"),
        ({"source": "base", "chat_template": "chatlm"}, "chat_template 'chatlm' is neither Jinja text nor a name. Did you mean 'chatml'?"),
        ({"pad_to_multiple_of": 8}, "tokenizer: say with `source` which tokenizer the result gets: union, base, or a model"),
    ],
)
def test_mistakes_are_named(here: Path, key: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason.replace("?", r"\?")):
        check({"inputs": {"a": "a", "b": "b"}, "steps": [{"merge": {"models": ["a", "b"], "tokenizer": key}}], "out": "out"}, here, "recipe")


def test_tables_of_one_size_with_tokens_in_other_rows_are_refused_too(here: Path) -> None:
    """Nothing else tells that their rows do not belong together."""
    toy(here / "turned", bpe(["t h", "th e", "i n"], ["<s>", "</s>"], specials_first=False), 7)
    step = {"models": ["a", "turned"]}
    inputs = {"a": "a", "turned": "turned"}
    recipe = check({"inputs": inputs, "steps": [{"merge": step}], "out": "out"}, here, "recipe")
    with pytest.raises(CheckpointError, match=r"token 'a' is row 2 of a but row 0 of turned, and 25 more tokens moved too. Align them with --tokenizer union"):
        run(recipe)
    run(check({"inputs": inputs, "steps": [{"merge": {**step, "tokenizer": "base"}}], "out": "aligned"}, here, "recipe"))
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    run(check({"inputs": inputs, "steps": [{"merge": {**step, "exclude": tables}}], "out": "without"}, here, "recipe"))
    assert rows(here / "aligned") == rows(here / "without") == 26


def test_reserved_tokens_with_a_name_of_their_own_are_no_reason(here: Path) -> None:
    toy(here / "named", bpe(["t h", "th e", "i n"], ["<s>", "<|im_end|>"]), 7)
    run(check({"inputs": {"a": "a", "named": "named"}, "steps": [{"merge": {"models": ["a", "named"]}}], "out": "out"}, here, "recipe"))
    assert rows(here / "out") == 26


def test_vocabularies_that_differ_are_refused_with_the_way_out(here: Path) -> None:
    recipe = check({"inputs": {"a": "a", "b": "b"}, "steps": [{"merge": {"models": ["a", "b"]}}], "out": "out"}, here, "recipe")
    with pytest.raises(CheckpointError, match=r"lm_head.weight: a has \(26, 8\), b has \(29, 8\).* align them with --tokenizer union, base or a model"):
        run(recipe)
