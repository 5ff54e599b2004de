"""The trainer: what trains and what does not, the same seed, the same bytes after a kill, masks, and what ends a training."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.errors import OptionError
from mergekit_plus.evaluate import load_model, perplexity
from mergekit_plus.training import STATE, TrainOptions, TrainRecord, distillation, loss_on, next_token, train

OPTIONS = TrainOptions(steps=6, lr=1e-2, batch=4)


class Line(nn.Module):
    """y = w x, learnt from pairs in rows [x, y]."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size, bias=False)
        nn.init.eye_(self.inner.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.inner(inputs)
        return output


def squared(model: nn.Module, rows: Tensor) -> Tensor:
    return functional.mse_loss(model(rows[:, 0]), rows[:, 1])


def pairs(count: int = 16, size: int = 4) -> Tensor:
    """Rows of which the second half is the first, times -2."""
    inputs = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    return torch.stack([inputs, -2 * inputs], 1)


def trained(options: TrainOptions = OPTIONS, **more: object) -> tuple[Tensor, TrainRecord]:
    model = Line()
    record = train(model, {"inner.weight": model.inner.weight}, squared, pairs(), options, **more)  # type: ignore[arg-type]
    return model.inner.weight.detach(), record


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    model: nn.Module = load_model(tiny_model("LlamaForCausalLM", tmp_path))
    return model


WINDOWS = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))


# ---- what it does ----


def test_it_learns_and_touches_nothing_else(llama: nn.Module) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    norms = {name: parameter for name, parameter in llama.named_parameters() if "norm" in name}
    record = train(llama, norms, next_token, WINDOWS, replace(OPTIONS, steps=12))
    assert record.losses[-1] < record.losses[0]
    assert {name for name, value in llama.state_dict().items() if not torch.equal(value, before[name])} == set(norms)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in llama.parameters())
    assert not llama.training


def test_a_step_of_adamw_is_that_of_the_formula() -> None:
    """The first step of Adam goes by the rate against the sign of the gradient, whatever its size."""
    weight, record = trained(TrainOptions(steps=1, lr=0.5, batch=16, warmup=0, clip=None))
    assert record.losses == pytest.approx([functional.mse_loss(pairs()[:, 0], pairs()[:, 1]).item()])
    (gradient,) = torch.autograd.grad(squared(model := Line(), pairs()), model.inner.weight)
    torch.testing.assert_close(weight, torch.eye(4) - 0.5 * gradient.sign())


def test_the_rate_rises_and_falls() -> None:
    linear = TrainOptions(steps=5, warmup=0.4)
    assert [linear.rate(step) for step in range(5)] == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3])
    assert [replace(linear, schedule="cosine").rate(step) for step in range(2, 5)] == pytest.approx([1, 3 / 4, 1 / 4])
    assert {replace(linear, schedule="constant", warmup=0).rate(step) for step in range(5)} == {1}


def test_rows_read_in_parts_and_activations_computed_again_change_nothing_but_rounding(llama: nn.Module, tmp_path: Path) -> None:
    found = []
    for options in (OPTIONS, replace(OPTIONS, accumulation=4), replace(OPTIONS, checkpointing=True)):
        model = load_model(tiny_model("LlamaForCausalLM", tmp_path))
        train(model, dict(model.named_parameters()), next_token, WINDOWS, options)
        found.append(model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[2], found[0])


def test_bfloat16_is_for_activations_alone(llama: nn.Module) -> None:
    record = train(llama, dict(llama.named_parameters()), next_token, WINDOWS, replace(OPTIONS, autocast=True))
    assert record.losses[-1] < record.losses[0]
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.float32}


