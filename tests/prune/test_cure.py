"""Training under sharing: what is shared stays one, what is private parts, and the tail follows its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from mergekit_plus.calibration import read_text
from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import OptionError
from mergekit_plus.evaluate import load_model, load_tokenizer
from mergekit_plus.training import TrainOptions, distillation, loss_on, next_token
from prune.fold import Fold, compacted, expanded, fold_of, load_tied, mapped, relaxed, sites_of_compact, stack_of, stored
from prune.fold.blocks import blocks_of
from prune.fold.tail import with_tail
from prune.perp import adapt
from prune.retrain import RetrainOptions, retrain, trainable

MODELS = Path(__file__).parents[1] / "models"
BASE = Checkpoint.open(MODELS / "base")
BLOCKS = len(stack_of(BASE).layers)
CYCLE = mapped(range(BLOCKS), 2, "cycle", "average")
COMPACT = relaxed(BASE, CYCLE, 4)
ROWS = read_text([MODELS / "text" / "docs.val.txt"], load_tokenizer(BASE), 20, 32)
TRAINING = TrainOptions(steps=4, lr=1e-3, batch=4, evaluations=2)
UP, NORM = "model.layers.{}.mlp.up_proj", "model.layers.{}.input_layernorm.weight"


def options_for(*variants: str, **more: Any) -> RetrainOptions:
    return RetrainOptions(variants, ROWS, **{"training": TRAINING, **more})


def logits(model: Any, vocabulary: int = 10**6) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ROWS[:2] % vocabulary, use_cache=False).logits
        return found


# ---- the model in memory ----


def test_blocks_of_a_group_have_one_parameter_their_own_norms_and_their_own_voices() -> None:
    layers = load_tied(COMPACT).model.layers
    first, again, other = layers[0], layers[BLOCKS // 2], layers[1]
    assert first.mlp.up_proj.weight is again.mlp.up_proj.weight
    assert first.mlp.up_proj.weight is not other.mlp.up_proj.weight
    assert first.input_layernorm.weight is not again.input_layernorm.weight
    assert first.mlp.up_proj.lora_A.weight is not again.mlp.up_proj.lora_A.weight


@pytest.mark.parametrize("rank", [0, 4])
def test_it_computes_what_the_expanded_model_does(rank: int) -> None:
    """Of a float32 checkpoint: in bfloat16 the expanded model rounds W + B A."""
    tensors = {name: BASE.read(name).float() for name in BASE.specs}
    base = replace(BASE, source=Checkpoint.from_tensors(tensors).source)
    compact = relaxed(base, CYCLE, rank) if rank else compacted(base, CYCLE)
    torch.testing.assert_close(logits(load_tied(compact)), logits(load_model(expanded(compact))), atol=2e-4, rtol=1e-4)


def test_the_gradient_of_what_is_shared_is_the_sum_over_its_places() -> None:
    compact = compacted(BASE, CYCLE)
    tied, apart = load_tied(compact).double(), load_model(expanded(compact)).double()
    next_token(tied, ROWS[:2]).backward()
    next_token(apart, ROWS[:2]).backward()
    for site in sites_of_compact(compact):
        wanted = sum(apart.get_parameter(path).grad for path in (site.parameter, *site.also))
        torch.testing.assert_close(tied.get_parameter(site.parameter).grad, wanted, atol=1e-9, rtol=1e-6)


def test_every_stored_tensor_is_a_site_and_each_trains_once() -> None:
    sites = {site.name: site for site in sites_of_compact(COMPACT)}
    assert set(sites) == set(COMPACT.specs)
    assert sites[f"{UP.format(0)}.weight"].also == (f"{UP.format(BLOCKS // 2)}.weight",)
    total = trainable(COMPACT, options_for("full"))[-1]
    assert total.parameters == sum(spec.numel for spec in COMPACT.specs.values())
    assert {row.variant: row.tensors for row in trainable(COMPACT, options_for("norms", "lora"))} == {
        "norms": 2 * BLOCKS + 1, "lora": 2 * 7 * BLOCKS, "total": 2 * BLOCKS + 1 + 2 * 7 * BLOCKS,
    }  # fmt: skip


def test_an_adapter_on_what_is_shared_is_one_too_and_merges_for_all_places() -> None:
    model, sites = load_tied(COMPACT), sites_of_compact(COMPACT)
    before = logits(model)
    adapted = adapt(model, sites, ["mask_lora"], {"rank": 2})
    torch.testing.assert_close(logits(model), before)
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.add_(torch.full_like(parameter, 0.01))
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-3
    merged = adapted.merge()
    assert len(merged) == 7 * BLOCKS // 2
    torch.testing.assert_close(logits(model), trained, atol=1e-4, rtol=1e-4)
    assert model.model.layers[0].mlp.up_proj.weight is model.model.layers[BLOCKS // 2].mlp.up_proj.weight


# ---- the cure ----


def test_what_is_cured_is_compact_again_and_its_shared_weights_are_shared(tmp_path: Path) -> None:
    save(retrain(COMPACT, options_for("full"), BASE), tmp_path / "cured")
    cured = stored(Checkpoint.open(tmp_path / "cured"))
    assert fold_of(cured) == CYCLE
    assert cured.specs == COMPACT.specs
    changed = {name for name in cured.specs if not torch.equal(cured.read(name), COMPACT.read(name))}
    assert {f"{UP.format(0)}.weight", NORM.format(0), NORM.format(BLOCKS // 2), f"{UP.format(0)}.lora_B.weight"} <= changed


@pytest.mark.parametrize(("variant", "part"), [("norms", "layernorm"), ("lora", ".lora_")])
def test_the_others_change_what_they_name_alone(variant: str, part: str) -> None:
    cured = retrain(COMPACT, options_for(variant))
    changed = {name for name in cured.specs if not torch.equal(cured.read(name), COMPACT.read(name))}
    assert changed
    assert all(part in name or (variant == "norms" and name == "model.norm.weight") for name in changed)


def test_a_compact_model_that_was_opened_is_retrained_as_what_it_is(tmp_path: Path) -> None:
    save(COMPACT, tmp_path / "compact")
    opened = Checkpoint.open(tmp_path / "compact")
    assert opened.specs == expanded(COMPACT).specs
    made, wanted = retrain(opened, options_for("norms")), retrain(COMPACT, options_for("norms"))
    assert made.files.keys() == wanted.files.keys()
    assert all(torch.equal(made.read(name), wanted.read(name)) for name in wanted.specs)
    assert retrain(expanded(COMPACT), options_for("norms")).specs == expanded(COMPACT).specs  # and what was expanded, as an ordinary one


def test_training_that_gains_nothing_is_the_identity() -> None:
    """The state before the first step is the best one at a rate of nothing: what is written is what was read, bit for bit."""
    cured = retrain(COMPACT, options_for("full", training=replace(TRAINING, lr=1e-30, steps=1)))
    assert all(torch.equal(cured.read(name), COMPACT.read(name)) for name in COMPACT.specs)


def test_a_model_without_voices_has_none_to_train() -> None:
    with pytest.raises(OptionError, match="lora: the model has nothing of the kind to train"):
        retrain(compacted(BASE, CYCLE), options_for("lora"))


def test_curing_draws_the_model_towards_its_teacher() -> None:
    training = replace(TRAINING, steps=25, lr=3e-3, batch=4)
    teacher = load_model(BASE)
    loss = distillation(teacher)
    before = loss_on(load_tied(COMPACT), ROWS, loss)
    cured = retrain(COMPACT, options_for("norms", "lora", training=training), BASE)
    assert loss_on(load_tied(cured), ROWS, loss) < 0.8 * before


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith(("ForCausalLM", "LMHeadModel"))])
def test_every_architecture_shares_and_trains(name: str, tmp_path: Path) -> None:
    """Of a mixture's experts, which transformers packs, nothing trains; they stay as they are. GPT-2's layers have no voice."""
    model, fold = tiny_model(name, tmp_path), mapped(range(2), 2)
    compact = compacted(model, fold) if name.startswith("GPT2") else relaxed(model, fold, 2)
    torch.testing.assert_close(logits(load_tied(compact), 64), logits(load_model(expanded(compact)), 64))
    rows = ROWS % 64
    cured = retrain(compact, RetrainOptions(("full",), rows, training=replace(TRAINING, steps=8, evaluations=8)))
    assert any(not torch.equal(cured.read(tensor), compact.read(tensor)) for tensor in compact.specs)
    load_model(cured)


# ---- the tail ----


def test_the_tail_is_the_squared_distance_of_hidden_states_to_those_of_the_blocks_that_they_were() -> None:
    fold = Fold.of([0, 2, 3, 5])
    model, teacher = load_model(expanded(compacted(BASE, fold))), load_model(BASE)
    ours, theirs = blocks_of(model, expanded(compacted(BASE, fold))).modules, blocks_of(teacher, BASE).modules
    loss = with_tail(distillation(teacher), [ours[2], ours[3]], [theirs[3], theirs[5]], 0.5)
    seen: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda module, args, output: seen.append(output)) for module in (ours[2], ours[3], theirs[3], theirs[5])]
    with torch.no_grad():
        value = loss(model, ROWS[:2])
        for handle in handles:
            handle.remove()
        wanted = distillation(teacher)(model, ROWS[:2]) + 0.5 * ((seen[0] - seen[2]).square().mean() + (seen[1] - seen[3]).square().mean())
    torch.testing.assert_close(value, wanted)


def test_the_tail_trains_blocks_that_the_logits_alone_train_otherwise() -> None:
    plain, drawn = (retrain(COMPACT, options_for("norms", tail=tail), BASE) for tail in (0, 2))
    assert not torch.equal(plain.read(NORM.format(1)), drawn.read(NORM.format(1)))


def test_a_tail_needs_a_teacher_and_blocks_that_are_known() -> None:
    short = expanded(compacted(BASE, Fold.of([0, 2, 3, 5])))
    with pytest.raises(OptionError, match="give one with --teacher"):
        retrain(COMPACT, options_for("norms", tail=1))
    with pytest.raises(OptionError, match=f"which of the teacher's {BLOCKS} blocks the 4 of .* were is not known; say it with --kept"):
        retrain(short, options_for("norms", tail=1), BASE)
    with pytest.raises(OptionError, match="a tail of 5 blocks of 4"):
        retrain(short, options_for("norms", tail=5, kept=(0, 2, 3, 5)), BASE)
    assert retrain(short, options_for("norms", tail=1, kept=(0, 2, 3, 5)), BASE).specs == short.specs
