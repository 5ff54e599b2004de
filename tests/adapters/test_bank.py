"""Many packed adapters on one model, a different one for each row of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_toys import TOKENS, adapted, model_of, saved

from mergekit_plus.adapters import open_adapter
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from quant.adapters.bank import AdapterBank, Packed, Place
from quant.adapters.codebooks import Codebook
from quant.adapters.coding import Coding, Scale, encode, table
from quant.adapters.container import Entry, expand
from quant.adapters.packing import pack
from quant.adapters.plan import QuantizeOptions, quantize_adapter


def test_each_row_has_its_adapter_and_codes_stay_packed(tmp_path: Path) -> None:
    saved(model_of(initializer_range=0.3), tmp_path / "base")
    bank = AdapterBank(load_model(Checkpoint.open(tmp_path / "base")))
    alone = {None: load_model(Checkpoint.open(tmp_path / "base"))}
    for name, options in {"one": {"bits": 1}, "two": {"average_bits": 2.0}}.items():
        adapted(model_of(), tmp_path / f"lora-{name}", seed=len(bank.adapters), target_modules=["q_proj", "down_proj"])
        save(quantize_adapter(open_adapter(tmp_path / f"lora-{name}"), QuantizeOptions(**options)), tmp_path / name)  # type: ignore[arg-type]
        bank.add(name, Checkpoint.open(tmp_path / name))
        alone[name] = load_model(Checkpoint.open(f"{tmp_path / 'base'}+{tmp_path / name}"))
    names = ["two", None, "one", "two"]
    with torch.no_grad():
        with bank.using(names):
            together = bank.model(input_ids=TOKENS.expand(4, -1)).logits
        assert torch.equal(bank.model(input_ids=TOKENS).logits, alone[None](input_ids=TOKENS).logits)
        for name, row in zip(names, together, strict=True):
            assert torch.allclose(row, alone[name](input_ids=TOKENS).logits[0], atol=1e-4)
    assert {packed.codes.dtype for packed in bank.adapters.values()} == {torch.uint8}
    assert bank.adapters["one"].codes.numel() == 4 * (4 * (16 + 16) + 4 * (32 + 16)) // 2 // 8
    bank.add("three", Checkpoint.open(tmp_path / "one"))
    assert bank.adapters["three"].layout is bank.adapters["one"].layout


@pytest.mark.parametrize("codebook", ["l2", "k-median"])
@pytest.mark.parametrize("scale", ["tensor", "component", "group"])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_bit_factors_are_multiplied_as_what_they_stand_for(axis: int, scale: Scale, codebook: Codebook) -> None:
    coding = Coding(1, codebook, scale)
    coded = encode(torch.randn(4, 150, generator=torch.Generator().manual_seed(0)), coding)  # rows of the code: of A, or columns of B
    entry = Entry("factor", "F32", (4, 150) if axis == 0 else (150, 4), axis, coding)
    codes = pack(coded.codes, 1).flatten()
    packed = Packed({}, codes, coded.stats, {1: table(codebook, 1)})
    x = torch.randn(3, 150 if axis == 0 else 4, generator=torch.Generator().manual_seed(1))
    factor = expand(entry, codes, coded.stats, packed.tables)
    y = packed.times(Place(entry, slice(None), slice(None)), x)
    torch.testing.assert_close(y, x @ factor.T, atol=1e-4, rtol=1e-5)


def test_what_a_bank_cannot_hold_is_refused(tmp_path: Path) -> None:
    saved(model_of(hidden_size=32), tmp_path / "wide")
    bank = AdapterBank(load_model(Checkpoint.open(tmp_path / "wide")))
    adapted(model_of(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    adapted(model_of(), tmp_path / "lora", target_modules=["q_proj"])
    save(quantize_adapter(open_adapter(tmp_path / "lora"), QuantizeOptions(1)), tmp_path / "packed")
    with pytest.raises(CheckpointError, match="dora is more than products B A beside linear layers"):
        bank.add("dora", Checkpoint.open(tmp_path / "dora"))
    with pytest.raises(CheckpointError, match="is not packed; `compress adapter quantize` packs an adapter"):
        bank.add("lora", Checkpoint.open(tmp_path / "lora"))
    with pytest.raises(CheckpointError, match=r"q_proj is a linear layer \(16, 16\), in the model \(32, 32\)"):
        bank.add("packed", Checkpoint.open(tmp_path / "packed"))
    with pytest.raises(OptionError, match="the bank has no adapter 'packed'"), bank.using(["packed"]):
        pass
