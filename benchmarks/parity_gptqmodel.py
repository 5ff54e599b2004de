"""How GPTQModel 7.7 reads our GPTQ files, measured: `python benchmarks/parity_gptqmodel.py --gptqmodel-python VENV/bin/python`.

GPTQModel runs in its own interpreter, on the CPU. Of every layout, width, group size and symmetry that we write, of several widths at once, and of a
conversion, it prints the largest difference between the weights that GPTQModel unpacks and those of `compress dequantize`, and between the logits of the
two models, both in float16. GPTQModel's float16 kernel multiplies in another order than a dense layer; weights must not differ at all.

`--write-golden` has GPTQModel pack known codes and writes what it packs to tests/quant/golden_gptqmodel.safetensors, so that the tests need no peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mergekit_plus.checkpoint import Checkpoint, save
from quant import Scheme
from quant.convert import convert
from quant.plan import dequantize, quantize

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "quant" / "golden_gptqmodel.safetensors"

READ = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
ids, found = torch.arange(1, 65).view(2, 32), {}
for name in sys.argv[2:]:
    packed = GPTQModel.load(f"{sys.argv[1]}/{name}", device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    dense = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}-dense", dtype=torch.float16)
    weights, own = load_file(f"{sys.argv[1]}/{name}-dense/model.safetensors"), {}
    for module, layer in packed.named_modules():
        if isinstance(layer, BaseQuantLinear):
            own[module] = (layer.dequantize_weight().T.float() - weights[f"{module}.weight"].float()).abs().max().item()
    with torch.no_grad():
        logits = (packed(ids).logits.float() - dense(ids).logits.float()).abs().max().item()
    found[name] = [len(own), max(own.values()), logits]
print("FOUND" + json.dumps(found))
"""

PACK = """
import sys
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from gptqmodel.quantization import QuantizeConfig
from safetensors.torch import save_file
tensors = {}
for bits in (2, 3, 4, 8):
    for symmetric in (True, False):
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(0, 1 << bits, (32, 64), generator=generator)
        zeros = torch.full((32, 2), 1 << (bits - 1)) if symmetric else torch.randint(0, 1 << bits, (32, 2), generator=generator)
        scales = (torch.rand(32, 2, generator=generator) + 0.5).half().float() / 64
        group = torch.arange(64) // 32
        linear = torch.nn.Linear(64, 32, bias=False)
        linear.weight.data = (codes - zeros[:, group]) * scales[:, group]
        layer = TorchLinear(bits=bits, group_size=32, sym=symmetric, desc_act=False, in_features=64, out_features=32, bias=False)
        layer.pack(linear, scales, zeros.float(), group.int())
        kept = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "qweight": layer.qweight, "scales": layer.scales, "g_idx": layer.g_idx}
        kept["qzeros_v2"] = layer.qzeros.clone()
        convert_gptq_v2_to_v1_format_module(module=layer, quantize_config=QuantizeConfig(bits=bits, group_size=32))
        kept["qzeros_v1"] = layer.qzeros.clone()
        tensors |= {f"{bits}.{'symmetric' if symmetric else 'asymmetric'}.{name}": tensor.contiguous() for name, tensor in kept.items()}
save_file(tensors, sys.argv[1])
"""


def cases(base: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """Everything that is written in GPTQ's layouts, by a name."""
    for layout, symmetries in (("gptq", (True,)), ("gptq_v2", (True, False))):
        for bits in (2, 3, 4, 8):
            for group in (0, 32, 128):
                for symmetric in symmetries:
                    name = f"{layout}-{bits}bit-{group or 'row'}-{'sym' if symmetric else 'asym'}"
                    yield name, quantize(base, Scheme(bits, group, symmetric), format_name=layout)
    blocks = range(6)
    mixed = {f"model.layers.{block}.self_attn.{part}_proj": Scheme(8 if block in (0, 5) else 4, 32) for block in blocks for part in "qkv"}
    mixed |= {f"model.layers.{block}.mlp.{part}_proj": Scheme(3, 64) for block in blocks for part in ("gate", "up")}
    mixed |= {f"model.layers.{block}.mlp.down_proj": Scheme(2, 32) for block in blocks if block != 3}
    yield "gptq-mixed", quantize(base, mixed, format_name="gptq")
    yield "converted-4bit", convert(quantize(base, Scheme(4, 32)), "gptq")


def run(python: Path, code: str, *arguments: str) -> str:
    """What GPTQModel's interpreter prints."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""}  # it does not start on two cores otherwise
    done = subprocess.run([python, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptqmodel-python", type=Path, required=True)
    parser.add_argument("--write-golden", action="store_true")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    given = parser.parse_args()
    if given.write_golden:
        run(given.gptqmodel_python, PACK, str(GOLDEN))
        return
    base = Checkpoint.open(ROOT / "tests" / "models" / "base")
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for name, packed in cases(base):
            if name.startswith(given.only):
                save(packed, Path(folder, name))
                save(dequantize(Checkpoint.open(Path(folder, name))), Path(folder, f"{name}-dense"))
                names.append(name)
        found = json.loads(run(given.gptqmodel_python, READ, folder, *names).rpartition("FOUND")[2])
    print("| file | layers | weights | logits |\n|---|---:|---:|---:|")
    for name, (layers, weights, logits) in found.items():
        print(f"| {name} | {layers} | {weights:.2g} | {logits:.2g} |")
    if worst := max(weights for _, weights, _ in found.values()):
        sys.exit(f"weights differ by up to {worst:.2g}")


if __name__ == "__main__":
    main()
