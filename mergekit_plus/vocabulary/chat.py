"""Chat templates: found wherever a model keeps its own, chosen, and written where transformers looks first (chat_template.jinja)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, OptionError, nearest
from .tokenizer import CONFIG, encode_json

FILE = "chat_template.jinja"

# The formats as their publishers describe them.
TEMPLATES = {
    "chatml": """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama3": """\
{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "mistral": """\
{% set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}{{ bos_token }}\
{% for message in messages %}\
{% if message.role == 'user' %}{{ ' [INST] ' + (system if loop.index0 == (1 if system else 0) else '') + message.content + ' [/INST]' }}\
{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}\
{% elif message.role != 'system' or not loop.first %}{{ raise_exception('this format knows one system message, at the start, user and assistant') }}\
{% endif %}{% endfor %}""",
    "alpaca": """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content | trim + '\\n\\n' }}\
{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content | trim + '\\n\\n' }}\
{% elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content | trim + '\\n\\n' }}\
{% else %}{{ raise_exception('this format knows the roles system, user and assistant') }}\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}""",
    "exaone": """\
{% if messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}{% for message in messages %}\
{{ '[|' + message.role + '|]' + message.content + ('\\n' if message.role == 'user' else '[|endofturn|]\\n') }}{% endfor %}\
{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}""",
}


def chat_problem(wanted: str, models: Iterable[str]) -> str | None:
    """Why this cannot be a chat template: it is no name that we know, and not Jinja either."""
    known = ["auto", *TEMPLATES, *models]
    if wanted in known or "{" in wanted:
        return None
    return f"chat_template '{wanted}' is neither Jinja text nor a name.{nearest(wanted, known)}"


def template_of(checkpoint: Checkpoint) -> str | None:
    """A model's own chat template; of several named ones the default."""
    if FILE in checkpoint.files:
        return checkpoint.file(FILE).decode("utf-8", "replace")
    for name in (CONFIG, "chat_template.json"):
        found: Any = checkpoint.json_file(name).get("chat_template")
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None


def choose_template(wanted: str, models: Mapping[str, Checkpoint], auto: Sequence[str]) -> str | None:
    """The text of the template that is wanted; None where "auto" finds none among the models that it counts.

    Errors: OptionError for an unknown name; CheckpointError for a model without a template.
    """
    if wanted in models:
        if (own := template_of(models[wanted])) is None:
            raise CheckpointError(f"{models[wanted].label} has no chat template")
        return own
    if wanted == "auto":
        found = [template.strip() for name in auto if (template := template_of(models[name]))]
        return Counter(found).most_common(1)[0][0] if found else None  # of equally common ones the first
    if problem := chat_problem(wanted, models):
        raise OptionError(problem)
    return TEMPLATES.get(wanted, wanted)


def with_template(checkpoint: Checkpoint, template: str) -> Checkpoint:
    """The checkpoint with this template in place of whatever it had."""
    files = {name: content for name, content in checkpoint.files.items() if name != "chat_template.json"}
    config = checkpoint.json_file(CONFIG)
    if config.pop("chat_template", None) is not None:
        files[CONFIG] = encode_json(config)
    return replace(checkpoint, files={**files, FILE: template.encode()})
