"""Chat templates: found, chosen and written; the built-in ones render what their formats say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from vocabulary_toys import A, toy

from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.vocabulary import TokenizerSpec, retokenize
from mergekit_plus.vocabulary.chat import TEMPLATES, template_of

TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
ORDERS = [{"role": "system", "content": "be brief"}, *TALK]


def rendered(template: str, messages: list[dict[str, str]], prompt: bool = True) -> str:
    """As transformers renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")


def test_chatml() -> None:
    assert rendered(TEMPLATES["chatml"], ORDERS[:2]) == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(TEMPLATES["chatml"], TALK[:1], prompt=False) == "<|im_start|>user\none<|im_end|>\n"


def test_llama3() -> None:
    user = "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
    assert rendered(TEMPLATES["llama3"], TALK[:1]) == f"<s>{user}<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_mistral() -> None:
    assert rendered(TEMPLATES["mistral"], TALK) == "<s> [INST] one [/INST] two</s> [INST] three [/INST]"
    assert rendered(TEMPLATES["mistral"], ORDERS[:2]) == "<s> [INST] be brief\n\none [/INST]"


def test_alpaca() -> None:
    assert rendered(TEMPLATES["alpaca"], ORDERS[:2]) == "be brief\n\n### Instruction:\none\n\n### Response:\n"


def models(tmp_path: Path, *templates: str | None) -> dict[str, Checkpoint]:
    found = {}
    for number, template in enumerate(templates):
        folder = toy(tmp_path / "abcdef"[number], A, number)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        found["abcdef"[number]] = Checkpoint.open(folder)
    return found


def template_in(views: dict[str, Checkpoint]) -> str | None:
    (template,) = {template_of(view) for view in views.values()}
    return template


def test_auto_takes_the_most_common_one(tmp_path: Path) -> None:
    views = retokenize(models(tmp_path, "{{1}}", "{{2}}", None, " {{2}}\n"), "a", TokenizerSpec(chat_template="auto"))
    assert template_in(views) == "{{2}}"


def test_auto_leaves_models_without_templates_as_they_are(tmp_path: Path) -> None:
    given = models(tmp_path, None, None)
    assert retokenize(given, None, TokenizerSpec(chat_template="auto")) == given


def test_a_name_a_model_or_a_text(tmp_path: Path) -> None:
    given = models(tmp_path, None, "{{2}}")
    for wanted, expected in {"chatml": TEMPLATES["chatml"], "b": "{{2}}", "{{ 3 }}": "{{ 3 }}"}.items():
        assert template_in(retokenize(given, "a", TokenizerSpec(chat_template=wanted))) == expected
    with pytest.raises(CheckpointError, match="a has no chat template"):
        retokenize(given, "a", TokenizerSpec(chat_template="a"))
    with pytest.raises(OptionError, match="chat_template 'chatmll' is neither Jinja text nor a name. Did you mean 'chatml'?"):
        retokenize(given, "a", TokenizerSpec(chat_template="chatmll"))


def test_the_vocabularies_stay_where_only_a_template_is_asked_for(tmp_path: Path) -> None:
    given = models(tmp_path, None, None)
    view = retokenize(given, None, TokenizerSpec(chat_template="chatml"))["a"]
    assert view.source is given["a"].source


def test_a_template_replaces_those_in_every_other_place(tmp_path: Path) -> None:
    folder = toy(tmp_path / "a", A, 0)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{1}}"}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "{{2}}"}, {"name": "default", "template": "{{3}}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    model = Checkpoint.open(folder)
    assert template_of(model) == "{{3}}"
    view = retokenize({"a": model}, None, TokenizerSpec(chat_template="chatml"))["a"]
    assert "chat_template.json" not in view.files
    assert json.loads(view.file("tokenizer_config.json")) == config
    assert view.file("chat_template.jinja").decode() == TEMPLATES["chatml"]
