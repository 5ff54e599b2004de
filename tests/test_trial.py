"""A trial of an output: transformers loads it, or says why not; the model goes on with a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.checks import Checks
from mergekit_plus.errors import RecipeError
from mergekit_plus.recipe import check, run
from mergekit_plus.steps import Execution
from mergekit_plus.trial import attempt
from quant import Scheme
from quant.plan import quantize

MODELS = Path(__file__).parent / "models"
ASKED = Checks(load=True, sample=["def forward(self", {"prompt": "class", "tokens": 3}])


def test_a_model_goes_on_as_transformers_does() -> None:
    verdicts, sampled = attempt(MODELS / "code", ASKED)
    assert [(verdict.what, verdict.kept, verdict.found) for verdict in verdicts] == [("loading in transformers", True, "all weights in place")]
    model, tokenizer = (kind.from_pretrained(MODELS / "code") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for sample, tokens in zip(sampled, (40, 3), strict=True):
        ids = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
        assert sample["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert [sample["prompt"] for sample in sampled] == ["def forward(self", "class"]


def test_packed_weights_are_tried_as_they_are(tmp_path: Path) -> None:
    save(quantize(Checkpoint.open(MODELS / "code"), Scheme(bits=4, group_size=32)), tmp_path / "packed")
    verdicts, sampled = attempt(tmp_path / "packed", ASKED)
    assert [verdict.kept for verdict in verdicts] == [True]
    assert all(sample["text"] for sample in sampled)


def test_what_transformers_would_fill_at_random_or_leave_out_is_a_failure(tmp_path: Path) -> None:
    code = Checkpoint.open(MODELS / "code")
    tensors = {name: code.read(name) for name in code.specs if name != "model.norm.weight"} | {"model.layers.0.extra.weight": torch.ones(3)}
    save(Checkpoint("odd", Checkpoint.from_tensors(tensors).source, code.files), tmp_path / "odd")
    verdicts, sampled = attempt(tmp_path / "odd", ASKED)
    assert [verdict.sentence for verdict in verdicts] == [
        "loading in transformers failed: missing weights model.norm.weight; unexpected weights model.layers.0.extra.weight"
    ]
    assert sampled == []


def test_what_transformers_refuses_is_a_failure_and_no_error(tmp_path: Path) -> None:
    save(Checkpoint.open(MODELS / "code"), tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "architectures": None, "model_type": "none-such"}))
    (verdict,), _ = attempt(tmp_path / "odd", ASKED)
    assert not verdict.kept
    assert "does not know model_type 'none-such'" in verdict.sentence


def test_nothing_is_loaded_unasked(tmp_path: Path) -> None:
    assert attempt(tmp_path / "nowhere", Checks()) == ([], [])


def test_a_recipe_tries_its_output_and_the_card_shows_the_sample(tmp_path: Path) -> None:
    parsed = {"inputs": {"code": str(MODELS / "code")}, "checks": {"load": True, "sample": "import ", "limits": {"sparsity": 0.5}}}
    outcome = run(check(parsed, tmp_path, "test"), Execution(out=tmp_path / "out"))
    assert [(verdict.what, verdict.kept) for verdict in outcome.verdicts] == [("the share of zeros", False), ("loading in transformers", True)]
    assert outcome.failures == ["the share of zeros is 0, at least 0.5 is wanted"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"## Samples\n\nThe likeliest token each time, after the prompt in the first line.\n\n```text\nimport \n{outcome.sampled[0]['text']}\n```" in card


@pytest.mark.parametrize("asked", [{"load": True}, {"sample": "import "}])
def test_what_is_no_model_is_refused_before_anything_is_written(asked: dict[str, Any], tmp_path: Path) -> None:
    (name,) = asked
    inputs = {"base": str(MODELS / "base"), "code": str(MODELS / "code")}
    extract = {"inputs": inputs, "steps": [{"extract_adapter": {"base": "base", "tuned": "code", "rank": 2}}], "checks": asked}
    with pytest.raises(RecipeError, match=f"out: an adapter is a folder, .* write to .*out, without {name}"):
        run(check(extract, tmp_path, "test"), Execution(out=tmp_path / "out"))
    save(Checkpoint("file", Checkpoint.from_tensors({"w": torch.ones(2, 2)}).source), tmp_path / "file.safetensors")
    with pytest.raises(RecipeError, match=f"checks: {name} need a config.json that says what model it is; .*file.safetensors has none"):
        run(check({"inputs": {"file": "file.safetensors"}, "checks": asked}, tmp_path, "test"), Execution(out=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.manifest.json", "file.safetensors"]
