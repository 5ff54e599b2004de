"""Reconstruction: a pruned block comes nearer to what it was, keeps its zeros, and nothing happens to a block that nothing was done to."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from perp_toys import pruned
from tiny import tiny_model
from torch import Tensor

from mergekit_plus.calibration import Block, walk
from mergekit_plus.checkpoint import Work
from mergekit_plus.errors import OptionError
from mergekit_plus.training import TrainOptions
from prune.reconstruct import Granularity, Reconstructed, ReconstructOptions, reconstruct

IDS = torch.randint(0, 64, (64, 60), generator=torch.Generator().manual_seed(3))  # two batches
OPTIONS = ReconstructOptions(training=TrainOptions(steps=20, lr=3e-4, batch=1, evaluations=4, dropout=False))


def walked(architecture: str, tmp_path: Path, process: Callable[[Block], dict[str, Tensor]]) -> None:
    walk(tiny_model(architecture, tmp_path), IDS, process, Work(tmp_path / "work"))


def cut(block: Block, share: float) -> None:
    """Set this share of every linear weight to zero, in place."""
    for name, weight in block.weights.items():
        weight.copy_(pruned({name: weight}, (name,), share)[name])


def work_on(
    architecture: str, tmp_path: Path, variants: list[str], options: ReconstructOptions = OPTIONS, share: float = 0.5
) -> tuple[list[Reconstructed], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """What was reconstructed in every block, its tensors as they were pruned, and as they are left."""
    found, before, after = [], [], []

    def process(block: Block) -> dict[str, Tensor]:
        targets, dense = list(block.outputs()), deepcopy(block.module)
        cut(block, share)
        before.append({name: weight.clone() for name, weight in block.weights.items()})
        found.append(reconstruct(block, targets, variants, options, dense=dense))
        after.append({name: weight.clone() for name, weight in block.weights.items()})
        return found[-1].tensors

    with torch.no_grad():
        walked(architecture, tmp_path, process)
    return found, before, after


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
@pytest.mark.parametrize("granularity", ["block", "sublayer", "linear"])
def test_the_error_falls_and_zeros_stay(architecture: str, granularity: Granularity, tmp_path: Path) -> None:
    found, before, after = work_on(architecture, tmp_path, ["mask_lora"], replace(OPTIONS, granularity=granularity))
    assert len(found) == 2
    for one, was, now in zip(found, before, after, strict=True):
        assert 0 < one.after < one.before
        assert one.tensors.keys() == was.keys()
        for name, weight in was.items():
            assert torch.equal(weight == 0, now[name] == 0)
            assert 0.4 < (weight == 0).float().mean() < 0.6
            assert torch.equal(one.tensors[name], now[name]) or torch.equal(one.tensors[name].T, now[name])  # GPT-2 stores [in, out]


@pytest.mark.parametrize("variants", [["biases", "norms"], ["norms", "mask_lora", "scale_lora"], ["neuroada"], ["full"]])
def test_every_variant_brings_a_block_nearer(variants: list[str], tmp_path: Path) -> None:
    found, before, after = work_on("OPTForCausalLM", tmp_path, variants)
    for one, was, now in zip(found, before, after, strict=True):
        assert one.after < one.before
        assert all(torch.equal(weight == 0, now[name] == 0) for name, weight in was.items())


def test_a_block_that_nothing_was_done_to_stays_as_it_is(tmp_path: Path) -> None:
    found, before, after = work_on("LlamaForCausalLM", tmp_path, ["norms", "mask_lora"], share=0.0)
    for one, was, now in zip(found, before, after, strict=True):
        assert (one.before, one.after) == (0, 0)
        assert all(torch.equal(weight, now[name]) for name, weight in was.items())


def test_the_next_block_sees_what_the_reconstructed_one_yields(tmp_path: Path) -> None:
    """And nothing else of it: its weights are those of the checkpoint."""
    expected, checkpoint = [], tiny_model("LlamaForCausalLM", tmp_path)

    def process(block: Block) -> dict[str, Tensor]:
        for name, weight in block.weights.items():
            assert torch.equal(weight, checkpoint.read(name).float())
        if expected:
            assert all(torch.equal(seen, made) for seen, made in zip(block.inputs, expected[0], strict=True))
        targets = list(block.outputs())
        cut(block, 0.5)
        tensors = reconstruct(block, targets, ["mask_lora"], OPTIONS).tensors
        expected.append(list(block.outputs()))
        return tensors

    with torch.no_grad():
        walked("LlamaForCausalLM", tmp_path, process)


def test_what_a_block_does_not_have_is_passed_over_and_nothing_at_all_refused(tmp_path: Path) -> None:
    found, *_ = work_on("LlamaForCausalLM", tmp_path, ["head", "norms", "biases"])
    assert all("norm" in name for one in found for name in one.tensors)
    with pytest.raises(OptionError, match="head, biases: a block has nothing of the kind to train"):
        work_on("LlamaForCausalLM", tmp_path, ["head", "biases"])
    with pytest.raises(OptionError, match="norms: nothing of the kind is inside a linear"):
        work_on("LlamaForCausalLM", tmp_path, ["norms"], replace(OPTIONS, granularity="linear"))


def test_finer_parts_need_the_dense_block(tmp_path: Path) -> None:
    def process(block: Block) -> dict[str, Tensor]:
        return reconstruct(block, list(block.outputs()), ["norms"], replace(OPTIONS, granularity="linear")).tensors

    with pytest.raises(OptionError, match="reconstruction by linear needs the dense block"):
        walked("LlamaForCausalLM", tmp_path, process)


def test_a_layer_alone_comes_near_the_best_that_its_mask_allows(tmp_path: Path) -> None:
    """Full training under the mask of one linear layer is least squares: no mask of its own does better by more than a little than what it found."""
    options = ReconstructOptions("linear", training=TrainOptions(steps=300, lr=0.02, batch=2, schedule="cosine", evaluations=2, dropout=False))
    seen: list[tuple[float, float]] = []

    def process(block: Block) -> dict[str, Tensor]:
        if block.index:
            return {}
        name = next(name for name in block.weights if "o_proj" in name)
        dense, inputs = deepcopy(block.module), []
        hook = dense.get_submodule("self_attn.o_proj").register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
        weight = block.weights[name]
        was = weight.clone()
        weight.copy_(pruned({name: weight}, (name,))[name])
        for number, states in enumerate(block.inputs):
            block.calls[number][0](dense, states)
        hook.remove()
        x = torch.cat(inputs).double()
        best = 0.0
        for row in range(len(weight)):
            kept = weight[row] != 0
            target = x @ was[row].double()
            solution = torch.linalg.lstsq(x[:, kept], target).solution
            best += (x[:, kept] @ solution - target).square().mean().item() / len(weight)
        found = reconstruct(block, [], ["full"], options, dense=dense)
        error = (x @ (block.weights[name] - was).double().T).square().mean().item()
        seen.append((error, best))
        return found.tensors

    with torch.no_grad():
        walked("LlamaForCausalLM", tmp_path, process)
    ((error, best),) = seen
    assert best <= error < 1.2 * best
