"""YAML as data and nothing else: no tags that make objects, no key twice, no size, depth or aliases that blow up when they are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000  # every alias written out


def read(path: Path) -> Any:
    """The content of a YAML file.

    Errors: RecipeError in one line.
    """
    return parse(_text(path), str(path))


def read_all(path: Path) -> list[Any]:
    """The documents of a YAML file, `---` between them.

    Errors: RecipeError in one line.
    """
    return parse_all(_text(path), str(path))


def parse(text: str, name: str) -> Any:
    """The value that YAML text stands for; `name` says in errors where it stands.

    Errors: RecipeError in one line.
    """
    documents = parse_all(text, name)
    if len(documents) > 1:
        raise RecipeError(f"{name} holds {len(documents)} YAML documents, where one is expected")
    return documents[0] if documents else None


def parse_all(text: str, name: str) -> list[Any]:
    """The values that YAML text stands for, one a document.

    Errors: RecipeError in one line.
    """
    try:
        loader = yaml.SafeLoader(text)
        documents, left = [], MAX_VALUES
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            left -= _count(node, {})
            if left < 0:
                raise ValueError(f"more than {MAX_VALUES} values, aliases counted as often as they stand")
            documents.append(loader.construct_document(node))
        return documents
    except (yaml.YAMLError, ValueError) as error:  # ValueError also for a number with too many digits, or a 31st of February
        raise RecipeError(f"{name} is not YAML that can be read: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{name} is not YAML that can be read: it is nested too deeply, or holds itself") from None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{path} is longer than {MAX_BYTES} bytes: it is no recipe")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, aliases and merge keys written out; each node is looked at once, and no key may be there twice."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            seen: set[str] = set()
            for key in parts[::2]:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: the key '{key.value}' is there twice")
                seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]
