"""A trial of an output as its users load it: transformers reads the folder, and the model goes on with prompts."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .checks import Checks, Verdict
from .errors import CompressError
from .evaluate import load_tokenizer
from .model import architecture, silent_transformers

Sampled = dict[str, str]  # prompt, text
_SHOWN = 200  # characters of what transformers says


def attempt(folder: Path, checks: Checks) -> tuple[list[Verdict], list[Sampled]]:
    """Whether transformers loads the folder with every weight in its place, and what the model says to each prompt of the checks, by its likeliest tokens.

    What transformers refuses is a verdict, not an error. Memory: the model as transformers holds it. No code of the folder's own is run.
    """
    if not (checks.load or checks.sample):
        return [], []
    what = "loading in transformers"
    try:
        with silent_transformers(), redirect_stderr(io.StringIO()):  # where compressed-tensors draws bars of its own
            model = _loaded(folder)
            sampled = [_continued(model, folder, sample.prompt, sample.tokens) for sample in checks.sample]
    except Exception as error:  # whatever it is that a user of the output would meet
        reason = " ".join(str(error).replace(str(folder), "the output").split())[:_SHOWN] or type(error).__name__
        return [Verdict(what, False, "failed", f"{what} failed: {reason}")], []
    return [Verdict(what, True, "all weights in place", "")], sampled


def _loaded(folder: Path) -> Any:
    model_class, _ = architecture(Checkpoint.open(folder))
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        raise CompressError("; ".join(f"{kind} weights {', '.join(names[:3])}" for kind, names in wrong.items() if names))
    return model.eval()


def _continued(model: Any, folder: Path, prompt: str, tokens: int) -> Sampled:
    import torch

    tokenizer = load_tokenizer(Checkpoint.open(folder))
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return {"prompt": prompt, "text": str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))}
