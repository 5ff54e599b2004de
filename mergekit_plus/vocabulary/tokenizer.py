"""A model's tokenizer as data: what tokenizer.json says, and the id of every token."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..model import silent_transformers

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SLOW = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*.model")  # other forms of what tokenizer.json says
FILES = (JSON, CONFIG, "special_tokens_map.json", "chat_template.json", "chat_template.jinja", *SLOW)
MAX_TOKENS = 1 << 24  # what an id must be below: tables are made as long as the largest id says
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The parsed tokenizer.json of the model called `label`."""

    label: str
    content: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        """The part that cuts words into pieces: BPE, Unigram, WordPiece, WordLevel."""
        found: Mapping[str, Any] = self.content["model"]
        return found

    @cached_property
    def kind(self) -> str:
        """The type of its model; files of old leave it to be told by the keys."""
        return str(self.model.get("type") or ("BPE" if "merges" in self.model else "Unigram" if "unk_id" in self.model else "WordPiece"))

    @cached_property
    def pieces(self) -> dict[str, int]:
        """The model's own vocabulary."""
        vocab = self.model["vocab"]
        return {piece: number for number, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)

    @property
    def added(self) -> list[dict[str, Any]]:
        """The tokens that are looked for in a text before the model sees it."""
        return list(self.content.get("added_tokens") or [])

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Every token's id."""
        return self.pieces | {entry["content"]: entry["id"] for entry in self.added}


def is_tokenizer_file(name: str) -> bool:
    """Whether a small file of a model belongs to its tokenizer."""
    return any(fnmatch(name, known) for known in FILES)


def encode_json(table: Mapping[str, Any]) -> bytes:
    """A table as the bytes of a small file."""
    return json.dumps(table, indent=2, ensure_ascii=False).encode() + b"\n"


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """A model's tokenizer, converted by transformers where there is no tokenizer.json; None where there is no tokenizer at all.

    Errors: CheckpointError for files that cannot be read as one.
    """
    content = checkpoint.json_file(JSON)
    if not content and not any(fnmatch(name, known) for name in checkpoint.files for known in SLOW):
        return None
    content = content or _converted(checkpoint)
    try:
        tokenizer = Tokenizer(checkpoint.label, {**content, "added_tokens": _added(checkpoint, content)})
        whole = all(type(number) is int and 0 <= number < MAX_TOKENS for number in tokenizer.tokens.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.label}: {JSON} is not a tokenizer ({type(error).__name__}: {error})") from None
    if not whole or not tokenizer.tokens:
        raise CheckpointError(f"{checkpoint.label}: {JSON} is not a tokenizer: its ids must be whole numbers below {MAX_TOKENS}")
    return tokenizer


def _added(checkpoint: Checkpoint, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens, with those that only the files beside tokenizer.json know."""
    entries = {entry["content"]: dict(entry) for entry in content.get("added_tokens") or []}
    vocab = content["model"]["vocab"]
    known = entries.keys() | (vocab.keys() if isinstance(vocab, dict) else {piece for piece, _ in vocab})
    beside = {entry["content"]: (int(number), entry) for number, entry in checkpoint.json_file(CONFIG).get("added_tokens_decoder", {}).items()}
    beside |= {token: (number, {}) for token, number in checkpoint.json_file("added_tokens.json").items() if token not in beside}
    entries |= {token: added_token(token, number, flags) for token, (number, flags) in beside.items() if token not in known}
    return sorted(entries.values(), key=lambda entry: int(entry["id"]))


def added_token(content: str, number: int, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An entry of `added_tokens`: text that is a token wherever it stands, unless the flags say otherwise."""
    return {"id": number, "content": content, **{flag: bool((flags or {}).get(flag, False)) for flag in FLAGS}}


def _converted(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of older files."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, silent_transformers():
        for name in checkpoint.files:
            if is_tokenizer_file(name) or name == "config.json":
                (Path(folder) / name).write_bytes(checkpoint.file(name))
        try:
            backend = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
            content: dict[str, Any] = json.loads(backend.to_str())
        except Exception as error:  # whatever strange files make it raise
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{checkpoint.label} has no {JSON}, and transformers cannot make one of its tokenizer ({reason})") from None
    return content
