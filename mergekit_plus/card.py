"""The model card: README.md of an output folder, whose first lines are what the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

CARD = "README.md"


def card(
    refs: Sequence[str],
    models: Sequence[str],
    steps: Sequence[Mapping[str, object]],
    recipe: str,
    table: Sequence[Mapping[str, Any]],
    sparsity: Mapping[str, Any] | None = None,
    sampled: Sequence[Mapping[str, str]] = (),
) -> bytes:
    """The card of a model made from `refs`, of which these `models` are on the Hub, by these steps; it is the same wherever the model is written to.

    recipe: the text of it. table: what was measured, a row for each model, this one last. sparsity: the zeros of what was pruned. sampled: prompts, and
    how the model goes on with them.
    """
    operations = [operation for step in steps for operation in step]
    quantized = bool({"quantize", "convert", "quantize_adapter"} & set(operations))
    merged, pruned = "merge" in operations, "prune" in operations
    tags = ["mergekit-plus", *(tag for tag, does in (("merge", merged), ("pruned", pruned), ("quantized", quantized)) if does)]
    adapter = bool(operations) and operations[-1].endswith(("_adapter", "_adapters"))
    own = any(isinstance(options, dict) and options.get("neurons") for step in steps for options in step.values())  # a kind that peft does not know
    front: dict[str, Any] = {"library_name": "mergekit-plus" if own else "peft" if adapter else "transformers", "tags": tags}
    if models:
        relation = "quantized" if quantized else "merge" if merged else None
        front = {"base_model": list(dict.fromkeys(models)), **({"base_model_relation": relation} if relation else {}), **front}
    said = ", then ".join(operations) or "copy"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "",
        f"Made by mergekit-plus ({said}) from {', '.join(map(_inline, dict.fromkeys(refs)))}.",
        "`manifest.json` has the SHA-256 of every file and of every input.", "",
        "## Recipe", "", "`compress run recipe.yaml` makes it again.", "", *_fenced(recipe.rstrip(), "yaml"),
    ]  # fmt: skip
    if table:
        lines += ["", "## Measured", "", *markdown_table([*table[:-1], {**table[-1], "model": "this model"}])]
    if sparsity:
        counts = f"{sparsity['share']:.2%} of {sparsity['weights']} weights in {len(sparsity['tensors'])} linear layers are zero"
        lines += ["", "## Sparsity", "", f"{counts} (asked: {sparsity['asked']}); `sparsity.json` has those of each layer."]
    if sampled:
        lines += ["", "## Samples", "", "The likeliest token each time, after the prompt in the first line."]
        lines += [line for sample in sampled for line in ("", *_fenced(f"{sample['prompt']}\n{sample['text']}", "text"))]
    return ("\n".join(lines) + "\n").encode()


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table in Markdown, whatever the cells hold; the headings are the rows' keys, in order of appearance, the first column is text."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [heads, ["---", *["---:"] * (len(heads) - 1)], *([_cell(row.get(head)) for head in heads] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _inline(text: str) -> str:
    """Text that is not markup, whatever it holds."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else _inline(str(value))


def _fenced(text: str, language: str) -> list[str]:
    """A block of code; its fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [fence + language, text, fence]
