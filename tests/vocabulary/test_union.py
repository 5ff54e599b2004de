"""The union of tokenizers: the base keeps its ids and its cuts, every token has one id, and what cannot be united is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from vocabulary_toys import LETTERS, A, B, C, Content, added, bpe, ids

from mergekit_plus.errors import CheckpointError
from mergekit_plus.vocabulary.tokenizer import Tokenizer
from mergekit_plus.vocabulary.union import unite, with_tokens

TEXT = st.text(alphabet="abcdefghijklmnopqrst ", max_size=40)


def loaded(tokenizer: Tokenizer) -> Library:
    """The tokenizer as the tokenizers library reads it; its ids must be those that we say."""
    library = Library.from_str(json.dumps(dict(tokenizer.content)))
    assert library.get_vocab() == tokenizer.tokens
    return library


def union(*contents: Content) -> Tokenizer:
    first, *others = (Tokenizer(chr(97 + number), content) for number, content in enumerate(contents))
    return unite(first, others)


def test_the_base_keeps_its_ids_and_the_others_follow() -> None:
    together = union(A, B, C)
    assert ids(A).items() <= together.tokens.items()
    assert sorted(together.tokens.values()) == list(range(34))
    assert list(together.tokens)[26:31] == ["ing", "Ġthe", "an", "and", "tha"]
    assert together.tokens["<|im_end|>"] == 28
    loaded(together)


def test_the_files_are_not_changed_in_place() -> None:
    before = copy.deepcopy([A, B])
    union(A, B)
    assert before == [A, B]


@given(TEXT)
def test_tokens_that_only_the_base_makes_are_cut_as_before(text: str) -> None:
    """A base whose pieces the others share: text is cut as it was; the specials of the others are found."""
    only_specials = bpe(["t h", "th e", "i n"], ["<s>", "</s>", "<a>", "<b>"], specials_first=False)
    together = union(A, only_specials)
    base, new = loaded(Tokenizer("a", A)), loaded(together)
    assert new.encode(text).ids == base.encode(text).ids
    assert new.encode(f"{text}<b>").tokens[-1] == "<b>"


@given(TEXT)
def test_text_of_the_union_decodes_to_itself(text: str) -> None:
    together = loaded(union(A, B, C))
    cut = together.encode(text)
    assert together.decode(cut.ids, skip_special_tokens=False) == text


def test_merges_of_the_others_join_what_the_base_leaves() -> None:
    together = loaded(union(A, B, C))
    assert together.encode("the thing and that").tokens == ["the", "Ġ", "th", "ing", "Ġ", "and", "Ġ", "that"]
    assert loaded(Tokenizer("a", A)).encode("thing").tokens == ["th", "in", "g"]


def test_one_tokenizer_united_with_itself_is_itself() -> None:
    assert union(A, A).content is A


def test_a_special_token_that_is_an_ordinary_piece_elsewhere_keeps_its_id_and_becomes_special() -> None:
    together = union(bpe([], ["<s>"], pieces=[*LETTERS, "<x>"]), bpe([], ["<s>", "<x>"]))
    assert together.tokens["<x>"] == 22
    assert loaded(together).encode("a<x>b").tokens == ["a", "<x>", "b"]


def test_holes_in_the_ids_stay() -> None:
    holed = copy.deepcopy(A)
    holed["added_tokens"].append(added("<far>", 40))
    holed["model"]["vocab"]["<far>"] = 40
    together = union(holed, B)
    assert together.tokens["<far>"] == 40
    assert together.tokens["ing"] == 41
    assert loaded(together).encode("<far>").ids == [40]


def test_new_tokens_follow_all_others_and_are_met_as_they_stand() -> None:
    more = with_tokens(Tokenizer("b", B), ["<new>", "the", "<newer>"])
    assert more.tokens["<new>"] == 29
    assert more.tokens["<newer>"] == 30
    assert loaded(more).encode("in<newer>").tokens == ["in", "<newer>"]
    assert with_tokens(more, ["<new>"]) is more


def unigram(pieces: dict[str, float], special: dict[str, int]) -> Content:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added(token, number) for token, number in special.items()],
        "normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None, "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[piece, score] for piece, score in pieces.items()], "byte_fallback": False},
    }  # fmt: skip


def test_unigram_pieces_follow_the_added_tokens_whose_ids_they_leave_alone() -> None:
    a = unigram({"<unk>": 0.0, "▁": -3.0, "a": -2.0, "b": -2.5}, {"<unk>": 0, "<x>": 4})
    b = unigram({"<unk>": 0.0, "▁": -3.0, "a": -2.0, "ab": -2.1, "▁ab": -2.2}, {"<unk>": 0, "<y>": 5})
    together = union(a, b)
    assert {token: together.tokens[token] for token in ("<x>", "ab", "▁ab", "<y>")} == {"<x>": 4, "ab": 5, "▁ab": 6, "<y>": 7}
    assert loaded(together).encode("ab<x>b<y>").tokens == ["▁ab", "<x>", "▁", "b", "<y>"]


def word_pieces(*pieces: str) -> Content:
    content = bpe([], [])
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    vocab = {piece: number for number, piece in enumerate(("[UNK]", *pieces))}
    return {**content, "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": None, "model": {**model, "vocab": vocab}, "added_tokens": [added("[UNK]", 0)]}


def test_word_pieces_of_both_are_used() -> None:
    together = union(word_pieces("a", "##b"), word_pieces("a", "##c", "##bc"))
    assert together.tokens == {"[UNK]": 0, "a": 1, "##b": 2, "##c": 3, "##bc": 4}
    assert loaded(together).encode("abc ab").tokens == ["a", "##bc", "a", "##b"]


def changed(content: Content, **parts: Any) -> Content:
    return {**content, **parts}


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (unigram({"<unk>": 0.0, "b": -1.0}, {}), "one is BPE, the other Unigram"),
        (changed(B, pre_tokenizer={"type": "Whitespace"}), r"their pre_tokenizers differ \(ByteLevel and Whitespace\)"),
        (changed(B, normalizer={"type": "Lowercase"}), r"their normalizers differ \(none and Lowercase\)"),
        (changed(B, pre_tokenizer={**B["pre_tokenizer"], "add_prefix_space": True}), r"the settings of their pre_tokenizers differ \(ByteLevel\)"),
        (changed(B, model={**B["model"], "byte_fallback": True}), "byte_fallback is False in one and True in the other"),
    ],
)
def test_what_cuts_text_in_another_way_is_refused(other: Content, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"of a and b cannot be united: {reason}, and .* would never be met; choose one of them"):
        union(A, other)


def test_what_only_adds_special_tokens_is_united_however_it_cuts() -> None:
    together = union(A, changed(bpe(["t h"], ["<z>"]), pre_tokenizer={"type": "Whitespace"}))
    assert together.tokens["<z>"] == 26


def test_where_offsets_are_trimmed_makes_no_difference() -> None:
    assert "ing" in union(A, changed(B, pre_tokenizer={**B["pre_tokenizer"], "trim_offsets": False})).tokens


def test_merges_written_as_strings_are_read_too() -> None:
    strings = changed(B, model={**B["model"], "merges": [" ".join(merge) for merge in B["model"]["merges"]]})
    assert union(A, strings).content == union(A, B).content
