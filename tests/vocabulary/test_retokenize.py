"""Models of different vocabularies as one: every row at its token, the small files with it, and the same bytes however it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from vocabulary_toys import LETTERS, A, B, C, bpe, ids, toy

import mergekit_plus.checkpoint.plan as plans
from mergekit_plus.checkpoint import Checkpoint, Plan, SaveOptions, Step, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.merge.plan import merge
from mergekit_plus.vocabulary import TokenizerSpec, retokenize

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = (EMBED, HEAD)
CONTENTS = {"a": A, "b": B, "c": C}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Checkpoint]:
    return {name: Checkpoint.open(toy(tmp_path / name, content, seed)) for seed, (name, content) in enumerate(CONTENTS.items())}


def views_of(models: Mapping[str, Checkpoint], base: str | None = "a", others: Mapping[str, Checkpoint] | None = None, **key: Any) -> dict[str, Checkpoint]:
    return retokenize(models, base, TokenizerSpec.model_validate(key), others)


def tokens_of(view: Checkpoint) -> dict[str, int]:
    """Every token's id, as the tokenizers library reads the view's file."""
    found: dict[str, int] = Tokenizer.from_str(view.file("tokenizer.json").decode()).get_vocab()
    return found


# ---- rows ----


@pytest.mark.parametrize("source", ["union", "base", "b", "c"])
@pytest.mark.parametrize("table", TABLES)
def test_every_token_that_a_model_has_keeps_its_row(models: dict[str, Checkpoint], source: str, table: str) -> None:
    for name, view in views_of(models, source=source).items():
        after, rows, own = tokens_of(view), view.read(table), models[name].read(table)
        shared = [token for token in ids(CONTENTS[name]) if token in after]
        assert len(shared) > 20
        assert torch.equal(rows[[after[token] for token in shared]], own[[ids(CONTENTS[name])[token] for token in shared]])


def test_the_base_keeps_all_its_rows_under_a_union(models: dict[str, Checkpoint]) -> None:
    view = views_of(models, source="union")["a"]
    assert torch.equal(view.read(EMBED)[:26], models["a"].read(EMBED))
    assert view.file("config.json") != models["a"].file("config.json")
    assert view.config["vocab_size"] == 34


def test_a_model_whose_rows_all_stay_is_not_touched(models: dict[str, Checkpoint]) -> None:
    view = views_of(models, source="base")["a"]
    assert all(plans.is_copy(step) for step in plans.steps_of(view))
    assert view.files == models["a"].files


def first_numbers(view: Checkpoint, *tokens: str) -> list[float]:
    """The first number of a token's embedding: the row that it comes from."""
    return [float(view.read(EMBED)[tokens_of(view)[token], 0]) for token in tokens]


def test_a_missing_row_is_the_bases_else_the_only_owners_else_the_mean(models: dict[str, Checkpoint]) -> None:
    # "the" is row 24 of a, 24 of b; "ing" row 22 of b alone; "<x>" row 2 of c alone
    union = views_of(models, source="union")
    assert first_numbers(union["c"], "the", "ing", "<x>") == [ids(A)["the"], ids(B)["ing"], 2.0]
    assert first_numbers(union["a"], "ing", "tha") == [ids(B)["ing"], ids(C)["tha"]]
    nobody_is_base = views_of(models, base=None, source="union")
    assert first_numbers(nobody_is_base["c"], "the") == [(ids(A)["the"] + ids(B)["the"]) / 2]


def test_rules_choose_rows_and_force_them(models: dict[str, Checkpoint]) -> None:
    rules = {
        "<new>": {"source": {"kind": "model_token", "model": "b", "token": "<|im_end|>"}},
        "in": {"source": {"kind": "model_token", "model": "b", "token_id": 3}},
        "ing": {"source": {"kind": "zero"}},
        "the": {"source": "b", "force": True},
        "a": {"source": {"kind": "zero"}, "force": True},
    }
    views = views_of(models, source="union", tokens=rules)
    assert first_numbers(views["a"], "<new>", "in", "ing", "the", "a") == [ids(B)["<|im_end|>"], ids(A)["in"], 0, ids(B)["the"], 0]
    assert first_numbers(views["c"], "<new>", "in", "ing", "the", "a") == [ids(B)["<|im_end|>"], 3, 0, ids(B)["the"], 0]
    assert first_numbers(views["b"], "ing", "the", "a") == [ids(B)["ing"], ids(B)["the"], 0]
    assert Tokenizer.from_str(views["a"].file("tokenizer.json").decode()).encode("a<new>").tokens == ["a", "<new>"]


