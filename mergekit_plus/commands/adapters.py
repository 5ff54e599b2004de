"""Doors to adapters. Heavy things are imported where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_plus.names import distinct

from .common import (
    Calibrate,
    CalibrationSeed,
    CalibrationWindow,
    CalibrationWindows,
    Dtype,
    Exclude,
    LessonText,
    Set,
    Writing,
    adapter,
    beside,
    calibration_key,
    carried_out,
    carry_out,
    open_model,
    print_result,
    settings,
    text_key,
    writes,
)

Codebook = Annotated[str, typer.Option("--codebook", help="l2 (Lloyd-Max) or k-median (the 1-bit adapters of arXiv 2307.16867)")]
FactorScale = Annotated[str, typer.Option("--scale", help="what shares a scale: tensor, component (row of A, column of B) or group (of 128)")]
LessonSteps = Annotated[int, typer.Option("--steps", min=1, help="steps of the training")]
LessonBatch = Annotated[int, typer.Option("--batch", min=1, help="windows that a step reads")]
LessonRate = Annotated[float | None, typer.Option("--lr", help="learning rate; relative to the size of what trains, where that starts from something")]
LessonAutocast = Annotated[bool, typer.Option("--autocast", help="train in bfloat16 where torch finds it safe")]
LessonSeed = Annotated[int, typer.Option("--seed", help="seed of the order of the text, and of what starts at random")]


@adapter.command("merge")
@writes("max_shard_size")
def merge_adapters(
    *,
    how: Writing,
    adapters: Annotated[list[str], typer.Argument(help="LoRA adapters of one base: folders as peft writes them, or org/name")],
    method: Annotated[str, typer.Option("--method", "-m", help="linear: exact, ranks add up; svd: linear, brought to a rank; or a merge method")] = "linear",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="rank of the result (default: the sum for linear, else the largest)")] = None,
    set_: Set = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", help="seed of the methods that draw at random")] = 0,
    dtype: Dtype = None,
) -> None:
    """Merge adapters into one.

    `compress adapter merge code-lora docs-lora`
    """
    from mergekit_plus.recipe import check

    names = distinct(adapters)
    step = {"method": method, "models": list(names), "rank": rank, "seed": seed, "dtype": dtype, **settings(set_)}
    recipe = check({"inputs": names, "steps": [{"merge_adapters": step}]}, Path(), "compress adapter merge")
    carry_out(recipe, how, Path("merged-adapter"))


@adapter.command()
@writes("max_shard_size", "allow_nonfinite")
def extract(
    *,
    how: Writing,
    base: Annotated[str, typer.Argument(help="the model that the other was tuned from")],
    tuned: Annotated[str, typer.Argument(help="the fine-tune")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="rank of every module")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="the least ranks that keep this share of each squared change, as in 0.95")] = None,
    save_rest: Annotated[bool, typer.Option("--save-rest", help="store what changed and is no linear layer whole: norms, embeddings, heads, biases")] = False,
    exclude: Exclude = [],  # noqa: B006
    dtype: Annotated[str, typer.Option("--dtype", help="float dtype of the factors")] = "float32",
    calibration: Calibrate = [],  # noqa: B006
    windows: CalibrationWindows = None,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
) -> None:
    """Extract a LoRA adapter from a fine-tune.

    It is said what that loses.

    `compress adapter extract base code --rank 16`
    """
    from dataclasses import asdict

    from mergekit_plus.adapters.extract import kept
    from mergekit_plus.checkpoint import Checkpoint
    from mergekit_plus.recipe import check
    from mergekit_plus.show import kept_lines

    step = {
        "base": "base", "tuned": "tuned", "rank": rank, "energy": energy, "save_rest": save_rest, "exclude": exclude, "dtype": dtype,
        **calibration_key(calibration, windows=windows, window=window, seed=seed),
    }  # fmt: skip
    recipe = check({"inputs": {"base": base, "tuned": tuned}, "steps": [{"extract_adapter": step}]}, Path(), "compress adapter extract")
    opened = [Checkpoint.open(ref, how.cache) for ref in (base, tuned)]  # now: a branch on the Hub may be elsewhere when the report is made
    facts, lines, outcome = carried_out(recipe, how, beside(tuned, "adapter", "folder"))
    if outcome is not None:
        report = kept(opened[0], opened[1], open_model(str(outcome.out)), exclude)
        facts, lines = {**facts, "kept": [asdict(tensor) for tensor in report]}, kept_lines(report) + lines
    print_result(facts, lines, how.as_json)


@adapter.command("quantize")
@writes("max_shard_size", "device")
def quantize_adapter(
    *,
    how: Writing,
    adapter: Annotated[str, typer.Argument(help="a LoRA adapter: a folder as peft writes it, or org/name")],
    bits: Annotated[int, typer.Option("--bits", help="1, 2, 3, 4 or 8 bits for each number in the factors")] = 4,
    codebook: Codebook = "l2",
    scale: FactorScale = "component",
    average_bits: Annotated[float | None, typer.Option("--average-bits", help="a width for each component, so many bits on the average")] = None,
    gauge: Annotated[str | None, typer.Option("--gauge", help="how B A is shared out before it is coded: balanced, svd, or none (as it is)")] = None,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="fit codes and scales to the product B A")] = True,
    distill: Annotated[float, typer.Option("--distill", min=0, max=1, help="the adapter's own predictions' part of the loss; the rest is the text's")] = 1.0,
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model that it was trained on, to distil with --text")] = None,
    text: LessonText = [],  # noqa: B006
    window: CalibrationWindow = None,
    steps: LessonSteps = 200,
    batch: LessonBatch = 4,
    lr: LessonRate = None,
    autocast: LessonAutocast = False,
    seed: LessonSeed = 0,
) -> None:
    """Bring a LoRA adapter to a few bits, packed.

    With --base and --text it is distilled for them.

    `compress adapter quantize code-lora --bits 2`
    """
    from mergekit_plus.recipe import check

    coding = {"bits": bits, "average_bits": average_bits, "codebook": codebook, "scale": scale, "gauge": gauge, "refit": refit, "distill": distill}
    step = {**coding, **_lesson(text, window, steps, batch, lr, autocast, seed)}
    inputs = {"adapter": adapter}
    if base is not None:
        inputs["base"] = base
        step |= {"base": "base", "of": "adapter"}
    recipe = check({"inputs": inputs, "steps": [{"quantize_adapter": step}]}, Path(), "compress adapter quantize")
    carry_out(recipe, how, beside(adapter, f"{average_bits or bits:g}bit", "folder"))


@adapter.command()
@writes("max_shard_size")
def expand(
    *,
    how: Writing,
    adapter: Annotated[str, typer.Argument(help="a packed adapter, or the packed difference of a fine-tune")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model that a difference is of; the output is a model then")] = None,
) -> None:
    """Turn a packed adapter into an ordinary one.

    peft and vLLM load that. With --base, a packed difference becomes a model.

    `compress adapter expand code-lora-2bit`
    """
    from mergekit_plus.errors import CheckpointError
    from mergekit_plus.inspection import packed_facts
    from mergekit_plus.recipe import check

    ref = adapter if base is None else f"{base}+{adapter}"
    if packed_facts(open_model(ref)) is None:
        raise CheckpointError(f"{ref} is not packed: it is as peft and engines read it")
    carry_out(check({"inputs": {"adapter": ref}}, Path(), "compress adapter expand"), how, beside(adapter, "expanded", "folder"))


@adapter.command()
@writes("max_shard_size", "device")
def train(
    *,
    how: Writing,
    base: Annotated[str, typer.Argument(help="the model that the adapter is for")],
    text: LessonText,
    bits: Annotated[int, typer.Option("--bits", help="1, 2, 3, 4 or 8 bits for each number in the factors; 16 trains a plain LoRA")] = 1,
    rank: Annotated[int, typer.Option("--rank", min=1, help="rank of every module")] = 8,
    target: Annotated[list[str], typer.Option("--target", metavar="PATTERN", help="modules, as in q_proj (default: all linear layers)")] = [],  # noqa: B006
    codebook: Codebook = "l2",
    scale: FactorScale = "component",
    init: Annotated[str, typer.Option("--init", help="lora; or components of the weights: pissa, corda-ipm (what a text uses), corda-kpm (the rest)")] = "lora",
    calibration: Calibrate = [],  # noqa: B006
    budget: Annotated[int | None, typer.Option("--budget", min=1, help="parameters in all: ranks up to --rank, where the loss is most sensitive (SPT)")] = None,
    pool_rank: Annotated[int | None, typer.Option("--pool-rank", min=1, help="modules of a kind share pools, as large as LoRA of this rank (MoS)")] = None,
    pool_private: Annotated[int, typer.Option("--pool-private", min=0, help="ranks of the pools that are each module's own")] = 1,
    pool_shards: Annotated[int, typer.Option("--pool-shards", min=1, help="pieces that a row is put together from")] = 4,
    neurons: Annotated[int | None, typer.Option("--neurons", min=1, help="in place of a LoRA, so many neurons in every MLP (AdaptFormer)")] = None,
    window: CalibrationWindow = None,
    steps: LessonSteps = 200,
    batch: LessonBatch = 4,
    lr: LessonRate = None,
    autocast: LessonAutocast = False,
    seed: LessonSeed = 0,
) -> None:
    """Train a LoRA adapter for few bits from scratch.

    `compress adapter train base --text code.txt --bits 1 --rank 16 --steps 20`
    """
    from mergekit_plus.recipe import check

    step = {
        "base": "base", "bits": bits, "rank": rank, "target": target, "codebook": codebook, "scale": scale, "init": init, "budget": budget,
        "neurons": neurons, "pools": {"rank": pool_rank, "private": pool_private, "shards": pool_shards} if pool_rank else None,
        **_lesson(text, window, steps, batch, lr, autocast, seed), **calibration_key(calibration),
    }  # fmt: skip
    recipe = check({"inputs": {"base": base}, "steps": [{"train_adapter": step}]}, Path(), "compress adapter train")
    carry_out(recipe, how, beside(base, f"{bits}bit-adapter", "folder"))


@adapter.command()
@writes("max_shard_size", "device")
def delta(
    *,
    how: Writing,
    base: Annotated[str, typer.Argument(help="the model that the other was tuned from")],
    tuned: Annotated[str, typer.Argument(help="the fine-tune")],
    bits: Annotated[int, typer.Option("--bits", help="1, 2, 3, 4 or 8 bits for each weight")] = 1,
    scale: Annotated[str, typer.Option("--scale", help="what shares a scale: tensor, or row (of a weight)")] = "tensor",
    save_rest: Annotated[bool, typer.Option("--save-rest/--leave-rest", help="store what changed and is no linear layer whole, or leave it")] = True,
    exclude: Exclude = [],  # noqa: B006
    text: LessonText = [],  # noqa: B006
    window: CalibrationWindow = None,
    steps: LessonSteps = 100,
    batch: LessonBatch = 4,
    lr: LessonRate = None,
    autocast: LessonAutocast = False,
    seed: LessonSeed = 0,
) -> None:
    """Bring the difference of a fine-tune to a bit a weight.

    That is BitDelta; --text trains its scales.

    `compress adapter delta base code`
    """
    from mergekit_plus.recipe import check

    step = {
        "base": "base", "tuned": "tuned", "bits": bits, "scale": scale, "save_rest": save_rest, "exclude": exclude,
        **_lesson(text, window, steps, batch, lr, autocast, seed),
    }  # fmt: skip
    recipe = check({"inputs": {"base": base, "tuned": tuned}, "steps": [{"delta": step}]}, Path(), "compress adapter delta")
    carry_out(recipe, how, beside(tuned, "delta", "folder"))


def _lesson(text: list[str], window: int | None, steps: int, batch: int, lr: float | None, autocast: bool, seed: int) -> dict[str, Any]:
    """The keys of a step that trains on a text; nothing where no text is given."""
    how = {"steps": steps, "batch": batch, "lr": lr, "autocast": autocast, "seed": seed}
    return {"text": text_key(text, window=window, seed=seed), **how} if text else {}
