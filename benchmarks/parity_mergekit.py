"""How our merge methods agree with mergekit 0.1.5, measured: `python benchmarks/parity_mergekit.py --mergekit-python VENV/bin/python`.

mergekit runs in its own interpreter and exchanges safetensors files with us. Of every method it prints

* float32 inputs: the largest difference between us and mergekit, and of each from mergekit's own float64 evaluation, relative to the
  element's largest input;
* bfloat16 inputs: the share of elements that are the float64 evaluation rounded to the nearest, for us and for mergekit as it runs by
  default (halfway between two bfloat16 values, where weights like 0.7 and 0.3 often lead, both neighbours count as nearest);
* what TIES keeps where magnitudes tie at the cut, and the mean and spread of DARE's random result.

`--write-golden` writes small inputs with mergekit's outputs to tests/merge/golden_mergekit.safetensors, so that the tests need no peer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "merge" / "golden_mergekit.safetensors"
PARITY = 1e-6

# label, method, how many models besides the base, options; a density of "half" stands for about a half, between two magnitudes
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("linear", "linear", 2, {"weight": [0.7, 0.3]}),
    ("linear, three, not normalized", "linear", 3, {"weight": [0.5, 0.4, -0.2], "normalize": False}),
    ("slerp", "slerp", 1, {"t": 0.35}),
    ("slerp, wide angle", "slerp", 1, {"t": 0.6}),
    ("task_arithmetic", "task_arithmetic", 2, {"weight": [0.6, 0.4]}),
    ("task_arithmetic, normalized", "task_arithmetic", 3, {"weight": [1.0, 0.5, 0.3], "normalize": True, "lambda": 0.8}),
    # weights in a simple ratio make the differences of bfloat16 models cancel exactly (0.6 * 2 = 0.4 * 3): then the rounding of the weights,
    # in float64 as in float32, elects the sign, and half a thousandth of the elements means nothing
    ("ties, density 1", "ties", 2, {"weight": [0.61, 0.43], "density": 1.0}),
    ("ties", "ties", 2, {"weight": [0.61, 0.43], "density": "half"}),
    ("ties, three, rescaled", "ties", 3, {"weight": [1.0, 0.7, 0.4], "density": "half", "rescale": True, "lambda": 0.9}),
    ("ties, summed", "ties", 3, {"weight": [1.0, -0.7, 0.4], "density": "half", "normalize": False}),
    ("dare_linear, density 1", "dare_linear", 2, {"weight": [0.6, 0.4], "density": 1.0}),
    ("dare_ties, density 1", "dare_ties", 3, {"weight": [0.61, 0.53, 0.43], "density": 1.0}),
]


def inputs(shape: Sequence[int], dtype: torch.dtype, seed: int, wide: bool) -> list[Tensor]:
    """A base and three models near it (or far from it, where `wide`)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tuple(shape), generator=generator) * 0.02
    step = 0.02 if wide else 0.002
    return [base.to(dtype), *((base + step * torch.randn(tuple(shape), generator=generator)).to(dtype) for _ in range(3))]


def half(vector: Tensor) -> float:
    """The density next to a half at which the cut lies between two different magnitudes, so that no tie has to be broken."""
    magnitudes = vector.double().abs().flatten().sort(descending=True).values
    size = magnitudes.numel()
    edges = [0, *(torch.nonzero(magnitudes[1:] < magnitudes[:-1]).flatten() + 1).tolist(), size]
    count = max(1, min(edges, key=lambda edge: abs(edge - size / 2)))
    return next(density for density in (count / size, (count + 0.5) / size, 1.0) if int(density * size) == count)


def settled(options: dict[str, Any], tensors: Sequence[Tensor], models: int) -> dict[str, Any]:
    """The options with "half" replaced for these tensors."""
    if options.get("density") != "half":
        return dict(options)
    base = tensors[0].double()
    return {**options, "density": [half(tensor.double() - base) for tensor in tensors[1 : models + 1]]}