def test_a_row_may_come_from_a_model_that_is_not_merged(models: dict[str, Checkpoint]) -> None:
    two = {name: models[name] for name in "ab"}
    rule = {"<x>": {"source": "c"}}
    views = views_of(two, source="base", tokens=rule, others={"c": models["c"]})
    assert first_numbers(views["a"], "<x>") == first_numbers(views["b"], "<x>") == [2.0]
    other = views_of(two, source="c", others={"c": models["c"]})["a"]
    assert tokens_of(other) == ids(C)
    assert first_numbers(other, "th", "tha") == [ids(A)["th"], 0.0], "a token that no merged model has is zeros"


@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(0, 6), st.integers(0, 6))
def test_any_two_vocabularies(first: list[int], second: list[int], drop_a: int, drop_b: int) -> None:
    """Under a union every row of every model stands at its token, whatever the order and the overlap."""
    import tempfile

    pieces = [[LETTERS[number] for number in order][drop:] for order, drop in ((first, drop_a), (second, drop_b))]
    with tempfile.TemporaryDirectory() as folder:
        contents = {name: bpe([], [], pieces=own) for name, own in zip("ab", pieces, strict=True)}
        models = {name: Checkpoint.open(toy(Path(folder) / name, content, 1, tied=True)) for name, content in contents.items()}
        for name, view in views_of(models, source="union").items():
            after = tokens_of(view)
            assert {token: after[token] for token in ids(contents["a"])} == ids(contents["a"])
            rows = view.read(EMBED)[[after[token] for token in ids(contents[name])]]
            assert torch.equal(rows, models[name].read(EMBED))


