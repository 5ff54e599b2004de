"""How our merge methods agree with mergekit 0.1.5, measured: `python benchmarks/parity_mergekit.py --mergekit-python VENV/bin/python`.

mergekit runs in its own interpreter and exchanges safetensors files with us. Of every method it prints

* float32 inputs: the largest difference between us and mergekit, and of each from mergekit's own float64 evaluation, relative to the
  element's largest input;
* bfloat16 inputs: the share of elements that are the float64 evaluation rounded to the nearest, for us and for mergekit as it runs by
  default (halfway between two bfloat16 values, where weights like 0.7 and 0.3 often lead, both neighbours count as nearest);
* what TIES keeps where magnitudes tie at the cut; of the random methods how often an element stays, and what is left of it in the mean, by
  its rank in its row.

`--write-golden` writes small inputs with mergekit's outputs to tests/merge/golden_mergekit.safetensors, so that the tests need no peer.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "merge" / "golden_mergekit.safetensors"
PARITY = 1e-6

# label, method, whether there is a base, how many models besides it, options; a density, gamma or select_topk of "half" or "tenth" stands for
# about that much, between two magnitudes, so that no tie has to be broken
CASES: list[tuple[str, str, bool, int, dict[str, Any]]] = [
    ("linear", "linear", False, 2, {"weight": [0.7, 0.3]}),
    ("linear, three, not normalized", "linear", False, 3, {"weight": [0.5, 0.4, -0.2], "normalize": False}),
    ("passthrough, scaled", "passthrough", False, 1, {"scale": 0.7}),
    ("slerp", "slerp", True, 1, {"t": 0.35}),
    ("slerp, wide angle", "slerp", True, 1, {"t": 0.6}),
    ("nuslerp", "nuslerp", False, 2, {"weight": [0.7, 0.4]}),
    ("nuslerp, task vectors", "nuslerp", True, 2, {"weight": [0.7, 0.4]}),
    ("nuslerp, along the last", "nuslerp", True, 2, {"weight": [0.7, 0.4], "nuslerp_flatten": False}),
    ("nuslerp, along the first", "nuslerp", True, 2, {"weight": [0.7, 0.4], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", "multislerp", False, 3, {"weight": [0.7, 0.4, 1.1]}),
    ("multislerp, task vectors", "multislerp", True, 3, {"weight": [0.7, 0.4, 0.2], "normalize_weights": False}),
    ("karcher", "karcher", False, 3, {}),
    ("karcher, wide angle", "karcher", False, 3, {"max_iter": 2}),
    ("nearswap", "nearswap", True, 1, {"t": 0.002}),
    ("arcee_fusion", "arcee_fusion", True, 1, {}),
    ("task_arithmetic", "task_arithmetic", True, 2, {"weight": [0.6, 0.4]}),
    ("task_arithmetic, normalized", "task_arithmetic", True, 3, {"weight": [1.0, 0.5, 0.3], "normalize": True, "lambda": 0.8}),
    # weights in a simple ratio make the differences of bfloat16 models cancel exactly (0.6 * 2 = 0.4 * 3): then the rounding of the weights,
    # in float64 as in float32, elects the sign, and half a thousandth of the elements means nothing
    ("ties, density 1", "ties", True, 2, {"weight": [0.61, 0.43], "density": 1.0}),
    ("ties", "ties", True, 2, {"weight": [0.61, 0.43], "density": "half"}),
    ("ties, three, rescaled", "ties", True, 3, {"weight": [1.03, 0.71, 0.43], "density": "half", "rescale": True, "lambda": 0.9}),
    ("ties, summed", "ties", True, 3, {"weight": [1.03, -0.73, 0.41], "density": "half", "normalize": False}),
    ("dare_linear, density 1", "dare_linear", True, 2, {"weight": [0.6, 0.4], "density": 1.0}),
    ("dare_ties, density 1", "dare_ties", True, 3, {"weight": [0.61, 0.53, 0.43], "density": 1.0}),
    ("breadcrumbs", "breadcrumbs", True, 2, {"weight": [0.6, 0.4], "density": "half", "gamma": "tenth"}),
    ("breadcrumbs, rescaled", "breadcrumbs", True, 3, {"weight": [0.6, 0.4, 0.3], "density": "half", "gamma": "tenth", "rescale": True}),
    ("breadcrumbs_ties", "breadcrumbs_ties", True, 3, {"weight": [0.61, 0.53, 0.43], "density": "half", "gamma": "tenth", "normalize": True}),
    ("della, density 1", "della", True, 3, {"weight": [0.61, 0.53, 0.43]}),
    ("della_linear, density 1", "della_linear", True, 2, {"weight": [0.6, 0.4]}),
    ("sce, wide", "sce", True, 3, {}),
    ("sce, select, wide", "sce", True, 3, {"select_topk": "half"}),
    ("ram", "ram", True, 3, {"epsilon": 0.002}),
    ("ramplus_tl", "ramplus_tl", True, 3, {"epsilon": 0.002, "r": 0.4, "alpha": 3.0}),
    ("model_stock, shared", "model_stock", True, 3, {}),
    ("model_stock, filter-wise, shared", "model_stock", True, 3, {"filter_wise": True}),
]
RANDOM: list[tuple[str, dict[str, Any]]] = [
    ("dare_linear", {"weight": 1.0, "density": 0.4}),
    ("dare_ties", {"weight": 1.0, "density": 0.4}),
    ("della_linear", {"weight": 1.0, "density": 0.5, "epsilon": 0.3}),
    ("della", {"weight": 1.0, "density": 0.5, "epsilon": 0.3}),
]
SEEDS = 200


def inputs(shape: Sequence[int], dtype: torch.dtype, seed: int, label: str) -> list[Tensor]:
    """A base and three models near it; far from it where the label says wide, and on one side of it where it says shared."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(tuple(shape), generator=generator)

    base, common = noise() * 0.02, noise() * 0.004 * ("shared" in label)
    step = 0.02 if "wide" in label else 0.002
    return [base.to(dtype), *((base + common + step * noise()).to(dtype) for _ in range(3))]


