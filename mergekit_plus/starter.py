"""A recipe to begin with, written for one model: what is sensible for it, with what else one may want in comments."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quant import Scheme
from quant.plan import is_packed, quantize

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .evaluate import size
from .model import adapter_reason, describe

GROUPS = (128, 64, 32, 16)
TEMPLATE = """\
# yaml-language-server: $schema=recipe.schema.json
# What becomes of {label}: {about}.
#
#   compress run recipe.yaml --dry-run              what would be read and written, and what that takes; reads headers only
#   compress run recipe.yaml                        writes {name}-4bit
#   compress run recipe.yaml --set model=./another  the same of another model
#
# Paths are relative to this file. `compress methods` lists every method and its options.
variables:
  model: {ref}
inputs:
  model: $model
{inputs}steps:                                              # one after the other; nothing is written in between
{merge}  # - prune: {{sparsity: 0.5, method: wanda, calibration: calibration.txt}}
  # - retrain: {{train: [norms, mask_lora], text: training.txt}}
  - quantize: {{bits: 4, group_size: {group}}}{pad_group}# with a text that is like what the model will read: method: gptq, calibration: calibration.txt
checks:                                             # what is not kept makes the exit code 1
  load: {load}                                        # transformers loads the output, every weight in its place
{sample}  # texts: {{heldout: heldout.txt}}                   # perplexity on each
  # against: model                                  # what ratios and divergences refer to
  limits:
    bits_per_weight: {bits}{pad}# that of the model: {before:.4g}
    # perplexity_ratio: 1.05                        # needs texts and against
    # kl: 0.05
out: {name}-4bit
"""


NO_INPUTS = "  # base: org/base                                  # to merge with, and to measure against\n"
NO_MERGE = "  # - merge: {method: ties, base: base, models: [model, other], density: 0.5}\n"


def starter(model: Checkpoint, ref: str, name: str, others: Mapping[str, str] | None = None, base: str | None = None) -> str:
    """The text of a recipe that quantizes a model, merged with others, to 4 bits and checks it, from the model's headers alone.

    ref: where the model is, as seen from the recipe. name: what its outputs are called after. others: where those are that it is merged with, by name;
    base: the name of one that is no model of the merge but what they were tuned from. Errors: CheckpointError for what is packed or an adapter.
    """
    if reason := adapter_reason(model):
        raise CheckpointError(f"{reason}; `compress adapter quantize {ref}` makes it small")
    if is_packed(model):
        raise CheckpointError(f"{model.label} is quantized already; begin with the model that it was made from")
    known = describe(model)
    widths = [model.specs[name].shape[-1] for name, meaning in known.tensors.items() if meaning.role == "linear"]
    group = next((group for group in GROUPS if all(width % group == 0 for width in widths)), 0)
    before, after = size(model), size(quantize(model, Scheme(bits=4, group_size=group)))
    bits = f"{math.ceil(after.bits_per_weight * 10) / 10:g}"
    kind = next(iter(model.config.get("architectures") or ["a checkpoint without config.json"]))
    about = f"{kind}, {before.parameters / 1e6:.4g} M parameters, {before.nbytes / 1e6:.4g} MB"
    tokenizer = any("token" in file for file in model.files)
    sample = "  sample: The meaning of life is                    # how the output goes on with it; shown on the model card\n" if tokenizer else ""
    others = others or {}
    inputs = "".join(f"  {other}: {place}\n" for other, place in others.items()) or NO_INPUTS
    listed = ", ".join(["model", *(other for other in others if other != base)])
    merging = f"method: ties, base: {base}, models: [{listed}], density: 0.5" if base else f"method: linear, models: [{listed}]"
    merge = f"  - merge: {{{merging}}}\n" if others else NO_MERGE
    return TEMPLATE.format(
        inputs=inputs, merge=merge,
        label=model.label, about=about, name=name, ref=ref, group=group, load=str(bool(model.config)).lower(), sample=sample, bits=bits,
        pad=" " * (31 - len(bits)), pad_group=" " * (12 - len(str(group))), before=before.bits_per_weight,
    )  # fmt: skip
