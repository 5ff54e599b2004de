"""How long the allocation solver takes to a proven optimum, beside general solvers on the same (scaled) tables.

    python benchmarks/allocation_solver.py [--items 1000] [--choices 8] [--only TABLE] [--peers [--seconds 30]]

Tables: `uniform` random costs and losses; `layers` of three sizes with smooth losses, and `noisy` ones, as measured sensitivities are; `odd` sizes, whose
costs have no common divisor; `correlated`, where losses nearly follow from costs. Budgets from tight (2 % of the way from the cheapest to the dearest) to
loose (98 %). --peers runs scipy's HiGHS and PuLP's CBC on the whole model too (pip install pulp; nothing else here needs it), and says how long they take by
the clock and how far their objective is from the proven optimum, for what they call optimal need not be.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

from quant.allocate import solve
from quant.branch_and_bound import branch

BITS = np.array([2, 3, 4, 5, 6, 8, 10, 16])


def tables(items: int, choices: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Named losses and costs [items, choices]."""
    for seed in range(2):
        draw = np.random.default_rng(seed)
        bits = BITS[:choices]
        scale = np.exp(draw.normal(0, 1.5, (items, 1)))
        layers = draw.choice([1 << 20, 4 << 20, 14 << 20], (items, 1)) * (bits * 8 + 1) // 8
        odd = draw.integers(10**6, 10**7, (items, 1)) * (bits * 8 + 1) // 8
        noise = np.exp(draw.normal(0, 1, (items, choices)))
        random = np.sort(draw.integers(1, 10**5, (items, choices)), 1)
        near = np.sort(draw.integers(1, 1000, (items, choices)), 1)
        yield "uniform", -np.sort(-draw.random((items, choices)), 1), random
        yield "layers", scale * 4.0**-bits, layers
        yield "noisy", scale * 4.0**-bits * noise, layers
        yield "odd", scale * 4.0**-bits * noise, odd
        yield "correlated", near.max() + 100 - near + draw.integers(-5, 5, near.shape).astype(float), near


def highs(losses: np.ndarray, costs: np.ndarray, budget: int, seconds: float) -> float:
    """The whole model in HiGHS, losses in units of their mean."""
    found = branch(list(losses - losses.min(1, keepdims=True)), [list(costs)], [budget], [0.0], float(np.ptp(losses, axis=1).mean()), seconds)
    return float("nan") if found.places is None else float(losses[np.arange(len(losses)), found.places].sum())


def cbc(losses: np.ndarray, costs: np.ndarray, budget: int, seconds: float) -> float:
    """The whole model in PuLP's CBC, losses in units of their mean."""
    import pulp

    model = pulp.LpProblem("bits", pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x{item}_{choice}", cat="Binary") for choice in range(losses.shape[1])] for item in range(len(losses))]
    unit = float(np.ptp(losses, axis=1).mean())
    pairs = [(item, choice) for item in range(len(losses)) for choice in range(losses.shape[1])]
    model += pulp.lpSum(float(losses[pair] / unit) * x[pair[0]][pair[1]] for pair in pairs)
    for row in x:
        model += pulp.lpSum(row) == 1
    model += pulp.lpSum(float(costs[pair] / budget) * x[pair[0]][pair[1]] for pair in pairs) <= 1
    model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, gapRel=0))
    chosen = [max(range(losses.shape[1]), key=lambda choice, row=row: row[choice].value() or 0) for row in x]
    return float(losses[np.arange(len(losses)), chosen].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=30.0, help="limit of each peer")
    parser.add_argument("--peers", action="store_true")
    asked = parser.parse_args()
    print(f"{'table':10} {'budget':>6} {'CPU s':>8} {'proven':>6} {'gap of LP':>10} {'left open':>9}")
    for name, losses, costs in tables(asked.items, asked.choices):
        if asked.only not in ("", name):
            continue
        least, most = int(costs.min(1).sum()), int(costs.max(1).sum())
        for share in (0.02, 0.2, 0.5, 0.8, 0.98):
            budget = int(least + share * (most - least))
            start = time.process_time()
            found = solve(losses.tolist(), costs.tolist(), budget)
            seconds = time.process_time() - start
            line = f"{name:10} {share:6.0%} {seconds:8.2f} {found.proven!s:>6} {(found.loss - found.relaxed) / found.loss:10.1e} {asked.items - found.fixed:9}"
            for label, peer in (("HiGHS", highs), ("CBC", cbc)) if asked.peers else ():
                start = time.perf_counter()
                value = peer(losses, costs, budget, asked.seconds)
                line += f"   {label} {time.perf_counter() - start:5.1f} s, {value / found.loss - 1:+.1e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
