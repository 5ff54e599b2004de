"""Perplexity, KL and size of models from files and from plans, against plain transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import compare, load_model, load_tokenizer, perplexity, size, tokenize, windows

Tiny = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Opens a tiny random model of an architecture."""
    return partial(tiny_model, under=tmp_path_factory.mktemp("tiny"))


MODELS = Path(__file__).parent / "models"
IDS = torch.arange(200) * 7 % 61


def plain(checkpoint: Checkpoint) -> Any:
    """The model as transformers itself loads it from the folder."""
    import transformers

    name = checkpoint.config["architectures"][0]
    return getattr(transformers, name).from_pretrained(checkpoint.label, dtype=torch.float32).eval()


class Recorder:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []
        self.done = 0

    @contextmanager
    def phase(self, label: str, total: int | None, unit: str = "B", done: int = 0) -> Iterator[None]:
        self.phases.append((label, total))
        yield

    def advance(self, amount: int) -> None:
        self.done += amount


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "GemmaForCausalLM",
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "OPTForCausalLM",
        "BertForMaskedLM",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
    ],
)
def test_a_loaded_model_is_bit_for_bit_that_of_transformers(tiny: Tiny, name: str) -> None:
    ours, theirs = load_model(tiny(name)), plain(tiny(name))
    for parameter, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[parameter], value), parameter
    with torch.inference_mode():
        assert torch.equal(ours(input_ids=IDS[None, :32]).logits, theirs(input_ids=IDS[None, :32]).logits)
    assert not ours.training


def test_a_plan_is_evaluated_without_a_file_and_a_step_runs_once(tiny: Tiny) -> None:
    llama, runs = tiny("LlamaForCausalLM"), []

    def halve(tensors: Any, first_row: int, measured: Any) -> Any:
        runs.append(len(tensors))
        return [tensor / 2 for tensor in tensors]

    together = [name for name in llama.specs if ".0." in name]
    step = Step(tuple((llama, name) for name in together), tuple(llama.specs[name] for name in together), halve)
    planned = replace(llama, source=Plan([step, *(copy_step(llama, name) for name in llama.specs if name not in together)]))
    progress = Recorder()
    ours, theirs = load_model(planned, progress=progress).state_dict(), plain(llama).state_dict()
    assert all(torch.equal(ours[name], theirs[name] / 2 if name in together else theirs[name]) for name in llama.specs)
    assert runs == [len(together)]
    assert progress.done == planned.nbytes == progress.phases[0][1]


def test_a_model_does_not_share_memory_with_the_checkpoint(tiny: Tiny) -> None:
    llama = tiny("LlamaForCausalLM")
    held = replace(Checkpoint.from_tensors({name: llama.read(name) for name in llama.specs}), files=llama.files)
    before = held.read("model.norm.weight").clone()
    with torch.no_grad():
        load_model(held).model.norm.weight.add_(1)
    assert torch.equal(held.read("model.norm.weight"), before)


