"""A calibration text as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, OptionError
from ..evaluate import tokenize

WINDOWS, WINDOW = 128, 256  # by default


def read_text(refs: Sequence[Path], tokenizer: Any, windows: int = WINDOWS, window: int = WINDOW, seed: int = 0) -> Tensor:
    """Windows of a text, int64 [windows, window]; fewer where the text has fewer. They do not overlap and are spread evenly over the text,
    at places that `seed` moves.

    A text is a file, the `.txt` and `.jsonl` files of a folder by name, or the "text" of each line of a `.jsonl` file; several follow each other.
    Errors: CheckpointError where one cannot be read, OptionError for a text that is shorter than a window.
    """
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *(tokenize(tokenizer, text) for ref in refs for text in _texts(Path(ref)))])
    if window < 2 or windows < 1:
        raise OptionError(f"{windows} windows of {window} tokens: give at least one window of two tokens")
    found = len(ids) // window
    if not found:
        names = ", ".join(str(ref) for ref in refs) or "no file"
        raise OptionError(f"the text ({names}) has {len(ids)} tokens, a window is {window}; give a longer text or a smaller --window")
    taken = min(windows, found)
    generator = torch.Generator().manual_seed(seed)
    bounds = [number * found // taken for number in range(taken + 1)]
    places = [start + int(torch.randint(end - start, (), generator=generator)) for start, end in zip(bounds, bounds[1:], strict=False)]
    return ids[: found * window].view(found, window)[places]


def text_files(ref: Path) -> list[Path]:
    """The files of a text: itself, or those of its folder. Errors: CheckpointError where there is none."""
    if ref.is_dir():
        if files := sorted(path for path in ref.iterdir() if path.suffix in (".txt", ".jsonl")):
            return files
        raise CheckpointError(f"{ref}: no .txt or .jsonl file lies in this folder")
    return [ref]


def _texts(ref: Path) -> list[str]:
    return [_text(path) for path in text_files(ref)]


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if path.suffix != ".jsonl":
        return text
    parts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            part = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            part = None
        if not isinstance(part, str):
            raise CheckpointError(f'{path}, line {number}: not a JSON object with a "text" that is a string')
        parts.append(part)
    return "\n\n".join(parts)
