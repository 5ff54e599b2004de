"""Our quantisers beside llm-compressor, GPTQModel, AutoRound and HQQ: perplexity, bits and time, on the same calibration tokens.

    python benchmarks/quantize_quality.py --model MODEL --calibration TRAIN.txt --test TEST.txt --methods rtn gptq hqq \\
        --llmcompressor VENV/bin/python --gptqmodel VENV/bin/python --autoround VENV/bin/python --hqq VENV/bin/python --cache results.jsonl

A method is a name of the registry, after `rotate+` for a rotated model, with options after commas (`gptq,act_order=false`; `order=layer` and `cross=true`
are of the calibration, `asymmetric=true` is of the scheme). A peer whose interpreter is not given is left out; each has a driver in benchmarks/peers and runs
with its own defaults. Everybody quantizes the linear layers of the blocks, symmetric but for HQQ, in groups of the same size, and calibrates on the same
windows of token ids, drawn anew for each draw. Each result is decoded to dense weights, a peer's by the peer, and measured by `evaluate.perplexity`.
Seconds are those of quantizing alone, of the processor and, in the JSON, of the clock; ours hold reading, packing and writing the file as well. What
calibrates here, and llm-compressor, has quantized on two windows before, so that no imports are among them. Every result goes into the cache at once, and
what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from mergekit_plus.calibration import read_text
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.evaluate import load_model, load_tokenizer, perplexity, tokenize
from mergekit_plus.model import describe
from quant import QUANTIZERS, Scheme
from quant.calibrated import Calibration
from quant.plan import dequantize, quantize
from quant.rotate import rotate

DRIVERS = Path(__file__).parent / "peers"
# label: the driver, the method, the interpreter's option, whether it calibrates
PEERS = {
    "llm-compressor RTN": ("run_llmcompressor.py", "rtn", "llmcompressor", False),
    "llm-compressor GPTQ": ("run_llmcompressor.py", "gptq", "llmcompressor", True),
    "GPTQModel GPTQ": ("run_gptqmodel.py", "gptq", "gptqmodel", True),
    "AutoRound": ("run_autoround.py", "autoround", "autoround", True),
    "HQQ": ("run_hqq.py", "hqq", "hqq", False),
}
OF_CALIBRATION = ("order", "cross")


class Bench:
    """One model, one test text, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.model = options, Checkpoint.open(options.model)
        self.cache: Path = options.cache
        self.warm = False
        self.done: dict[str, Any] = dict(json.loads(line) for line in self.cache.read_text().splitlines()) if self.cache.is_file() else {}
        tokenizer = load_tokenizer(self.model)
        self.test = tokenize(tokenizer, options.test.read_text())
        self.draws = [read_text([options.calibration], tokenizer, options.windows, options.window, seed) for seed in range(options.draws)]
        roles = describe(self.model)
        self.linears = sorted(roles.linears)
        self.weights = sum(self.model.specs[name].numel for name in self.linears)
        self.rest = self.model.nbytes - sum(self.model.specs[name].nbytes for name in self.linears)

    def remember(self, key: str, make: Any) -> dict[str, Any]:
        """What the cache holds, or what is made now."""
        if key not in self.done:
            self.done[key] = make()
            with self.cache.open("a") as file:
                print(json.dumps([key, self.done[key]]), file=file)
            print(f"{key}: {self.done[key]}", file=sys.stderr)
        found: dict[str, Any] = self.done[key]
        return found

    def perplexity(self, checkpoint: Checkpoint) -> float:
        return perplexity(load_model(checkpoint), self.test, limit=self.options.test_windows).value

    def facts(self, dense: Checkpoint, nbytes: int, seconds: float, processor: float) -> dict[str, Any]:
        bits = 8 * (nbytes - self.rest) / self.weights  # of a weight of the linear layers, scales and zero points and a header among them
        return {"ppl": self.perplexity(dense), "bytes": nbytes, "bits": bits, "seconds": seconds, "cpu_seconds": processor}

    def ours(self, what: str, scheme: Scheme, ids: torch.Tensor | None) -> dict[str, Any]:
        method, rotated, given = parse(what)
        source = rotate(self.model) if rotated else self.model
        scheme = replace(scheme, symmetric=not given.pop("asymmetric", False))
        own = {name: given.pop(name) for name in OF_CALIBRATION if name in given}
        calibration = None if ids is None else Calibration(ids, **own)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            if ids is not None and not self.warm:  # whatever is imported or set up when it is first needed
                save(quantize(source, scheme, method, given, calibration=replace(calibration, ids=ids[:2])), Path(folder) / "warm")
                self.warm = True
            wall, processor = time.perf_counter(), time.process_time()
            save(quantize(source, scheme, method, given, calibration=calibration), out)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            return self.facts(dequantize(Checkpoint.open(out)), nbytes, wall, processor)

    def peer(self, label: str, interpreter: str, scheme: Scheme, ids: torch.Tensor) -> dict[str, Any]:
        driver, method, _, _ = PEERS[label]
        threads = str(self.options.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            save_file({"ids": ids}, out / "tokens.safetensors")
            job = {
                "model": str(self.options.model.resolve()), "tokens": str(out / "tokens.safetensors"), "out": folder, "method": method, "bits": scheme.bits,
                "group_size": scheme.group_size, "threads": self.options.threads, "dtype": self.options.peer_dtype,
                "options": {"iters": self.options.autoround_steps} if label == "AutoRound" else {},
            }  # fmt: skip
            (out / "job.json").write_text(json.dumps(job))
            ran = subprocess.run(
                [interpreter, str(DRIVERS / driver), str(out / "job.json")], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            if ran.returncode:
                raise SystemExit(f"{label} failed:\n{ran.stderr[-3000:]}")
            result = json.loads((out / "result.json").read_text())
            if result["replaced"] != self.linears:
                raise SystemExit(f"{label} quantized other layers: {sorted({*result['replaced']} ^ {*self.linears})[:3]}")
            facts = self.facts(Checkpoint.open(out / "dense"), result["bytes"], result["seconds"], result["cpu_seconds"])
            return {**facts, "versions": result["versions"]}

    def rows(self) -> dict[str, dict[int, list[dict[str, Any]]]]:
        """Results by label, by bits, a draw each; one alone of what does not calibrate."""
        size, window = f"g{self.options.group_size}", f"{self.options.windows}x{self.options.window}"
        found: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for bits in self.options.bits:
            scheme = Scheme(bits, self.options.group_size)
            for what in self.options.methods:
                draws = self.draws if QUANTIZERS[parse(what)[0]].calibrated else [None]
                found.setdefault(what, {})[bits] = [
                    self.remember(f"{what} W{bits} {size} {f'{window} draw {number}' if ids is not None else 'no text'}",
                                  lambda what=what, scheme=scheme, ids=ids: self.ours(what, scheme, ids))
                    for number, ids in enumerate(draws)
                ]  # fmt: skip
            for label, (_, _, option, calibrates) in PEERS.items():
                interpreter = getattr(self.options, option)
                draws = self.draws[: self.options.autoround_draws] if label == "AutoRound" else self.draws if calibrates else self.draws[:1]
                steps = f", {self.options.autoround_steps} steps" if label == "AutoRound" else ""
                for number, ids in enumerate(draws if interpreter else []):
                    key = f"{label}{steps} W{bits} {size} {f'{window} draw {number}' if calibrates else 'no text'}"
                    made = self.remember(key, lambda label=label, interpreter=interpreter, scheme=scheme, ids=ids: self.peer(label, interpreter, scheme, ids))
                    found.setdefault(f"{label}{steps}", {}).setdefault(bits, []).append(made)
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"])
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128, help="of calibration text in a draw")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--test-windows", type=int, help="of 256 tokens; by default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("quantize-quality.jsonl"), help="holds results of one model and test text")
    parser.add_argument("--json", type=Path, help="where all results go")
    parser.add_argument("--peer-dtype", default="bfloat16", help="in which the peers load the model")
    parser.add_argument("--autoround-steps", type=int, default=200, help="for each block")
    parser.add_argument("--autoround-draws", type=int, help="as many as the others by default")
    for option in sorted({option for _, _, option, _ in PEERS.values()}):
        parser.add_argument(f"--{option}", metavar="PYTHON", help="its interpreter")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    unquantized = bench.remember("unquantized", lambda: {"ppl": bench.perplexity(bench.model)})
    rows = bench.rows()
    widths = options.bits
    print(f"| method | {' | '.join(f'{bits} bits' for bits in widths)} | bits a weight | CPU seconds |\n|---|{'---|' * (len(widths) + 2)}")
    print(f"| unquantized | {' | '.join([format(unquantized['ppl'], '.2f')] * len(widths))} | 16 | |")
    for label, by_bits in rows.items():
        cells = [cell([one["ppl"] for one in by_bits[bits]]) for bits in widths]
        own = ", ".join(f"{by_bits[bits][0]['bits']:.2f}" for bits in widths)
        seconds = statistics.mean(one["cpu_seconds"] for found in by_bits.values() for one in found)
        print(f"| {label} | {' | '.join(cells)} | {own} | {seconds:.1f} |")
    versions = {name: version for by_bits in rows.values() for found in by_bits.values() for one in found for name, version in one.get("versions", {}).items()}
    print("\n" + ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("torch", "transformers")))
    if options.json:
        options.json.write_text(json.dumps({"unquantized": unquantized, "rows": rows}, indent=1))


def parse(what: str) -> tuple[str, bool, dict[str, Any]]:
    """A method as it is written on the command line: its name, whether the model is rotated, its options."""
    name, *options = what.split(",")
    given = {key: yaml.safe_load(value) for key, value in (option.split("=") for option in options)}
    return name.removeprefix("rotate+"), name.startswith("rotate+"), given


def cell(values: list[float]) -> str:
    """The mean over the draws, how far the farthest is from it, and their number."""
    mean = statistics.mean(values)
    return f"{mean:.2f}" + (f" ± {max(abs(value - mean) for value in values):.2f} ({len(values)})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
