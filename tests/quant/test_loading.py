"""A folder of packed weights is loaded by transformers as it is, and every weight has the bits of our `dequantize`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.checkpoint.dtypes import TAGS
from mergekit_plus.checkpoint.spec import TensorSpec
from quant import FORMATS, Scheme, decode, dequantize, read_config, rtn
from quant.plan import PRESETS, quantize
from quant.plan import dequantize as unpacked

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries that load; what they load is what is tested
BASE = Path(__file__).parents[1] / "models" / "base"
PROMPT = torch.arange(12).view(1, 12)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # not the buffers: transformers keeps the angles of the positions in float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def write_packed(folder: Path, schemes: Mapping[str, Scheme], status: str | None = "compressed") -> dict[str, Tensor]:
    """Quantise the linear layers of a tiny Llama by the schemes for parts of their names; returns the weights they stand for."""
    model = tiny_llama()
    layout = FORMATS["pack-quantized"]
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Scheme] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        scheme = next((scheme for part, scheme in schemes.items() if part in name), None)
        if scheme is None:
            tensors[name] = tensor.contiguous()
            continue
        module, spec = name.removesuffix(".weight"), TensorSpec(name, TAGS[tensor.dtype], tuple(tensor.shape))
        layers[module], quantized = scheme, rtn(tensor, scheme)
        tensors |= {f"{module}.{suffix}": part for suffix, part in {**layout.encode(quantized), **layout.fixed(spec)}.items()}
        expected[name] = dequantize(quantized)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    written: Any = layout.config(layers, sorted(linears - set(layers)))
    if status is None:
        del written["quantization_status"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": written}
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    return expected


def assert_weights(model: Any, expected: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        logits = model(PROMPT).logits  # weights are decompressed at the first forward
    found = model.state_dict()
    for name, weight in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], weight), name
    reference = tiny_llama()
    reference.load_state_dict({**reference.state_dict(), **expected})
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(PROMPT).logits)


@pytest.mark.parametrize("scheme", [Scheme(bits, group) for bits in range(2, 9) for group in (0, 32)], ids=str)
def test_a_symmetric_model_loads_as_it_is(tmp_path: Path, scheme: Scheme) -> None:
    expected = write_packed(tmp_path / "model", {"_proj": scheme})
    assert len(expected) == 14
    assert_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), expected)


def test_a_model_of_several_schemes_loads_as_it_is(tmp_path: Path) -> None:
    schemes = {"layers.0.mlp.down": Scheme(8, 0), "mlp": Scheme(3, 32), "q_proj": Scheme(4, 64), "v_proj": Scheme(5, 16)}
    expected = write_packed(tmp_path / "model", schemes)
    assert len(expected) == 10
    assert_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), expected)


@pytest.mark.parametrize("scheme", [Scheme(bits, group, False) for bits in range(2, 9) for group in (0, 32)], ids=str)
def test_an_asymmetric_model_loads_dequantized(tmp_path: Path, scheme: Scheme) -> None:
    """compressed-tensors 0.18 to 0.20 fail to load packed zero points otherwise."""
    expected = write_packed(tmp_path / "model", {"_proj": scheme})
    config = CompressedTensorsConfig(dequantize=True)
    assert_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config), expected)


def logits_of(folder: Path, dequantized: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a folder as transformers loads it, and its weights afterwards."""
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantized else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        logits = model(PROMPT).logits
    return logits, model.state_dict()


def assert_loads(packed: Checkpoint, tmp_path: Path, dequantized: bool = False) -> None:
    """Weights and logits of what is written are those of our own dequantization, bit for bit."""
    save(packed, tmp_path / "packed")
    dense = unpacked(Checkpoint.open(tmp_path / "packed"))
    save(dense, tmp_path / "dense")
    found, weights = logits_of(tmp_path / "packed", dequantized)
    for name in dense.specs:
        assert torch.equal(weights[name], dense.read(name)), name
    assert torch.equal(found, logits_of(tmp_path / "dense")[0])


@pytest.mark.parametrize("scheme", [Scheme(bits, group) for bits in (2, 3, 4, 8) for group in (64, 128)], ids=str)
def test_groups_of_64_and_128_load_as_they_are(tmp_path: Path, scheme: Scheme) -> None:
    assert_loads(quantize(Checkpoint.open(BASE), scheme), tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_scheme_by_its_name_loads_and_where_only_weights_are_quantised_as_it_is(tmp_path: Path, name: str) -> None:
    """By default transformers rounds activations too where servers do, so that logits are compared without."""
    scheme, layout = PRESETS[name]
    assert_loads(quantize(Checkpoint.open(BASE), scheme, format_name=layout), tmp_path, dequantized=name in ("W8A8", "FP8", "FP8_BLOCK"))
    _, weights = logits_of(tmp_path / "packed")
    assert torch.equal(weights["model.layers.5.mlp.down_proj.weight"], Checkpoint.open(tmp_path / "dense").read("model.layers.5.mlp.down_proj.weight"))


def test_several_schemes_with_zero_points_are_decoded_module_by_module(tmp_path: Path) -> None:
    """transformers 5.23 cannot load them in any way; compressed-tensors decodes each."""
    schemes = {f"model.layers.{block}.mlp.down_proj": Scheme(2 + block, 32 * (block % 2), False) for block in range(6)}
    packed = quantize(Checkpoint.open(BASE), schemes)
    written, dense = QuantizationConfig.model_validate(packed.config["quantization_config"]), unpacked(packed)
    for module in schemes:
        parts = {name.removeprefix(f"{module}."): packed.read(name) for name in packed.specs if name.startswith(f"{module}.weight")}
        (group,) = (group for group in written.config_groups.values() if any(re.match(target.removeprefix("re:"), module) for target in group.targets))
        assert torch.equal(PackedQuantizationCompressor.decompress(parts, group)["weight"], dense.read(f"{module}.weight"))


def test_without_its_status_a_model_loads_random_weights_in_silence(tmp_path: Path) -> None:
    """Why the status is written; when this fails, the trap is gone."""
    expected = write_packed(tmp_path / "model", {"_proj": Scheme(4, 32)}, status=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], expected[name])


def test_what_we_write_we_read_back_from_the_folder(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    schemes = {"down_proj": Scheme(8, 0, False), "up_proj": Scheme(3, 32)}
    expected = write_packed(tmp_path / "model", schemes)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    lookup = read_config(json.loads((tmp_path / "model" / "config.json").read_text()))
    for name, weight in expected.items():
        module = name.removesuffix(".weight")
        scheme = lookup(module)
        assert scheme is not None
        parts = {key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.")}
        assert torch.equal(dequantize(decode(parts, scheme, weight.shape)), weight)
    assert lookup("lm_head") is None