def edges(values: Tensor) -> list[int]:
    """How many elements can be the largest without a tie at the cut."""
    ordered = values.double().flatten().sort(descending=True).values
    return [0, *(torch.nonzero(ordered[1:] < ordered[:-1] * (1 - 1e-6)).flatten() + 1).tolist(), ordered.numel()]


def share(count: int, size: int) -> float:
    """A share of which `int(share * size)` makes the count."""
    return next(found for found in (count / size, (count + 0.5) / size, 1.0) if int(found * size) == count)


def settled(options: dict[str, Any], tensors: Sequence[Tensor], models: int) -> dict[str, Any]:
    """The options with the words among them replaced for these tensors."""
    found = dict(options)
    vectors = [tensor.double() - tensors[0].double() for tensor in tensors[1 : models + 1]]
    size = tensors[0].numel()
    if "density" in options and options["density"] == "half":
        found["density"] = []
        tops = []
        for vector in vectors:
            cuts = edges(vector.abs())
            top = min(cuts[:-1], key=lambda cut: abs(cut - size / 10)) if "gamma" in options else 0
            bottom = min([cut for cut in cuts if cut > top], key=lambda cut: abs(cut - top - size / 2))
            found["density"].append(share(bottom - top, size))
            tops.append(share(top, size))
        if "gamma" in options:
            found["gamma"] = tops
    if options.get("select_topk") == "half":
        variance = torch.stack(vectors).var(0, unbiased=False)
        count = min(edges(variance), key=lambda cut: abs(cut - size / 2))
        found["select_topk"] = share(count, max(1, int(torch.count_nonzero(variance))))
    return found


def ours(method: str, base: Tensor | None, models: Sequence[Tensor], options: dict[str, Any], seed: int = 0) -> Tensor:
    """Our result in the working dtype."""
    from mergekit_plus.merge import METHODS
    from mergekit_plus.noise import Noise

    class Whole:
        size = models[0].numel()

        def map(self, function: Callable[[Tensor | None, Sequence[Tensor]], Any], sample: bool = False, only: Collection[int] | None = None) -> list[Any]:
            return [function(base, models)]

    chosen = METHODS[method]
    arguments = chosen.options.check(options, len(models))
    inside: dict[str, Any] = {"first": 0, "noise": Noise(seed, "x")}
    if chosen.statistic is not None:
        wanted = inspect.signature(chosen.statistic).parameters
        inside["measured"] = chosen.statistic(Whole(), **{key: value for key, value in arguments.items() if key in wanted})
    given = {name: inside[name] for name in chosen.inside}
    return chosen.function(*((base,) if chosen.takes_base else ()), models, **given, **arguments)


