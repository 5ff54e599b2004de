"""A search over real models: what it measures, what it finds, and that its outcome needs no search any more."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checkpoint.journal import Done, Journal
from mergekit_plus.errors import CheckpointError, OutputError, RecipeError
from mergekit_plus.evaluate import load_model, load_tokenizer, log_probabilities, perplexity, tokenize
from mergekit_plus.recipe import Recipe, check, load, run
from mergekit_plus.search.candidates import Candidates
from mergekit_plus.search.objective import nll, pair, prepare, spread
from mergekit_plus.search.run import search
from mergekit_plus.show import search_lines
from mergekit_plus.steps import Execution, MergeStep

MODELS = Path(__file__).parents[1] / "models"
NAMES = ["code", "docs"]
TEXTS = {name: str(MODELS / "text" / f"{name}.val.txt") for name in NAMES}
HOW = Execution()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Checkpoint]:
    return {name: Checkpoint.open(MODELS / name) for name in ("base", *NAMES)}


@cache
def model(name: str) -> Any:
    return load_model(Checkpoint.open(MODELS / name))


@cache
def rows(name: str) -> torch.Tensor:
    """Four windows of 48 tokens, enough for each fine-tune to be better than the base on its own text."""
    ids = tokenize(load_tokenizer(Checkpoint.open(MODELS / "base")), Path(TEXTS[name]).read_text())
    return spread(model("base"), ids, 48, 4)


def step(method: str, options: dict[str, Any], **search_options: Any) -> MergeStep:
    given = {"options": options, "texts": TEXTS, "window": 48, "windows": 4, "budget": 6} | search_options
    return MergeStep.model_validate({"method": method, "models": NAMES, "base": "base", "search": given})


def weights(of: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


# ---- the merged models ----


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("task_arithmetic", {"lambda": 0.37}), ("task_arithmetic", {"weight": [0.2, 0.5]}), ("ties", {"lambda": 0.6}), ("pcb", {"lambda": [0.3, 0.8]}),
        ("pcb", {"lambda": {"depth": [0.3, 0.8, 0.5]}}), ("task_arithmetic", {"lambda": {"attention": 0.2, "mlp": 0.5, "rest": 0.4}}),
    ],
)  # fmt: skip
def test_where_the_merge_is_linear_the_sum_of_its_parts_is_the_merge_within_a_rounding(
    method: str, values: dict[str, Any], inputs: dict[str, Checkpoint]
) -> None:
    merge = step(method, {})
    candidates = Candidates(merge, inputs, HOW, values)
    assert candidates.linear == next(iter(values))
    summed, again = weights(candidates.at(values)), weights(load_model(merge.with_options(values).build(inputs, None, HOW)))
    parts = list(summed)
    assert parts == list(again)
    differing = sum(int((summed[name] != again[name]).sum()) for name in parts)
    assert differing < 1e-3 * sum(tensor.numel() for tensor in summed.values())  # where float32 puts a sum on the other side of a bf16 boundary
    for name in parts:
        torch.testing.assert_close(summed[name], again[name], rtol=2**-7, atol=1e-6)
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in summed.values())


@pytest.mark.parametrize(("method", "values"), [("pcb", {"lambda": 0.5, "ratio": 0.3}), ("ties", {"weight": [0.3, 0.6]}), ("linear", {"weight": [1.0, 3.0]})])
def test_where_it_is_not_linear_it_is_merged_anew(method: str, values: dict[str, Any], inputs: dict[str, Checkpoint]) -> None:
    candidates = Candidates(step(method, {}), inputs, HOW, values)
    assert candidates.linear is None
    direct = weights(load_model(step(method, {}).with_options(values).build(inputs, None, HOW)))
    for name, tensor in weights(candidates.at(values)).items():
        assert torch.equal(tensor, direct[name])


def test_a_statistic_is_measured_again_only_where_an_option_that_it_depends_on_changed(inputs: dict[str, Checkpoint]) -> None:
    merge = step("ties", {}).with_options({"density": 0.5})
    candidates = Candidates(merge, inputs, HOW, {"weight": [1.0, 1.0], "lambda": 1.0})
    name = "model.embed_tokens.weight"

    def measured(**values: Any) -> Any:
        return candidates.checkpoint(values).source.step_of[name].measured  # type: ignore[attr-defined]

    first = measured(weight=[0.2, 0.3])
    assert measured(weight=[0.4, 0.3]) is first
    assert measured(weight=[0.4, 0.3], density=0.4) is not first


# ---- what is minimised ----


def test_the_windows_are_spread_over_the_text() -> None:
    ids = torch.arange(0, 1000)
    assert spread(model("base"), ids, 10, 4)[:, 0].tolist() == [0, 330, 660, 990]
    assert spread(model("base"), ids, 10, 1000).shape == (100, 10)
    assert spread(model("base"), ids[:7], 10, 4).tolist() == [list(range(7))]


@torch.inference_mode()
def reference_nll(name: str, text: str) -> float:
    """Cross entropy in float64, token by token."""
    logits = model(name)(input_ids=rows(text)).logits.double()
    return float(functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), rows(text)[:, 1:].reshape(-1)))


@torch.inference_mode()
def reference_kl(name: str, text: str) -> float:
    """`sum of p (log p - log q)` in float64, the mean over predictions; p is the text's own model's."""
    p, q = (model(each)(input_ids=rows(text)).logits.double().softmax(-1)[:, :-1] for each in (text, name))
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("name", ["base", "code"])
def test_each_objective_is_what_its_formula_says(name: str) -> None:
    texts = {text: rows(text) for text in NAMES}
    experts = {text: lambda text=text: model(text) for text in NAMES}

    def value(kind: Any) -> float:
        objective = prepare(kind, texts, lambda: model("base"), experts)
        return objective.value(objective.losses(model(name)))

    losses = {text: reference_nll(name, text) for text in NAMES}
    assert value("mean") == pytest.approx(sum(losses.values()) / 2, rel=1e-6)
    assert value("kl") == pytest.approx(sum(reference_kl(name, text) for text in NAMES) / 2, rel=1e-5, abs=1e-9)
    shares = [(losses[text] - reference_nll(text, text)) / (reference_nll("base", text) - reference_nll(text, text)) for text in NAMES]
    assert value("worst") == pytest.approx(max(shares), rel=1e-4, abs=1e-6)


def test_log_probabilities_add_up_to_one_and_are_those_of_perplexity() -> None:
    found = list(log_probabilities(model("base"), rows("code")))
    assert [part.shape for part in found] == [(47, 1024)] * 4
    assert float(found[0].exp().sum(-1).mean()) == pytest.approx(1)
    picked = torch.stack([part.gather(1, row[1:, None]) for part, row in zip(found, rows("code"), strict=True)])
    assert -float(picked.mean()) == pytest.approx(nll(model("base"), rows("code")), rel=1e-6)


def test_a_loss_that_is_not_finite_is_infinitely_bad() -> None:
    objective = prepare("mean", {"a": rows("code")}, None, {})
    assert objective.value({"a": math.nan}) == math.inf
    assert objective.value({"a": math.inf}) == math.inf


def test_texts_go_with_the_models_of_their_names_or_else_in_order() -> None:
    assert pair(["docs", "code"], ["code", "docs"]) == {"docs": "docs", "code": "code"}
    assert pair(["x", "y"], ["code", "docs"]) == {"x": "code", "y": "docs"}


def test_an_expert_that_is_no_better_than_the_base_on_its_text_is_refused(inputs: dict[str, Checkpoint]) -> None:
    swapped = {"x": TEXTS["docs"], "y": TEXTS["code"]}
    with pytest.raises(CheckpointError, match=r"on the text x its own model is no better than the base \(.* nats\); texts go with models in their order"):
        search(step("ties", {"lambda": None}, objective="worst", texts=swapped), inputs, Path(), HOW)


# ---- the outcome ----


@pytest.mark.parametrize("objective", ["mean", "worst", "kl"])
def test_what_is_found_is_at_least_as_good_as_the_defaults_and_always_the_same(objective: str, inputs: dict[str, Checkpoint]) -> None:
    found, again = (search(step("task_arithmetic", {"lambda": None}, objective=objective), inputs, Path(), HOW) for _ in range(2))
    assert found == again
    assert found.search is None
    assert found.searched is not None
    trace = found.searched["evaluations"]
    assert len(trace) == 6
    assert trace[0]["options"] == {"lambda": 1.0}
    best = min(trace, key=lambda row: row["objective"])
    assert best["objective"] < trace[0]["objective"]
    assert best["options"] == found.searched["found"] == found.options()


def recipe(scale: str, **search_options: Any) -> Recipe:
    merge = step("pcb", {scale: None, "ratio": [0.2, 0.9]}, **search_options).model_dump(exclude_none=True)
    return check({"inputs": {name: str(MODELS / name) for name in ("base", *NAMES)}, "steps": [{"merge": merge}]}, Path(), "recipe")


@pytest.mark.parametrize("scale", ["lambda:each", "lambda:depth2", "lambda:kinds"])
def test_the_written_recipe_holds_values_and_trace_and_makes_the_same_model_without_a_search(scale: str, tmp_path: Path) -> None:
    outcome = run(recipe(scale, heldout={"test": str(MODELS / "text" / "code.test.txt")}), Execution(out=tmp_path / "out"))
    (record,) = outcome.searched
    (written,) = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"]
    merge = written["merge"]
    assert merge["lambda"] == record["found"]["lambda"]
    assert merge["ratio"] == record["found"]["ratio"]
    assert merge["searched"] == record
    assert "search" not in merge
    assert [row["model"] for row in record["heldout"]] == ["base", "start", "found"]

    saved = load_model(Checkpoint.open(tmp_path / "out"))
    direct = sum(perplexity(saved, rows(name).reshape(-1), window=48).nll for name in NAMES) / 2
    assert direct == pytest.approx(min(row["objective"] for row in record["evaluations"]), abs=2e-6)

    again = run(load(tmp_path / "out" / "recipe.yaml"), Execution(out=tmp_path / "again"))
    assert again.searched == []
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()

    lines = search_lines(record)
    assert lines[0].split() == ["search", "lambda", "ratio", "mean", "code", "docs"]
    assert sum("*" in line for line in lines) == 1
    assert any(line.startswith("found lambda") for line in lines)


def test_values_that_do_not_go_together_are_passed_over(inputs: dict[str, Checkpoint]) -> None:
    found = search(step("della", {"lambda": None, "density": None}, budget=10), inputs, Path(), HOW)
    assert found.searched is not None
    refused = [row for row in found.searched["evaluations"] if row["objective"] is None]
    assert refused
    assert all(not 0.15 < row["options"]["density"] < 0.85 for row in refused)  # density - epsilon below 0, or density + epsilon above 1
    assert found.searched["found"] not in [row["options"] for row in refused]
    assert any(line.endswith("-") for line in search_lines(found.searched))


def test_a_search_that_cannot_be_is_refused_with_everything_else_that_is_wrong() -> None:
    merge = {"method": "pcb", "models": NAMES, "base": "base", "inter": "max", "search": {"options": {"lamda": None}, "texts": {}}}
    with pytest.raises(RecipeError, match=r"inter='max'.*; search: it needs `texts`.*; search: pcb has no option 'lamda'\. Did you mean 'lambda'\?"):
        check({"inputs": {name: str(MODELS / name) for name in ("base", *NAMES)}, "steps": [{"merge": merge}]}, Path(), "recipe")
    merge = {"method": "pcb", "models": NAMES, "base": "base", "search": {"option": {}, "texts": {}}}
    with pytest.raises(RecipeError, match=r"step 1, merge: search: unknown key 'option'\. Did you mean 'options'\?"):
        check({"inputs": {name: str(MODELS / name) for name in ("base", *NAMES)}, "steps": [{"merge": merge}]}, Path(), "recipe")


def test_what_an_interrupted_run_left_is_seen_before_the_search(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    Journal(partial / "journal", Done({"inputs": "other"}, 10_000, {"model.safetensors": (5000, "0" * 64)})).close()
    merge = step("task_arithmetic", {"lambda": [0, 1]}).model_dump(exclude_none=True)
    recipe = check({"inputs": {name: str(MODELS / name) for name in ("base", *NAMES)}, "steps": [{"merge": merge}]}, tmp_path, "r")
    with pytest.raises(OutputError, match=r"out: an interrupted run finished 5\.0 of 10\.0 kB; continue it with --resume, or start over with --overwrite"):
        run(recipe, Execution(out=tmp_path / "out"))
