"""The chat templates that a document can name, in Jinja, as the model families publish their formats."""

from __future__ import annotations

_ALPACA = """\
{% for message in messages if message.role == 'system' %}{{ message.content | trim + '\\n\\n' }}{% endfor %}
{% for message in messages %}
{% if message.role == 'user' %}{{ '### Instruction:\\n' + message.content | trim + '\\n\\n' }}
{% elif message.role == 'user_context' %}{{ '### Input:\\n' + message.content | trim + '\\n\\n' }}
{% elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content | trim + '\\n\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}
"""

_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

_EXAONE = """\
{% if messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}
{% for message in messages %}
{{ '[|' + message.role + '|]' + message.content + ('\\n' if message.role == 'user' else '[|endofturn|]\\n') }}
{% endfor %}
{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}
"""

_LLAMA3 = """\
{{ bos_token }}
{% for message in messages %}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

_MISTRAL = """\
{% set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{% set turns = messages[1:] if system else messages %}
{{ bos_token }}
{% for message in turns %}
{% if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{ raise_exception('after the system message, if any, user and assistant must take turns') }}
{% elif message.role == 'user' %}{{ ' [INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
{% else %}{{ ' ' + message.content + eos_token }}
{% endif %}
{% endfor %}
"""


def _dense(template: str) -> str:
    """Without the line ends that are there for the reader: a template's own are written `\\n` inside of its expressions."""
    return template.replace("\n", "")


TEMPLATES = {
    "alpaca": _dense(_ALPACA), "chatml": _dense(_CHATML), "exaone": _dense(_EXAONE), "llama3": _dense(_LLAMA3), "mistral": _dense(_MISTRAL),
}  # fmt: skip