def test_rows_from_all_over_a_table_are_read_in_one_go(models: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    def step_of(view: Checkpoint) -> Step:
        assert isinstance(view.source, Plan)
        return view.source.step_of[EMBED]

    few = views_of(models, source="union")["b"]
    monkeypatch.setattr("mergekit_plus.vocabulary.rows.PLACES", 2)
    many = views_of(models, source="union")["b"]
    assert (step_of(few).cut, step_of(many).cut) == (1, 0)
    assert torch.equal(few.read(EMBED), many.read(EMBED))


# ---- padding ----


def test_padding_is_kept_and_new_tokens_take_its_place(tmp_path: Path) -> None:
    a, b = (Checkpoint.open(toy(tmp_path / name, content, 0, rows=32)) for name, content in (("a", A), ("b", bpe(["t h", "th e", "i n"], ["<s>", "</s>"]))))
    same = views_of({"a": a, "b": b}, source="base")["b"]
    assert torch.equal(same.read(EMBED), b.read(EMBED))
    assert same.config["vocab_size"] == 32
    c = Checkpoint.open(toy(tmp_path / "c", bpe(["t h", "th e", "i n"], ["<s>", "</s>", "<new>"]), 5))
    union = views_of({"a": a, "c": c}, source="union")
    assert union["a"].read(EMBED).shape == union["c"].read(EMBED).shape == (32, 8)
    assert union["a"].read(EMBED)[:, 0].tolist() == [*range(26), 2, *range(27, 32)], "id 26 is now <new>, row 2 of c"
    assert union["c"].read(EMBED)[27:, 0].tolist() == [27, 28, 29, 30, 31], "padding that c lacks is a's"


def test_padding_that_nobody_has_is_the_mean_of_the_other_rows(models: dict[str, Checkpoint]) -> None:
    view = views_of(models, source="base", pad_to_multiple_of=16)["a"]
    rows = view.read(EMBED)
    assert rows.shape == (32, 8)
    assert view.config["vocab_size"] == 32
    torch.testing.assert_close(rows[26:], models["a"].read(EMBED).mean(0).expand(6, -1))


def test_a_token_beyond_the_table_is_no_row_of_the_model(tmp_path: Path) -> None:
    a, b = (Checkpoint.open(toy(tmp_path / name, A, seed, rows=rows)) for seed, (name, rows) in enumerate({"a": 25, "b": 26}.items()))
    views = views_of({"a": a, "b": b}, source="base")
    assert torch.equal(views["a"].read(EMBED)[25], b.read(EMBED)[25])
    assert views["a"].config["vocab_size"] == 26


# ---- as a stream ----


@pytest.mark.parametrize("key", [{"source": "union"}, {"source": "c", "pad_to_multiple_of": 32}])
@pytest.mark.parametrize("base", ["a", None])
def test_the_same_bytes_however_it_is_cut(models: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: Any, base: str | None) -> None:
    def merged() -> Checkpoint:
        return merge(list(views_of(models, base, **key).values()), "linear", None, {"weight": [0.5, 0.3, 0.2]})

    save(merged(), tmp_path / "whole.safetensors")
    monkeypatch.setattr(plans, "PIECE", 24)
    monkeypatch.setattr(plans, "SLAB", 80)
    save(merged(), tmp_path / "cut.safetensors", SaveOptions(workers=2))
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "cut.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["ties", "pcb", "slerp"])
def test_every_kind_of_method_merges_views(models: dict[str, Checkpoint], method: str) -> None:
    views = views_of({name: models[name] for name in "ab"}, source="union")
    result = merge([views["b"]], method, views["a"], {"t": 0.5} if method == "slerp" else {})
    assert result.read(EMBED).shape == (29, 8)
    assert bool(torch.isfinite(result.read(HEAD)).all())


def test_rows_of_a_wider_dtype_widen_the_table(tmp_path: Path) -> None:
    a = Checkpoint.open(toy(tmp_path / "a", A, 0, dtype=torch.bfloat16))
    b = Checkpoint.open(toy(tmp_path / "b", B, 1))
    views = views_of({"a": a, "b": b}, source="union")
    assert views["a"].specs[EMBED].dtype == "F32"
    place = tokens_of(views["a"])["ing"]
    assert torch.equal(views["a"].read(EMBED)[place], b.read(EMBED)[ids(B)["ing"]])


def test_a_tied_head_gives_its_embeddings(tmp_path: Path) -> None:
    a = Checkpoint.open(toy(tmp_path / "a", A, 0))
    b = Checkpoint.open(toy(tmp_path / "b", B, 1, tied=True))
    views = views_of({"a": a, "b": b}, source="union")
    assert HEAD not in views["b"].specs
    assert views["a"].read(HEAD)[tokens_of(views["a"])["ing"], 0] == ids(B)["ing"]
    assert merge(list(views.values()), "linear").read(HEAD).shape == (29, 8)


# ---- the small files ----


def test_special_ids_follow_their_tokens(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 5], "temperature": 0.7, "suppress_tokens": [25]}))
    models["a"] = Checkpoint.open(tmp_path / "a")
    view = views_of(models, source="b")["a"]
    assert {key: view.config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")} == {"vocab_size": 29, "bos_token_id": 27, "eos_token_id": 26}
    generation = json.loads(view.file("generation_config.json"))
    assert generation == {"bos_token_id": 27, "eos_token_id": [26, ids(B)["d"]], "temperature": 0.7, "suppress_tokens": [ids(B)["in"]]}
    assert (view.file("tokenizer.json"), view.file("tokenizer_config.json")) == (models["b"].file("tokenizer.json"), models["b"].file("tokenizer_config.json"))


def test_a_special_token_that_is_gone_is_the_one_of_the_tokenizers_owner(tmp_path: Path) -> None:
    a = Checkpoint.open(toy(tmp_path / "a", bpe([], ["<bos>", "<eos>"]), 0, bos_token_id=0, eos_token_id=1, pad_token_id=-1))
    b = Checkpoint.open(toy(tmp_path / "b", B, 1))
    view = views_of({"a": a, "b": b}, source="b")["a"]
    assert [view.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [27, 26, -1]


def test_older_forms_of_a_changed_tokenizer_do_not_travel(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    for name in ("merges.txt", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json"):
        (tmp_path / "a" / name).write_text("{}")
    models["a"] = Checkpoint.open(tmp_path / "a")
    carried = {"config.json", "special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(views_of(models, source="union")["a"].files) == carried
    assert set(views_of(models, source="base")["a"].files) == carried | {"merges.txt", "tokenizer.model"}


def test_added_tokens_that_only_the_config_knows_are_tokens(tmp_path: Path) -> None:
    folder = toy(tmp_path / "a", A, 0, rows=28)
    decoder = {"26": {"content": "<late>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}))
    b = Checkpoint.open(toy(tmp_path / "b", B, 1))
    view = views_of({"a": Checkpoint.open(folder), "b": b}, source="union")["b"]
    assert tokens_of(view)["<late>"] == 26
    assert first_numbers(view, "<late>") == [26]
    assert json.loads(view.file("tokenizer_config.json"))["added_tokens_decoder"]["29"]["content"] == "<|im_end|>"


def test_a_folder_of_older_files_is_converted(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    folder = tmp_path / "b"
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(ids(B)))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in B["model"]["merges"]))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    models["b"] = Checkpoint.open(folder)
    view = views_of(models, source="union")["b"]
    assert first_numbers(view, "the", "ing", "<|im_end|>") == [ids(B)[token] for token in ("the", "ing", "<|im_end|>")]
    assert {"vocab.json", "merges.txt"} <= views_of(models, source="b")["a"].files.keys()


@pytest.mark.parametrize("source", ["union", "b"])
def test_transformers_loads_the_result(models: dict[str, Checkpoint], tmp_path: Path, source: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    save(merge(list(views_of(models, source=source, chat_template="chatml").values()), "linear"), out)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == (34 if source == "union" else 29)
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokens_of(Checkpoint.open(out))["<|im_end|>"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "<|im_start|>user\nthe<|im_end|>\n"
    assert model(**tokenizer("the thing", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    assert load_file(out / "model.safetensors")[EMBED].shape[0] == len(tokenizer)


def test_the_tokenizers_of_real_models_are_the_same_one() -> None:
    real = {name: Checkpoint.open(Path(__file__).parents[1] / "models" / name) for name in ("base", "code")}
    views = views_of(real, base="base", source="union")
    assert all(plans.is_copy(step) for view in views.values() for step in plans.steps_of(view))
    assert views["code"].file("tokenizer.json") == real["base"].file("tokenizer.json")


# ---- refusals ----


def test_a_model_without_a_tokenizer_is_taken_to_use_the_bases_or_refused(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    same = Checkpoint.open(toy(tmp_path / "same", None, 7, rows=26))
    view = views_of({"a": models["a"], "same": same}, source="b", others=models)["same"]
    assert first_numbers(view, "the") == [ids(A)["the"]]
    other = Checkpoint.open(toy(tmp_path / "other", None, 7, rows=27))
    with pytest.raises(CheckpointError, match="other: no tokenizer beside the tensors, so that nobody knows which row is which token"):
        views_of({"a": models["a"], "other": other}, source="base")


def test_impossible_rules_are_refused(models: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match=r"'<n>' is to be taken from .*b, which has no token '<n>'"):
        views_of(models, source="union", tokens={"<n>": {"source": "b"}})
    with pytest.raises(CheckpointError, match="which has no row 29, its tables have 29"):
        views_of(models, source="union", tokens={"<n>": {"source": {"kind": "model_token", "model": "b", "token_id": 29}}})
    with pytest.raises(OptionError, match="tokenizer: 'd' is not an input"):
        views_of(models, source="d")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ({"tokens": {"x": {}}}, "say with `source` which tokenizer the result gets"),
        ({"pad_to_multiple_of": 8}, "say with `source` which tokenizer the result gets"),
        ({"source": "base", "pad_to_multiple_of": 0}, "greater than or equal to 1"),
        ({"source": "base", "tokens": {"x": {"force": True}}}, "say with `source` which"),
        ({"source": "base", "tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}, "by `token` or by `token_id`"),
        ({"source": "base", "tokens": {"x": {"sauce": "a"}}}, "sauce"),
    ],
)
def test_keys_that_mean_nothing_are_refused(key: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TokenizerSpec.model_validate(key)


def test_rows_of_another_width_are_refused(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    folder = toy(tmp_path / "wide", B, 0)
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBED] = torch.zeros(29, 9)
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight: .*a has F32 \(26, 8\), .*wide F32 \(29, 9\): their rows do not fit"):
        views_of({"a": models["a"], "wide": Checkpoint.open(folder)}, source="union")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": {"vocab": {"a": "0"}, "merges": []}}, r"tokenizer.json is not a tokenizer: its ids must be whole numbers"),
        ({"model": {"vocab": {"a": 10**12}, "merges": []}}, "its ids must be whole numbers below 16777216"),
        ({"model": 3}, r"tokenizer.json is not a tokenizer \("),
        ([1], "tokenizer.json is not a JSON object"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, content: Any, reason: str) -> None:
    folder = toy(tmp_path / "x", A, 0)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        views_of({"x": Checkpoint.open(folder)}, base=None, source="base")
