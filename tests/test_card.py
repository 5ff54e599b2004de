"""Model cards: what the Hub reads in them, and that nothing in a recipe breaks out of its place."""

from __future__ import annotations

import yaml

from mergekit_plus.card import card

MERGE = [{"merge": {"method": "linear"}}]


def front(text: bytes) -> dict[str, object]:
    return yaml.safe_load(text.decode().split("---\n")[1])  # type: ignore[no-any-return]


def test_a_whole_card() -> None:
    table = [{"model": "a", "MB": 2.0, "ppl code": 15.937}, {"model": "out", "MB": 1.0}]
    assert card(["org/a@v1", "./b"], ["org/a"], [*MERGE, {"quantize": {"bits": 4}}], "inputs: {}\n", table).decode() == """---
base_model:
- org/a
base_model_relation: quantized
library_name: transformers
tags:
- mergekit-plus
- merge
- quantized
---

Made by mergekit-plus (merge, then quantize) from org/a@v1, ./b.
`manifest.json` has the SHA-256 of every file and of every input.

## Recipe

`compress run recipe.yaml` makes it again.

```yaml
inputs: {}
```

## Measured

| model | MB | ppl code |
| --- | ---: | ---: |
| a | 2 | 15.94 |
| this model | 1 |  |
"""


def test_an_adapter_is_for_peft() -> None:
    told = front(card(["./a"], [], [{"train_adapter": {}}, {"quantize_adapter": {}}], "", []))
    assert told == {"library_name": "peft", "tags": ["mergekit-plus", "quantized"]}
    assert front(card(["./a"], [], [{"train_adapter": {"neurons": 8}}], "", []))["library_name"] == "mergekit-plus"


def test_base_models_are_those_on_the_hub_each_once() -> None:
    assert front(card([], ["org/a", "org/b", "org/a"], MERGE, "", [])) == {
        "base_model": ["org/a", "org/b"], "base_model_relation": "merge", "library_name": "transformers", "tags": ["mergekit-plus", "merge"],
    }  # fmt: skip
    assert front(card(["./a"], [], MERGE, "", [])).keys() == {"library_name", "tags"}
    assert "base_model_relation" not in front(card(["org/a"], ["org/a"], [{"dequantize": {}}], "", []))


def test_names_and_recipes_stay_in_their_places() -> None:
    made = card(["[a](http://b)\n---\nlicense: mit", "<script>|`x`\n# y"], [], MERGE, "a: '```\n# out'\n````", [{"model": "a|b\n"}, {}]).decode()
    assert "from \\[a\\](http://b) --- license: mit, \\<script\\>\\|\\`x\\` \\# y.\n" in made
    assert "\n`````yaml\na: '```\n# out'\n````\n`````\n" in made
    assert "| a\\|b |" in made
    assert front(made.encode()).keys() == {"library_name", "tags"}
