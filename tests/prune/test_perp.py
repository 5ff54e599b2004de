"""PERP's variants: counted right, identity at the start, merged as they computed, and no zero lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from perp_toys import WINDOWS, described, disturb, logits, pruned, pruned_model
from tiny import tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, OPTConfig

from mergekit_plus.errors import OptionError
from mergekit_plus.evaluate import load_model
from mergekit_plus.model import describe
from mergekit_plus.training import TrainOptions, next_token, train
from prune.perp import VARIANTS, Site, adapt, report, sites_of

ARCHITECTURES = ["LlamaForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM"]
ON_LINEARS = ["mask_lora", "lora_prune", "scale_lora", "hut", "neuroada"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- counts ----

# Percent at rank 16, computed from the architectures: biases, norms, biases+norms, head, mask_lora, all four
TABLE: dict[str, tuple[Any, tuple[float, ...]]] = {
    "OPT-125M": (OPTConfig(), (0.0816, 0.0307, 0.0969, 0.652, 2.12, 2.79)),  # OPTConfig's defaults are those of OPT-125M
    "OPT-1.3B": (
        OPTConfig(hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32),
        (0.0412, 0.0153, 0.0489, 0.0636, 1.076, 1.18),
    ),
    "OPT-30B": (
        OPTConfig(hidden_size=7168, word_embed_proj_dim=7168, ffn_dim=28672, num_hidden_layers=48, num_attention_heads=56),
        (0.0127, 0.0046, 0.0150, 0.0031, 0.331, 0.347),
    ),
    "Llama-2-7B": (LlamaConfig(), (0, 0.0040, 0.0040, 0.0086, 0.593, 0.602)),  # LlamaConfig's defaults are those of the 7B models
    "Mistral-7B": (MistralConfig(), (0, 0.0037, 0.0037, 0.0080, 0.579, 0.587)),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_trainable_shares_are_those_of_the_published_models(name: str) -> None:
    config, expected = TABLE[name]
    checkpoint = described(config)
    sites = sites_of(checkpoint)
    total = sum(spec.numel for spec in checkpoint.specs.values())
    combinations = (["biases"], ["norms"], ["biases", "norms"], ["head"], ["mask_lora"], ["biases", "norms", "head", "mask_lora"])
    has_biases = any(site.is_bias for site in sites)
    for variants, percent in zip(combinations, expected, strict=True):
        variants = [variant for variant in variants if has_biases or variant != "biases"]
        if not variants:
            assert percent == 0
            continue
        rows = report(sites, variants, {}, total)
        found = rows[-1].percent
        if len(variants) > 2:  # the table's last column counts the adapters among the model's parameters
            found = 100 * rows[-1].parameters / (total + sum(row.parameters for row in rows if row.variant in ("head", "mask_lora")))
        assert found == pytest.approx(percent, rel=0.005, abs=5e-5), variants


def test_a_report_counts_every_parameter_once_and_reads_nothing() -> None:
    checkpoint = described(OPTConfig())
    total = sum(spec.numel for spec in checkpoint.specs.values())
    rows = {row.variant: row for row in report(sites_of(checkpoint), ["biases", "norms", "scale_lora", "neuroada"], {"k": 2}, total)}
    assert total == 125_239_296
    assert rows["biases"].parameters == 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768
    assert rows["norms"].parameters == 2 * 25 * 768
    assert rows["scale_lora"].parameters == 12 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert rows["neuroada"].parameters == 12 * 2 * (5 * 768 + 3072)
    shared = 25 * 768  # the biases of norms are biases and belong to norms
    assert rows["total"].parameters == sum(row.parameters for name, row in rows.items() if name != "total") - shared
    assert report(sites_of(checkpoint), ["full"], {}, total)[-1].parameters == total


# ---- on a model ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_model_with_a_variant_on_it_is_the_model_until_it_is_trained(architecture: str, variant: str, tmp_path: Path) -> None:
    checkpoint, model = pruned_model(architecture, tmp_path)
    sites = sites_of(checkpoint)
    if not any(VARIANTS[variant].trains(site) for site in sites):
        with pytest.raises(OptionError, match=f"{variant}: the model has nothing of the kind to train"):
            adapt(model, sites, [variant])
        return
    before, expected = weights_of(model), logits(model)
    adapted = adapt(model, sites, [variant])
    assert torch.equal(logits(model), expected)
    adapted.merge()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"lora_prune", "lora"}))
def test_the_merged_model_computes_what_the_trained_one_did(architecture: str, variant: str, tmp_path: Path) -> None:
    checkpoint, model = pruned_model(architecture, tmp_path)
    sites = sites_of(checkpoint)
    if variant == "biases" and architecture == "LlamaForCausalLM":
        return
    before = logits(model)
    adapted = adapt(model, sites, [variant], {"rank": 4} if variant in ("mask_lora", "hut", "head") else {})
    disturb(adapted.parameters)
    if variant == "full":
        with torch.no_grad():
            for name, mask in adapted.masks.items():
                adapted.parameters[name].masked_fill_(~mask, 0)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-4
    adapted.merge()
    torch.testing.assert_close(logits(model), trained)


def test_lora_prune_loses_at_the_end_what_it_had_while_it_trained(tmp_path: Path) -> None:
    checkpoint, model = pruned_model("LlamaForCausalLM", tmp_path)
    adapted = adapt(model, sites_of(checkpoint), ["lora_prune"])
    disturb(adapted.parameters)
    trained = logits(model)
    adapted.merge()
    assert (logits(model) - trained).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("variants", [[name] for name in ON_LINEARS] + [["mask_lora", "scale_lora"], ["lora_prune", "neuroada", "hut"], ["full"]])
def test_training_keeps_every_zero_and_makes_none(architecture: str, variants: list[str], tmp_path: Path) -> None:
    """Bit for bit: a zero times a negative scale would be another zero."""
    checkpoint, model = pruned_model(architecture, tmp_path)
    adapted = adapt(model, sites_of(checkpoint), variants)
    train(model, adapted.parameters, next_token, WINDOWS, TrainOptions(steps=4, lr=0.05, batch=2, weight_decay=0.1), masks=adapted.masks)
    merged = adapted.merge()
    linears = describe(checkpoint).linears
    assert set(linears) <= merged.keys()
    for name in linears:
        before, after = checkpoint.read(name), merged[name]
        assert torch.equal(before == 0, after == 0), name
        assert torch.equal(before[before == 0].view(torch.int32), after[before == 0].view(torch.int32))
        assert (before - after).abs().max() > 0


def test_a_pattern_of_two_in_four_outlives_retraining(tmp_path: Path) -> None:
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        groups = layer.weight.view(-1, 4)
        groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    holder = nn.ModuleDict({"up": layer})
    for name in ON_LINEARS:
        adapted = adapt(holder, [Site("up.weight", "up.weight", "linear", (6, 8))], [name])
        disturb(adapted.parameters)
        (merged,) = adapted.merge().values()
        assert ((merged.view(-1, 4) != 0).sum(1) == 2).all(), name


def test_without_zeros_mask_lora_is_lora() -> None:
    """W + alpha / r B A, as peft merges it."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    made = VARIANTS["mask_lora"].make(weight, torch.Generator().manual_seed(1), {"rank": 2, "alpha": 6.0})
    disturb(dict(made.named_parameters()))
    a, b = made.get_parameter("a"), made.get_parameter("b")
    torch.testing.assert_close(made(weight), weight + 3 * b @ a)


