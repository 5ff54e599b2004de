"""A text weighs what an extracted adapter keeps: least error of the outputs, as far as it was heard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_toys import close, model_of, saved
from program import Program
from torch import Tensor

from mergekit_plus.adapters import apply, read_adapter
from mergekit_plus.adapters.extract import ExtractOptions, extract
from mergekit_plus.adapters.lowrank import leading
from mergekit_plus.adapters.weighted import DAMP, leading_for
from mergekit_plus.calibration import read_text
from mergekit_plus.calibration.statistics import MomentsFile, calibrate
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_tokenizer

MODELS = Path(__file__).parents[1] / "models"
TEXT = MODELS / "text"


def problem(outputs: int = 9, inputs: int = 12) -> tuple[Tensor, Tensor]:
    """A matrix, and the Gram matrix of inputs that are far from even."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, inputs, generator=generator) * torch.logspace(0, -2, inputs)
    return torch.randn(outputs, inputs, generator=generator), x.T @ x / 200


def product(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return (u * s) @ v.T


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_it_is_the_least_error_of_the_outputs(rank: int) -> None:
    """Against the symmetric root, by eigenvectors, and its inverse."""
    matrix, gram = problem()
    values, vectors = torch.linalg.eigh(gram.double() + DAMP * gram.diagonal().mean().double() * torch.eye(12, dtype=torch.float64))
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    u, s, vt = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    found = leading_for(matrix, gram, rank, "x")
    assert close(product(*found), (u[:, :rank] * s[:rank]) @ vt[:rank] @ inverse, 1e-9)
    assert close(torch.linalg.vector_norm(found[2], dim=0), torch.ones(rank))
    assert float(((matrix - product(*found)) @ root).norm()) == pytest.approx(float(s[rank:].norm()), abs=1e-9)


def test_inputs_that_are_even_or_unheard_weigh_nothing() -> None:
    matrix, gram = problem()
    for even in (torch.eye(12), 7 * torch.eye(12), torch.zeros(12, 12)):
        assert close(product(*leading_for(matrix, even, 3, "x")), product(*leading(matrix.double(), 3, "x")))
    assert close(product(*leading_for(matrix, 5 * gram, 3, "x")), product(*leading_for(matrix, gram, 3, "x")))


def moments(model: Checkpoint, text: str, path: Path) -> MomentsFile:
    save(calibrate(model, read_text([TEXT / text], load_tokenizer(model), 16, 64), {}), path)
    return MomentsFile(Checkpoint.open(path))


def test_outputs_on_a_text_that_was_not_seen_lose_less_and_weights_more(tmp_path: Path) -> None:
    base, tuned = Checkpoint.open(MODELS / "base"), Checkpoint.open(MODELS / "code")
    heard, unheard = moments(tuned, "code.val.txt", tmp_path / "val.safetensors"), moments(tuned, "code.test.txt", tmp_path / "test.safetensors")
    lost = {}
    for name, given in (("plain", None), ("weighed", heard.checkpoint)):
        adapted = apply(base, [read_adapter(extract(base, tuned, ExtractOptions(rank=8), moments=given))])
        outputs = weights = 0.0
        for weight in (name for name in tuned.specs if name in unheard):
            change = tuned.read(weight).double() - adapted.read(weight).double()
            outputs += float(((change @ unheard.checkpoint.read(unheard.reads(weight)[0][1]).double()) * change).sum())
            weights += float(change.square().sum())
        lost[name] = outputs, weights
    assert lost["weighed"][0] < 0.9 * lost["plain"][0]
    assert lost["weighed"][1] > lost["plain"][1]


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_at_full_rank_nothing_is_lost_however_it_is_weighed(kind: str, tmp_path: Path) -> None:
    base = Checkpoint.open(saved(model_of(kind), tmp_path / "base"))
    model = model_of(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    tuned = Checkpoint.open(saved(model, tmp_path / "tuned"))
    text = calibrate(tuned, torch.arange(96).view(8, 12) % 64, {})
    result = apply(base, [read_adapter(extract(base, tuned, ExtractOptions(rank=1000, save_rest=True), moments=text))])
    assert all(close(result.read(name), tuned.read(name), 1e-5) for name in tuned.specs)


def test_as_a_user_asks_for_it(compress: Program, tmp_path: Path) -> None:
    models = MODELS / "base", MODELS / "code"
    heard = ["--calibration", TEXT / "code.val.txt", "--windows", 4, "--window", 32]
    ended = compress("adapter", "extract", *models, "--rank", 2, *heard, "-o", "weighed", "--json")
    assert ended.returncode == 0, ended.stderr
    plain = compress("adapter", "extract", *models, "--rank", 2, "-o", "plain", "--json")
    left = [{tensor["name"]: tensor["left"] for tensor in json.loads(found.stdout)["kept"]} for found in (plain, ended)]
    assert all(left[1][name] >= left[0][name] for name in left[0])
    assert compress("verify", "weighed", "--inputs").returncode == 0
    line = compress("adapter", "extract", *models, "--energy", 0.5, *heard).line
    assert "an energy is of the differences alone; with a calibration text, give a rank" in line
    assert "--windows says how a text is read" in compress("adapter", "extract", *models, "--rank", 2, "--windows", 4).line
    base, tuned = map(Checkpoint.open, models)
    with pytest.raises(OptionError, match="an energy is of the differences alone"):
        extract(base, tuned, ExtractOptions(energy=0.5), moments=base)
    with pytest.raises(CheckpointError, match="base holds no moments; `compress calibrate MODEL --text FILE -o "):
        extract(base, tuned, ExtractOptions(rank=2), moments=base)
    others = calibrate(Checkpoint.open(saved(model_of(), tmp_path / "other")), torch.arange(24).view(2, 12), {})
    with pytest.raises(CheckpointError, match="was measured on a model of other shapes than .*code; measure this one"):
        extract(base, tuned, ExtractOptions(rank=2), moments=others)

