"""A text continued by a model as it is stored, dense or packed, token by token; transformers' own `generate` does the work.

    checkpoint, adapters = opened("model-4bit")
    speed = generate(checkpoint, "def fib(n):", Sampling(), print, adapters=adapters)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from quant.loading import load

from .adapters import Adapter
from .checkpoint import Checkpoint
from .checkpoint.dtypes import TORCH_DTYPES, parse_float_dtype
from .errors import CheckpointError, OptionError, printable
from .evaluate import load_tokenizer
from .model import architecture, silent_transformers
from .progress import Progress, quiet

TOKENS = 128  # new ones at most, where nothing is said


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest, or with a temperature one by its probability, among those that make up `top_p` of it."""

    max_new_tokens: int | None = None  # TOKENS, or what the model has room for
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        """Everything wrong with them, a sentence each."""
        cold = self.temperature is not None and not self.temperature > 0
        found = [f"--temperature {self.temperature:g}: above 0; leave it out for the likeliest token"] if cold else []
        found += [f"--top-p {self.top_p:g}: above 0 and up to 1"] if not 0 < self.top_p <= 1 else []
        found += ["--top-p chooses among tokens that are drawn; give a --temperature too"] if self.top_p != 1 and self.temperature is None else []
        return found + (["--max-new-tokens must be 1 or more"] if self.max_new_tokens is not None and self.max_new_tokens < 1 else [])


@dataclass(frozen=True)
class Speed:
    """What a run took: the prompt in one pass, which yields the first token, and a pass for every further one."""

    prompt_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float
    weight_bytes: int

    @property
    def prefill(self) -> float:
        """Tokens of the prompt in a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode(self) -> float | None:
        """Tokens in a second after the first; None where there was only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def generate(
    checkpoint: Checkpoint, prompt: str, sampling: Sampling, write: Callable[[str], object], *, adapters: Sequence[Adapter] = (), chat: bool = False,
    dtype: torch.dtype | None = None, device: str = "cpu", threads: int | None = None, progress: Progress | None = None,
) -> Speed:  # fmt: skip
    """Continue a prompt; `write` gets the text as it comes, without the prompt and without control characters but tabs and ends of lines.

    chat: the prompt is what a user says, in the words of the model's chat template. dtype: that of the model's own config.json by default.
    Errors: OptionError for options that cannot be, a prompt without tokens, and one that leaves no room; CheckpointError for what is no causal model, or
    has no tokenizer, or no chat template.
    """
    if found := sampling.problems():
        raise OptionError("; ".join(found))
    if not prompt:
        raise OptionError("--prompt is empty; give the text to continue")
    tokenizer = load_tokenizer(checkpoint)
    ids = _ids(checkpoint, tokenizer, prompt, chat)
    config = _config(checkpoint, ids, sampling)
    with _threads(threads), silent_transformers():
        model = load(checkpoint, dtype or own_dtype(checkpoint), progress or quiet(), adapters, device=device)
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            return timed(model, ids, config, _shown(tokenizer, write))


def timed(model: Any, ids: Tensor, config: Any, streamer: Any = None, now: Callable[[], float] = perf_counter) -> Speed:
    """What it takes to continue ids, int64 [tokens], as a GenerationConfig says; `streamer` gets the tokens, the prompt's first, `now` tells the time."""
    clock, rows = _Clock(streamer, now), ids[None].to(model.device)
    with torch.inference_mode():
        model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=config, streamer=clock)
    first, last = clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]
    return Speed(len(ids), first, len(clock.times) - 1, last, weight_bytes(model))


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json names, else that of most of the floats."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(named, str) and named != "auto":
        return TORCH_DTYPES[parse_float_dtype(named)]
    floats = Counter[str]()
    for spec in checkpoint.specs.values():
        floats[spec.dtype] += spec.numel if spec.is_float else 0
    return TORCH_DTYPES[max(floats, key=lambda tag: floats[tag])]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and stored buffers, one that has several names once."""
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values())


def _ids(checkpoint: Checkpoint, tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """The tokens of a prompt, int64 [tokens], with those that the tokenizer begins a text with."""
    if not chat:
        return torch.tensor(tokenizer(prompt, verbose=False)["input_ids"], dtype=torch.int64)
    if not tokenizer.chat_template:
        raise CheckpointError(f"{checkpoint.label} has no chat template; leave out --chat to have the prompt continued as it is")
    try:  # the only place where a template is rendered, in the sandbox that transformers has for it
        said = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template makes the sandbox raise
        raise CheckpointError(f"{checkpoint.label}: its chat template fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    return torch.tensor(tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _config(checkpoint: Checkpoint, ids: Tensor, sampling: Sampling) -> Any:
    """What `generate` is told: ends as generation_config.json or config.json names them, and no habits of the model's own."""
    from transformers import GenerationConfig

    model_class, whole = architecture(checkpoint)
    config = whole.get_text_config()
    if getattr(whole, "is_encoder_decoder", False) or not model_class.can_generate():
        raise CheckpointError(f"{checkpoint.label}: {model_class.__name__} does not predict the next token; a causal language model does")
    if not len(ids):
        raise OptionError("the prompt has no tokens; give more of a text to continue")
    if int(ids.max()) >= config.vocab_size:
        raise OptionError(f"token {int(ids.max())} is outside the model's vocabulary of {config.vocab_size}; is the tokenizer another model's?")
    longest = getattr(config, "max_position_embeddings", None)
    wanted = sampling.max_new_tokens or max(1, min(TOKENS, (longest or len(ids) + TOKENS) - len(ids)))
    if longest and len(ids) + wanted > longest:
        raise OptionError(f"{len(ids)} tokens of prompt and {wanted} new ones are more than the {longest} that the model takes; ask for fewer")
    ends = checkpoint.json_file("generation_config.json").get("eos_token_id", config.eos_token_id)
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature is not None else {}
    return GenerationConfig(max_new_tokens=wanted, eos_token_id=ends or None, pad_token_id=ends[0] if ends else None, **drawn)


def _shown(tokenizer: Any, write: Callable[[str], object]) -> Any:
    """transformers' TextStreamer, which hands on whole words, to `write`; what a model says must not steer a terminal."""
    from transformers import TextStreamer

    def shown(text: str, stream_end: bool = False) -> None:
        write(re.sub(r"[^\n\t]+", lambda line: printable(line[0]), text) + "\n" * stream_end)

    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = shown
    return streamer


class _Clock:
    """A streamer that takes down when tokens come, and hands them on."""

    def __init__(self, streamer: Any, now: Callable[[], float]) -> None:
        self.streamer, self.now = streamer, now
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """The prompt, or the next token."""
        self.times.append(self.now())
        if self.streamer is not None:
            self.streamer.put(tokens)

    def end(self) -> None:
        """No more of them."""
        if self.streamer is not None:
            self.streamer.end()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
