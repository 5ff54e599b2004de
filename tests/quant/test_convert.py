"""One packed format to another: the same codes, and scales as the target holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, OptionError
from quant import Scheme
from quant.convert import convert
from quant.floats import FP8
from quant.formats import modules_of
from quant.plan import dequantize, quantize

SCHEMES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (0, 32, 64, 128) for symmetric in (True, False)]


def model(dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{block}.up_proj.weight": torch.randn(96, 128, generator=generator).to(dtype) / 50 for block in range(2)}
    made = Checkpoint.from_tensors({**weights, "norm.weight": torch.ones(128, dtype=dtype), "lm_head.weight": torch.ones(32, 128, dtype=dtype)}, "m")
    return replace(made, files={"config.json": b'{"dtype": "%s"}' % str(dtype).removeprefix("torch.").encode()})


def stored(checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    save(checkpoint, tmp_path / f"saved-{len(list(tmp_path.iterdir()))}")
    return Checkpoint.open(tmp_path / f"saved-{len(list(tmp_path.iterdir())) - 1}")


def codes_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Codes, scales in float64, and zero points of every module."""
    found = {}
    for module in modules_of(checkpoint):
        codes: Any = module.decode({part: checkpoint.read(f"{module.name}.{part}") for part in module.row_parts})
        found[module.name] = [codes.codes.tolist(), codes.scale.double().tolist(), None if codes.zero_point is None else codes.zero_point.tolist()]
    return found


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_there_and_back_every_byte_is_the_same(tmp_path: Path, scheme: Scheme) -> None:
    packed = stored(quantize(model(), scheme), tmp_path)
    gptq = stored(convert(packed, "gptq_v2"), tmp_path)
    assert codes_of(gptq) == codes_of(packed)
    back = stored(convert(gptq, "pack-quantized"), tmp_path)
    assert Path(back.label, "model.safetensors").read_bytes() == Path(packed.label, "model.safetensors").read_bytes()
    assert back.config == packed.config
    if scheme.symmetric:
        first = stored(convert(packed, "gptq"), tmp_path)
        assert codes_of(first) == codes_of(packed)
        assert codes_of(convert(first, "gptq_v2")) == codes_of(packed)
    assert gptq.config["quantization_config"]["quant_method"] == "gptq"
    assert Path(gptq.label, "quantize_config.json").exists()
    assert not Path(back.label, "quantize_config.json").exists()


def test_widths_of_several_kinds_go_together() -> None:
    packed = quantize(model(), {"layers.0.up_proj": Scheme(4, 32), "layers.1.up_proj": Scheme(8, 0)})
    gptq = convert(packed, "gptq")
    assert codes_of(gptq) == codes_of(packed)
    assert convert(gptq, "pack-quantized").config == packed.config


def test_a_conversion_of_what_is_not_written_yet_is_that_of_the_file(tmp_path: Path) -> None:
    lazy = convert(quantize(model(), Scheme(4, 32)), "gptq")
    save(lazy, tmp_path / "lazy", SaveOptions(workers=2))
    save(convert(stored(quantize(model(), Scheme(4, 32)), tmp_path), "gptq"), tmp_path / "file")
    assert (tmp_path / "lazy" / "model.safetensors").read_bytes() == (tmp_path / "file" / "model.safetensors").read_bytes()
    assert lazy.notes[-1] == "scales are rounded to float16, by at most 0.00049 of their size where float16 has normal numbers"


def test_w8a8_and_eight_bits_by_row_are_the_same_codes_and_a_note_speaks_of_activations() -> None:
    packed = quantize(model(), Scheme(8, 0))
    bytewise = convert(packed, "int-quantized")
    assert codes_of(bytewise) == codes_of(packed)
    assert bytewise.notes[-1] == "servers will round activations to 8 bits as they run int-quantized"
    back = convert(bytewise, "pack-quantized")
    assert codes_of(back) == codes_of(packed)
    assert back.notes[-1] == "pack-quantized rounds weights only: servers will no longer round activations"


def test_a_note_says_what_scales_lose(tmp_path: Path) -> None:
    single = stored(quantize(model(torch.float32), Scheme(4, 32)), tmp_path)
    half = convert(single, "gptq_v2")
    values, exact = dequantize(half).read("layers.0.up_proj.weight").double(), dequantize(single).read("layers.0.up_proj.weight").double()
    changes = ((values - exact).abs() / exact.abs())[exact != 0]
    (note,) = half.notes
    said = float(note.rpartition(" ")[2])
    assert note.startswith("scales are rounded to float16; the largest relative change is ")
    assert 0 < said < 2**-11
    assert abs(float(changes.max()) - said) < 2**-11
    assert convert(stored(quantize(model(), Scheme(4, 32)), tmp_path), "gptq").notes == ()  # bfloat16's all fit


def test_scales_that_float16_cannot_hold_are_refused_or_said(tmp_path: Path) -> None:
    def with_scale(value: float) -> Checkpoint:
        packed = stored(quantize(model(), Scheme(4, 32)), tmp_path)
        tensors = {name: packed.read(name) for name in packed.specs}
        tensors["layers.0.up_proj.weight_scale"] = torch.full_like(tensors["layers.0.up_proj.weight_scale"], value)
        return replace(Checkpoint.from_tensors(tensors, "m"), files=packed.files)

    with pytest.raises(CheckpointError, match=r"m: layers.0.up_proj has a scale that F16 cannot hold, in which gptq stores them"):
        convert(with_scale(1e6), "gptq").read("layers.0.up_proj.qweight")
    (note,) = convert(with_scale(1.1e-7), "gptq").notes
    assert note == "384 scales below 6.1e-05 are rounded to multiples of 6e-08"


def test_what_the_target_cannot_hold_is_refused_with_the_layer() -> None:
    with pytest.raises(OptionError, match="layers.0.up_proj cannot be stored as gptq: it holds integers of 2, 3, 4 and 8 bits, not 5 bits"):
        convert(quantize(model(), Scheme(5, 32)), "gptq")
    with pytest.raises(OptionError, match="layers.0.up_proj cannot be stored as gptq: version 1 stores zero points less one"):
        convert(quantize(model(), Scheme(4, 32, False)), "gptq")
    with pytest.raises(OptionError, match="cannot be stored as pack-quantized: it holds integers, not FP8"):
        convert(quantize(model(), FP8, format_name="float-quantized"), "pack-quantized")
    with pytest.raises(OptionError, match="is stored as pack-quantized already"):
        convert(quantize(model(), Scheme(4, 32)), "pack-quantized")
    with pytest.raises(OptionError, match="`compress dequantize` unpacks a model"):
        convert(quantize(model(), Scheme(4, 32)), "dense")
    with pytest.raises(CheckpointError, match="m holds no packed weights to convert"):
        convert(model(), "gptq")
