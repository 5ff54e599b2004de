"""How much processor time it takes to plan a merge of very many small tensors: `python benchmarks/plan.py [--tensors 46000]`.

An unpacked mixture of experts (DeepSeek-V3 has about 46,000 tensors) is planned from its headers alone: opening the files, composing the merge, and laying
out the output, for whole models, for a gradient with filters, and for slices. The target is 5 seconds each, opening included; mergekit 0.1.5 takes time that
grows with the square of the number (400 s for 8000 tensors, under its profiler).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 60


def write_model(folder: Path, tensors: int) -> None:
    """The experts of 60 layers, of 2 x 2 elements, and what stands around them."""
    experts = tensors // (3 * LAYERS)
    folder.mkdir()
    kinds = [f"mlp.experts.{expert}.{kind}_proj.weight" for expert in range(experts) for kind in ("gate", "up", "down")]
    weights = {f"model.layers.{layer}.{kind}": torch.zeros(2, 2) for layer in range(LAYERS) for kind in kinds}
    save_file({"model.embed_tokens.weight": torch.zeros(8, 2), **weights, "model.norm.weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "of-no-library", "num_hidden_layers": LAYERS}))


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    a, b = str(folder / "a"), str(folder / "b")
    half = LAYERS // 2
    gradient = {"t": [{"filter": "up_proj", "value": [0, 0.5, 1]}, {"filter": "gate", "value": 0.3}, {"value": 0.5}]}
    return {
        "linear": {"merge_method": "linear", "models": [{"model": a}, {"model": b}]},
        "ties": {"merge_method": "ties", "base_model": a, "models": [{"model": b}], "parameters": {"density": 0.5}},
        "slerp, gradient and filters": {"merge_method": "slerp", "base_model": a, "models": [{"model": a}, {"model": b}], "parameters": gradient},
        "two slices": {"merge_method": "passthrough", "slices": [
            {"sources": [{"model": a, "layer_range": [0, half]}]}, {"sources": [{"model": b, "layer_range": [half, LAYERS]}]}]},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=46_000)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from mergekit_plus.checkpoint.save import SaveOptions, plan_save
    from mergekit_plus.recipe import build, load

    gc.set_threshold(100_000)  # as the program does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in ("a", "b"):
            write_model(folder / model, given.tensors)
        for label, document in documents(folder).items():
            (folder / "document.yaml").write_text(yaml.safe_dump(document))
            start = time.process_time()
            result = build(load(folder / "document.yaml")).result
            built = time.process_time()
            plan_save(result, folder / "out", SaveOptions())
            end = time.process_time()
            print(f"{label:30} {len(result.specs)} tensors: {built - start:.2f} s to open and compose, {end - built:.2f} s to lay out")


if __name__ == "__main__":
    main()
