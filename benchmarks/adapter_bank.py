"""The memory of a thousand adapters on one base: packed in an `AdapterBank`, and as float16 tensors. The lines in docs/adapters.md.

    python benchmarks/adapter_bank.py [--model MODEL] [--rank 16] [--adapters 1000]

Adapters of random numbers beside every linear layer, each with memory of its own; measured as the growth of the process's anonymous memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from mergekit_plus.adapters import read_adapter
from mergekit_plus.adapters.layout import Product, adapter_of
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.evaluate import load_model
from quant.adapters.bank import AdapterBank
from quant.adapters.plan import QuantizeOptions, quantize_adapter

BASE = Path(__file__).parents[1] / "tests" / "models" / "base"


def anonymous() -> int:
    """Bytes of anonymous memory of this process, without what malloc keeps of what was freed."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


def random_adapter(base: Checkpoint, rank: int) -> Checkpoint:
    """An adapter of random numbers beside every linear layer of a model."""
    generator = torch.Generator().manual_seed(0)

    def factorise(tensors: object, product: Product) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn((rank, product.shape[1]), generator=generator), torch.randn((product.shape[0], rank), generator=generator)

    products = [Product(name.removesuffix(".weight"), rank, spec.shape) for name, spec in base.specs.items() if "_proj" in name]
    steps = [product.step([], lambda tensors, product=product: factorise(tensors, product), "F16") for product in products]
    return adapter_of("random", products, steps, None, "CAUSAL_LM")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BASE)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=1000)
    options = parser.parse_args()
    base = Checkpoint.open(options.model)
    adapter = random_adapter(base, options.rank)
    bank = AdapterBank(load_model(base))
    print(f"{options.adapters} adapters of rank {options.rank}, {adapter.nbytes // 2} numbers each\n")
    print("| | bytes of the tensors | anonymous memory |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for bits in (1, 2, 4):
            save(quantize_adapter(read_adapter(adapter), QuantizeOptions(bits, refit=False)), Path(folder) / str(bits))
            bank.adapters.clear()
            bank.add("0", Checkpoint.open(Path(folder) / str(bits)))
            before, first = anonymous(), bank.adapters["0"]
            for number in range(1, options.adapters):
                bank.adapters[str(number)] = replace(first, codes=first.codes.clone(), stats=first.stats.clone())
            print(f"| {bits} bit{'s' * (bits > 1)} | {bank.nbytes / 1e6:.1f} MB | {(anonymous() - before) / 1e6:.1f} MB |", flush=True)
    bank.adapters.clear()
    few = max(1, options.adapters // 10)
    before = anonymous()
    dense = [{name: adapter.read(name) for name in adapter.specs} for _ in range(few)]
    grown = (anonymous() - before) / few * options.adapters
    print(f"| float16 ({few} measured) | {len(dense) * adapter.nbytes / few * options.adapters / 1e6:.1f} MB | {grown / 1e6:.1f} MB |")


if __name__ == "__main__":
    main()
