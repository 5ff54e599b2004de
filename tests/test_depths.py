"""Depth plans: what can become of neighbouring blocks, what it costs, the program's choice, and the file that holds it."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from program import Program

from mergekit_plus.calibration.options import CalibrationOptions
from mergekit_plus.checkpoint import Checkpoint
from mergekit_plus.depths import Costs, DepthOptions, choices_of, fold_with, plan_depth
from mergekit_plus.errors import OptionError, OutputError
from mergekit_plus.evaluate import load_model
from mergekit_plus.training import loss_on
from prune.fold import Fold, folded, kinds_of
from prune.fold.plan_file import FoldPlan, read, write

MODELS = Path(__file__).parent / "models"
BASE = Checkpoint.open(MODELS / "base")
BLOCKS = 6
TEXT = CalibrationOptions(texts=[str(MODELS / "text" / "docs.val.txt")], windows=6, window=32)


def test_all_that_can_become_of_neighbours() -> None:
    assert choices_of([4]) == [((4,),), ()]
    assert choices_of([4, 5]) == [((4,), (5,)), ((4, 5),), ((4,),), ((5,),), ()]
    assert [len(choices_of(range(count))) for count in (1, 2, 3, 4)] == [2, 5, 14, 41]


def test_choices_put_together_are_a_fold_whose_groups_have_the_weights_of_their_first_block() -> None:
    assert fold_with([((0,), (1, 2)), (), ((7, 8),)]) == Fold((0, 1, 2, 7, 8), (0, 1, 1, 2, 2), (0, 1, 7))


def test_costs_are_those_of_what_is_stored_once_and_of_what_runs() -> None:
    costs = Costs.of(BASE)
    kept = [((0,),), ((2,),), ((5,),)]
    assert costs.outside + sum(map(costs.bytes, kept)) == folded(BASE, Fold.of([0, 2, 5])).nbytes
    norms = costs.private[0]
    assert costs.bytes(((0, 1, 2),)) == costs.bytes(((0,),)) + 2 * norms
    assert costs.operations(((0, 1, 2),)) == 3 * costs.operations(((0,),))
    assert norms == sum(BASE.specs[f"model.layers.0.{name}.weight"].nbytes for name in ("input_layernorm", "post_attention_layernorm"))


@pytest.mark.parametrize("given", [{"budget": 0.8}, {"operations": 0.5}, {"budget": 0.9, "operations": 0.7}])
def test_a_plan_is_within_its_budgets_and_loses_what_it_says(given: dict[str, float], tmp_path: Path) -> None:
    planned = plan_depth(BASE, DepthOptions(TEXT, **given), tmp_path / "plan.yaml")
    plan = read(tmp_path / "plan.yaml")
    assert plan == planned.plan
    assert not list(plan.problems())
    assert planned.bytes <= given.get("budget", 1)
    assert planned.operations == len(plan.kept) / BLOCKS <= given.get("operations", 1)
    heldout = TEXT.read(BASE)[0][2::3]
    lost = loss_on(load_model(folded(BASE, plan.fold)), heldout) - loss_on(load_model(BASE), heldout)
    assert planned.candidates[0].measured == pytest.approx(lost, abs=1e-5)
    assert lost == pytest.approx(min(one.measured for one in planned.candidates), abs=1e-5)


def test_the_second_round_is_measured_around_the_solution_of_the_first(tmp_path: Path) -> None:
    """What the file says of losses, by every pair of choices: the least sum of the first round within the budget is where the second one stands."""
    options = DepthOptions(TEXT, operations=0.5)
    plan_depth(BASE, options, tmp_path / "plan.yaml")
    table = [choices_of(range(3)), choices_of(range(3, 6))]
    rows, dense = TEXT.read(BASE)[0][[0, 1, 3, 4]], load_model(BASE)
    whole = loss_on(dense, rows)

    def lost(*chosen: int) -> float:
        fold = fold_with([choices[number] for choices, number in zip(table, chosen, strict=True)])
        return loss_on(load_model(folded(BASE, fold)), rows) - whole if fold.kept else math.inf

    first = [[lost(number, 0) for number in range(14)], [lost(0, number) for number in range(14)]]
    cost = [[sum(map(len, choice)) for choice in choices] for choices in table]
    able = [pair for pair in product(range(14), repeat=2) if cost[0][pair[0]] + cost[1][pair[1]] <= 3]
    standing = min(able, key=lambda pair: first[0][pair[0]] + first[1][pair[1]])
    said = yaml.safe_load((tmp_path / "plan.yaml").read_text())["made"]["losses"]
    assert next(iter(said[0].values())) == pytest.approx(lost(0, standing[1]), abs=1e-5)
    assert next(iter(said[1].values())) == pytest.approx(lost(standing[0], 0), abs=1e-5)
    assert list(said[0]) == ["0 1 2", "0 1+2", "0+1 2", "0+1+2", "0 1", "0+1", "0 2", "0+2", "1 2", "1+2", "0", "1", "2", "none"]


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give a budget: a share of the model's bytes, or of its operations"):
        plan_depth(BASE, DepthOptions(TEXT), tmp_path / "plan.yaml")
    with pytest.raises(OptionError, match="--operations 0.1: a share between 0.167, for one block, and 1"):
        plan_depth(BASE, DepthOptions(TEXT, operations=0.1), tmp_path / "plan.yaml")
    with pytest.raises(OptionError, match="the calibration text has 2 windows; give at least 3"):
        plan_depth(BASE, DepthOptions(TEXT.model_copy(update={"windows": 2}), budget=0.8), tmp_path / "plan.yaml")
    (tmp_path / "there.yaml").touch()
    with pytest.raises(OutputError, match="exists already"):
        plan_depth(BASE, DepthOptions(TEXT, budget=0.8), tmp_path / "there.yaml")


# ---- the file ----


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = FoldPlan.of(Fold((0, 1, 3, 4), (0, 0, 1, 2), (None, 3, 4)), BLOCKS)
    write(tmp_path / "plan.yaml", plan)
    assert read(tmp_path / "plan.yaml") == plan
    assert (tmp_path / "plan.yaml").read_text() == "blocks: 6\nkept: [0, 1, 3, 4]\ngroups: [0, 0, 1, 2]\nparents: [null, 3, 4]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blocks: 6\nkept: [0]\ngroups: [0]\nparents: [0]\nshare: 2\n", "share: Extra inputs are not permitted"),
        ("blocks: 6\nkept: [0]\ngroups: [0]\n", "parents: Field required"),
        ("blocks: 6\nkept: [7]\ngroups: [0]\nparents: [0]\n", "the model has the blocks 0 to 5"),
        ("blocks: 6\nkept: [0, 1]\ngroups: [0, 2]\nparents: [0, 1]\n", "each of the 2 blocks has a group, 0 to 1"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(OptionError, match=said):
        read(tmp_path / "plan.yaml")


def test_the_command_plans_and_folds_as_planned_and_the_recipe_holds_the_plan(compress: Program, tmp_path: Path) -> None:
    text = ("--calibration", MODELS / "text" / "docs.val.txt", "--windows", 3, "--window", 32)
    done = compress("fold", MODELS / "base", "--operations", 0.7, *text)
    assert done.returncode == 0, done.stderr
    assert "`compress fold MODEL --plan plan.yaml` makes it" in done.stdout
    assert compress("fold", MODELS / "base", "--plan", "plan.yaml", "-o", "folded").returncode == 0
    plan = read(tmp_path / "plan.yaml")
    out = Checkpoint.open(tmp_path / "folded")
    wanted = folded(BASE, plan.fold)
    assert all(torch.equal(out.read(name), wanted.read(name)) for name in wanted.specs)
    assert yaml.safe_load((tmp_path / "folded" / "recipe.yaml").read_text())["steps"][0]["fold"]["plan"] == plan.model_dump()
    assert "a budget is for finding a plan" in compress("fold", MODELS / "base", "--budget", 0.7, "--remove", 1, *text).line
    assert "leave keep, remove and share out" in compress("fold", MODELS / "base", "--plan", "plan.yaml", "--remove", 1, *text).line
    write(tmp_path / "other.yaml", FoldPlan.of(Fold.of([0, 1]), 12))
    assert "the plan is for a model of 12 blocks, this one has 6" in compress("fold", MODELS / "base", "--plan", "other.yaml").line


def test_blocks_of_two_kinds_are_not_planned_to_share(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0],
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "mixed")
    tokenizer.save_pretrained(tmp_path / "mixed")
    mixed = Checkpoint.open(tmp_path / "mixed")
    kinds = kinds_of(mixed)
    assert [kinds[0] == kinds[1], kinds[1] == kinds[2]] == [False, True]
    plan = plan_depth(mixed, DepthOptions(TEXT, budget=0.95), tmp_path / "plan.yaml").plan
    assert 0 not in [block for block, group in zip(plan.kept, plan.groups, strict=True) if plan.groups.count(group) > 1]
    assert folded(mixed, plan.fold).nbytes < mixed.nbytes