def test_each_pass_over_the_rows_is_a_shuffle_that_the_seed_decides() -> None:
    seen: list[Tensor] = []

    def watch(model: nn.Module, rows: Tensor) -> Tensor:
        seen.append(rows)
        return squared(model, rows)

    model = Line()
    for seed in (0, 0, 1):
        train(model, {"w": model.inner.weight}, watch, pairs(6), replace(OPTIONS, batch=4, steps=3, seed=seed))
    first, again, other = (torch.cat(seen[start : start + 3]) for start in (0, 3, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(sum(torch.equal(row, known) for known in first) == 2 for row in pairs(6))  # twelve rows are two passes over six


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_callers_random_numbers_alone() -> None:
    (first, record), (second, _), (other, _) = trained(), trained(), trained(replace(OPTIONS, seed=1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    model, state = Line(), torch.get_rng_state()
    train(model, {"w": model.inner.weight}, squared, pairs(), OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert record.optimizer_bytes == 2 * 16 * 4 + 4  # two moments of 16 weights, and a count


def test_muon_moves_matrices_and_adamw_what_is_none(llama: nn.Module) -> None:
    record = train(llama, dict(llama.named_parameters()), next_token, WINDOWS, replace(OPTIONS, optimizer="muon", steps=12))
    assert record.losses[-1] < record.losses[0]
    sizes = {name: parameter.numel() for name, parameter in llama.named_parameters()}
    by_adam = sum(size for name, size in sizes.items() if "norm" in name or "embed" in name or "lm_head" in name)
    counts = 4 * sum("norm" in name or "embed" in name or "lm_head" in name for name in sizes)
    assert record.optimizer_bytes == 4 * (2 * by_adam + sum(sizes.values()) - by_adam) + counts  # Muon keeps one moment


# ---- losses ----


def test_the_loss_is_the_one_that_perplexity_reports(llama: nn.Module) -> None:
    assert loss_on(llama, WINDOWS, batch=3) == pytest.approx(perplexity(llama, WINDOWS.flatten(), window=12).nll)


def test_distillation_from_the_model_itself_is_zero_and_mixes_with_the_cross_entropy(llama: nn.Module) -> None:
    itself = distillation(llama)(llama, WINDOWS)
    assert abs(itself.item()) < 1e-6
    assert distillation(llama, 0.25)(llama, WINDOWS).item() == pytest.approx(0.75 * next_token(llama, WINDOWS).item(), rel=1e-5)


def test_distillation_is_the_kl_from_the_teacher(llama: nn.Module, tmp_path: Path) -> None:
    teacher = load_model(tiny_model("MistralForCausalLM", tmp_path))
    with torch.no_grad():
        ours, theirs = (model(input_ids=WINDOWS).logits[:, :-1].double().softmax(-1) for model in (llama, teacher))
        assert distillation(teacher)(llama, WINDOWS).item() == pytest.approx((theirs * (theirs / ours).log()).sum(-1).mean().item(), rel=1e-4)


# ---- masks ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_what_a_mask_forbids_stays_zero_in_weights_and_in_the_optimisers_state(optimizer: str, tmp_path: Path) -> None:
    mask = torch.eye(4, dtype=torch.bool) | (torch.arange(16).view(4, 4) % 3 == 0)
    options = replace(OPTIONS, optimizer=optimizer, weight_decay=0.1, steps=9)  # type: ignore[arg-type]
    weight, _ = trained(options, masks={"inner.weight": mask}, folder=tmp_path)
    assert torch.equal(weight != 0, mask)
    state = torch.load(tmp_path / STATE, weights_only=True)["optimizers"][0]["state"][0]
    moments = [value for value in state.values() if isinstance(value, Tensor) and value.ndim == 2]
    assert moments
    assert all(torch.equal(moment != 0, mask) for moment in moments)


# ---- evaluation, and what ends a training ----


def test_the_model_is_left_in_the_state_that_evaluated_best() -> None:
    values = iter([3.0, 1.0, 2.0, 5.0])
    weight, record = trained(replace(OPTIONS, evaluations=3), evaluate=lambda: next(values))
    assert record.evaluations == [(0, 3.0), (2, 1.0), (4, 2.0), (6, 5.0)]
    assert (record.best, record.value) == (2, 1.0)
    stops: list[int] = []
    at_two = Line()

    def stop() -> None:
        stops.append(1)
        if len(stops) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(at_two, {"inner.weight": at_two.inner.weight}, squared, pairs(), OPTIONS, after_step=stop)
    assert torch.equal(weight, at_two.inner.weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_best_state(bad: float) -> None:
    def breaks(model: nn.Module, rows: Tensor) -> Tensor:
        calls.append(1)
        return squared(model, rows) * (bad if len(calls) == 4 else 1)

    calls: list[int] = []
    model = Line()
    best: list[Tensor] = []

    def evaluate() -> float:
        best.append(model.inner.weight.detach().clone())
        return -len(best)

    record = train(model, {"inner.weight": model.inner.weight}, breaks, pairs(), replace(OPTIONS, evaluations=6), evaluate=evaluate)
    assert record.stopped == "the loss of step 4 of 6 is not finite"
    assert record.best == 3
    assert torch.equal(model.inner.weight, best[3])


def test_a_gradient_that_is_not_finite_ends_it_too() -> None:
    model = Line()
    nn.init.zeros_(model.inner.weight)
    record = train(model, {"w": model.inner.weight}, lambda model, rows: model(rows[:, 0]).sum().sqrt(), pairs(), OPTIONS)
    assert record.stopped == "the gradient of step 1 of 6 is not finite"
    assert not model.inner.weight.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"lr": math.nan}, "the learning rate is nan"),
        ({"warmup": 2.0}, "warmup is 2.0; it is a share"),
        ({"batch": 6, "accumulation": 4}, "a batch of 6 rows cannot be read in 4 equal parts"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        trained(replace(OPTIONS, **options))  # type: ignore[arg-type]


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(OptionError, match="there is nothing to train; there are no rows to train on"):
        train(Line(), {}, squared, pairs(0), OPTIONS)


# ---- resuming ----


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_training_goes_on_to_the_same_bytes(killed_at: int, tmp_path: Path) -> None:
    """Dropout and shuffling are part of it; the kill falls between a step and what would have been kept of it."""

    class Dropping(Line):
        def forward(self, inputs: Tensor) -> Tensor:
            return functional.dropout(super().forward(inputs), 0.3, self.training)

    def run(folder: Path | None, stop_at: int = -1) -> tuple[Tensor, TrainRecord]:
        model, steps = Dropping(), iter(range(1, 99))

        def stop() -> None:
            if next(steps) == stop_at:
                raise KeyboardInterrupt

        def evaluate() -> float:
            return loss_on(model, pairs(), squared)

        options = replace(OPTIONS, evaluations=3, optimizer="muon", warmup=0.5)
        record = train(model, {"w": model.inner.weight}, squared, pairs(), options, after_step=stop, evaluate=evaluate, folder=folder, keep_every=0)
        return model.inner.weight.detach(), record

    straight, record = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed_at)
    assert (tmp_path / STATE).exists() == (killed_at > 1)
    resumed, again = run(tmp_path)
    assert torch.equal(resumed, straight)
    assert again == record
    finished, third = run(tmp_path)  # nothing is left to do
    assert torch.equal(finished, straight)
    assert third == record


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    trained(folder=tmp_path)
    with pytest.raises(OptionError, match="holds the state of another training"):
        trained(replace(OPTIONS, lr=1e-3), folder=tmp_path)


# ---- several processes ----

SCRIPT = """
import os, sys, torch
sys.path[:0] = {path!r}
from test_training import OPTIONS, Line, pairs, squared, train
torch.distributed.init_process_group("gloo")
model = Line()
record = train(model, {{"inner.weight": model.inner.weight}}, squared, pairs(), OPTIONS)
if torch.distributed.get_rank() == 0:
    torch.save((model.inner.weight.detach(), record.losses), {out!r})
torch.distributed.barrier()
os._exit(0)  # what torch tears down at the end of an interpreter is not what is tested, and now and then aborts
"""


def test_two_processes_under_torchrun_learn_what_one_does(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.pt"
    script.write_text(SCRIPT.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])], out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    weight, losses = torch.load(out, weights_only=True)
    alone, record = trained()
    torch.testing.assert_close(weight, alone)
    assert losses == pytest.approx(record.losses)
