"""Checks of a recipe: what is measured, and which limits are not kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.checks import Checks, measure, measure_and_compare, verdicts
from mergekit_plus.errors import CheckpointError, RecipeError
from mergekit_plus.evaluate import compare, load_model, load_tokenizer, perplexity, tokenize
from mergekit_plus.progress import quiet
from mergekit_plus.recipe import check

MODELS = Path(__file__).parent / "models"
ROW = {"model": "m", "MB": 2.0, "bits/weight": 4.5, "ppl a": 10.0, "ppl b": 20.0, "KL a": 0.2, "KL b": 0.1, "top-1 a": 0.8, "top-1 b": 0.9}
REFERENCE = {"model": "r", "ppl a": 8.0, "ppl b": 20.0}


def sentences(checks: Checks, row: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    return [verdict.sentence for verdict in verdicts(checks, row, reference) if not verdict.kept]


def failed(**limits: Any) -> list[str]:
    """What fails of these limits on `ROW`."""
    return sentences(Checks(texts={"a": "a.txt", "b": "b.txt"}, against="r", limits=limits), ROW, REFERENCE)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"perplexity": 20}, []),
        ({"perplexity": 15}, ["perplexity on b is 20, at most 15 is wanted"]),
        ({"perplexity": {"a": 9.5}}, ["perplexity on a is 10, at most 9.5 is wanted"]),
        ({"perplexity": {"a": 10}}, []),
        ({"perplexity_ratio": 1.2}, ["perplexity relative to r on a is 1.25, at most 1.2 is wanted"]),
        ({"kl": 0.15}, ["KL from r on a is 0.2, at most 0.15 is wanted"]),
        ({"top1": {"a": 0.85, "b": 0.85}}, ["top-1 agreement with r on a is 0.8, at least 0.85 is wanted"]),
        ({"bits_per_weight": 4.5}, []),
        ({"bits_per_weight": 4.25}, ["bits a weight are 4.5, at most 4.25 are wanted"]),
        ({"bytes": "2MB"}, []),
        ({"bytes": 1_500_000}, ["the tensors take 2 MB, at most 1.5 MB are wanted"]),
    ],
)
def test_a_limit_that_is_not_kept_is_a_sentence(limits: dict[str, Any], expected: list[str]) -> None:
    assert failed(**limits) == expected


def test_all_limits_are_looked_at() -> None:
    assert len(failed(perplexity=1, perplexity_ratio=1, kl=0, top1=1, bits_per_weight=1, bytes=1)) == 2 + 1 + 2 + 2 + 1 + 1


def test_what_is_not_a_number_keeps_no_limit() -> None:
    checks = Checks(texts={"a": "a.txt"}, limits={"perplexity": 1e9})
    assert sentences(checks, {**ROW, "ppl a": math.nan}, {}) == ["perplexity on a is nan, at most 1e+09 is wanted"]


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"limits": {"kl": 1, "top1": 0.5}}, "checks: kl and top1 need `against`, the input that they refer to; checks: limits on texts need `texts`"),
        ({"limits": {"perplexity": 3}}, "checks: limits on texts need `texts`"),
        ({"texts": {"a": "recipes.txt"}}, "checks: the text a is not at here/recipes.txt"),
        ({"texts": {"a": "a"}, "limits": {"perplexity": {"b": 3}}}, "checks: the text a is not at here/a; checks: limits.perplexity: there is no text 'b'"),
        ({"window": 1}, "checks.window: Input should be greater than 1"),
        ({"windows": 0}, "checks.windows: Input should be greater than 0"),
        ({"limits": {"bytes": "some"}}, "checks.limits.bytes: 'some' is not a size; write 5GB, 512MiB or a number of bytes"),
        ({"limits": {"kl": {"a": "low"}}}, "checks.limits.kl: one number for all texts, or a table with one for each, not {'a': 'low'}"),
    ],
)
def test_checks_that_cannot_be_are_refused_before_anything_is_read(given: dict[str, Any], problems: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check({"inputs": {"m": "nowhere"}, "checks": given}, Path("here"), "r")
    assert str(caught.value) == f"r: {problems}"


def test_limits_are_numbers_for_all_texts_or_for_each() -> None:
    assert Checks(limits={"perplexity": 3, "kl": {"a": 1}}).limits.model_dump(exclude_none=True) == {"perplexity": 3.0, "kl": {"a": 1.0}}
    with pytest.raises(ValidationError):
        Checks(limits={"perplexity": True})


def test_a_row_holds_size_perplexity_and_distance_from_the_reference() -> None:
    code, base = (Checkpoint.open(MODELS / name) for name in ("code", "base"))
    path = MODELS / "text" / "code.test.txt"
    checks = Checks(texts={"code": str(path)}, window=128, windows=3)
    row = measure(code, checks, Path(), quiet(), base)
    model, reference, ids = load_model(code), load_model(base), tokenize(load_tokenizer(code), path.read_text())
    found = compare(model, reference, ids, window=128, limit=3)
    assert row == {
        "model": str(MODELS / "code"), "MB": 2.886912, "bits/weight": 16.0,
        "ppl code": perplexity(model, ids, window=128, limit=3).value, "KL code": found.kl, "top-1 code": found.agreement,
    }  # fmt: skip
    assert measure(code, Checks(), Path(), quiet()) == {"model": str(MODELS / "code"), "MB": 2.886912, "bits/weight": 16.0}


def test_a_model_is_as_good_as_itself() -> None:
    code = Checkpoint.open(MODELS / "code")
    limits = {"perplexity_ratio": 1, "kl": 1e-6, "top1": 1}
    checks = Checks(texts={"c": str(MODELS / "text" / "c.test.txt")}, windows=1, against="code", limits=limits)
    rows, found = measure_and_compare(checks, Path(), {"code": code}, {}, code)
    assert [row["model"] for row in rows] == ["code", str(MODELS / "code")]
    assert [verdict.what for verdict in found] == ["perplexity relative to code on c", "KL from code on c", "top-1 agreement with code on c"]
    assert all(verdict.kept for verdict in found)


def test_a_text_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"raw: not UTF-8 text"):
        measure(Checkpoint.open(MODELS / "base"), Checks(texts={"t": "raw"}), tmp_path, quiet())
