"""The checks of a recipe: what is measured on its result and on inputs beside it, and the limits that the result must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from .checkpoint import Checkpoint
from .checkpoint.shards import parse_size
from .errors import CheckpointError, OptionError
from .progress import Progress, quiet


def _per_text(value: object) -> object:
    numbers = value.values() if isinstance(value, dict) else [value]
    if value is not None and not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise ValueError(f"one number for all texts, or a table with one for each, not {value!r}")
    return value


PerText = Annotated[float | dict[str, float], BeforeValidator(_per_text)]


class Limits(BaseModel):
    """What the result must reach; a limit over texts takes one number for all, or one for each text."""

    model_config = ConfigDict(extra="forbid")

    perplexity: PerText | None = Field(None, description="at most")
    perplexity_ratio: PerText | None = Field(None, description="at most, relative to `against`")
    kl: PerText | None = Field(None, description="at most, nats a token, from `against`")
    top1: PerText | None = Field(None, description="at least, share of tokens, with `against`")
    bits_per_weight: float | None = Field(None, description="at most")
    bytes: int | None = Field(None, description="at most, all tensors")

    @field_validator("bytes", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        try:
            return parse_size(value) if isinstance(value, str) else value
        except OptionError as error:
            raise ValueError(str(error)) from None


class Checks(BaseModel):
    """What is measured on the result, and what it must reach."""

    model_config = ConfigDict(extra="forbid")

    texts: dict[str, str] = Field(default_factory=dict)
    window: int = Field(256, gt=1, description="tokens; windows do not overlap")
    windows: int | None = Field(None, gt=0, description="use only so many windows of each text")
    beside: list[str] = Field(default_factory=list, description="inputs that are measured too, for the table")
    stages: bool = Field(False, description="measure what each step makes, not only the last")
    against: str | None = Field(None, description="the input that ratios, KL and agreement refer to")
    limits: Limits = Field(default_factory=Limits)

    def problems(self, folder: Path) -> list[str]:
        """What is wrong beyond the schema; texts are relative to `folder`."""
        found = [f"checks: the text {name} is not at {folder / text}" for name, text in self.texts.items() if not (folder / text).is_file()]
        given = self.limits.model_dump(exclude_none=True)
        relative = [name for name in ("perplexity_ratio", "kl", "top1") if name in given]
        if relative and self.against is None:
            found.append(f"checks: {' and '.join(relative)} need `against`, the input that they refer to")
        if not self.texts and (relative or "perplexity" in given):
            found.append("checks: limits on texts need `texts`")
        for name, limit in given.items():
            if isinstance(limit, dict):
                found += [f"checks: limits.{name}: there is no text '{text}'" for text in limit if text not in self.texts]
        return found


Row = dict[str, Any]


def measure(checkpoint: Checkpoint, checks: Checks, folder: Path, progress: Progress, reference: Checkpoint | None = None) -> Row:
    """One row of the table: size, perplexity on every text, and with a reference KL(reference || model) in nats and top-1 agreement.

    Packed checkpoints are measured as servers compute them: by their dequantized weights, of which no more than one is there at a time. Texts are
    tokenized by the checkpoint's own tokenizer (or the reference's, where it has none).
    """
    from quant.loading import load

    from .evaluate import compare, load_tokenizer, perplexity, size, tokenize

    facts = size(checkpoint)
    row: Row = {"model": checkpoint.label, "MB": facts.nbytes / 1e6, "bits/weight": facts.bits_per_weight}
    if not checks.texts:
        return row
    texts = {name: read_text(folder / text) for name, text in checks.texts.items()}
    model = load(checkpoint, progress=progress, as_dequantized=True)
    other = load(reference, progress=progress, as_dequantized=True) if reference else None
    tokenizer = load_tokenizer(checkpoint if reference is None or _has_tokenizer(checkpoint) else reference)
    for name, text in texts.items():
        ids = tokenize(tokenizer, text)
        row[f"ppl {name}"] = perplexity(model, ids, window=checks.window, limit=checks.windows, progress=progress).value
        if other is not None:
            found = compare(model, other, ids, window=checks.window, limit=checks.windows, progress=progress)
            row[f"KL {name}"], row[f"top-1 {name}"] = found.kl, found.agreement
    return row


def measure_and_compare(
    checks: Checks, folder: Path, inputs: Mapping[str, Checkpoint], stages: Mapping[str, Checkpoint], result: Checkpoint, progress: Progress | None = None
) -> tuple[list[Row], list[str]]:
    """A row of measurements for each input of interest, each stage on the way, and the result; and a sentence for each limit that is not kept.

    Stages are measured as they are computed: no file is written for them.
    """
    progress = progress or quiet()
    other = inputs[checks.against] if checks.against else None
    beside = list(dict.fromkeys([*checks.beside, *([checks.against] if checks.against else [])]))
    rows = [{**measure(inputs[name], checks, folder, progress), "model": name} for name in beside]
    if checks.stages:
        rows += [{**measure(stage, checks, folder, progress, other), "model": name} for name, stage in stages.items()]
    row = measure(result, checks, folder, progress, other)
    reference = rows[beside.index(checks.against)] if checks.against else {}
    return [*rows, row], failures(checks, row, reference)


def failures(checks: Checks, row: Row, reference: Row) -> list[str]:
    """A sentence for each limit that the row does not keep."""
    found: list[str] = []

    def hold(what: str, limit: PerText | None, value: Callable[[str], float], least: bool = False) -> None:
        for text in checks.texts if limit is not None else ():
            bound = limit.get(text) if isinstance(limit, dict) else limit
            if bound is not None and not (value(text) >= bound if least else value(text) <= bound):
                found.append(f"{what} on {text} is {value(text):.4g}, {'at least' if least else 'at most'} {bound:g} is wanted")

    limits = checks.limits
    hold("perplexity", limits.perplexity, lambda text: row[f"ppl {text}"])
    hold(f"perplexity relative to {checks.against}", limits.perplexity_ratio, lambda text: row[f"ppl {text}"] / reference[f"ppl {text}"])
    hold(f"KL from {checks.against}", limits.kl, lambda text: row[f"KL {text}"])
    hold(f"top-1 agreement with {checks.against}", limits.top1, lambda text: row[f"top-1 {text}"], least=True)
    if limits.bits_per_weight is not None and row["bits/weight"] > limits.bits_per_weight:
        found.append(f"bits a weight are {row['bits/weight']:.4g}, at most {limits.bits_per_weight:g} are wanted")
    if limits.bytes is not None and row["MB"] * 1e6 > limits.bytes:
        found.append(f"the tensors take {row['MB']:.4g} MB, at most {limits.bytes / 1e6:g} MB are wanted")
    return found


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    return any("token" in name for name in checkpoint.files)


def read_text(path: Path) -> str:
    """A text, whole.

    Errors: CheckpointError where it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