def peer(folder: Path) -> None:
    """Runs under mergekit's interpreter: every job of the folder, its result beside it; of a job with seeds the results of all."""
    from mergekit.merge_methods import merge_tensors  # type: ignore[import-not-found]

    torch.manual_seed(0)
    tensors = load_file(folder / "inputs.safetensors")
    results = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        found = []
        for seed in range(job["seeds"] or 1):
            if job["seeds"]:
                torch.manual_seed(seed)
            result = merge_tensors(
                [tensors[key] for key in job["tensors"]],
                job["method"],
                parameters=job["options"],
                base_index=0 if job["base"] else None,
                dtype=getattr(torch, job["dtype"], None),
                out_dtype=getattr(torch, job["out_dtype"], None),
            )
            found.append(result.contiguous().clone())
        results[name] = torch.stack(found) if job["seeds"] else found[0]
    save_file(results, folder / "outputs.safetensors")


class Peer:
    """Collects jobs for mergekit and runs them all in one process."""

    def __init__(self, python: str) -> None:
        self.python, self.tensors, self.jobs = python, dict[str, Tensor](), dict[str, Any]()

    def add(
        self, name: str, method: str, base: bool, tensors: Sequence[Tensor], options: dict[str, Any],
        dtype: str = "unset", out_dtype: str = "unset", seeds: int = 0,
    ) -> None:  # fmt: skip
        keys = [f"{name}.{index}" for index in range(len(tensors))]
        self.tensors.update({key: tensor.contiguous().clone() for key, tensor in zip(keys, tensors, strict=True)})
        self.jobs[name] = {"method": method, "tensors": keys, "options": options, "base": base, "dtype": dtype, "out_dtype": out_dtype, "seeds": seeds}

    def run(self) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(self.tensors, folder / "inputs.safetensors")
            (folder / "jobs.json").write_text(json.dumps(self.jobs))
            subprocess.run([self.python, __file__, "--peer", str(folder)], check=True)
            return load_file(folder / "outputs.safetensors")