def ours(method: str, tensors: Sequence[Tensor], options: dict[str, Any], seed: int = 0) -> Tensor:
    """Our result in the working dtype."""
    from mergekit_plus.merge import METHODS
    from mergekit_plus.merge.noise import Noise

    class Whole:
        size = tensors[0].numel()

        def map(self, function: Callable[[Tensor | None, Sequence[Tensor]], Any], sample: bool = False) -> list[Any]:
            return [function(tensors[0], tensors[1:])]

    chosen = METHODS[method]
    models = tensors[1:] if chosen.needs_base else tensors
    arguments = chosen.options.check(options, len(models))
    inside: dict[str, Any] = {"first": 0, "noise": Noise(seed, "x")}
    if chosen.statistic is not None:
        wanted = chosen.statistic.__code__.co_varnames
        inside["measured"] = chosen.statistic(Whole(), **{key: value for key, value in arguments.items() if key in wanted})
    given = {name: inside[name] for name in chosen.inside}
    return chosen.function(*((tensors[0],) if chosen.needs_base else ()), models, **given, **arguments)


def peer(folder: Path) -> None:
    """Runs under mergekit's interpreter: every job of the folder, its result beside it."""
    from mergekit.merge_methods import merge_tensors  # type: ignore[import-not-found]

    torch.manual_seed(0)
    tensors = load_file(folder / "inputs.safetensors")
    results = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        result = merge_tensors(
            [tensors[key] for key in job["tensors"]],
            job["method"],
            parameters=job["options"],
            base_index=0 if job["base"] else None,
            dtype=getattr(torch, job["dtype"], None),
            out_dtype=getattr(torch, job["out_dtype"], None),
        )
        results[name] = result.contiguous().clone()
    save_file(results, folder / "outputs.safetensors")


class Peer:
    """Collects jobs for mergekit and runs them all in one process."""

    def __init__(self, python: str) -> None:
        self.python, self.tensors, self.jobs = python, dict[str, Tensor](), dict[str, Any]()

    def add(self, name: str, method: str, tensors: Sequence[Tensor], options: dict[str, Any], dtype: str = "unset", out_dtype: str = "unset") -> None:
        keys = [f"{name}.{index}" for index in range(len(tensors))]
        self.tensors.update({key: tensor.contiguous().clone() for key, tensor in zip(keys, tensors, strict=True)})
        job = {"method": method, "tensors": keys, "options": options, "base": method != "linear", "dtype": dtype, "out_dtype": out_dtype}
        self.jobs[name] = job

    def run(self) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(self.tensors, folder / "inputs.safetensors")
            (folder / "jobs.json").write_text(json.dumps(self.jobs))
            subprocess.run([self.python, __file__, "--peer", str(folder)], check=True)
            return load_file(folder / "outputs.safetensors")


def rounded_right(result: Tensor, exact: Tensor) -> float:
    """The share of elements than which no other of the dtype is nearer to the exact one."""
    nearest = (exact.to(result.dtype).double() - exact).abs()
    return ((result.double() - exact).abs() <= nearest * (1 + 1e-5)).double().mean().item()


