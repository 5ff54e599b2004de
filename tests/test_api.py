"""The Python API: recipes written as calls; the tutorial runs as it stands."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergekit_plus as mp
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import OptionError, OutputError, RecipeError
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize
from mergekit_plus.recipe import check, load, run
from mergekit_plus.steps import Execution

REPOSITORY = Path(__file__).parent.parent
MODELS = REPOSITORY / "tests" / "models"
TEXT = MODELS / "text" / "code.test.txt"


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def merged(**options: Any) -> mp.Model:
    return mp.merge([MODELS / "code", MODELS / "docs"], "ties", base=MODELS / "base", **options)


def test_calls_make_what_the_recipe_with_these_steps_makes(tmp_path: Path) -> None:
    outcome = merged(density=0.5, lambda_=0.8).prune(0.3).quantize(bits=4, group_size=32).save(tmp_path / "api")
    steps = [
        {"merge": {"method": "ties", "base": "base", "models": ["code", "docs"], "density": 0.5, "lambda": 0.8}},
        {"prune": {"sparsity": 0.3}}, {"quantize": {"bits": 4, "group_size": 32}},
    ]  # fmt: skip
    parsed = {"inputs": {name: str(MODELS / name) for name in ("base", "code", "docs")}, "steps": steps}
    run(check(parsed, Path(), "test"), Execution(out=tmp_path / "recipe"))
    assert weights(tmp_path / "api") == weights(tmp_path / "recipe")
    assert outcome.out == tmp_path / "api"
    assert outcome.sparsity is not None


def test_a_model_is_a_file_for_compress_run_too(tmp_path: Path) -> None:
    small = merged(density=0.5).quantize(bits=4, group_size=32).check(limits={"bits_per_weight": 7})
    (tmp_path / "recipe.yaml").write_text(small.to_yaml())
    assert load(tmp_path / "recipe.yaml").model_dump() == small.recipe.model_dump()
    assert yaml.safe_load(small.to_yaml())["checks"] == {"limits": {"bits_per_weight": 7}}


def test_options_of_one_model_stand_with_it(tmp_path: Path) -> None:
    apart = mp.merge({str(MODELS / "code"): {"weight": 0.7}, str(MODELS / "docs"): {"weight": 0.3}})
    together = mp.merge([MODELS / "code", MODELS / "docs"], weight=[0.7, 0.3])
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        assert apart.checkpoint().read(name).equal(together.checkpoint().read(name))


def test_operations_make_another_model_and_leave_this_one_as_it_was() -> None:
    model = mp.open_model(MODELS / "code")
    assert [list(step) for step in model.quantize(bits=4, group_size=32).dequantize().steps] == [["quantize"], ["dequantize"]]
    assert model.steps == ()
    assert model.check(limits={"bytes": "1GB"}).checks == {"limits": {"bytes": "1GB"}}
    assert model.checks == {}


def test_what_is_wrong_is_said_where_it_is_called() -> None:
    model = mp.open_model(MODELS / "code")
    with pytest.raises(RecipeError, match=r"quantize: .*bits=9"):
        model.quantize(bits=9)
    with pytest.raises(RecipeError, match=r"unknown operation 'quantise'. Did you mean 'quantize'\?"):
        model.step("quantise", bits=4)
    with pytest.raises(RecipeError, match=r"merge: ties has no option 'desnity'. Did you mean 'density'\?"):
        merged(desnity=0.5)
    with pytest.raises(RecipeError, match="the text t is not at nowhere.txt"):
        model.check(texts={"t": "nowhere.txt"})
    with pytest.raises(OptionError, match="the text nowhere is not at nowhere.txt"):
        model.eval("nowhere.txt")


def test_a_plan_reads_headers_and_writes_nothing(tmp_path: Path) -> None:
    facts = merged(density=0.5).plan(tmp_path / "out")
    assert 2.9 * facts["bytes_written"] < facts["bytes_read"] <= 3 * facts["bytes_written"]
    assert not (tmp_path / "out").exists()


def test_a_result_is_measured_without_being_written() -> None:
    row = mp.open_model(MODELS / "docs").eval({"code": TEXT}, against=MODELS / "code", windows=2)
    docs = Checkpoint.open(MODELS / "docs")
    expected = perplexity(load_model(docs), tokenize(load_tokenizer(docs), TEXT.read_text()), window=256, limit=2).value
    assert row["ppl code"] == expected
    assert {"KL code", "top-1 code"} <= row.keys()


def test_checks_are_kept_or_told(tmp_path: Path) -> None:
    outcome = mp.open_model(MODELS / "code").check(texts={"code": TEXT}, windows=1, limits={"perplexity": 1}).save(tmp_path / "out")
    assert len(outcome.failures) == 1
    assert outcome.failures[0].startswith("perplexity on code is")
    with pytest.raises(OutputError, match="exists already"):
        mp.open_model(MODELS / "code").save(tmp_path / "out")


def test_a_recipe_file_runs_with_its_variables(tmp_path: Path) -> None:
    outcomes = mp.run_recipe(REPOSITORY / "recipes/ci.yaml", tmp_path / "out", {"bits": [4]}, max_shard_size="1MB")
    assert list(outcomes) == ["bits=4"]
    assert outcomes["bits=4"].out == tmp_path / "out-bits-4"
    assert not outcomes["bits=4"].failures


def test_the_tutorial_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of Python after the one before; what a block prints is the block of text behind it."""
    for name in ("base", "code", "docs", "text"):
        os.symlink(MODELS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", (REPOSITORY / "docs/tutorial.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    space: dict[str, Any] = {}
    for code, printed in blocks:
        exec(compile(code, "docs/tutorial.md", "exec"), space)  # the repository's own text
        assert capsys.readouterr().out == printed
    assert (tmp_path / "small" / "recipe.yaml").is_file()