def test_a_model_can_be_loaded_in_bfloat16(tiny: Tiny) -> None:
    assert load_model(tiny("LlamaForCausalLM"), torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def changed(checkpoint: Checkpoint, drop: str = "", **extra: torch.Tensor) -> Checkpoint:
    tensors = {name: checkpoint.read(name) for name in checkpoint.specs if name != drop}
    return replace(Checkpoint.from_tensors(tensors | extra), files=checkpoint.files)


def test_random_weights_are_never_evaluated(tiny: Tiny) -> None:
    llama = tiny("LlamaForCausalLM")
    with pytest.raises(CheckpointError, match=r"does not fit LlamaForCausalLM: missing model\.norm\.weight"):
        load_model(changed(llama, drop="model.norm.weight"))
    with pytest.raises(CheckpointError, match="unexpected surplus"):
        load_model(changed(llama, surplus=torch.ones(3)))
    with pytest.raises(CheckpointError, match=r"misshapen lm_head\.weight \[64, 8\], not \[64, 16\]"):
        load_model(changed(llama, **{"lm_head.weight": torch.ones(64, 8)}))
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        load_model(changed(llama, drop="lm_head.weight"))  # its config says untied


def test_a_missing_expert_is_missed(tiny: Tiny) -> None:
    moe, expert = tiny("MixtralForCausalLM"), "model.layers.1.block_sparse_moe.experts.1"
    with pytest.raises(CheckpointError, match=r"misshapen model.layers.1.mlp.experts.down_proj \[1, 16, 32\], not \[2, 16, 32\]"):
        load_model(changed(moe, drop=f"{expert}.w2.weight"))
    with pytest.raises(CheckpointError, match="are all of them there"):
        load_model(changed(moe, drop=f"{expert}.w3.weight"))


def test_an_error_while_reading_is_the_readers_own(tiny: Tiny) -> None:
    def fail(tensors: Any, first_row: int, measured: Any) -> Any:
        raise CheckpointError("shard 2 changed while it was read")

    llama = tiny("LlamaForCausalLM")
    steps = [Step(((llama, name),), (spec,), fail) if "up_proj" in name else copy_step(llama, name) for name, spec in llama.specs.items()]
    with pytest.raises(CheckpointError, match="shard 2 changed"):
        load_model(replace(llama, source=Plan(steps)))


def test_a_quantised_checkpoint_is_refused(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        load_model(changed(tiny("LlamaForCausalLM"), **{"a.weight_packed": torch.ones(2, 2, dtype=torch.int32)}))


# ---- perplexity ----


def expected_nll(model: Any, ids: torch.Tensor, window: int, count: int) -> float:
    """A plain transformers loop: the mean of the losses of windows of equal length."""
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids[: count * window].view(count, window)]
    return sum(losses) / count


def test_perplexity_agrees_with_a_plain_transformers_loop() -> None:
    base = Checkpoint.open(MODELS / "base")
    ids = tokenize(load_tokenizer(base), (MODELS / "text" / "docs.test.txt").read_text("utf-8"))
    ours = perplexity(load_model(base), ids, limit=6)
    assert ours.value == pytest.approx(math.exp(expected_nll(plain(base), ids, 256, 6)), rel=1e-5)
    assert (ours.windows, ours.window, ours.predictions) == (6, 256, 6 * 255)
    assert 2 < ours.value < 500  # trained: a uniform guess is 1024


def test_a_fine_tune_is_better_on_its_domain_and_away_from_its_base() -> None:
    base, code = Checkpoint.open(MODELS / "base"), Checkpoint.open(MODELS / "code")
    ids = tokenize(load_tokenizer(base), (MODELS / "text" / "code.test.txt").read_text("utf-8"))
    before, after = load_model(base), load_model(code)
    assert perplexity(after, ids, limit=8).value < perplexity(before, ids, limit=8).value
    measured = compare(after, before, ids, limit=4)
    assert 0.001 < measured.kl < 3
    assert 0.2 < measured.agreement < 1


def test_the_first_token_of_a_window_is_not_predicted_and_a_remainder_is_left_out(tiny: Tiny) -> None:
    model = load_model(tiny("LlamaForCausalLM"))
    measured = perplexity(model, IDS[:50], window=16)
    assert (measured.windows, measured.predictions) == (3, 45)
    assert measured.nll == pytest.approx(expected_nll(model, IDS[:50], 16, 3), rel=1e-6)
    assert measured == perplexity(model, IDS[:48], window=16)


def test_a_text_shorter_than_a_window_is_one_window(tiny: Tiny) -> None:
    assert perplexity(load_model(tiny("LlamaForCausalLM")), IDS[:10], window=16).predictions == 9


def test_a_window_is_256_tokens_or_what_the_model_takes(tiny: Tiny) -> None:
    assert windows(load_model(tiny("LlamaForCausalLM")), IDS).shape == (3, 64)
    assert windows(load_model(tiny("GPT2LMHeadModel")), IDS).shape == (3, 64)


def test_the_batch_changes_only_the_last_bits(tiny: Tiny) -> None:
    model = load_model(tiny("GemmaForCausalLM"))
    one, all_ = (perplexity(model, IDS, window=32, batch=batch).nll for batch in (1, 6))
    assert one == pytest.approx(all_, rel=1e-6)


def test_progress_counts_tokens(tiny: Tiny) -> None:
    progress = Recorder()
    perplexity(load_model(tiny("LlamaForCausalLM")), IDS, window=32, limit=4, batch=3, progress=progress)
    assert progress.phases == [("perplexity", 128)]
    assert progress.done == 128


def test_what_a_model_cannot_take_is_said_before_it_runs(tiny: Tiny) -> None:
    model = load_model(tiny("LlamaForCausalLM"))
    with pytest.raises(OptionError, match="a window of 65 tokens: the model takes 2 to 64 tokens"):
        perplexity(model, IDS, window=65)
    with pytest.raises(OptionError, match="nothing to predict in 1 tokens"):
        perplexity(model, IDS[:1])
    with pytest.raises(OptionError, match="limit 0"):
        perplexity(model, IDS, limit=0)
    with pytest.raises(OptionError, match="token 64 is outside the model's vocabulary of 64"):
        perplexity(model, IDS + 4)
    with pytest.raises(CheckpointError, match="BertForMaskedLM does not predict the next token"):
        perplexity(load_model(tiny("BertForMaskedLM")), IDS)


# ---- KL ----


def test_a_model_equals_itself(tiny: Tiny) -> None:
    model = load_model(tiny("LlamaForCausalLM"))
    measured = compare(model, model, IDS, window=32)
    assert (measured.kl, measured.agreement, measured.predictions) == (0.0, 1.0, 6 * 31)


def test_kl_is_from_the_reference_to_the_model(tiny: Tiny) -> None:
    model, reference = load_model(tiny("LlamaForCausalLM")), load_model(tiny("MistralForCausalLM"))
    with torch.no_grad():
        reference.lm_head.weight.mul_(20)
    with torch.inference_mode():
        ours, theirs = (each(input_ids=IDS[None, :32]).logits[0, :-1].double().log_softmax(-1) for each in (model, reference))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    measured = compare(model, reference, IDS[:32], window=32)
    assert measured.kl == pytest.approx(expected, rel=1e-5)
    assert measured.agreement == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()


# ---- tokenizers ----


def test_a_tokenizer_comes_from_the_small_files_and_adds_no_special_tokens() -> None:
    base = Checkpoint.open(MODELS / "base")
    inside = replace(base, files={name: base.file(name) for name in base.files})
    tokenizer = load_tokenizer(inside)
    ids = tokenize(tokenizer, "def f(x):\n    return x\n")
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == "def f(x):\n    return x\n"


def test_without_a_tokenizer_the_error_says_so(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer; name a model folder"):
        load_tokenizer(tiny("LlamaForCausalLM"))
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(replace(tiny("LlamaForCausalLM"), files={**tiny("LlamaForCausalLM").files, "tokenizer.json": b"{"}))


# ---- size ----


def test_a_dense_model_has_16_bits_a_weight(tiny: Tiny) -> None:
    tensors = {"a.weight": torch.ones(4, 8, dtype=torch.bfloat16), "position_ids": torch.arange(0)}
    measured = size(Checkpoint.from_tensors(tensors))
    assert (measured.nbytes, measured.parameters, measured.bits_per_weight) == (64, 32, 16.0)
    assert size(tiny("GPT2LMHeadModel")).parameters == sum(spec.numel for spec in tiny("GPT2LMHeadModel").specs.values())


def test_packed_weights_count_as_what_they_unpack_to() -> None:
    packed = {
        "a.weight_packed": torch.ones(8, 2, dtype=torch.int32),  # 3 bits, 20 columns in 64 bits
        "a.weight_scale": torch.ones(8, 1, dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([8, 20]),
        "a.bias": torch.ones(8, dtype=torch.bfloat16),
    }
    assert size(Checkpoint.from_tensors(packed)).parameters == 8 * 20 + 8
    gptq = {"a.qweight": torch.ones(4, 16, dtype=torch.int32), "a.scales": torch.ones(1, 16).half(), "a.g_idx": torch.ones(32).int()}
    gptq["a.qzeros"] = torch.ones(1, 2, dtype=torch.int32)
    assert size(declared(gptq, {"bits": 4})).parameters == 32 * 16
    gptq["a.g_idx"] = torch.ones(16).int()
    assert size(declared(gptq, {"bits": 4})).parameters == 16 * 16  # where widths are mixed, the groups of the inputs say how many these are
    del gptq["a.g_idx"]
    assert size(declared(gptq, {"bits": 8})).parameters == 16 * 16
    assert size(declared({"a.weight_packed": torch.ones(4, 8, dtype=torch.uint8)}, {})).parameters == 4 * 16
    eight = {"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1), "a.input_scale": torch.ones(1)}
    assert size(declared(eight, {})).parameters == 32
    groups = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    assert size(declared({"a.weight_packed": torch.ones(4, 8, dtype=torch.int32)}, groups)).parameters == 4 * 32


def declared(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Checkpoint:
    return replace(Checkpoint.from_tensors(tensors), files={"config.json": json.dumps({"quantization_config": config}).encode()})


def test_the_size_of_a_plan_that_packs_needs_no_packing() -> None:
    def never(tensors: Any, first_row: int, measured: Any) -> Any:
        raise AssertionError("the plan was run")

    dense = Checkpoint.from_tensors({"a.weight": torch.ones(8, 20)})
    writes = (TensorSpec("a.weight_packed", "I32", (8, 2)), TensorSpec("a.weight_shape", "I64", (2,)))
    measured = size(Checkpoint("planned", Plan([Step(((dense, "a.weight"),), writes, never)])))
    assert (measured.nbytes, measured.parameters) == (8 * 2 * 4 + 16, 160)
