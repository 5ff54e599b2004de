"""The checks of a recipe: what is measured on its result and on inputs beside it, and the limits that the result must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    sparsity: float | None = Field(None, ge=0, le=1, description="at least, share of zeros among the linear weights")

    @field_validator("bytes", mode="before", json_schema_input_type=int | str | None)
    @classmethod
    def _size(cls, value: object) -> object:
        try:
            return parse_size(value) if isinstance(value, str) else value
        except OptionError as error:
            raise ValueError(str(error)) from None


class Sample(BaseModel):
    """What the model is to go on with: a prompt, and how many tokens at most; the likeliest token each time."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    tokens: int = Field(40, gt=0)


@dataclass(frozen=True)
class Verdict:
    """One check: what was looked at, what came of it, and whether it was kept; `sentence` says what is wrong where it was not."""

    what: str
    kept: bool
    found: str
    sentence: str

    @property
    def facts(self) -> dict[str, Any]:
        """As results hold it."""
        return {"check": self.what, "kept": self.kept, "found": self.found}


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
    load: bool = Field(False, description="transformers must load the output as it is, every weight in its place")
    sample: list[Sample] = Field(default_factory=list, description="prompts that the output, as transformers loads it, goes on with")

    @field_validator("sample", mode="before", json_schema_input_type=str | Sample | list[str | Sample])
    @classmethod
    def _one_prompt(cls, value: object) -> object:
        prompts = value if isinstance(value, list) else [value]
        return [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]

    @property
    def measures(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.texts or self.limits.model_fields_set or self.load or self.sample)

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

    from .evaluate import Size, compare, load_tokenizer, perplexity, size, tokenize
    from .inspection import stored_bytes

    facts = Size(stored_bytes(checkpoint), size(checkpoint).parameters)
    row: Row = {"model": checkpoint.label, "MB": facts.nbytes / 1e6, "bits/weight": facts.bits_per_weight}
    if not checks.texts:
        return row
    texts = {name: read_text(folder / text) for name, text in checks.texts.items()}
    model = load(checkpoint, progress=progress, as_dequantized=True)
    other = load(reference, progress=progress, as_dequantized=True) if reference else None
    tokenizer = load_tokenizer(checkpoint if reference is None or has_tokenizer(checkpoint) else reference)
    for name, text in texts.items():
        ids = tokenize(tokenizer, text)
        row[f"ppl {name}"] = perplexity(model, ids, window=checks.window, limit=checks.windows, progress=progress).value
        if other is not None:
            found = compare(model, other, ids, window=checks.window, limit=checks.windows, progress=progress)
            row[f"KL {name}"], row[f"top-1 {name}"] = found.kl, found.agreement
    return row


def measure_and_compare(
    checks: Checks, folder: Path, inputs: Mapping[str, Checkpoint], stages: Mapping[str, Checkpoint], result: Checkpoint, progress: Progress | None = None
) -> tuple[list[Row], list[Verdict]]:
    """A row of measurements for each input of interest, each stage on the way, and the result; and what became of each limit.

    Stages are measured as they are computed: no file is written for them.
    """
    progress = progress or quiet()
    other = inputs[checks.against] if checks.against else None
    beside = list(dict.fromkeys([*checks.beside, *([checks.against] if checks.against else [])]))
    rows = [{**measure(inputs[name], checks, folder, progress), "model": name} for name in beside]
    if checks.stages:
        rows += [{**measure(stage, checks, folder, progress, other), "model": name} for name, stage in stages.items()]
    row = measure(result, checks, folder, progress, other)
    if checks.limits.sparsity is not None:
        row["zeros"] = _zeros(result)
    reference = rows[beside.index(checks.against)] if checks.against else {}
    return [*rows, row], verdicts(checks, row, reference)


def verdicts(checks: Checks, row: Row, reference: Row) -> list[Verdict]:
    """What became of each limit, on the row of the result."""
    limits, done = checks.limits, list[Verdict]()

    def hold(what: str, value: float, limit: float, least: bool = False, verb: str = "is", unit: str = "") -> None:
        kept = value >= limit if least else value <= limit
        found = f"{value:.4g}{unit}"
        wanted = f"{'at least' if least else 'at most'} {limit:g}{unit} {'is' if verb == 'is' else 'are'} wanted"
        done.append(Verdict(what, kept, found, f"{what} {verb} {found}, {wanted}"))

    def hold_texts(what: str, limit: PerText | None, value: Callable[[str], float], least: bool = False) -> None:
        for text in checks.texts if limit is not None else ():
            bound = limit.get(text) if isinstance(limit, dict) else limit
            if bound is not None:
                hold(f"{what} on {text}", value(text), bound, least)

    hold_texts("perplexity", limits.perplexity, lambda text: row[f"ppl {text}"])
    hold_texts(f"perplexity relative to {checks.against}", limits.perplexity_ratio, lambda text: row[f"ppl {text}"] / reference[f"ppl {text}"])
    hold_texts(f"KL from {checks.against}", limits.kl, lambda text: row[f"KL {text}"])
    hold_texts(f"top-1 agreement with {checks.against}", limits.top1, lambda text: row[f"top-1 {text}"], least=True)
    if limits.bits_per_weight is not None:
        hold("bits a weight", row["bits/weight"], limits.bits_per_weight, verb="are")
    if limits.bytes is not None:
        hold("the tensors", row["MB"], limits.bytes / 1e6, verb="take", unit=" MB")
    if limits.sparsity is not None:
        hold("the share of zeros", row["zeros"], limits.sparsity, least=True)
    return done


def _zeros(checkpoint: Checkpoint) -> float:
    """The share of zeros among the linear weights, packed or not."""
    from prune.report import sparsity_facts, zeros_of
    from quant.plan import dequantize, is_packed

    share: float = sparsity_facts("", zeros_of(dequantize(checkpoint) if is_packed(checkpoint) else checkpoint))["share"]
    return share


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether one lies beside the weights."""
    return any("token" in name for name in checkpoint.files)


def read_text(path: Path) -> str:
    """A text, whole.

    Errors: CheckpointError where it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
