"""`compress generate`, as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from program import Program
from tiny import SMALL, tiny_model

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.evaluate import load_model, load_tokenizer
from mergekit_plus.generate import Sampling, generate, own_dtype, weight_bytes
from quant import Scheme
from quant.loading import load, opened
from quant.plan import quantize

MODELS = Path(__file__).parent / "models"
PROMPT = "def fib(n):"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model of code, at 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "code-4bit"
    save(quantize(Checkpoint.open(MODELS / "code"), Scheme(4, 32)), folder)
    return folder


def continued(ref: Path | str, sampling: Sampling, **how: Any) -> str:
    """The text that comes after the prompt."""
    parts: list[str] = []
    checkpoint, adapters = opened(str(ref))
    generate(checkpoint, PROMPT, sampling, parts.append, adapters=adapters, **how)
    return "".join(parts)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_it_writes_what_transformers_generates(packed: Path, kind: str) -> None:
    ref = packed if kind == "packed" else MODELS / "code"
    checkpoint = Checkpoint.open(ref)
    model, tokenizer = load(checkpoint, torch.bfloat16), load_tokenizer(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    text = continued(ref, Sampling(20))
    assert text == tokenizer.decode(found, skip_special_tokens=True) + "\n"
    assert text.count("n") > 0


def test_the_program_writes_the_text_and_says_how_fast_it_was(compress: Program, packed: Path) -> None:
    code, out, err = compress("generate", packed, "--prompt", PROMPT, "-n", 12)
    assert code == 0
    assert out == continued(packed, Sampling(12))
    line = err.splitlines()[-1]
    assert line.startswith("compress: prompt of 8 tokens at ")
    assert line.endswith("tokens/s, 12 in all; weights of 1.19 MB")


def test_one_token_has_no_speed_after_the_first(packed: Path) -> None:
    speed = generate(Checkpoint.open(packed), PROMPT, Sampling(1), lambda text: None)
    assert (speed.prompt_tokens, speed.new_tokens, speed.decode) == (8, 1, None)
    assert speed.prefill > 0
    assert speed.weight_bytes == Checkpoint.open(packed).nbytes


def test_what_is_drawn_goes_by_the_seed_and_leaves_torchs_own_alone(packed: Path) -> None:
    before = torch.get_rng_state()
    first, again, other = (continued(packed, Sampling(12, 1.5, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    greedy = continued(packed, Sampling(12), dtype=torch.float32)
    for nearly in (Sampling(12, 1e-4), Sampling(12, 5.0, top_p=1e-6)):
        assert continued(packed, nearly, dtype=torch.float32) == greedy


def test_a_models_own_dtype_is_that_of_its_config_or_of_most_of_its_floats() -> None:
    code = Checkpoint.open(MODELS / "code")
    assert own_dtype(code) == torch.bfloat16
    assert own_dtype(code.with_config(dtype="float16")) == torch.float16
    assert own_dtype(code.with_config(dtype=None)) == torch.bfloat16
    assert weight_bytes(load_model(code, torch.bfloat16)) == code.nbytes


def test_threads_are_torchs_again_afterwards(packed: Path) -> None:
    before = torch.get_num_threads()
    assert continued(packed, Sampling(2), threads=before + 1) == continued(packed, Sampling(2))
    assert torch.get_num_threads() == before


def changed(folder: Path | str, to: Path, **files: object) -> Path:
    """A copy of a model's folder with other small files; None removes one."""
    shutil.copytree(folder, to)
    for name, content in files.items():
        path = to / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return to


def test_a_text_ends_where_the_model_says_it_does(packed: Path, tmp_path: Path) -> None:
    """generation_config.json names the ends, of which instruction-tuned models have several."""
    model, tokenizer = load(Checkpoint.open(packed), torch.bfloat16), load_tokenizer(Checkpoint.open(packed))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    third = int(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)[0, -1])
    short = changed(packed, tmp_path / "short", generation_config__json={"eos_token_id": [1, third], "temperature": 9.0, "do_sample": True})
    speed = generate(Checkpoint.open(short), PROMPT, Sampling(12), lambda text: None)
    assert speed.new_tokens <= 3


# ---- chat ----


def test_a_prompt_is_put_into_the_chat_template_when_asked(packed: Path, tmp_path: Path) -> None:
    template = "<s>{% for message in messages %}{{ message.content }}(n):{% endfor %}"
    chatty = changed(packed, tmp_path / "chatty", chat_template__jinja=template)
    parts: list[str] = []
    speed = generate(Checkpoint.open(chatty), "def fib", Sampling(12), parts.append, chat=True)
    assert "".join(parts) == continued(packed, Sampling(12))
    assert speed.prompt_tokens == 8


# ---- mistakes ----


def test_what_cannot_be_is_refused_in_one_line(compress: Program, packed: Path, tmp_path: Path) -> None:
    def line(*arguments: object) -> str:
        return compress("generate", *arguments).line.removeprefix("compress: ")

    assert line(packed, "-p", "") == "--prompt is empty; give the text to continue"
    assert line(packed, "-p", "x", "--temperature", "0") == "--temperature 0: above 0; leave it out for the likeliest token"
    assert line(packed, "-p", "x", "--top-p", "0.9") == "--top-p chooses among tokens that are drawn; give a --temperature too"
    assert line(packed, "-p", "x", "-n", 600) == "2 tokens of prompt and 600 new ones are more than the 512 that the model takes; ask for fewer"
    assert line(packed, "-p", "x", "--dtype", "int8").startswith("unknown dtype 'int8'.")
    assert line(packed, "-p", "x", "--chat") == f"{packed} has no chat template; leave out --chat to have the prompt continued as it is"
    assert line(tmp_path / "gone", "-p", "x").startswith(f"{tmp_path / 'gone'}: no such file or folder")
    assert line(MODELS / "text", "-p", "x").endswith("holds no model.safetensors and no model.safetensors.index.json")
    tokenizer = {name: (MODELS / "code" / name.replace("__", ".")).read_text() for name in ("tokenizer__json", "tokenizer_config__json")}
    bare = changed(packed, tmp_path / "bare", **dict.fromkeys(tokenizer))
    assert line(bare, "-p", "x") == f"{bare} has no tokenizer; name a model folder that has one, with tokenizer.json in it"
    assert line(f"{packed}+{tmp_path / 'missing'}", "-p", "x").startswith(f"{tmp_path / 'missing'}: no such file or folder")
    bert = changed(tiny_model("BertForMaskedLM", tmp_path, {**SMALL, "vocab_size": 1024}).label, tmp_path / "bert", **tokenizer)
    assert line(bert, "-p", "x") == f"{bert}: BertForMaskedLM does not predict the next token; a causal language model does"
