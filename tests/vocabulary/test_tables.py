"""The tensors whose rows are tokens are found in every architecture, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import ARCHITECTURES, tiny_model

from mergekit_plus.errors import CheckpointError
from mergekit_plus.vocabulary.tables import vocabulary_tables

EXPECTED = {
    "GPT2LMHeadModel": {"transformer.wte.weight"},
    "GPT2Model": {"wte.weight"},
    "GPTNeoXForCausalLM": {"gpt_neox.embed_in.weight", "embed_out.weight"},
    "OPTForCausalLM": {"model.decoder.embed_tokens.weight"},
    "GemmaForCausalLM": {"model.embed_tokens.weight"},
    "BertForMaskedLM": {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_of(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """The vocabulary is 64 in all of them, and in some so are the positions."""
    found = vocabulary_tables(tiny_model(name, tmp_path_factory.getbasetemp()))
    assert set(found) == EXPECTED.get(name, {"model.embed_tokens.weight", "lm_head.weight"})


def test_a_size_that_no_table_has_is_refused(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", tmp_path)
    with pytest.raises(CheckpointError, match="config.json says vocab_size 65, but no embedding has 65 rows; mend config.json"):
        vocabulary_tables(model.with_config(vocab_size=65))
    with pytest.raises(CheckpointError, match="no config.json says a vocab_size"):
        vocabulary_tables(replace(model, files={}))
