"""What a search minimises: how far a model is, on each of some texts, from what it should be there, as one number.

Texts are cut into windows as `evaluate` cuts them, of which a fixed number is read, spread evenly over the text: a text's first pages are
not like the rest of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError, OptionError
from ..evaluate import log_probabilities, perplexity, windows

Losses = dict[str, float]
Load = Callable[[], Any]


@dataclass(frozen=True)
class Objective:
    """A model's losses, in nats a token, and the one number that they make.

    "mean": the mean of the negative log-likelihoods over the texts. "worst": the largest `(loss - expert) / (base - expert)`, the expert being
    the text's own model: 0 is the expert, 1 the base. "kl": the mean KL(expert || model) in nats.
    """

    kind: Literal["mean", "worst", "kl"]
    rows: Mapping[str, Tensor]  # int64 [windows, window] of each text
    span: Mapping[str, tuple[float, float]]  # "worst": each text's loss under its expert and under the base
    targets: Mapping[str, list[Tensor]]  # "kl": the expert's log-probabilities, float32 [window - 1, vocabulary] of each window

    def losses(self, model: Any) -> Losses:
        """The loss on each text: negative log-likelihoods, or divergences."""
        if self.kind == "kl":
            return {name: _divergence(model, rows, self.targets[name]) for name, rows in self.rows.items()}
        return {name: nll(model, rows) for name, rows in self.rows.items()}

    def value(self, losses: Losses) -> float:
        """What is minimised; infinite where a loss is not finite."""
        parts = [(loss - self.span[name][0]) / (self.span[name][1] - self.span[name][0]) if self.span else loss for name, loss in losses.items()]
        number = max(parts) if self.kind == "worst" else math.fsum(parts) / len(parts)
        return number if math.isfinite(number) else math.inf


def prepare(kind: Literal["mean", "worst", "kl"], rows: Mapping[str, Tensor], base: Load | None, experts: Mapping[str, Load]) -> Objective:
    """Measure what the objective refers to; one model is loaded at a time. `experts`: the model of each text.

    Errors: CheckpointError where a text's own model is no better than the base there, which leaves nothing to normalise by.
    """
    span: dict[str, tuple[float, float]] = {}
    targets: dict[str, list[Tensor]] = {}
    if kind == "worst":
        assert base is not None
        start = base()
        bases = {name: nll(start, part) for name, part in rows.items()}
        del start
        for name, part in rows.items():
            span[name] = nll(experts[name](), part), bases[name]
            if not span[name][0] < span[name][1]:
                raise CheckpointError(
                    f"search: on the text {name} its own model is no better than the base ({span[name][0]:.3f} and {bases[name]:.3f} nats); "
                    "texts go with models in their order"
                )
    if kind == "kl":
        targets = {name: list(log_probabilities(experts[name](), part)) for name, part in rows.items()}
    return Objective(kind, rows, span, targets)


def spread(model: Any, ids: Tensor, window: int | None, count: int) -> Tensor:
    """`count` windows of a text at even distances (all, where there are fewer), int64 [count, window]. Errors: as `evaluate.windows`."""
    rows = windows(model, ids, window)
    places = torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()
    return rows[places]


def nll(model: Any, rows: Tensor) -> float:
    """Mean negative log-likelihood over windows, nats a token."""
    return perplexity(model, rows.reshape(-1), window=rows.shape[1]).nll


def pair(texts: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """Which model each text belongs to: the one of its name where the texts have the models' names, else the one in its place."""
    if set(texts) == set(models):
        return {name: name for name in texts}
    return dict(zip(texts, models, strict=False))


def _divergence(model: Any, rows: Tensor, targets: Sequence[Tensor]) -> float:
    total = 0.0
    for here, there in zip(log_probabilities(model, rows), targets, strict=True):
        if here.shape != there.shape:
            raise OptionError(f"search: the models have vocabularies of {here.shape[-1]} and {there.shape[-1]} tokens, so that there is no KL")
        total += functional.kl_div(here, there, log_target=True, reduction="sum").item() / len(here)
    return total / len(rows)