def test_the_gradients_of_mask_lora_are_those_of_the_formula() -> None:
    """dA = s B^T (M o G), dB = s (M o G) A^T; nothing of G reaches them where M is zero, and G unmasked does in LoRA-Prune."""
    noise = torch.Generator().manual_seed(0)
    weight = pruned({"w": torch.randn(6, 8, generator=noise)}, ("w",))["w"]
    gradient = torch.randn(6, 8, generator=noise)
    for name, mask in (("mask_lora", (weight != 0).float()), ("lora_prune", torch.ones(6, 8))):
        made = VARIANTS[name].make(weight, torch.Generator().manual_seed(1), {"rank": 2, "alpha": 6.0})
        disturb(dict(made.named_parameters()))
        a, b = made.get_parameter("a"), made.get_parameter("b")
        (made(weight) * gradient).sum().backward()
        torch.testing.assert_close(a.grad, 3 * b.detach().T @ (mask * gradient))
        torch.testing.assert_close(b.grad, 3 * (mask * gradient) @ a.detach().T)


def test_scale_lora_of_any_rank_as_released_stays_of_rank_one() -> None:
    """W o (BA) from equal entries, trained: the second singular value of BA stays nothing, and BA is a row scale times a column scale."""
    noise = torch.Generator().manual_seed(0)
    weight, inputs, target = torch.randn(6, 8, generator=noise), torch.randn(32, 8, generator=noise), torch.randn(32, 6, generator=noise)
    a, b = (nn.Parameter(torch.full(shape, 0.5)) for shape in ((4, 8), (6, 4)))
    optimizer = torch.optim.AdamW([a, b], lr=0.02)
    for _ in range(50):
        optimizer.zero_grad()
        (inputs @ (weight * (b @ a)).T - target).square().mean().backward()
        optimizer.step()
    values = torch.linalg.svdvals((b @ a).detach())
    assert (b @ a - 1).abs().max() > 0.1
    assert values[1] < 1e-5 * values[0]
    made = VARIANTS["scale_lora"].make(weight, None, {})
    disturb(dict(made.named_parameters()))
    torch.testing.assert_close(made(weight), weight * made.get_parameter("rows") * made.get_parameter("columns"))


