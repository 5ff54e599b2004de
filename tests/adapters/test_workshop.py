"""The workshop: adapters that start from components of the weights, come out of shared pools, or have rank where it counts; all are plain LoRA in the end."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from adapter_toys import close, load, logits, model_of, saved
from program import Program
from torch import Tensor

from mergekit_plus.adapters import open_adapter
from mergekit_plus.adapters.layout import Product
from mergekit_plus.adapters.weighted import DAMP
from mergekit_plus.calibration.statistics import calibrate
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import OptionError, RecipeError
from mergekit_plus.evaluate import load_model
from mergekit_plus.recipe import check
from mergekit_plus.training import TrainOptions, loss_on
from quant.adapters.latent import attached
from quant.adapters.pools import Sharing, pooled
from quant.adapters.principal import Init, Shifted, components
from quant.adapters.ranks import ranks_within, sensitivities
from quant.adapters.scratch import TrainAdapterOptions, train_adapter
from quant.adapters.train import Lesson

MODELS = Path(__file__).parents[1] / "models"
KINDS = ["LlamaForCausalLM", "GPT2LMHeadModel"]


def base_of(folder: Path, kind: str = "LlamaForCausalLM") -> Checkpoint:
    """A tiny model whose logits are far from even, so that what is trained shows."""
    return Checkpoint.open(saved(model_of(kind, initializer_range=0.3), folder / "base"))


def rows(windows: int = 24, seed: int = 0) -> Tensor:
    """Windows of a language in which every token follows from the one before: 5 more, of 64."""
    starts = torch.randint(64, (windows, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + 5 * torch.arange(12)) % 64


def lesson(steps: int = 30, lr: float = 3e-2) -> Lesson:
    return Lesson(rows(), TrainOptions(steps, lr, clip=None))


def in_peft(folder: Path) -> Tensor:
    """What peft makes of `base` and `adapter` in a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(load(folder / "base").float(), folder / "adapter").eval())


def learns(folder: Path, base: Checkpoint, options: TrainAdapterOptions, steps: int = 40) -> None:
    """It trains, is written, says in peft what it says here, and has learned something."""
    moments = calibrate(base, rows(seed=3), {}) if options.init.startswith("corda") else None
    save(train_adapter(base, lesson(steps), options, moments), folder / "adapter")
    adapted = load_model(Checkpoint.open(f"{folder / 'base'}+{folder / 'adapter'}"))
    assert loss_on(adapted, rows(seed=1)) < loss_on(load_model(base), rows(seed=1)) - 0.2
    if options.bits == 16:
        assert close(in_peft(folder), logits(adapted), 1e-4)


# ---- components of the weights ----


@pytest.mark.parametrize("init", ["corda-ipm", "corda-kpm"])
def test_components_are_those_of_the_paper(init: Init) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator) * torch.logspace(0, -1, 8)
    gram = x.T @ x / 50
    c = gram.double() + DAMP * gram.double().diagonal().mean() * torch.eye(8, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight.double() @ c, full_matrices=False)
    places = slice(0, 2) if init == "corda-ipm" else slice(4, 6)
    a, rows_b = components(weight, gram, 2, init, "x")
    assert (a.shape, rows_b.shape) == ((2, 8), (2, 6))
    assert close(rows_b.T @ a, (u[:, places] * s[places]) @ vt[places] @ torch.linalg.inv(c), 1e-5)
    assert close(rows_b @ rows_b.T, torch.diag(s[places]), 1e-5)
    whole = components(weight, gram, 6, init, "x")
    assert close(whole[1].T @ whole[0], weight, 1e-5)


def test_it_starts_from_the_base_and_is_written_as_the_difference_of_products(tmp_path: Path) -> None:
    model = load_model(base_of(tmp_path))
    before = logits(model)
    projection = model.model.layers[0].self_attn.q_proj
    shifted = Shifted(*components(projection.weight.detach(), None, 3, "pissa", "x"))
    with attached(model, {"model.layers.0.self_attn.q_proj": shifted}) as parameters:
        assert sorted(parameters) == [f"model.layers.0.self_attn.q_proj.{name}" for name in ("a", "rows_b")]
        assert close(logits(model), before, 1e-4)
        start = shifted.a.detach().clone() * shifted.sizes[0], shifted.rows_b.detach().clone() * shifted.sizes[1]
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        now = shifted.a * shifted.sizes[0], shifted.rows_b * shifted.sizes[1]
        wanted = now[1].double().T @ now[0].double() - start[1].double().T @ start[0].double()
        a, rows_b = shifted.stored()
        assert (a.shape, rows_b.shape) == ((6, 16), (6, 16))
        assert close(rows_b.T @ a, wanted, 1e-6)
        in_half, put_together = (each.T.half().float() @ other.half().float() for other, each in ((a, rows_b), shifted.rows()))
        assert (in_half - wanted).norm() < (put_together - wanted).norm() / 20


