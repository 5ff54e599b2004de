"""`chat_template`: a known name, Jinja text, or what most of the models have; transformers uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mergekit_toys import llama, result_of

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError
from mergekit_plus.vocabulary.chat import TEMPLATES

TALK = [{"role": role, "content": content} for role, content in (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "?"))]
SPOKEN = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\n?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
              "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]?\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Hello</s> [INST] ? [/INST]",
}  # fmt: skip


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with a tokenizer: a without a template, b, c and d with one, each in its own way."""
    monkeypatch.chdir(tmp_path)
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "x": 2}, "unk_token": "x"}, "added_tokens": [], "version": "1.0"}
    for number, name in enumerate("abcd"):
        llama(name, number, layers=1)
        (Path(name) / "tokenizer.json").write_text(json.dumps(vocabulary))
        table: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        templates = {"b": "{{ 'B' }}", "c": [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ 'C' }}"}]}
        if name in templates:
            table["chat_template"] = templates[name]
        (Path(name) / "tokenizer_config.json").write_text(json.dumps(table))
    Path("d/chat_template.jinja").write_text("{{ 'C' }}\n")


def spoken(wanted: str, base: str, out: Path) -> str:
    """What the merged model's tokenizer makes of the conversation."""
    from transformers import AutoTokenizer

    models = [{"model": name} for name in sorted("abcd", key=lambda name: name != base)]
    save(result_of({"merge_method": "linear", "models": models, "chat_template": wanted}), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", SPOKEN)
def test_a_name_stands_for_a_format(name: str, tmp_path: Path) -> None:
    assert SPOKEN.keys() == TEMPLATES.keys()
    assert spoken(name, "b", tmp_path / "out") == SPOKEN[name]


@pytest.mark.parametrize(("wanted", "result"), [("{{ messages[1].content }}!", "Hi!"), ("auto", "C")])
def test_text_is_taken_as_it_is_and_auto_is_the_template_of_most(wanted: str, result: str, tmp_path: Path) -> None:
    assert spoken(wanted, "a", tmp_path / "out") == result
    assert spoken(wanted, "b", tmp_path / "other") == result


def test_a_template_without_a_tokenizer_is_refused() -> None:
    llama("bare", 7, layers=1)
    with pytest.raises(CheckpointError, match="bare has no tokenizer_config.json, so no tokenizer would use it"):
        result_of({"merge_method": "linear", "models": [{"model": "bare"}], "chat_template": "chatml"})
    assert Checkpoint.open("a").files.keys() == {"config.json", "tokenizer.json", "tokenizer_config.json"}
