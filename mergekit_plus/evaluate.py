"""How good a model is and how large: perplexity, KL to a reference, bits a weight.

    ids = tokenize(load_tokenizer(checkpoint), text)
    perplexity(load_model(checkpoint), ids).value

A checkpoint need not exist for this: `load_model` fills a transformers model tensor by tensor from a plan as well as from files.
A text is cut into non-overlapping windows; the first token of a window is not predicted, every other one is, from those before it in
the window. A remainder shorter than a window is left out (a text shorter than a window is one window).
"""

from __future__ import annotations

import math
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.folder import whole
from .checkpoint.layout import computations
from .checkpoint.plan import Plan, Step, execute
from .errors import CheckpointError, CompressError, OptionError
from .model import adapter_reason, architecture, quantized_reason, silent_transformers
from .progress import Progress, quiet

WINDOW = 256  # tokens
LOGITS = 1 << 26  # numbers in the logits of a batch, unless one window has more
_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class Perplexity:
    """The mean negative log-likelihood of the predicted tokens, in nats, and how many there were."""

    nll: float
    predictions: int
    windows: int
    window: int

    @property
    def value(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Comparison:
    """A model against a reference over the predicted tokens: mean KL(reference || model) in nats, and how often both say the same token."""

    kl: float
    agreement: float
    predictions: int
    windows: int
    window: int


@dataclass(frozen=True)
class Size:
    """Bytes of all tensors, and the weights that they stand for: packed ones count as what they unpack to, scales and masks as none."""

    nbytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a file for a weight of the model."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


# ---- models and tokenizers ----


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, progress: Progress | None = None, instead: Mapping[str, nn.Module] | None = None
) -> Any:
    """The transformers model of a dense checkpoint, in evaluation mode on the CPU; each tensor is read, or computed, once.

    transformers itself maps names (packed experts, prefixes, tied weights). A compact one is expanded. Memory: the model in `dtype`, and a few tensors more.
    instead: modules that stand in place of the model's own, by where they stand; the checkpoint has no tensors for them.
    Errors: CheckpointError for a quantised checkpoint or an adapter, an unknown architecture, and a tensor too few, too many or of another shape.
    """
    checkpoint = whole(checkpoint)
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    progress = progress or quiet()
    for computation in computations(checkpoint):
        computation.run(progress=progress)
    with silent_transformers(), progress.phase(f"loading {checkpoint.label}", checkpoint.nbytes):
        known_class, config = architecture(checkpoint)
        model_class = _without(known_class, instead) if instead else known_class
        reader = Reader(checkpoint, progress)
        state = {name: Unread(reader, name) for name in checkpoint.specs}
        try:
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:
            if reader.error is not None:
                raise reader.error from None
            if isinstance(error, (RuntimeError, ValueError, KeyError, TypeError)):
                raise CheckpointError(f"{checkpoint.label} does not fit {model_class.__name__}: {_why(error)}") from None
            raise
    if reader.error is not None:
        raise reader.error
    problems = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    problems["misshapen"] = [f"{name} {list(here)}, not {list(there)}" for name, here, there in sorted(info["mismatched_keys"])]
    if found := [f"{kind} {_some(names)}" for kind, names in problems.items() if names]:
        raise CheckpointError(f"{checkpoint.label} does not fit {model_class.__name__}: {'; '.join(found)}")
    model.__class__ = known_class
    for place, module in (instead or {}).items():
        model.set_submodule(place, module)
    return model.eval()


def _without(model_class: Any, places: Iterable[str]) -> Any:
    """A class that makes the same models, with nothing to fill at these places."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        for place in places:
            self.set_submodule(place, nn.Identity())

    return type(model_class.__name__, (model_class,), {"__init__": make, "__module__": model_class.__module__})


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "its experts cannot be packed as the model has them; are all of them there?" if "CONVERSION" in text else text[:300]


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


class Reader:
    """Reads tensors for several threads; a step that yields several of them runs once."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self.checkpoint, self.progress = checkpoint, progress
        self.error: CompressError | None = None
        self._steps = checkpoint.source.step_of if isinstance(checkpoint.source, Plan) else {}
        self._locks = {id(step): threading.Lock() for step in self._steps.values()}
        self._waiting: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        try:
            step = self._steps.get(name)
            tensor = self.checkpoint.read(name) if step is None or len(step.writes) == 1 else self._from(step, name)
        except CompressError as error:
            self.error = self.error or error
            raise
        self.progress.advance(self.checkpoint.specs[name].nbytes)
        return tensor.clone()  # a tensor in memory must not become the model's own

    def _from(self, step: Step, name: str) -> Tensor:
        with self._locks[id(step)]:
            if name not in self._waiting:
                self._waiting.update(zip((spec.name for spec in step.writes), execute(step), strict=True))
            return self._waiting.pop(name)


