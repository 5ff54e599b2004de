"""Short names for what has long ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def distinct(refs: Sequence[str]) -> dict[str, str]:
    """A short name for each reference, in order: the last part of its path, numbered where two would be the same."""
    names: dict[str, str] = {}
    for ref in refs:
        stem = Path(ref).name.removesuffix(".safetensors").removesuffix(".txt").removesuffix(".yaml") or ref
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names[name] = ref
    return names
