"""The allocation solver against brute force, published optima and a general solver, and what must hold of any exact one."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_plus.errors import OptionError
from quant import knapsack
from quant.allocate import Solution, solve

CASES: Any = json.loads((Path(__file__).parent / "bit_allocation_cases.json").read_text())
HAWQ: Any = CASES["hawq_v3"]["instances"]["resnet18"]
SYNTHETIC: Any = CASES["synthetic_mckp"]

Table = list[list[float]]
Counts = list[list[int]]


def a_table(seed: int, items: int = 6, choices: int = 4, kind: str = "noisy") -> tuple[Table, Counts]:
    """Losses that mostly fall with the width, and costs of layers of several sizes."""
    generator = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 6, 8, 5, 7, 16])[:choices]
    numel = generator.choice([3, 16, 40], items) if kind == "noisy" else generator.integers(1_000, 9_000, items)
    loss = np.exp(generator.normal(0, 1.5, (items, 1))) * 4.0**-bits * np.exp(generator.normal(0, 1 if kind == "noisy" else 0.01, (items, choices)))
    return loss.tolist(), (numel[:, None] * bits).tolist()


def brute_force(losses: Table, costs: Counts, budget: float, *others: tuple[Counts, int]) -> tuple[float, int]:
    """The least loss within the budget, and its least cost."""
    found = []
    for choices in itertools.product(*(range(len(row)) for row in losses)):
        if all(sum(row[choice] for row, choice in zip(table, choices, strict=True)) <= most for table, most in ((costs, budget), *others)):
            cost = sum(row[choice] for row, choice in zip(costs, choices, strict=True))
            found.append((math.fsum(row[choice] for row, choice in zip(losses, choices, strict=True)), cost))
    return min(found)


def budgets(costs: Counts, count: int = 5) -> list[int]:
    least, most = sum(map(min, costs)), sum(map(max, costs))
    return [least + (most - least) * part // (count - 1) for part in range(count)]


# ---- published cases ----


def hawq(constraint: str) -> tuple[Table, Counts, list[list[int]], int]:
    """HAWQ-V3's instance in whole numbers: tied layers are one item with choices 4 and 8 bits."""
    exact = {key: [Fraction(str(number)) for number in HAWQ[key]] for key in ("parameters", "bops", "latency_int4", "latency_int8")}
    at4, at8 = {
        "modelsize": ([n / 2 for n in exact["parameters"]], exact["parameters"]),
        "bops": ([n / 64 for n in exact["bops"]], [n / 16 for n in exact["bops"]]),
        "latency": (exact["latency_int4"], exact["latency_int8"]),
    }[constraint]
    unit = 1000 * math.lcm(*(number.denominator for number in (*at4, *at8)))
    gain = [t * (d8 - d4) for t, d8, d4 in zip(*(HAWQ[k] for k in ("Hutchinson_trace", "delta_weights_8bit_square", "delta_weights_4bit_square")), strict=True)]
    tied = {layer: pair for pair in HAWQ["ties"] for layer in pair}
    groups = list(dict.fromkeys(tuple(tied.get(layer, [layer])) for layer in range(len(gain))))
    losses = [[0.0, math.fsum(gain[layer] for layer in group)] for group in groups]
    costs = [[int(sum(bits[layer] for layer in group) * unit) for bits in (at4, at8)] for group in groups]
    return losses, costs, [list(group) for group in groups], unit


@pytest.mark.parametrize("case", HAWQ["cases"], ids=lambda case: f"{case['constraint']} {case['limit']}")
def test_the_optima_of_hawq_v3_are_found_and_proven(case: dict[str, Any]) -> None:
    losses, costs, groups, unit = hawq(case["constraint"])
    low, high = sum(row[0] for row in costs), sum(row[1] for row in costs)
    budget = math.floor(low + Fraction(str(case["limit"])) * (high - low))
    assert budget / unit == pytest.approx(case["budget"], rel=1e-9)
    found = solve(losses, costs, budget)
    eight = {layer for group, choice in zip(groups, found.choices, strict=True) for layer in group if choice}
    assert "".join(str(int(layer in eight)) for layer in range(19)) == case["optimal_is8"]
    assert found.loss == pytest.approx(case["optimal_objective"], rel=1e-12)
    assert found.relaxed == pytest.approx(case["lp_bound"], rel=1e-9)
    assert found.proven


@pytest.mark.parametrize("case", SYNTHETIC["cases"], ids=lambda case: str(case["avg_bits"]))
def test_the_optima_of_a_synthetic_table_are_found_and_proven(case: dict[str, Any]) -> None:
    found = solve(SYNTHETIC["loss"], SYNTHETIC["cost_bits"], case["budget_bits"])
    assert list(found.choices) == case["selection"]
    assert (found.loss, found.cost) == (pytest.approx(case["optimum"], rel=1e-12), case["cost"])
    assert found.relaxed == pytest.approx(case["lp_bound"], rel=1e-9, abs=1e-12)
    assert found.proven
    assert found.bound == found.loss