@pytest.mark.parametrize("init", ["pissa", "corda-ipm", "corda-kpm"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_start_from_the_weights_are_plain_ones_of_twice_the_rank(kind: str, init: Init, tmp_path: Path) -> None:
    base = base_of(tmp_path, kind)
    learns(tmp_path, base, TrainAdapterOptions(16, 4, init=init))
    opened = open_adapter(tmp_path / "adapter")
    assert {module.rank for module in opened.lowrank.values()} == {8}
    assert opened.config["init_lora_weights"] is True


# ---- pools ----


def products(count: int = 3) -> list[Product]:
    return [Product(f"layers.{block}.{name}", 6, shape) for block in range(count) for name, shape in (("up", (16, 8)), ("down", (8, 16)))]


def test_modules_of_a_kind_share_pieces_that_train_and_have_some_of_their_own() -> None:
    sharing = Sharing(3, 1, 4)
    found = pooled(products(), 5, sharing, None, 2.0, torch.Generator().manual_seed(0))
    assert list(found) == [product.module for product in products()]
    trained = {id(parameter): parameter.numel() for module in found.values() for parameter in module.parameters()}
    assert sum(trained.values()) == 2 * 3 * 3 * (16 + 8)  # two kinds of 3 modules: the parameters of rank 3
    ups = [module for name, module in found.items() if name.endswith("up")]
    for side in (0, 1):
        drawn = [set(module.places[side].flatten().tolist()) for module in ups]
        assert all(len(own) == 5 * 4 for own in drawn)  # none twice
        own = [{place for place in places if place >= 2 * 3 * 4} for places in drawn]
        assert [len(places) for places in own] == [4, 4, 4]
        assert not set.intersection(*map(set, own[:2]))
        assert drawn[0] & drawn[1]
    assert not torch.equal(ups[0].places[0], ups[0].places[1])
    a, rows_b = ups[0].rows()
    assert (a.shape, rows_b.shape, bool(rows_b.any())) == ((5, 8), (5, 16), False)
    assert torch.equal(a[2], torch.cat([ups[0].pool.a[place] for place in ups[0].places[0][2]]))


@pytest.mark.parametrize("bits", [16, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_out_of_pools_are_plain_ones_of_the_whole_rank(kind: str, bits: int, tmp_path: Path) -> None:
    base = base_of(tmp_path, kind)
    learns(tmp_path, base, TrainAdapterOptions(bits, 4, sharing=Sharing(3, 1, 2)), steps=80)
    opened = open_adapter(tmp_path / "adapter")
    assert {module.rank for module in opened.lowrank.values()} == {4}
    if bits == 16 and kind == KINDS[0]:
        ups = [opened.checkpoint.read(opened.lowrank[f"model.layers.{block}.mlp.up_proj"].a) for block in (0, 1)]
        pieces = [set(map(tuple, a.view(-1, 8).tolist())) for a in ups]
        assert len(pieces[0]) == 8
        assert pieces[0] & pieces[1]
        assert pieces[0] - pieces[1]


def test_a_rank_above_that_of_what_is_shared_takes_every_piece_as_often_as_others() -> None:
    found = pooled(products(), 7, Sharing(2, 1, 4), None, 2.0, torch.Generator().manual_seed(0))
    assert found["layers.0.up"].places[0].flatten()[: 6 * 4].bincount().tolist() == [2] * 3 * 4  # 6 ranks out of 3


def test_pools_that_cannot_be_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    with pytest.raises(OptionError, match=r"down_proj: 16 numbers cannot be cut into 3 pieces; give another number of shards"):
        train_adapter(base, lesson(), TrainAdapterOptions(16, 4, sharing=Sharing(2, 1, 3)))
    with pytest.raises(OptionError, match=r"k_proj: \(8, 16\) has no rank 9; give a smaller rank, or leave the module out with --target"):
        train_adapter(base, lesson(), TrainAdapterOptions(16, 9, sharing=Sharing(2)))
    assert Sharing(5, 5, 0).problems(4) == [
        "pools of rank 5 for an adapter of rank 4: 1 up to the adapter's", "5 private ranks in pools of rank 5: they must be fewer",
        "a row has 1 piece or more, not 0",
    ]  # fmt: skip


# ---- ranks within a budget ----


@pytest.mark.parametrize(("kind", "module"), [("LlamaForCausalLM", "model.layers.1.mlp.up_proj"), ("GPT2LMHeadModel", "transformer.h.1.mlp.c_fc")])
def test_sensitivities_are_sums_of_squared_gradients(kind: str, module: str, tmp_path: Path) -> None:
    model = load_model(base_of(tmp_path, kind))
    turned = kind.startswith("GPT2")
    found = sensitivities(model, {module: turned}, rows(8))[module]
    assert not any(parameter.grad is not None for parameter in model.parameters())
    weight = model.get_submodule(module).weight
    wanted = torch.zeros_like(weight)
    for batch in (rows(8)[:4], rows(8)[4:]):
        loss = torch.nn.functional.cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        wanted += torch.autograd.grad(loss, weight)[0].square()
    assert close(found, wanted.T if turned else wanted, 1e-5)


def test_ranks_count_the_most_sensitive_weights_that_a_budget_can_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": ((4, 6), 1.0), "b": ((5, 3), 3.0), "c": ((4, 4), 0.2)}
    sensitivity = {name: torch.rand(shape, generator=generator) ** 4 * size for name, (shape, size) in shapes.items()}

    def counted(ranks: Sequence[int]) -> float:
        return sum(
            float(own.flatten().sort(descending=True).values[: rank * sum(own.shape)].sum()) for rank, own in zip(ranks, sensitivity.values(), strict=True)
        )

    for budget in (8, 21, 30, 44):
        able = [ranks for ranks in itertools.product(range(4), repeat=3) if ranks[0] * 10 + ranks[1] * 8 + ranks[2] * 8 <= budget]
        assert counted(list(ranks_within(sensitivity, budget, 3).values())) == pytest.approx(max(map(counted, able)))
    with pytest.raises(OptionError, match="a budget of 7 parameters gives no module a rank: rank 1 of the smallest has 8"):
        ranks_within(sensitivity, 7, 3)


def test_a_budget_makes_a_plain_adapter_with_ranks_of_its_own(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    learns(tmp_path, base, TrainAdapterOptions(16, 8, budget=1000))
    opened = open_adapter(tmp_path / "adapter")
    assert sum(spec.numel for spec in opened.checkpoint.specs.values()) <= 1000
    assert len(opened.config["rank_pattern"]) > 0
    assert len({module.rank for module in opened.lowrank.values()}) > 1
    note, = train_adapter(base, lesson(), TrainAdapterOptions(16, 8, budget=1000)).notes
    assert note.startswith(f"{sum(spec.numel for spec in opened.checkpoint.specs.values())} of 1000 parameters; modules by their rank: ")


# ---- as a user asks for it ----


def test_what_does_not_go_together_is_told(tmp_path: Path) -> None:
    steps = [
        {"train_adapter": {"base": "base", "init": "corda-kmp", "bits": 16}},
        {"train_adapter": {"base": "base", "init": "pissa", "calibration": "none.txt"}},
        {"train_adapter": {"base": "base", "budget": 7, "pools": {"rank": 9}}},
    ]
    with pytest.raises(RecipeError) as caught:
        check({"inputs": {"base": "base"}, "steps": steps}, tmp_path, "r")
    for problem in (
        "unknown init 'corda-kmp'. Did you mean 'corda-kpm'?", "CorDA looks at a calibration text, the task's or that of what is to stay",
        "pissa starts from components of each weight, in full numbers; train it at 16 bits and without pools",
        "pools of rank 9 for an adapter of rank 8", "pools have as many parameters as their rank says; give them, or a budget",
    ):  # fmt: skip
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    "way",
    [
        ["--init", "corda-kpm", "--calibration", MODELS / "text" / "docs.val.txt"],
        ["--budget", 4000],
        ["--pool-rank", 2, "--pool-private", 1, "--pool-shards", 2],
    ],
)
def test_adapter_train(way: list[object], compress: Program, tmp_path: Path) -> None:
    base, text = MODELS / "base", MODELS / "text" / "code.val.txt"
    ended = compress("adapter", "train", base, "--text", text, "--bits", 16, "--rank", 4, "--window", 32, "--steps", 2, *way, "-o", "lora", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert compress("verify", "lora", "--inputs").returncode == 0
    assert compress("merge", f"{base}+lora", "-o", "merged").returncode == 0
