"""Adapters beside the layers of a packed model, where they cannot be added to its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_toys import TOKENS, adapted, model_of, saved
from program import Program

from mergekit_plus.adapters import open_adapter
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError
from mergekit_plus.evaluate import load_model
from mergekit_plus.training import TrainOptions, loss_on
from quant import Scheme
from quant.adapters.plan import QuantizeOptions, quantize_adapter
from quant.adapters.scratch import TrainAdapterOptions, train_adapter
from quant.adapters.train import Lesson
from quant.loading import load, opened
from quant.plan import dequantize, quantize


@pytest.mark.parametrize("bits", [1, 16])
def test_an_adapter_stands_beside_packed_layers(tmp_path: Path, bits: int) -> None:
    saved(model_of(), tmp_path / "base")
    adapted(model_of(), tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    if bits == 1:
        save(quantize_adapter(open_adapter(tmp_path / "lora"), QuantizeOptions(1)), tmp_path / "few")
    adapter = tmp_path / ("few" if bits == 1 else "lora")
    save(quantize(Checkpoint.open(tmp_path / "base"), Scheme(4, 16)), tmp_path / "packed")
    save(dequantize(Checkpoint.open(tmp_path / "packed")), tmp_path / "dense")
    checkpoint, adapters = opened(f"{tmp_path / 'packed'}+{adapter}")
    model = load(checkpoint, adapters=adapters)
    with torch.inference_mode():
        wanted = load_model(Checkpoint.open(f"{tmp_path / 'dense'}+{adapter}"))(input_ids=TOKENS).logits
        torch.testing.assert_close(model(input_ids=TOKENS).logits, wanted, rtol=0, atol=1e-4)
        assert not torch.allclose(load(checkpoint)(input_ids=TOKENS).logits, wanted, atol=1e-2)
    assert opened(f"{tmp_path / 'dense'}+{adapter}")[1] == []  # it is applied


def test_an_adapter_that_is_more_than_products_or_another_models_is_refused(tmp_path: Path) -> None:
    saved(model_of(), tmp_path / "base")
    save(quantize(Checkpoint.open(tmp_path / "base"), Scheme(4, 16)), tmp_path / "packed")
    adapted(model_of(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    adapted(model_of(hidden_size=32), tmp_path / "wide", target_modules=["q_proj"])
    wide = r"wide does not fit the model: .*q_proj is a linear layer \(32, 32\), in the model \(16, 16\)"
    for name, reason in (("dora", "dora is more than products B A beside linear layers"), ("wide", wide)):
        checkpoint, adapters = opened(f"{tmp_path / 'packed'}+{tmp_path / name}")
        with pytest.raises(CheckpointError, match=reason):
            load(checkpoint, adapters=adapters)


def test_an_adapter_alone_is_refused_and_so_is_one_whose_base_is_missing(compress: Program, tmp_path: Path) -> None:
    adapted(model_of(), tmp_path / "lora", target_modules=["q_proj"])
    assert " is an adapter, not a model; a model with it applied is written MODEL+" in compress("generate", tmp_path / "lora", "-p", "x").line
    assert compress("generate", f"{tmp_path / 'gone'}+{tmp_path / 'lora'}", "-p", "x").line.startswith(f"compress: {tmp_path / 'gone'}: no such file or folder")


def test_an_adapter_is_trained_beside_a_packed_base_which_stays_packed(tmp_path: Path) -> None:
    saved(model_of(initializer_range=0.3), tmp_path / "base")
    save(quantize(Checkpoint.open(tmp_path / "base"), Scheme(4, 16)), tmp_path / "packed")
    rows = (torch.arange(12) * 5 + 7 * torch.arange(24)[:, None]) % 61
    lesson = Lesson(rows, TrainOptions(steps=30, lr=3e-2, batch=4))
    save(train_adapter(Checkpoint.open(tmp_path / "packed"), lesson, TrainAdapterOptions(1, 4)), tmp_path / "one")
    checkpoint, adapters = opened(f"{tmp_path / 'packed'}+{tmp_path / 'one'}")
    before, after = (loss_on(load(checkpoint, adapters=found), rows) for found in ([], adapters))
    assert after < before - 0.5