def test_neuroada_trains_the_largest_of_each_row_and_none_that_is_zero() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.0], [0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    made = VARIANTS["neuroada"].make(weight, None, {"k": 2})
    with torch.no_grad():
        made.get_parameter("theta").fill_(10)
    assert made(weight).tolist() == [[1, 7, 12, 0], [0, 0, 10.5, 0], [0, 0, 0, 0]]


def test_hut_scales_and_cannot_repair_a_row_of_zeros() -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    made = VARIANTS["hut"].make(weight, torch.Generator().manual_seed(0), {"rank": 1, "alpha": 1.0})
    disturb(dict(made.named_parameters()), 1.0)
    a, b = made.get_parameter("a"), made.get_parameter("b")
    torch.testing.assert_close(made(weight), weight * (1 + b @ a))
    assert made(weight)[1].tolist() == [0, 0]


def test_sara_revives_what_was_pruned_and_says_so() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, -0.1]])
    made = VARIANTS["sara"].make(weight, None, {"quantile": 0.5})
    with torch.no_grad():
        made.get_parameter("theta").fill_(1)
    assert made(weight).tolist() == [[1, 3, 1, pytest.approx(-0.1)]]
    assert [name for name, variant in VARIANTS.items() if variant.densifies] == ["sara"]


def test_the_head_is_untied_and_the_embeddings_stay(tmp_path: Path) -> None:
    checkpoint, model = pruned_model("GPT2LMHeadModel", tmp_path)
    embeddings = model.transformer.wte.weight.detach().clone()
    adapted = adapt(model, sites_of(checkpoint), ["head"])
    disturb(adapted.parameters)
    trained = logits(model)
    assert adapted.merge().keys() == {"lm_head.weight"}
    torch.testing.assert_close(logits(model), trained)
    assert torch.equal(model.transformer.wte.weight, embeddings)
    assert not torch.equal(model.lm_head.weight, embeddings)


def test_bfloat16_autocast_leaves_the_weights_of_adapters_in_float32(tmp_path: Path) -> None:
    checkpoint, model = pruned_model("LlamaForCausalLM", tmp_path)
    adapted = adapt(model, sites_of(checkpoint), ["mask_lora"])
    disturb(adapted.parameters)
    exact = model.model.layers[0].mlp.up_proj.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact)


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        ([], {}, "say what is to train: biases, norms"),
        (["mask_lroa"], {}, "unknown retraining variant 'mask_lroa'. Did you mean 'mask_lora'?"),
        (["norms", "norms"], {}, "'norms' is named twice"),
        (["full", "norms"], {}, "full trains everything; leave out norms, or full"),
        (["norms", "mask_lora"], {"rnak": 3}, "norms, mask_lora: no option 'rnak'. Did you mean 'rank'?"),
        (["mask_lora"], {"rank": 0}, "mask_lora: rank=0: Input should be greater than or equal to 1"),
        (["biases"], {}, "biases: the model has nothing of the kind to train; leave it out"),
    ],
)
def test_what_cannot_be_trained_is_refused(variants: list[str], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = tiny_model("LlamaForCausalLM", tmp_path)
    with pytest.raises(OptionError, match=message.replace("?", r"\?")):
        adapt(load_model(checkpoint), sites_of(checkpoint), variants, options)