@dataclass(frozen=True)
class Unread:
    """A tensor as transformers takes one from a file: `unread[...]` reads it."""

    reader: Reader
    name: str

    def __getitem__(self, index: object) -> Tensor:
        return self.reader.read(self.name)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer in the checkpoint's small files; runs no code of its own.

    Errors: CheckpointError where there is none, or transformers cannot read it.
    """
    if not any(
        name.startswith(("tokenizer", "vocab", "merges", "spiece")) or name.endswith((".model", ".tiktoken")) for name in checkpoint.files
    ):
        raise CheckpointError(f"{checkpoint.label} has no tokenizer; name a model folder that has one, with tokenizer.json in it")
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder, silent_transformers():
        from transformers import AutoTokenizer

        for name in checkpoint.files:
            (Path(folder) / Path(name).name).write_bytes(checkpoint.file(name))
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever a malformed tokenizer makes the tokenizers library raise
            raise CheckpointError(
                f"{checkpoint.label}: transformers cannot read the tokenizer ({' '.join(str(error).split())[:200]})"
            ) from None


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """The token ids of a text, int64 [tokens], without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


# ---- measurements ----


def perplexity(
    model: Any,
    ids: Tensor,
    *,
    window: int | None = None,
    limit: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a causal model over a text: int64 ids [tokens], of which the first `limit` windows are read (all by default).

    `window` is 256 tokens, or what the model can take where that is less; results of different windows do not compare. Float64 sums.
    Errors: OptionError for a window or ids that the model cannot take, CheckpointError for a model that is not causal.
    """
    rows = windows(model, ids, window, limit)
    total, progress = 0.0, progress or quiet()
    with progress.phase("perplexity", rows.numel(), " tokens"), torch.inference_mode():
        for part in torch.split(rows, batch or _batch(model, rows)):
            for logits, row in zip(_logits(model, part), part, strict=True):
                total += functional.cross_entropy(logits[:-1], row[1:].to(logits.device), reduction="none").double().sum().item()
            progress.advance(part.numel())
    predictions = len(rows) * (rows.shape[1] - 1)
    return Perplexity(total / predictions, predictions, *rows.shape)


def compare(
    model: Any,
    reference: Any,
    ids: Tensor,
    *,
    window: int | None = None,
    limit: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """How far a model's predictions are from a reference's, over windows as in `perplexity`; memory for the logits of a few windows.

    Errors: as `perplexity`, and CheckpointError where the vocabularies differ.
    """
    rows = windows(reference, ids, window, limit)
    windows(model, ids, rows.shape[1], limit)
    kl, same, progress = 0.0, 0, progress or quiet()
    with progress.phase("comparing", rows.numel(), " tokens"), torch.inference_mode():
        for part in torch.split(rows, batch or _batch(model, rows)):
            for ours, theirs in zip(_logits(model, part), _logits(reference, part), strict=True):
                if ours.shape != theirs.shape:
                    raise CheckpointError(
                        f"the model has {ours.shape[-1]} tokens and the reference {theirs.shape[-1]}; only equal vocabularies compare"
                    )
                here, there = ours[:-1], theirs[:-1].to(ours.device)  # [window - 1, vocabulary]
                divergence = functional.kl_div(here.log_softmax(-1), there.log_softmax(-1), log_target=True, reduction="none").sum(-1)
                kl += divergence.double().sum().item()
                same += int((here.argmax(-1) == there.argmax(-1)).sum())
            progress.advance(part.numel())
    predictions = len(rows) * (rows.shape[1] - 1)
    return Comparison(kl / predictions, same / predictions, predictions, *rows.shape)


def log_probabilities(model: Any, rows: Tensor) -> Iterator[Tensor]:
    """What a model expects after each token of a window but the last, float32 [window - 1, vocabulary], a window at a time."""
    for part in torch.split(rows, _batch(model, rows)):
        with torch.inference_mode():
            found = list(_logits(model, part))
        for logits in found:
            with torch.inference_mode():  # not around the yield: whoever takes it keeps gradients as they were
                expected = logits[:-1].log_softmax(-1)
            yield expected


def windows(model: Any, ids: Tensor, window: int | None = None, limit: int | None = None) -> Tensor:
    """The windows of a text that a measurement reads, int64 [windows, window]. Errors: as `perplexity`."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise CheckpointError(
            f"{type(model).__name__} does not predict the next token, so it has no perplexity; a causal language model does"
        )
    longest = getattr(config, "max_position_embeddings", None)
    size = window or min(WINDOW, longest or WINDOW)
    if size < 2 or (longest and size > longest):
        raise OptionError(f"a window of {size} tokens: the model takes 2 to {longest or 'any number of'} tokens")
    if len(ids) < 2 or (limit is not None and limit < 1):
        raise OptionError(
            f"nothing to predict in {len(ids)} tokens" + (f", limit {limit}" if limit is not None else "") + "; give a longer text"
        )
    if int(ids.max()) >= config.vocab_size:
        raise OptionError(
            f"token {int(ids.max())} is outside the model's vocabulary of {config.vocab_size}; is the tokenizer another model's?"
        )
    size = min(size, len(ids))
    return ids[: len(ids) // size * size].view(-1, size)[:limit]


def _batch(model: Any, rows: Tensor) -> int:
    logits = rows.shape[1] * int(model.config.get_text_config().vocab_size)
    return max(1, min(8, LOGITS // logits))


def _logits(model: Any, rows: Tensor) -> Iterator[Tensor]:
    """Float32 logits [window, vocabulary], a window at a time."""
    for logits in model(input_ids=rows.to(model.device), use_cache=False).logits:
        yield logits.float()


# ---- size ----


def size(checkpoint: Checkpoint) -> Size:
    """Bytes and weights of a checkpoint, dense or packed, from its headers and the `weight_shape` tensors of packed files.

    A plan that packs is not run where a step reads the weight that it packs.
    """
    parameters = 0
    for name, spec in checkpoint.specs.items():
        leaf = name.rpartition(".")[2]
        if leaf in ("weight_packed", "qweight") or leaf.endswith("_blocks") or f"{name}.absmax" in checkpoint.specs:
            parameters += _unpacked(checkpoint, name)
        elif not _ABOUT_ANOTHER.match(leaf) and (spec.is_float or leaf == "weight"):
            parameters += spec.numel
    return Size(checkpoint.nbytes, parameters)


# Scales, zero points and the like, of another tensor.
_ABOUT_ANOTHER = re.compile(r"weight_|input_|qzeros|scales|g_idx|absmax|quant_|nested_|SCB|[kv]_scale|\w+_scales$")


def _unpacked(checkpoint: Checkpoint, name: str) -> int:
    """How many weights a packed tensor holds."""
    spec, module = checkpoint.specs[name], name.rpartition(".")[0]
    if isinstance(checkpoint.source, Plan):
        for read in checkpoint.source.step_of[name].read_specs:
            if read.name == f"{module}.weight":
                return read.numel
    if f"{module}.weight_shape" in checkpoint.specs:
        return int(checkpoint.read(f"{module}.weight_shape").prod())
    if f"{module}.g_idx" in checkpoint.specs:  # of any width: its groups are those of the inputs
        return checkpoint.specs[f"{module}.g_idx"].rows * spec.shape[1]
    return spec.nbytes * 8 // _bits(checkpoint.config.get("quantization_config"))


def _bits(declared: Any) -> int:
    """Bits of a packed weight as config.json declares them; 4 where it does not, as the formats do that leave it out."""
    declared = declared if isinstance(declared, dict) else {}
    groups = declared.get("config_groups")
    schemes = [scheme.get("weights") or {} for scheme in groups.values() if isinstance(scheme, dict)] if isinstance(groups, dict) else []
    bits = declared.get("bits") or next((weights.get("num_bits") for weights in schemes), None)
    return bits if isinstance(bits, int) and bits > 0 else 4
