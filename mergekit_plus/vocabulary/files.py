"""The small files of a model under a new vocabulary: tokenizer files, and the token ids in config.json and generation_config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.checkpoint import SmallFile
from .tokenizer import CONFIG, FLAGS, JSON, SLOW, Tokenizer, encode_json, is_tokenizer_file

_ID = re.compile(r"(?:.*_)?token_(?:id|ids|index)|(?:begin_)?suppress_tokens")


def tokenizer_files(owner: Checkpoint, tokenizer: Tokenizer, changed: bool) -> dict[str, bytes | SmallFile]:
    """The tokenizer's files: the owner's as they are, or a new tokenizer.json without the older forms of the same, which would contradict it."""
    files = {name: content for name, content in owner.files.items() if is_tokenizer_file(name)}
    if not changed:
        return files
    slow = [name for name in files if name in SLOW or name.endswith((".model", ".tiktoken"))]
    files = {name: content for name, content in files.items() if name not in slow}
    config = owner.json_file(CONFIG)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(entry["id"]): {key: entry[key] for key in ("content", *FLAGS)} for entry in tokenizer.added}
        files[CONFIG] = encode_json(config)
    return {**files, JSON: json.dumps(tokenizer.content, ensure_ascii=False, separators=(",", ":")).encode()}  # indenting 150,000 tokens takes seconds


def with_vocabulary(
    model: Checkpoint, size: int, files: Mapping[str, bytes | SmallFile], before: Mapping[str, int], after: Mapping[str, int], owner: Checkpoint
) -> Checkpoint:
    """The model's small files under the new tokenizer: its `files`, `size` in config.json, and the ids of special tokens by their text.

    Where the new vocabulary lacks the text, the id is the one that the tokenizer's owner has under the same key.
    """
    texts = {number: token for token, number in before.items()}

    def follow(number: int) -> int | None:
        token = texts.get(number)
        return number if token is None else after.get(token)  # no token's id, as -1: as it is

    kept = {name: content for name, content in model.files.items() if not is_tokenizer_file(name)}
    for name in ("config.json", "generation_config.json"):
        if name in kept:
            table = _followed(model.json_file(name), owner.json_file(name), follow)
            if name == "config.json":
                table = _sized(table, size)
            if table != model.json_file(name):
                kept[name] = encode_json(table)
    return replace(model, files=dict(sorted({**kept, **files}.items())))


def _followed(table: Mapping[str, Any], fallback: Mapping[str, Any], follow: Callable[[int], int | None]) -> dict[str, Any]:
    """A config with every token id replaced by what `follow` says, at any depth."""

    def value_of(key: str, value: Any, instead: Any) -> Any:
        if isinstance(value, dict):
            return _followed(value, instead if isinstance(instead, dict) else {}, follow)
        if not _ID.fullmatch(key):
            return value
        if isinstance(value, list) and all(type(number) is int for number in value):
            found = [number for number in map(follow, value) if number is not None]
            return found or (instead if value else value)
        if type(value) is not int:
            return value
        number = follow(value)
        return instead if number is None else number

    return {key: value_of(key, value, fallback.get(key)) for key, value in table.items()}


def _sized(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config with this vocab_size, where it says one."""
    inner = config.get("text_config")
    changed = {**config, **({"text_config": _sized(inner, size)} if isinstance(inner, dict) else {})}
    return {**changed, "vocab_size": size} if "vocab_size" in config else changed
