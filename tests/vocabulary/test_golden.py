"""Each token gets the row that mergekit 0.1.5 gives it; its rows were written by benchmarks/parity_mergekit_tokenizers.py --write-golden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from vocabulary_toys import GOLDEN_CASES, WEIGHTS, A, B, C, toy

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.merge.plan import merge
from mergekit_plus.vocabulary import TokenizerSpec, retokenize

GOLDEN = Path(__file__).parent / "golden_mergekit.safetensors"
ROWS = load_file(GOLDEN)
with safe_open(GOLDEN, "pt") as opened:
    TOKENS: dict[str, list[str]] = json.loads(opened.metadata()["tokens"])


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_agrees_with_mergekit_token_by_token(tmp_path: Path, case: str) -> None:
    key, with_base = GOLDEN_CASES[case]
    models = {name: Checkpoint.open(toy(tmp_path / name, content, seed)) for seed, (name, content) in enumerate({"a": A, "b": B, "c": C}.items())}
    views = retokenize(models, "a" if with_base else None, TokenizerSpec.model_validate(key))
    merged = merge(list(views.values()), "linear", None, {"weight": list(WEIGHTS.values())})
    ids = Tokenizer.from_str(merged.file("tokenizer.json").decode()).get_vocab()
    assert sorted(ids) == TOKENS[case]
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, padding = ROWS[f"{case}.{table}"], ROWS[f"{case}.{table}.padding"]
        result = merged.read(table)
        torch.testing.assert_close(result[[ids[token] for token in TOKENS[case]]], rows, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(result[len(ids) :], padding, atol=1e-5, rtol=1e-5)