def table(python: str, side: int) -> None:
    """Print what the module's docstring says."""
    peer = Peer(python)
    prepared: list[tuple[str, str, list[Tensor], dict[str, Any]]] = []
    for label, method, models, options in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = inputs((side, side + 1), dtype, len(prepared), "wide" in label)[: models + 1]
            if method == "linear":
                tensors = tensors[1:]
            given = settled(options, tensors, models)
            name = f"{label}/{dtype}"
            prepared.append((name, method, tensors, given))
            peer.add(name, method, tensors, given)
            peer.add(f"{name}/exact", method, tensors, given, dtype="float64")
    tied = torch.randint(1, 4, (10, 1000), generator=torch.Generator().manual_seed(0)).float()
    peer.add("tied", "ties", [torch.zeros_like(tied), tied], {"weight": 1.0, "density": 0.5})
    noisy = inputs((1000, 1000), torch.float32, 99, True)[:3]
    random = {"weight": [1.0, 0.5], "density": 0.4}
    for method in ("dare_linear", "dare_ties"):
        peer.add(method, method, noisy, random)
    results = peer.run()

    print(f"{'method':30} {'f32: apart':>10} {'ours off':>9} {'theirs off':>10} {'bf16 ours':>10} {'theirs':>9}")
    for (label, *_), pair in zip(CASES, zip(prepared[::2], prepared[1::2], strict=True), strict=True):
        (name, method, tensors, given), (name16, _, tensors16, given16) = pair
        scale = torch.stack([tensor.abs() for tensor in tensors]).amax(0)
        mine, them, exact = ours(method, tensors, given), results[name], results[f"{name}/exact"]
        apart, off, off_theirs = (((a - b).abs() / scale).max().item() for a, b in ((mine, them), (mine, exact), (them, exact)))
        right = rounded_right(ours(method, tensors16, given16).bfloat16(), results[f"{name16}/exact"])
        theirs = rounded_right(results[name16], results[f"{name16}/exact"])
        note = "" if min(apart, off) < PARITY and right > 0.999 else "  <-- not at parity"
        print(f"{label:30} {apart:10.1e} {off:9.1e} {off_theirs:10.1e} {right:10.3%} {theirs:9.3%}{note}")

    mine, them = ours("ties", [torch.zeros_like(tied), tied], {"density": 0.5}) != 0, results["tied"] != 0
    print(f"\nties among ties: kept {int(mine.sum())} and {int(them.sum())} of {tied.numel()}, the same ones: {bool((mine == them).all())}")
    for method in ("dare_linear", "dare_ties"):
        vectors = [result - noisy[0] for result in (ours(method, noisy, random), results[method])]
        shown = [f"mean {vector.mean():+.5f} std {vector.std():.5f} zero {(vector == 0).double().mean():.4f}" for vector in vectors]
        print(f"{method}: ours {shown[0]}; mergekit {shown[1]}")


def write_golden(python: str) -> None:
    """Small inputs of odd shapes with mergekit's results: float32 as it runs, bfloat16 from its float64 evaluation, rounded once."""
    peer, inside, cases = Peer(python), dict[str, Tensor](), list[dict[str, Any]]()
    for case, (label, method, models, options) in enumerate(CASES):
        if method.startswith("dare"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((7, 13), (33,), (2, 3, 5), (1,), ()):
                tensors = inputs(shape, dtype, case, "wide" in label)[: models + 1]
                if method == "linear":
                    tensors = tensors[1:]
                given = settled(options, tensors, models)
                name = f"{len(cases)}"
                cases.append({"label": label, "method": method, "options": given, "inputs": len(tensors)})
                inside.update({f"{name}.{index}": tensor for index, tensor in enumerate(tensors)})
                narrow = dtype == torch.bfloat16
                peer.add(name, method, tensors, given, dtype="float64" if narrow else "unset", out_dtype="bfloat16" if narrow else "unset")
    outputs = {f"{name}.result": tensor for name, tensor in peer.run().items()}
    save_file({**inside, **outputs}, GOLDEN, metadata={"cases": json.dumps(cases), "peer": "mergekit 0.1.5"})
    with safe_open(GOLDEN, "pt") as file:
        print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(json.loads(file.metadata()['cases']))} cases")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", help="interpreter of an environment with mergekit 0.1.5")
    parser.add_argument("--write-golden", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)} instead of the table")
    parser.add_argument("--side", type=int, default=1000, help="about the square root of the number of elements")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        peer(given.peer)
        return
    if not given.mergekit_python:
        parser.error("--mergekit-python is needed")
    sys.path.insert(0, str(ROOT))
    (write_golden if given.write_golden else lambda python: table(python, given.side))(given.mergekit_python)


if __name__ == "__main__":
    main()
