"""Folding depth: which blocks go, what the surgery leaves, and what config.json says then."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from program import Program
from tiny import ARCHITECTURES, EXPERTS, GROUPED, tiny_model
from torch.nn import functional

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.training import loss_on
from prune.fold import SCORES, Fold, count_of, folded, importance, mapped, stack_of
from prune.fold.blocks import Blocks, blocks_of
from prune.fold.importance import GATING

MODELS = Path(__file__).parents[1] / "models"
BASE = Checkpoint.open(MODELS / "base")
BLOCKS = len(stack_of(BASE).layers)
TEXT = MODELS / "text" / "docs.val.txt"
ROWS = torch.randint(0, 200, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def logits(checkpoint: Checkpoint, rows: torch.Tensor = ROWS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(checkpoint)(input_ids=rows, use_cache=False).logits
        return found


# ---- surgery ----


def test_nothing_removed_and_nothing_shared_is_the_model_itself(tmp_path: Path) -> None:
    save(folded(BASE, Fold.of(range(BLOCKS))), tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert out.config == BASE.config
    assert all(torch.equal(out.read(name), BASE.read(name)) for name in BASE.specs)


@pytest.mark.parametrize("parent", ["first", "average"])
def test_blocks_of_a_group_have_equal_linear_weights_and_their_own_norms(parent: str) -> None:
    result = folded(BASE, mapped(range(BLOCKS), 2, parent=parent))  # type: ignore[arg-type]
    up, norm = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.input_layernorm.weight"
    first, second = (BASE.read(up.format(number)) for number in (0, 1))
    wanted = first if parent == "first" else ((first.float() + second.float()) / 2).to(first.dtype)
    assert torch.equal(result.read(up.format(0)), wanted)
    assert torch.equal(result.read(up.format(1)), wanted)
    assert all(torch.equal(result.read(norm.format(number)), BASE.read(norm.format(number))) for number in range(BLOCKS))


def test_folding_what_is_folded_changes_nothing() -> None:
    once = folded(BASE, mapped(range(BLOCKS), 2, parent="average"))
    twice = folded(once, mapped(range(BLOCKS), 2, parent="average"))
    assert all(torch.equal(twice.read(name), once.read(name)) for name in once.specs)


def test_what_config_says_of_layers_goes_with_them(folder: Path) -> None:
    types = ["sliding_attention", "full_attention"] * 3
    model = tiny_model("Qwen2ForCausalLM", folder)
    tensors = {name: model.read(name) for name in model.specs}
    many = {name.replace("layers.0", f"layers.{n}"): tensor for n in range(6) for name, tensor in tensors.items() if "layers.1" not in name}
    deep = Checkpoint("deep", Checkpoint.from_tensors(many).source, model.files)
    deep = deep.with_config(num_hidden_layers=6, layer_types=types, sliding_window=8, use_sliding_window=True)
    result = folded(deep, Fold.of([0, 3, 4]))
    assert (result.config["num_hidden_layers"], result.config["layer_types"]) == (3, [types[0], types[3], types[4]])
    assert logits(result, ROWS[:1] % 64).isfinite().all()


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Qwen2ForCausalLM", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
        ("Gemma2ForCausalLM", {"sliding_window": 6, "head_dim": 8}),
        ("Gemma3ForCausalLM", {"sliding_window": 6, "head_dim": 8}),
        ("SmolLM3ForCausalLM", {"pad_token_id": 0}),
        ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1, 4]}),
        ("Gemma4ForCausalLM", {"sliding_window": 6, "head_dim": 8, "hidden_size_per_layer_input": 0}),
    ],
)
def test_every_block_keeps_its_kind_also_where_config_leaves_it_to_a_default(name: str, more: dict[str, Any], stated: bool, folder: Path) -> None:
    """As in older config.json on the Hub, where the library works out kinds of attention by the numbers of layers, which are others now."""
    (folder / "six").mkdir(exist_ok=True)
    model = tiny_model(name, folder / "six", {**GROUPED, **more, "num_hidden_layers": 6})
    if not stated:
        model = model.with_config(layer_types=None, no_rope_layers=None)
    rows = ROWS[:, :24] % 64
    blocks = blocks_of(load_model(model), model)
    for kept in ([2, 3, 4, 5], [0, 2, 4], [1, 3, 5], [5], [1, 4]):
        if name == "Gemma4ForCausalLM" and kept[-1] != 5:  # its last block is of the other kind whatever config.json says
            continue
        with blocks.changed(lambda number, entering, leaving, kept=kept: leaving if number in kept else entering), torch.no_grad():
            wanted = blocks.model(input_ids=rows, use_cache=False).logits
        torch.testing.assert_close(logits(folded(model, Fold.of(kept)), rows), wanted)


def test_parameters_are_those_of_the_formula() -> None:
    size = {name: spec.numel for name, spec in BASE.specs.items()}
    inside = {name for layer in stack_of(BASE).layers for name in layer}
    of_block = sum(size[name] for name in stack_of(BASE).layers[0])
    result = folded(BASE, Fold.of(range(BLOCKS - 1)))
    assert sum(spec.numel for spec in result.specs.values()) == sum(size[name] for name in size if name not in inside) + (BLOCKS - 1) * of_block


# ---- gates ----

CAUSAL = [name for name in ARCHITECTURES if name.endswith(("ForCausalLM", "LMHeadModel"))]


@pytest.mark.parametrize("name", CAUSAL)
def test_open_gates_are_the_model_and_a_closed_one_is_the_model_without_the_block_to_the_bit(name: str, folder: Path) -> None:
    model = tiny_model(name, folder)
    rows = ROWS[:2, :16] % 64
    blocks = blocks_of(load_model(model), model)
    for gates, wanted in (([1.0, 1.0], model), ([0.0, 1.0], folded(model, Fold.of([1]))), ([1.0, 0.0], folded(model, Fold.of([0])))):
        with blocks.gated(torch.tensor(gates)), torch.no_grad():
            found = blocks.model(input_ids=rows, use_cache=False).logits
        assert torch.equal(found, logits(wanted, rows))


# ---- importance ----


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    from mergekit_plus.calibration import read_text
    from mergekit_plus.evaluate import load_tokenizer

    return read_text([TEXT], load_tokenizer(BASE), 8, 64)


def test_influence_is_one_minus_the_mean_cosine(rows: torch.Tensor) -> None:
    model = load_model(BASE)
    found = importance(blocks_of(model, BASE), rows, 1, "influence")
    inner = model.model.layers
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in inner]
    handles.append(inner[-1].register_forward_hook(lambda module, args, output: seen.append(output)))
    with torch.no_grad():
        model(input_ids=rows)
    for handle in handles:
        handle.remove()
    wanted = [1 - functional.cosine_similarity(seen[n].double(), seen[n + 1].double(), dim=-1).mean().item() for n in range(len(inner))]
    assert found.scores == pytest.approx(wanted, abs=1e-6)
    assert found.removed == (min(range(len(inner)), key=lambda number: wanted[number]),)


class Stack(torch.nn.Module):
    """A model that is a table of embeddings, and matrices as its blocks."""

    def __init__(self, table: torch.Tensor, matrices: list[torch.Tensor]) -> None:
        super().__init__()
        self.table = table
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(*matrix.shape, bias=False) for matrix in matrices])
        for block, matrix in zip(self.blocks, matrices, strict=True):
            block.weight.data = matrix

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        states = self.table[input_ids]
        for block in self.blocks:
            states = block(states)
        return SimpleNamespace(logits=states @ self.table.T)


def test_influence_is_zero_of_what_turns_nothing_two_at_most_and_knows_no_scale_and_no_basis() -> None:
    generator = torch.Generator().manual_seed(1)
    table, mixing, basis = (torch.randn(size, 8, generator=generator) for size in (16, 8, 8))
    turn = torch.linalg.qr(basis)[0]
    rows = torch.arange(16).view(2, 8)

    def scores(table: torch.Tensor, *matrices: torch.Tensor) -> tuple[float, ...]:
        model = Stack(table, list(matrices))
        return importance(Blocks(model, list(model.blocks)), rows, 1, "influence").scores

    eye = torch.eye(8)
    found = scores(table, eye, 3 * eye, -eye, mixing)
    assert found[:3] == pytest.approx([0, 0, 2], abs=1e-6)
    assert 0 < found[3] < 2
    assert scores(100 * table, eye, mixing)[1] == pytest.approx(scores(table, eye, mixing)[1], abs=1e-6)
    assert scores(table @ turn, eye, turn.T @ mixing @ turn)[1] == pytest.approx(scores(table, eye, mixing)[1], abs=1e-6)


def test_leaving_out_one_block_is_exhaustive(rows: torch.Tensor) -> None:
    blocks = blocks_of(load_model(BASE), BASE)

    def without(removed: int) -> float:
        with blocks.changed(lambda number, entering, leaving: entering if number == removed else leaving):
            return loss_on(blocks.model, rows)

    losses = [without(number) for number in range(BLOCKS)]
    found = importance(blocks, rows, 1, "leave-one-out")
    assert found.scores == pytest.approx(losses)
    assert found.removed == (losses.index(min(losses)),)


@pytest.fixture
def quick_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("prune.fold.importance"), "GATING", replace(GATING, steps=12, batch=2))


@pytest.mark.usefixtures("quick_gates")
def test_gates_leave_as_much_open_as_stays_and_the_model_as_it_was(rows: torch.Tensor) -> None:
    model = load_model(BASE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = importance(blocks_of(model, BASE), rows, 2, "gates")
    assert sum(found.scores) == pytest.approx(BLOCKS - 2, abs=0.01)
    assert found.removed == tuple(sorted(sorted(range(BLOCKS), key=lambda number: found.scores[number])[:2]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found == importance(blocks_of(model, BASE), rows, 2, "gates")  # the seed decides


@pytest.mark.usefixtures("quick_gates")
def test_gates_find_the_block_that_does_nothing(rows: torch.Tensor) -> None:
    idle = [name for name in BASE.specs if name.startswith("model.layers.2.") and name.endswith(("o_proj.weight", "down_proj.weight"))]
    tensors = {name: torch.zeros_like(BASE.read(name)) if name in idle else BASE.read(name) for name in BASE.specs}
    model = Checkpoint("idle", Checkpoint.from_tensors(tensors).source, BASE.files)
    assert 2 in importance(blocks_of(load_model(model), model), rows, 2, "gates").removed  # another one may do harm on so little text


@pytest.mark.usefixtures("quick_gates")
@pytest.mark.parametrize("method", list(SCORES))
def test_pinned_blocks_stay(method: str, rows: torch.Tensor) -> None:
    blocks = blocks_of(load_model(BASE), BASE)
    free = BLOCKS - 1
    found = importance(blocks, rows[:2], 1, method, pinned=[number for number in range(BLOCKS) if number != free])
    assert found.removed == (free,)


# ---- errors and the program ----


def test_what_cannot_be_folded_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match=f"the model has the blocks 0 to {BLOCKS - 1}"):
        folded(BASE, Fold.of([0, 99]))
    with pytest.raises(OptionError, match="there must be one at least"):
        mapped([], 1)
    with pytest.raises(OptionError, match="leaves one at least"):
        count_of(BLOCKS, BLOCKS)
    with pytest.raises(CheckpointError, match="no stack of blocks"):
        stack_of(Checkpoint.from_tensors({"w": torch.ones(2, 2)}))


def test_the_command_removes_says_which_and_its_recipe_keeps_them(compress: Program, tmp_path: Path) -> None:
    done = compress("fold", MODELS / "base", "--remove", 1, "--by", "influence", "--calibration", TEXT, "--windows", 4, "--window", 64, "-o", "folded")
    assert done.returncode == 0, done.stderr
    assert f" of the blocks 0 to {BLOCKS - 1}" in done.stderr
    out = Checkpoint.open(tmp_path / "folded")
    assert out.config["num_hidden_layers"] == BLOCKS - 1
    assert compress("run", "folded/recipe.yaml", "-o", "again").returncode == 0  # from what was found: no text is read for it
    again = Checkpoint.open(tmp_path / "again")
    assert all(torch.equal(out.read(name), again.read(name)) for name in out.specs)
    assert "give one with --calibration FILE, or the blocks that stay with --keep" in compress("fold", MODELS / "base", "--remove", 1).line
    assert "Did you mean 'gates'" in compress("fold", MODELS / "base", "--keep", "0,1", "--by", "gate").line
    assert "write numbers with commas between" in compress("fold", MODELS / "base", "--keep", "a").line
