"""One tokenizer of several: the base's, with its ids, and after them what only the others have.

What is united must cut words alike. Added tokens always can be: they are found in the text as they stand. For the pieces of a model, the
normalizer and the pre-tokenizer must be the base's, or a piece would mean another text. BPE tries the base's merges first and goes on
with the others'; Unigram and WordPiece choose among all pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from .tokenizer import Tokenizer, added_token

Pieces = list[Any] | dict[str, Any]


def unite(base: Tokenizer, others: Sequence[Tokenizer]) -> Tokenizer:
    """The union. Every token of the base keeps its id.

    Errors: CheckpointError where another tokenizer has pieces of its own and cuts text in another way.
    """
    tokens = dict(base.tokens)
    added = {entry["content"]: entry for entry in base.added}
    new: list[tuple[Tokenizer, list[str]]] = []
    following = max(tokens.values()) + 1
    for other in others:
        fresh = [entry for entry in other.added if entry["content"] not in added]
        special = {entry["content"] for entry in fresh}
        pieces = sorted((piece for piece in other.pieces if piece not in tokens and piece not in special), key=other.pieces.__getitem__)
        if pieces and (reason := _unlike(base, other)):
            many = f"{len(pieces)} tokens ('{pieces[0]}')" if len(pieces) > 1 else f"the token '{pieces[0]}'"
            raise CheckpointError(
                f"the tokenizers of {base.label} and {other.label} cannot be united: {reason}, and {many} would never be met; choose one of them, or `base`"
            )
        for token in (*pieces, *(entry["content"] for entry in fresh)):
            if token not in tokens:
                tokens[token], following = following, following + 1
        added |= {entry["content"]: {**entry, "id": tokens[entry["content"]]} for entry in fresh}
        if pieces:
            new.append((other, pieces))
    if len(added) == len(base.added) and not new:
        return base
    model = {**base.model, "vocab": _vocabulary(base, new, tokens), **_merges(base, new)}
    return _settled(base, {**base.content, "model": model, "added_tokens": sorted(added.values(), key=lambda entry: int(entry["id"]))})


def with_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer with these further tokens, after all others; itself where it has them."""
    missing = [text for text in texts if text not in tokenizer.tokens]
    if not missing:
        return tokenizer
    first = max(tokenizer.tokens.values()) + 1
    entries = [added_token(text, first + number) for number, text in enumerate(missing)]
    return _settled(tokenizer, {**tokenizer.content, "added_tokens": [*tokenizer.added, *entries]})


def _unlike(a: Tokenizer, b: Tokenizer) -> str | None:
    """How two tokenizers cut text differently; None where they do not."""
    if a.kind != b.kind:
        return f"one is {a.kind}, the other {b.kind}"
    for part in ("normalizer", "pre_tokenizer"):
        if _essence(a.content.get(part)) != _essence(b.content.get(part)):
            names = [_name(tokenizer.content.get(part)) for tokenizer in (a, b)]
            return f"their {part}s differ ({names[0]} and {names[1]})" if names[0] != names[1] else f"the settings of their {part}s differ ({names[0]})"
    for flag in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if (a.model.get(flag) or None) != (b.model.get(flag) or None):
            return f"{flag} is {a.model.get(flag)!r} in one and {b.model.get(flag)!r} in the other"
    return None


def _essence(part: Any) -> Any:
    """A part of a tokenizer without what changes no token."""
    if isinstance(part, dict):
        return {key: _essence(value) for key, value in part.items() if key != "trim_offsets"}
    return [_essence(value) for value in part] if isinstance(part, list) else part


def _name(part: Any) -> str:
    if not isinstance(part, dict):
        return "none"
    inner = part.get("pretokenizers") or part.get("normalizers")
    return " + ".join(map(_name, inner)) if inner else str(part.get("type"))


def _vocabulary(base: Tokenizer, new: Sequence[tuple[Tokenizer, list[str]]], tokens: Mapping[str, int]) -> Pieces:
    vocab: Pieces = base.model["vocab"]
    if isinstance(vocab, dict):
        return vocab | {piece: tokens[piece] for _, pieces in new for piece in pieces}
    scores = {piece: other.model["vocab"][other.pieces[piece]][1] for other, pieces in new for piece in pieces}
    return _filled(vocab, {tokens[piece]: (piece, score) for piece, score in scores.items()}, base.added)


def _filled(vocab: list[Any], more: Mapping[int, tuple[str, float]], added: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Unigram's pieces, whose ids are their places: those of added tokens between them are filled with scores too low to be chosen."""
    if not more:
        return vocab
    lowest = min((score for _, score in (*vocab, *more.values())), default=0.0) - 10
    outside = {int(entry["id"]): str(entry["content"]) for entry in added}
    places = range(len(vocab), max(more) + 1)
    return [*vocab, *(list(more.get(place, (outside.get(place, f"<unused {place}>"), lowest))) for place in places)]


def _merges(base: Tokenizer, new: Sequence[tuple[Tokenizer, list[str]]]) -> dict[str, Any]:
    """BPE's merges: the base's, then those of the others that make a new piece."""
    if base.kind != "BPE":
        return {}
    prefix = len(base.model.get("continuing_subword_prefix") or "")
    merges = [_pair(merge) for merge in base.model["merges"]]
    known = set(merges)
    for other, pieces in new:
        wanted = set(pieces)
        for merge in map(_pair, other.model["merges"]):
            if merge[0] + merge[1][prefix:] in wanted and merge not in known:
                merges.append(merge)
                known.add(merge)
    return {"merges": merges}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _settled(tokenizer: Tokenizer, content: dict[str, Any]) -> Tokenizer:
    """A tokenizer whose added tokens keep their ids.

    The tokenizers library numbers an added token that the model does not know by itself, after the number of pieces and the ids so far; where that
    is not its id, it is made a piece, which no merge ever makes.
    """
    changed = Tokenizer(tokenizer.label, content)
    pieces, added = changed.pieces, changed.added
    outside = [entry for entry in added if entry["content"] not in pieces]
    first = max([len(pieces) - 1, *(entry["id"] for entry in added if entry["content"] in pieces and entry["id"] >= len(pieces))]) + 1
    if [entry["id"] for entry in outside] == list(range(first, first + len(outside))):
        return changed
    model = changed.model
    if isinstance(model["vocab"], dict):
        vocab: Pieces = model["vocab"] | {entry["content"]: entry["id"] for entry in outside}
    else:
        lowest = min((score for _, score in model["vocab"]), default=0.0) - 10
        vocab = _filled(model["vocab"], {entry["id"]: (entry["content"], lowest) for entry in outside}, added)
    return Tokenizer(tokenizer.label, {**content, "model": {**model, "vocab": vocab}})
