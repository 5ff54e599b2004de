"""Bits for each layer: what a layer's loss is, what its bits cost, and that an allocation becomes the file that was promised."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from mergekit_plus.checkpoint import Checkpoint, save
from mergekit_plus.errors import CheckpointError, OptionError
from mergekit_plus.evaluate import compare, load_model
from mergekit_plus.moments import Moments
from quant import Scheme, proxies
from quant.allocate import solve
from quant.allocation import parse_choice, parse_choices
from quant.bits_file import GroupScheme, group_schemes, read, schemes_of, write
from quant.layer_groups import file_size, groups_of, label, stored_bits, weights_of
from quant.mixed import Budget, allocate, candidates, schemes
from quant.plan import quantize
from quant.replay import Replay
from quant.sensitivity import Sensitivities, measure

CHOICES = (Scheme(2, 16), Scheme(3, 16), Scheme(4, 16, False), Scheme(8, 0))
Tiny = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    under = tmp_path_factory.mktemp("tiny")
    return lambda name: tiny_model(name, under)


def rows(windows: int = 4, window: int = 16) -> torch.Tensor:
    return torch.randint(0, 64, (windows, window), generator=torch.Generator().manual_seed(0))


def dense(model: Checkpoint, scheme: Any) -> Checkpoint:
    return quantize(model, scheme, format_name="dense")


def choices_of(model: Checkpoint) -> tuple[Scheme, ...]:
    return CHOICES if "MoE" not in model.config["architectures"][0] and "Moe" not in model.config["architectures"][0] else (Scheme(2, 8), Scheme(4, 0))


def table_of(model: Checkpoint, **options: Any) -> Sensitivities:
    choices = choices_of(model)
    return measure(model, groups_of(model, choices[0]), choices, partial(dense, model), rows(), **options)


def measured_kl(model: Checkpoint, schemes_: dict[str, Scheme]) -> float:
    """KL(dense || quantised) by way of the evaluation of whole models."""
    return compare(load_model(dense(model, schemes_)), load_model(model), rows().flatten(), window=16).kl


# ---- groups and costs ----


def test_groups_are_what_servers_fuse_and_the_rest_alone(tiny: Tiny) -> None:
    groups = groups_of(tiny("LlamaForCausalLM"), CHOICES[0])
    assert [label(group) for group in groups[:4]] == [
        "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj/up_proj", "model.layers.0.self_attn.k_proj/q_proj/v_proj",
        "model.layers.0.self_attn.o_proj",
    ]  # fmt: skip
    assert len(groups) == 8
    mixtral = groups_of(tiny("MixtralForCausalLM"), CHOICES[0])
    assert {len(group) for group in mixtral if "experts" in group[0]} == {6}  # two experts of three matrices
    assert label(next(group for group in mixtral if "experts" in group[0])).endswith(" and 5 more")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_stored_bits_are_those_of_the_file(tiny: Tiny, name: str, tmp_path: Path) -> None:
    model = tiny(name)
    groups = groups_of(model, CHOICES[0])
    costs = stored_bits(model, groups, CHOICES, "pack-quantized")
    selection = [number % len(CHOICES) for number in range(len(groups))]
    roles = {name: CHOICES[choice] for group, choice in zip(groups, selection, strict=True) for name in group}
    mixed = quantize(model, {name.removesuffix(".weight"): scheme for name, scheme in roles.items()})
    save(mixed, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    quantised = [spec.nbytes for name, spec in written.specs.items() if ".weight_" in name]
    assert 8 * sum(quantised) == sum(row[choice] for row, choice in zip(costs, selection, strict=True))
    assert file_size(mixed) == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights_of(model, groups) == sum(model.specs[name].numel for name in roles)


# ---- losses ----


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GemmaForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("reference", ["uniform", "mixed", "dense"])
def test_a_loss_is_the_kl_of_the_model_with_one_group_switched(tiny: Tiny, name: str, reference: str) -> None:
    model = tiny(name)
    choices = choices_of(model)
    groups = groups_of(model, choices[0])
    standing = {"uniform": (1,) * len(groups), "mixed": tuple(number % 2 for number in range(len(groups))), "dense": None}[reference]
    table = table_of(model, reference=standing)
    at = {} if standing is None else schemes(model, table.groups, table.choices, standing)
    assert table.base == pytest.approx(measured_kl(model, at) if at else 0.0, rel=1e-4, abs=1e-9)
    for group in (0, len(groups) // 2, len(groups) - 1):
        for number, choice in enumerate(choices):
            switched = {**at, **{name.removesuffix(".weight"): choice for name in groups[group]}}
            assert table.base + table.losses[group][number] == pytest.approx(measured_kl(model, switched), rel=1e-3, abs=1e-8)
    assert standing is None or all(row[choice] == 0 for row, choice in zip(table.losses, standing, strict=True))


def test_the_model_is_as_it_was_after_a_replay(tiny: Tiny) -> None:
    model = load_model(tiny("LlamaForCausalLM"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replay = Replay(model, rows())
    assert replay.record().abs().max() < 1e-9
    name = "model.layers.1.mlp.up_proj.weight"
    with replay.changed({name: torch.zeros_like(before[name])}):
        there = replay.divergence_after([name])
        assert torch.equal(there, replay.divergence())
    assert there.min() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "forward" not in vars(model.model.layers[0])


def test_a_loss_that_adds_up_is_predicted(tiny: Tiny) -> None:
    """One group away from the reference point there is nothing to add up, so that prediction and measurement are one."""
    model = tiny("LlamaForCausalLM")
    table = table_of(model, reference=(2,) * 8)
    selection = [2, 2, 0, 2, 2, 2, 2, 2]
    assert table.predicted(selection) == pytest.approx(measured_kl(model, schemes(model, table.groups, table.choices, selection)), rel=1e-3)
    assert table.predicted([2] * 8) == table.base


def test_sensitivities_come_back_from_their_file(tiny: Tiny, tmp_path: Path) -> None:
    table = replace(table_of(tiny("LlamaForCausalLM"), reference=(1,) * 8), made={"model": "m"})
    table.write(tmp_path / "s.json")
    assert Sensitivities.read(tmp_path / "s.json") == table
    fewer = table.only((CHOICES[3], CHOICES[1]))
    assert (fewer.choices, fewer.reference) == ((CHOICES[3], CHOICES[1]), (1,) * 8)
    assert fewer.losses[5] == (table.losses[5][3], table.losses[5][1])
    for broken in ("[]", "{}", json.dumps({**json.loads((tmp_path / "s.json").read_text()), "losses": [[0.0]]})):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(OptionError, match=r"--sensitivities .*broken\.json: .*; measure again without it"):
            Sensitivities.read(tmp_path / "broken.json")


def test_gram_is_the_relative_error_of_the_outputs_and_fisher_half_the_squared_change_of_the_log_likelihood(tiny: Tiny) -> None:
    checkpoint = tiny("LlamaForCausalLM")
    groups = groups_of(checkpoint, CHOICES[0])
    gram, fisher = (proxies.measure(checkpoint, groups, CHOICES, partial(dense, checkpoint), rows(), kind=kind) for kind in ("gram", "fisher"))
    model, name = load_model(checkpoint), "model.layers.1.mlp.down_proj.weight"
    group = groups.index((name,))
    change = dense(checkpoint, CHOICES[1]).read(name) - checkpoint.read(name)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_hook(lambda _, inputs, output: (seen.append(inputs[0].detach()), output.retain_grad(), seen.append(output))[0])
    likely = model(input_ids=rows()).logits.log_softmax(-1).flatten(0, 1)
    labels = torch.multinomial(likely.detach().exp(), 1, generator=torch.Generator().manual_seed(proxies.SEED))
    likely.gather(1, labels).sum().backward()
    handle.remove()
    x, y = seen[0].flatten(0, 1).double(), seen[1].flatten(0, 1).detach().double()  # [tokens, in], [tokens, out]
    gradient, there = seen[1].grad.flatten(0, 1).double(), x @ change.double().T  # type: ignore[union-attr]
    assert fisher.losses[group][1] == pytest.approx(float((gradient * there).sum(-1).square().mean() / 2), rel=1e-4)
    moments = [Moments((part.T @ part / len(part)).float(), part.mean(0).float(), len(part)) for part in x.split(16)]
    trace = [float((change @ one.gram * change).sum() / (checkpoint.read(name) @ one.gram * checkpoint.read(name)).sum()) for one in moments]
    assert gram.losses[group][1] == pytest.approx(sum(trace) / len(trace), rel=1e-3)
    relative = [float(a.square().sum() / b.square().sum()) for a, b in zip(there.split(16), y.split(16), strict=True)]
    assert gram.losses[group][1] == pytest.approx(sum(relative) / 4, rel=1e-3)
    assert all(row[0] > row[1] > row[2] > 0 for row in fisher.losses)


def test_packed_experts_have_losses_but_no_fisher(tiny: Tiny) -> None:
    model = tiny("MixtralForCausalLM")
    groups = groups_of(model, CHOICES[0])
    with pytest.raises(CheckpointError, match="no linear layer of its own in MixtralForCausalLM; measure with --sensitivity kl"):
        proxies.measure(model, groups, CHOICES, partial(dense, model), rows(), kind="fisher")


# ---- budgets and candidates ----


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> tuple[Checkpoint, Sensitivities]:
    model = tiny("LlamaForCausalLM")
    return model, table_of(model, reference=(1,) * 8)


def allocated(model: Checkpoint, table: Sensitivities, budget: Budget, **options: Any) -> Any:
    return allocate(model, table, budget, partial(quantize, model), "pack-quantized", make=partial(dense, model), **options)


def test_the_best_of_several_allocations_within_the_budget_is_kept(llama: tuple[Checkpoint, Sensitivities]) -> None:
    model, table = llama
    found = allocated(model, table, Budget(bits_per_weight=6.5), heldout=rows(6), count=6)
    assert found.candidates[0].origin == "optimum"
    assert len({candidate.selection for candidate in found.candidates}) == len(found.candidates) > 3
    assert all(candidate.cost <= 6.5 * found.weights for candidate in found.candidates)
    assert found.chosen.measured == min(candidate.measured for candidate in found.candidates)
    assert found.solution.proven
    assert found.candidates[0].predicted == pytest.approx(table.base + found.solution.loss)
    again = load_model(dense(model, schemes(model, table.groups, table.choices, found.chosen.selection)))
    assert found.chosen.measured == pytest.approx(compare(again, load_model(model), rows(6).flatten(), window=16).kl, rel=1e-3)
    assert allocated(model, table, Budget(bits_per_weight=6.5)).candidates == (replace(found.candidates[0], measured=None),)


def test_the_second_best_is_second_to_none_but_the_best(llama: tuple[Checkpoint, Sensitivities]) -> None:
    model, table = llama
    costs = stored_bits(model, table.groups, table.choices, "pack-quantized")
    budget = sum(row[1] for row in costs)
    solution = solve(table.losses, costs, budget)
    exact = replace(table, errors=tuple((0.0,) * 4 for _ in table.groups))  # no noise
    found = [one for one in candidates(exact, costs, solution, budget, None, 8, 0) if one.origin == "second best"]
    every = sorted(
        math.fsum(row[choice] for row, choice in zip(table.losses, selection, strict=True))
        for selection in itertools.product(range(4), repeat=8)
        if sum(row[choice] for row, choice in zip(costs, selection, strict=True)) <= budget
    )
    assert every[0] == pytest.approx(solution.loss)
    assert found[0].predicted - table.base == pytest.approx(every[1])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_size_is_kept_to_the_byte(llama: tuple[Checkpoint, Sensitivities], share: float, tmp_path: Path) -> None:
    model, table = llama
    least, most = (file_size(quantize(model, table.choices[choice])) for choice in (0, 3))
    size = round(least + share * (most - least))
    found = allocated(model, table, Budget(size=size))
    out = tmp_path / "out"
    save(quantize(model, schemes(model, table.groups, table.choices, found.chosen.selection)), out)
    assert (out / "model.safetensors").stat().st_size == found.file_bytes <= size
    with pytest.raises(OptionError, match=rf"--size of {least - 1} bytes cannot be met: with the narrowest choices it is {least}, of which"):
        allocated(model, table, Budget(size=least - 1))


def test_the_dual_keeps_the_loss_with_the_fewest_bits(llama: tuple[Checkpoint, Sensitivities]) -> None:
    model, table = llama
    most = table.base
    found = allocated(model, table, Budget(max_loss=most), heldout=rows(), count=5)
    assert found.candidates[0].predicted <= most * (1 + 1e-12)
    within = [candidate for candidate in found.candidates if candidate.measured <= most]
    assert found.chosen == (min(within, key=lambda candidate: candidate.cost) if within else min(found.candidates, key=lambda candidate: candidate.measured))
    hopeful = replace(table, base=-1.0)  # predicts less than there is
    with pytest.warns(UserWarning, match=r"no candidate keeps --max-loss .* on held-out text; the best of them loses .* nats a token"):
        lost = allocated(model, hopeful, Budget(max_loss=1e-12), heldout=rows(), count=4)
    assert lost.chosen.measured == min(candidate.measured for candidate in lost.candidates)
    with pytest.raises(OptionError, match=r"--max-loss 1e-12 cannot be met: the widest choices lose .* nats a token; add wider ones"):
        allocated(model, table, Budget(max_loss=1e-12))


def test_budgets_that_cannot_be_are_refused(llama: tuple[Checkpoint, Sensitivities]) -> None:
    with pytest.raises(OptionError, match="give one of --bits-per-weight, --size and --max-loss"):
        Budget(3.0, 100)
    with pytest.raises(OptionError, match="a budget is a number above 0"):
        Budget(bits_per_weight=float("nan"))
    with pytest.raises(OptionError, match=r"--bits-per-weight 1.5 cannot be met: the narrowest choices take \d\.\d{4}, scales and all"):
        allocated(*llama, Budget(bits_per_weight=1.5))


def test_choices_are_bits_with_group_sizes_and_symmetry_of_their_own() -> None:
    assert parse_choices("2,3g32,8a, 4g0s", 64, True) == (Scheme(2, 64), Scheme(3, 32), Scheme(8, 64, False), Scheme(4, 0))
    assert parse_choice("4", 128, False) == Scheme(4, 128, False)
    with pytest.raises(OptionError, match="'4b' is no choice; write bits, with a group size and a or s where they differ, as in 4, 4g32 or 8a"):
        parse_choices("3,4b", 128, True)
    with pytest.raises(OptionError, match="give at least two, each once"):
        parse_choices("3,4,3", 128, True)
    with pytest.raises(OptionError, match="bits=16: a weight has 2 to 8 bits"):
        parse_choices("3,16", 128, True)


# ---- the file ----


def test_bits_yaml_comes_back_and_names_every_layer(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("MixtralForCausalLM")
    groups = groups_of(model, CHOICES[0], exclude=("*.o_proj.weight",))
    written = group_schemes(model, groups, [CHOICES[number % 4] for number in range(len(groups))])
    write(tmp_path / "bits.yaml", written, {"made": {"by": "test"}})
    assert read(tmp_path / "bits.yaml") == written
    assert written[-1] == GroupScheme(modules=["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"], bits="dense")
    experts = next(group for group in written if "experts" in group.modules[0])
    assert len(experts.modules) == 3
    assert all(".experts.*." in module for module in experts.modules)
    found = schemes_of(written, model)
    assert found == {name.removesuffix(".weight"): CHOICES[number % 4] for number, group in enumerate(groups) for name in group}
    quantize(model, found)


def test_an_allocation_of_another_model_is_refused_with_the_names(tiny: Tiny, tmp_path: Path) -> None:
    llama, neox = tiny("LlamaForCausalLM"), tiny("GPTNeoXForCausalLM")
    groups = groups_of(llama, CHOICES[0])
    written = group_schemes(llama, groups, [CHOICES[0]] * len(groups))
    with pytest.raises(OptionError) as caught:
        schemes_of(written, neox)
    assert str(caught.value) == (
        "the allocation is another model's: it names model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj and 11 more, "
        f"which {neox.label} has not and it says nothing of gpt_neox.layers.0.attention.dense, gpt_neox.layers.0.attention.query_key_value, "
        "gpt_neox.layers.0.mlp.dense_4h_to_h and 5 more; make one for this model with `compress allocate`"
    )
    with pytest.raises(OptionError, match="'model.layers.0.mlp.down_proj' stands in two groups; a layer has one scheme"):
        schemes_of([*written, written[0]], llama)
    for content, reason in (
        ("groups: []", "groups: List should have at least 1 item"), ("a: 1", "groups: Field required"),
        ("groups: [{modules: [x]}]", "groups.0.bits: Field required"),
        ("groups: [{modules: [x], bits: 12}]", "bits=12: a weight has 2 to 8 bits"), ("groups: [{modules: [x], bits: 4, size: 2}]", "groups.0.size: Extra"),
    ):  # fmt: skip
        (tmp_path / "bits.yaml").write_text(content)
        with pytest.raises(OptionError, match=reason):
            read(tmp_path / "bits.yaml")