# ---- against brute force ----


@pytest.mark.parametrize("kind", ["noisy", "fine"])
@pytest.mark.parametrize("seed", range(12))
def test_brute_force_finds_nothing_better_and_nothing_as_good_and_cheaper(seed: int, kind: str) -> None:
    losses, costs = a_table(seed, kind=kind)
    for budget in budgets(costs):
        found = solve(losses, costs, budget)
        assert (found.loss, found.cost) == brute_force(losses, costs, budget)
        assert found.proven


@pytest.mark.parametrize("seed", range(8))
def test_items_of_different_lengths_ties_and_impossible_choices(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses = [generator.integers(-3, 4, generator.integers(1, 5)).astype(float).tolist() for _ in range(7)]
    costs = [generator.integers(0, 6, len(row)).tolist() for row in losses]
    for row in losses[::2]:
        row[int(generator.integers(len(row)))] = row[0]
    for row in (row for row in losses if len(row) > 3):
        row[1] = math.inf
    least = sum(min(cost for loss, cost in zip(*rows, strict=True) if loss < math.inf) for rows in zip(losses, costs, strict=True))
    for budget in (least, least + 2, least + 5, 100):
        found = solve(losses, costs, budget)
        assert (found.loss, found.cost) == brute_force(losses, costs, budget)


@pytest.mark.parametrize("seed", range(8))
def test_two_budgets_at_once_against_brute_force(seed: int) -> None:
    losses, costs = a_table(seed)
    other = np.random.default_rng(seed + 100).integers(1, 50, (6, 4)).tolist()
    for budget, limit in itertools.product(budgets(costs)[1:4], budgets(other)[2:4]):
        try:
            expected = brute_force(losses, costs, budget, (other, limit))[0]
        except ValueError:
            with pytest.raises(OptionError, match=f"budgets of {budget} and {limit} cannot be met together; each alone can"):
                solve(losses, costs, budget, second=(other, limit))
            continue
        found = solve(losses, costs, budget, second=(other, limit))
        assert found.loss == pytest.approx(expected, rel=1e-12)
        assert found.cost <= budget
        assert found.second is not None
        assert found.second <= limit
        assert found.bound <= found.loss
        assert found.proven


@pytest.mark.parametrize("seed", range(6))
def test_the_least_cost_within_a_loss_against_brute_force(seed: int) -> None:
    losses, costs = a_table(seed)
    for budget in budgets(costs):
        within = solve(losses, costs, budget)
        dual = solve(losses, costs, max_loss=within.loss)
        assert dual.cost <= budget
        whole = [[round(math.ldexp(loss, 45)) for loss in row] for row in losses]  # so that no order of a sum matters
        cheapest, _ = brute_force([[float(cost) for cost in row] for row in costs], whole, math.ldexp(within.loss, 45) + 3)
        assert dual.cost == cheapest
        assert dual.loss <= within.loss * (1 + 1e-12)
        assert dual.proven


def test_branch_and_bound_proves_what_dynamic_programming_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, costs = a_table(3, items=40, choices=6, kind="fine")
    budget = budgets(costs)[1]
    exact = solve(losses, costs, budget)
    assert (exact.by, exact.proven) == ("states", True)
    monkeypatch.setattr(knapsack, "BEAM", 1)
    monkeypatch.setattr(knapsack, "PAIRS", 1)
    branched = solve(losses, costs, budget)
    assert (branched.by, branched.proven) == ("branching", True)
    assert branched.loss == exact.loss
    assert solve(losses, costs, max_loss=exact.loss).cost == exact.cost


def test_what_is_not_proven_says_so_and_its_bound_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    costs = np.sort(generator.integers(1, 10**6, (60, 5)) * 2, axis=1)
    losses = (2e6 - costs).astype(float).tolist()  # as many solutions are nearly as good as there can be
    monkeypatch.setattr(knapsack, "PAIRS", 50)
    monkeypatch.setattr(knapsack, "BEAM", 50)
    budget = int(costs.mean(1).sum()) | 1
    found = solve(losses, costs.tolist(), budget, seconds=0.1)
    assert found.cost <= budget
    assert found.bound <= found.loss
    assert found.proven == (found.gap <= 1e-9 * found.loss)


# ---- what must hold of any exact solver ----


@pytest.mark.parametrize("seed", range(5))
def test_the_relaxation_is_a_bound_and_equals_the_best_lagrangian_and_the_simplex(seed: int) -> None:
    from scipy.optimize import linprog

    losses, costs = a_table(seed, 20, 5)
    for budget in budgets(costs):
        found = solve(losses, costs, budget)
        one = np.kron(np.eye(20), np.ones(5))
        simplex = linprog(np.ravel(losses) * 1e6, A_ub=[np.ravel(costs)], b_ub=[budget], A_eq=one, b_eq=np.ones(20)).fun / 1e6  # above its tolerances
        assert found.relaxed == pytest.approx(simplex, rel=1e-7, abs=1e-12)
        prices = [0.0, *np.geomspace(1e-7, 1, 400)]
        lagrangian = max(sum(min(loss + price * cost for loss, cost in zip(*rows, strict=True)) for rows in zip(losses, costs, strict=True)) - price * budget
                         for price in prices)  # fmt: skip
        assert lagrangian <= found.relaxed * (1 + 1e-12)
        assert found.relaxed <= found.loss * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_is_at_most_one_step_and_none_at_a_corner_of_the_hulls(seed: int) -> None:
    losses, costs = a_table(seed, 20, 5)
    items = [knapsack.item_of(*(np.array(part, dtype=np.int64) for part in ([round(number * 2**40) for number in loss], cost, range(5))))
             for loss, cost in zip(losses, costs, strict=True)]  # fmt: skip
    steps = knapsack.steps_of(items)
    corners = sum(int(item.weight[0]) for item in items) + np.cumsum(steps.weight)
    for corner in corners[::7].tolist():
        found = solve(losses, costs, corner)
        assert found.loss == pytest.approx(found.relaxed, rel=1e-9)
        assert found.by == "relaxation" or found.proven
    for budget in budgets(costs, 9):
        assert solve(losses, costs, budget).loss - solve(losses, costs, budget).relaxed <= steps.gain.max() / 2**40


def test_it_is_never_worse_than_greedy_or_any_uniform_choice() -> None:
    for seed in range(10):
        losses, costs = a_table(seed, 12, 5)
        for budget in budgets(costs):
            found = solve(losses, costs, budget).loss
            for choice in range(5):
                if sum(row[choice] for row in costs) <= budget:
                    assert found <= math.fsum(row[choice] for row in losses) * (1 + 1e-15)
            assert found <= greedy(losses, costs, budget) * (1 + 1e-15)


def greedy(losses: Table, costs: Counts, budget: int) -> float:
    """The best loss saved a bit, again and again, while it fits."""
    at = [row.index(min(row)) for row in costs]
    while True:
        left = budget - sum(row[choice] for row, choice in zip(costs, at, strict=True))
        moves = [((losses[item][at[item]] - loss) / (cost - costs[item][at[item]]), item, choice) for item in range(len(at))
                 for choice, (loss, cost) in enumerate(zip(losses[item], costs[item], strict=True))
                 if 0 < cost - costs[item][at[item]] <= left and loss < losses[item][at[item]]]  # fmt: skip
        if not moves:
            return math.fsum(row[choice] for row, choice in zip(losses, at, strict=True))
        _, item, choice = max(moves)
        at[item] = choice


def test_more_budget_and_more_choices_never_hurt_and_tying_items_never_helps() -> None:
    for seed in range(6):
        losses, costs = a_table(seed, 10, 5)
        found = [solve(losses, costs, budget).loss for budget in budgets(costs, 20)]
        assert found == sorted(found, reverse=True)
        budget = budgets(costs)[1]
        fewer = solve([row[:4] for row in losses], [row[:4] for row in costs], max(budget, sum(min(row[:4]) for row in costs))).loss
        assert solve(losses, costs, max(budget, sum(min(row[:4]) for row in costs))).loss <= fewer
        tied = solve(*([[x + y for x, y in zip(table[0], table[1], strict=True)], *table[2:]] for table in (losses, costs)), budget).loss  # type: ignore[arg-type]
        assert solve(losses, costs, budget).loss <= tied * (1 + 1e-15)


def same(found: Solution, other: Solution, factor: float = 1.0, shift: float = 0.0) -> bool:
    return other.cost == found.cost and other.proven and math.isclose(other.loss, found.loss * factor + shift, rel_tol=1e-12)


@pytest.mark.parametrize("factor", [1e-9, 1e-6, 0.37, 1.0, 1e9])
def test_the_scale_of_the_losses_changes_nothing(factor: float) -> None:
    for items, choices in ((10, 5), (128, 8)):
        losses, costs = a_table(7, items, choices)
        for budget in budgets(costs):
            scaled = solve([[loss * factor for loss in row] for row in losses], costs, budget)
            assert scaled.choices == solve(losses, costs, budget).choices
            assert same(solve(losses, costs, budget), scaled, factor)


def test_order_units_constants_and_useless_choices_change_nothing() -> None:
    losses, costs = a_table(11, 14, 5)
    order = np.random.default_rng(0).permutation(14).tolist()
    for budget in budgets(costs):
        found = solve(losses, costs, budget)
        assert same(found, solve([losses[item] for item in order], [costs[item] for item in order], budget))
        assert same(found, solve([row[::-1] for row in losses], [row[::-1] for row in costs], budget))
        in_bytes = solve(losses, [[cost * 1000 for cost in row] for row in costs], budget * 1000 + 999)
        assert (in_bytes.choices, in_bytes.cost) == (found.choices, found.cost * 1000)
        assert same(found, solve([[loss + 3 for loss in losses[0]], *losses[1:]], costs, budget), shift=3)
        worse = solve([[*row, max(row) + 1] for row in losses], [[*row, max(row) + 1] for row in costs], budget)
        twice = solve([[*row, *row] for row in losses], [[*row, *row] for row in costs], budget)
        assert worse.choices == twice.choices == found.choices


def test_the_ends_of_the_budget() -> None:
    losses, costs = a_table(5, 9, 5)
    least = sum(map(min, costs))
    assert solve(losses, costs, least).choices == tuple(row.index(min(row)) for row in costs)
    best = [min(range(5), key=lambda choice: (loss[choice], cost[choice])) for loss, cost in zip(losses, costs, strict=True)]
    assert solve(losses, costs, sum(row[choice] for row, choice in zip(costs, best, strict=True))).choices == tuple(best)
    assert solve(losses, costs, 10**9).choices == tuple(best)


def test_equal_losses_go_to_the_cheapest() -> None:
    assert solve([[1.0, 1.0, 1.0], [2.0, 2.0, 5.0]], [[30, 10, 20], [7, 9, 1]], 1000).choices == (1, 0)
    assert solve([[0.0, 0.0]] * 50, [[3, 2]] * 50, 10**6).cost == 100
    found = solve([[1.0, 0.0], [1.0, 0.0]], [[0, 5], [0, 4]], 5)  # either may be improved: the cheaper one is
    assert (found.choices, found.cost) == ((0, 1), 4)


def test_with_losses_above_none_the_lightest_set_is_inclusion_minimal() -> None:
    """Hubara et al.: no layer at low width could be raised within the budget."""
    losses, costs = a_table(2, 30, 2, "fine")
    losses = [[max(row) + 1e-6, 0.0] for row in losses]
    for budget in budgets(costs, 12):
        found = solve(losses, costs, budget)
        assert all(found.cost + row[1] - row[0] > budget for row, choice in zip(costs, found.choices, strict=True) if choice == 0)


# ---- what is refused ----


def test_what_cannot_be_met_is_refused_with_the_least_that_can() -> None:
    losses, costs = [[3.0, 1.0], [5.0, 2.0]], [[10, 20], [30, 40]]
    with pytest.raises(OptionError, match="a budget of 39 cannot be met: the cheapest choices cost 40"):
        solve(losses, costs, 39)
    with pytest.raises(OptionError, match="a loss of 2.5 cannot be met: the best choices lose 3"):
        solve(losses, costs, max_loss=2.5)
    with pytest.raises(OptionError, match="give a budget, or the greatest loss: one of them"):
        solve(losses, costs)
    with pytest.raises(OptionError, match=r"item 1 has losses that cannot be: \[nan, 2.0\]"):
        solve([[3.0, 1.0], [math.nan, 2.0]], costs, 50)
    with pytest.raises(OptionError, match="count in a larger unit"):
        solve(losses, [[1 << 52, 20], [30, 40]], 50)
    with pytest.raises(OptionError, match="each choice a loss and a cost"):
        solve(losses, [[1, 2], [3]], 50)


def test_the_solver_writes_nothing_and_is_the_same_in_every_process() -> None:
    code = """
import random
from quant import knapsack
from quant.allocate import solve
random.seed(1)
costs = [[random.randrange(1000) * bits for bits in (2, 3, 4, 8)] for _ in range(60)]
losses = [[random.random() * 4.0 ** -bits for bits in (2, 3, 4, 8)] for _ in range(60)]
print(solve(losses, costs, sum(row[1] for row in costs)).choices)
knapsack.BEAM = knapsack.PAIRS = 1
print(solve(losses, costs, sum(row[1] for row in costs), second=(costs, sum(row[2] for row in costs))).choices)
"""
    runs = [subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True,
                           text=True, check=True).stdout for seed in ("0", "1")]  # fmt: skip
    assert runs[0] == runs[1]
    first, second = runs[0].splitlines()
    assert first == second
