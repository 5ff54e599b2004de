"""Which row mergekit 0.1.5 gives each token, and which we do: `python benchmarks/parity_mergekit_tokenizers.py --mergekit-yaml VENV/bin/mergekit-yaml`.

Three toy models with tokenizers of their own are averaged by both under every case of tests/vocabulary/vocabulary_toys.py. Printed is the largest
difference over all tokens, which are matched by their text. `--write-golden` keeps mergekit's rows in tests/vocabulary/golden_mergekit.safetensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "vocabulary")]

from vocabulary_toys import GOLDEN_CASES, WEIGHTS, A, B, C, toy  # noqa: E402

from mergekit_plus.checkpoint import Checkpoint  # noqa: E402
from mergekit_plus.merge.plan import merge  # noqa: E402
from mergekit_plus.vocabulary import TokenizerSpec, retokenize  # noqa: E402

GOLDEN = ROOT / "tests" / "vocabulary" / "golden_mergekit.safetensors"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def vocabulary(tokenizer_json: bytes) -> dict[str, int]:
    """Every token's id, as the tokenizers library reads the file."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_str(tokenizer_json.decode()).get_vocab()
    return found


def by_mergekit(program: Path, folder: Path, key: dict[str, Any], with_base: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The tokens and tables of mergekit's merge."""
    config = {
        "merge_method": "linear", "dtype": "float32", "tokenizer": key, **({"base_model": "a"} if with_base else {}),
        "models": [{"model": name, "parameters": {"weight": weight}} for name, weight in WEIGHTS.items()],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    subprocess.run([program, "config.yaml", "out", "--quiet", "--no-write-model-card"], cwd=folder, check=True, capture_output=True)
    return vocabulary((folder / "out" / "tokenizer.json").read_bytes()), load_file(folder / "out" / "model.safetensors")


def ours(folder: Path, key: dict[str, Any], with_base: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The tokens and tables of our merge."""
    models = {name: Checkpoint.open(folder / name) for name in WEIGHTS}
    views = retokenize(models, "a" if with_base else None, TokenizerSpec.model_validate(key))
    merged = merge(list(views.values()), "linear", None, {"weight": list(WEIGHTS.values())})
    return vocabulary(merged.file("tokenizer.json")), {name: merged.read(name) for name in TABLES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit-yaml", type=Path, required=True)
    parser.add_argument("--write-golden", action="store_true")
    arguments = parser.parse_args()
    golden: dict[str, Tensor] = {}
    tokens: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for seed, (name, content) in enumerate({"a": A, "b": B, "c": C}.items()):
            toy(root / name, content, seed)
        for case, (key, with_base) in GOLDEN_CASES.items():
            theirs, their_tables = by_mergekit(arguments.mergekit_yaml.absolute(), root, dict(key), with_base)
            own, own_tables = ours(root, dict(key), with_base)
            texts = sorted(theirs)
            tokens[case] = texts
            places = torch.tensor([theirs[text] for text in texts])
            worst = 0.0
            for table in TABLES:
                golden[f"{case}.{table}"] = their_tables[table][places].contiguous()
                golden[f"{case}.{table}.padding"] = their_tables[table][len(theirs) :].contiguous()
                rows = own_tables[table][torch.tensor([own[text] for text in texts])]
                worst = max(worst, float((rows - their_tables[table][places]).abs().max()))
            print(f"{case:24} {len(texts)} tokens, {len(own)} of ours, tables of {len(their_tables[TABLES[0]])} and {len(own_tables[TABLES[0]])}: {worst:.2g}")
    if arguments.write_golden:
        save_file(golden, GOLDEN, {"tokens": json.dumps(tokens)})


if __name__ == "__main__":
    main()
