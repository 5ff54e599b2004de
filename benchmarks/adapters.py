"""What adapters extracted from a fine-tune of tests/models keep of it: the table in docs/adapters.md.

    python benchmarks/adapters.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from mergekit_plus.adapters.extract import ExtractOptions, extract, kept, overall
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize

MODELS = Path(__file__).parents[1] / "tests" / "models"
CASES = {
    "`--rank 4`": ExtractOptions(rank=4),
    "`--rank 16`": ExtractOptions(rank=16),
    "`--energy 0.5`": ExtractOptions(energy=0.5),
    "`--rank 64`": ExtractOptions(rank=64),
    "`--rank 4 --save-rest`": ExtractOptions(rank=4, save_rest=True),
    "`--rank 16 --save-rest`": ExtractOptions(rank=16, save_rest=True),
    "`--rank 16 --save-rest --dtype bfloat16`": ExtractOptions(rank=16, save_rest=True, dtype="BF16"),
    "`--energy 0.9 --save-rest`": ExtractOptions(energy=0.9, save_rest=True),
}


def main() -> None:
    """Print the table."""
    base, tuned = (Checkpoint.open(MODELS / name) for name in ("base", "code"))
    tokenizer = load_tokenizer(base)
    texts = [tokenize(tokenizer, (MODELS / "text" / f"{name}.test.txt").read_text()) for name in ("code", "docs")]

    def line(name: str, nbytes: int | None, errors: tuple[float, float] | None, model: Checkpoint) -> None:
        loaded = load_model(model)
        values = [perplexity(loaded, ids, window=256, limit=20).value for ids in texts]
        size = f"{nbytes / 1e6:.2f} MB" if nbytes else ""
        lost = " | ".join(f"{error:.3f}" for error in errors) if errors else " | "
        print(f"| {name} | {size} | {lost} | {' | '.join(f'{value:.2f}' for value in values)} |", flush=True)

    print("| | bytes of the adapter | error, linear layers | error, all | perplexity, code | perplexity, docs |\n|---|---|---|---|---|---|")
    line("base", None, None, base)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, options) in enumerate(CASES.items()):
            out = Path(folder) / str(number)
            save(extract(base, tuned, options), out)
            adapter = Checkpoint.open(out)
            report = kept(base, tuned, adapter)
            errors = overall([tensor for tensor in report if tensor.kind == "low rank"]), overall(report)
            line(name, adapter.nbytes, errors, Checkpoint.open(f"{base.label}+{out}"))
    line("the fine-tune", tuned.nbytes, None, tuned)


if __name__ == "__main__":
    main()
