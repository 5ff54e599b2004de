"""What mergekit 0.1.5 makes of documents, for the tests: `python benchmarks/golden_mergekit_yaml.py --mergekit-python VENV/bin/python`.

Writes tests/mergekit/golden_mergekit_yaml.safetensors: three tiny models, and for every document below the tensors and the number of layers that
mergekit gave. mergekit runs in its own interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "mergekit" / "golden_mergekit_yaml.safetensors"
LAYERS, HIDDEN, INNER, VOCABULARY = 4, 4, 6, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip

DOCUMENTS: dict[str, str] = {
    "two stacks, scaled": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1.0}]}
""",
    "overlapping and repeated layers": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: a, layer_range: [1, 3]}]
  - sources: [{model: a, layer_range: [1, 4]}]
""",
    "gradients and filters": """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0.5, 0]}, {value: 0.5}]}
""",
    "a gradient over whole models": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: [0.1, 0.9, 0.3]}}
  - {model: b, parameters: {weight: {filter: mlp, value: [1, 0.2]}}}
parameters: {weight: 0.25, lambda: [0.5, 1]}
""",
    "filters of one model": """
merge_method: ties
base_model: base
models:
  - {model: base}
  - {model: a, parameters: {density: [{filter: q_proj, value: 0.25}, {filter: "*", value: 0.75}], weight: 0.61}}
  - {model: b, parameters: {density: 0.5, weight: [{filter: down_proj, value: 0.7}, {value: 0.43}]}}
parameters: {normalize: true, int8_mask: true}
""",
    "scopes: a source before its slice before the document": """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 3}}
      - {model: b, layer_range: [0, 2]}
    parameters: {weight: 2}
  - sources:
      - {model: a, layer_range: [2, 4]}
      - {model: base, layer_range: [1, 3], parameters: {weight: [{filter: mlp, value: 5}]}}
parameters: {weight: 1}
""",
    "fewer sources in the last slice": """
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {weight: 0.3}}, {model: b, layer_range: [2, 4], parameters: {weight: 0.7}}]
  - sources: [{model: base, layer_range: [0, 1], parameters: {weight: 1}}]
""",
    "a slice of no layers for the head": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [4, 4]}]
""",
    "slices of one layer are at the end of a gradient": """
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 1], parameters: {weight: [1, 3]}}, {model: b, layer_range: [1, 2], parameters: {weight: 1}}]
  - sources: [{model: a, layer_range: [1, 4], parameters: {weight: [1, 3]}}, {model: b, layer_range: [1, 4], parameters: {weight: 1}}]
""",
    "a base model for each slice": """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - base_model: b
    sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
parameters: {t: 0.25}
""",
    "truth values are picked": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {normalize: [true, false]}
""",
    "numbers that YAML takes for words": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 5e-1}}
  - {model: b, parameters: {weight: [1e-1, 9e-1]}}
""",
    "dtypes": """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.7}}
  - {model: b, parameters: {weight: 0.3}}
dtype: torch.float32
out_dtype: bfloat16
""",
    "models as tables": """
merge_method: linear
models:
  - {model: {model: {path: a}}, parameters: {weight: 0.7}}
  - {model: {model: b, override_architecture: LlamaForCausalLM}, parameters: {weight: 0.3}}
""",
    "the only module by its name": """
merge_method: linear
modules:
  default:
    slices:
      - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4], parameters: {weight: 3}}]
    parameters: {weight: 2}
""",
    "a base that is not listed, for a method that may have one": """
merge_method: nuslerp
base_model: base
models: [{model: a, parameters: {weight: [0.2, 0.6]}}, {model: b, parameters: {weight: 0.5}}]
""",
    "the base model is merged too where no method takes it as one": """
merge_method: linear
base_model: base
models: [{model: a}, {model: b, parameters: {weight: 2}}]
parameters: {weight: 1}
""",
}


def tiny_model(seed: int) -> dict[str, Tensor]:
    """The tensors of a Llama of four layers."""
    generator = torch.Generator().manual_seed(seed)

    def of(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": of(VOCABULARY, HIDDEN), "lm_head.weight": of(VOCABULARY, HIDDEN), "model.norm.weight": of(HIDDEN)}
    for layer in range(LAYERS):
        shapes = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN // 2, HIDDEN), "v": (HIDDEN // 2, HIDDEN), "o": (HIDDEN, HIDDEN)}
        tensors |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": of(*shape) for name, shape in shapes.items()}
        tensors |= {f"model.layers.{layer}.mlp.{name}_proj.weight": of(INNER, HIDDEN) for name in ("gate", "up")}
        tensors |= {f"model.layers.{layer}.mlp.down_proj.weight": of(HIDDEN, INNER)}
        tensors |= {f"model.layers.{layer}.{name}_layernorm.weight": of(HIDDEN) for name in ("input", "post_attention")}
    return tensors


def peer(folder: Path) -> None:
    """Runs under mergekit's interpreter: every document of the folder, its model beside it."""
    import yaml
    from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
    from mergekit.merge import run_merge  # type: ignore[import-not-found]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found]

    os.chdir(folder)
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    for number, text in enumerate(json.loads(Path("documents.json").read_text())):
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), f"out-{number}", options)


def write_golden(python: str) -> None:
    models = {name: tiny_model(seed) for seed, name in enumerate(("base", "a", "b"))}
    inside = {f"{name}/{tensor}": content for name, tensors in models.items() for tensor, content in tensors.items()}
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, tensors in models.items():
            (folder / model).mkdir()
            save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
            (folder / model / "config.json").write_text(json.dumps(CONFIG))
        (folder / "documents.json").write_text(json.dumps(list(DOCUMENTS.values())))
        subprocess.run([python, __file__, "--peer", str(folder)], check=True)
        for number, (label, text) in enumerate(DOCUMENTS.items()):
            made = {key: value for path in sorted((folder / f"out-{number}").glob("*.safetensors")) for key, value in load_file(path).items()}
            inside |= {f"{number}/{key}": value.contiguous() for key, value in made.items()}
            config = json.loads((folder / f"out-{number}" / "config.json").read_text())
            cases.append({"label": label, "document": text, "layers": config["num_hidden_layers"]})
    save_file(inside, GOLDEN, metadata={"cases": json.dumps(cases), "config": json.dumps(CONFIG), "peer": "mergekit 0.1.5"})
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(cases)} documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", help="interpreter of an environment with mergekit 0.1.5")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        peer(given.peer)
    elif given.mergekit_python:
        write_golden(given.mergekit_python)
    else:
        parser.error("--mergekit-python is needed")


if __name__ == "__main__":
    main()