def by_rank(results: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """How often an element is not zero, and what is left of it in the mean, by its rank in its row: of merged vectors [seeds, rows, columns]."""
    order = vector.abs().argsort(dim=1)
    ratio = (results.double() / vector.double()).gather(2, order.expand_as(results))
    return (ratio != 0).double().mean((0, 1)), ratio.mean((0, 1))


def rounded_right(result: Tensor, exact: Tensor) -> float:
    """The share of elements than which no other of the dtype is nearer to the exact one."""
    nearest = (exact.to(result.dtype).double() - exact).abs()
    return ((result.double() - exact).abs() <= nearest * (1 + 1e-5)).double().mean().item()


def table(python: str, side: int) -> None:
    """Print what the module's docstring says."""
    peer = Peer(python)
    prepared: list[tuple[str, str, Tensor | None, list[Tensor], dict[str, Any]]] = []
    for label, method, has_base, models, options in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = inputs((side, side + 1), dtype, len(prepared), label)[: models + 1]
            given = settled(options, tensors, models)
            base, rest = (tensors[0] if has_base else None), tensors[1:]
            name = f"{label}/{dtype}"
            prepared.append((name, method, base, rest, given))
            peer.add(name, method, has_base, tensors if has_base else rest, given)
            peer.add(f"{name}/exact", method, has_base, tensors if has_base else rest, given, dtype="float64")
    tied = torch.randint(1, 4, (10, 1000), generator=torch.Generator().manual_seed(0)).float()
    peer.add("tied", "ties", True, [torch.zeros_like(tied), tied], {"weight": 1.0, "density": 0.5})
    vector = inputs((40, 25), torch.float32, 99, "wide")[1]
    for method, options in RANDOM:
        peer.add(method, method, True, [torch.zeros_like(vector), vector], options, seeds=SEEDS)
    results = peer.run()

    print(f"{'method':32} {'f32: apart':>10} {'ours off':>9} {'theirs off':>10} {'bf16 ours':>10} {'theirs':>9}")
    for (label, *_), pair in zip(CASES, zip(prepared[::2], prepared[1::2], strict=True), strict=True):
        (name, method, base, rest, given), (name16, _, base16, rest16, given16) = pair
        scale = torch.stack([tensor.abs() for tensor in ([base] if base is not None else []) + rest]).amax(0)
        mine, them, exact = ours(method, base, rest, given), results[name], results[f"{name}/exact"]
        apart, off, off_theirs = (((a - b).abs() / scale).max().item() for a, b in ((mine, them), (mine, exact), (them, exact)))
        right = rounded_right(ours(method, base16, rest16, given16).bfloat16(), results[f"{name16}/exact"])
        theirs = rounded_right(results[name16].bfloat16(), results[f"{name16}/exact"])
        note = "" if min(apart, off) < PARITY and right > 0.999 else "  <-- not at parity"
        print(f"{label:32} {apart:10.1e} {off:9.1e} {off_theirs:10.1e} {right:10.3%} {theirs:9.3%}{note}")

    mine, them = ours("ties", torch.zeros_like(tied), [tied], {"density": 0.5}) != 0, results["tied"] != 0
    print(f"\nties among ties: kept {int(mine.sum())} and {int(them.sum())} of {tied.numel()}, the same ones: {bool((mine == them).all())}")
    print(f"\n{'smallest, middle and largest of a row':40} {'stays':>20} {'left in the mean':>22}")
    for method, options in RANDOM:
        for who in ("mergekit", "ours", *(["ours, l1"] if "della" in method else [])):
            given = {**options, "rescale": "l1"} if "l1" in who else options
            mine = torch.stack([ours(method, torch.zeros_like(vector), [vector], given, seed) for seed in range(SEEDS)])
            found = by_rank(results[method] if who == "mergekit" else mine, vector)
            shown = [" ".join(f"{row[place]:6.3f}" for place in (0, 12, 24)) for row in found]
            print(f"{method + ', ' + who:40} {shown[0]} {shown[1]}")


def write_golden(python: str) -> None:
    """Small inputs of odd shapes with mergekit's results: its float64 evaluation, rounded once; of random methods what `by_rank` says."""
    peer, inside, cases = Peer(python), dict[str, Tensor](), list[dict[str, Any]]()
    for number, (label, method, has_base, models, options) in enumerate(CASES):
        if method.startswith("dare"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((7, 13), (33,), (2, 3, 5), (1,), ()):
                if shape in ((1,), ()) and ("gamma" in options or "filter_wise" in options or method in ("nuslerp", "arcee_fusion", "model_stock")):
                    continue  # where there is nothing to choose, or no angle, or one at which we differ
                tensors = inputs(shape, dtype, number, label)[: models + 1]
                given = settled(options, tensors, models)
                tensors = tensors if has_base else tensors[1:]
                name = f"{len(cases)}"
                cases.append({"label": label, "method": method, "base": has_base, "options": given, "inputs": len(tensors)})
                inside.update({f"{name}.{index}": tensor for index, tensor in enumerate(tensors)})
                peer.add(name, method, has_base, tensors, given, dtype="float64", out_dtype=str(dtype)[6:])
    vector = inputs((40, 25), torch.float32, 99, "wide")[1]
    for method, options in RANDOM:
        peer.add(method, method, True, [torch.zeros_like(vector), vector], options, seeds=SEEDS)
    outputs = peer.run()
    for method, _ in RANDOM:
        inside[f"{method}.stays"], inside[f"{method}.left"] = (found.float() for found in by_rank(outputs.pop(method), vector))
    results = {f"{name}.result": tensor for name, tensor in outputs.items()}
    notes = {"cases": json.dumps(cases), "random": json.dumps(dict(RANDOM)), "peer": "mergekit 0.1.5"}
    save_file({**inside, **results, "random": vector}, GOLDEN, metadata=notes)
    with safe_open(GOLDEN, "pt") as file:
        print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes, {len(json.loads(file.metadata()['cases']))} cases")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", help="interpreter of an environment with mergekit 0.1.5")
    parser.add_argument("--write-golden", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)} instead of the table")
    parser.add_argument("--side", type=int, default=999, help="about the square root of the number of elements; mergekit draws samples beyond a million")
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
