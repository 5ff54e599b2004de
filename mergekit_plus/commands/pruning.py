"""Doors to pruning, folding and retraining. Heavy things are imported where they are used."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import (
    Calibrate,
    CalibrationSeed,
    CalibrationWindow,
    CalibrationWindows,
    Exclude,
    FewWindows,
    Include,
    LessonText,
    Model,
    Set,
    Writing,
    app,
    beside,
    calibration_key,
    carried_out,
    carry_out,
    check_device,
    execution_of,
    hash_early,
    open_model,
    print_result,
    settings,
    text_key,
    writes,
)

if TYPE_CHECKING:
    from mergekit_plus.digests import Digests


@app.command()
@writes()
def prune(
    *,
    how: Writing,
    model: Model = ".",
    sparsity: Annotated[float | None, typer.Option("--sparsity", help="share of zeros, as in 0.5")] = None,
    pattern: Annotated[str | None, typer.Option("--pattern", metavar="N:M", help="at most n weights that are not zero in every m inputs, as in 2:4")] = None,
    structured: Annotated[
        str | None, typer.Option("--structured", metavar="mlp=SHARE,heads=SHARE", help="take neurons and heads out whole: a smaller ordinary model")
    ] = None,
    mask: Annotated[str | None, typer.Option("--mask", help="zeros where this has them: masks saved by --masks, or a pruned model")] = None,
    masks: Annotated[Path | None, typer.Option("--masks", help="write the masks too, one bit a weight, to this .safetensors file")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="see `compress methods`")] = "magnitude",
    scope: Annotated[str | None, typer.Option("--scope", help="what is compared: row, tensor, block or global (default: the method's own)")] = None,
    calibration: Calibrate = [],  # noqa: B006
    windows: CalibrationWindows = None,
    window: CalibrationWindow = None,
    allocate: Annotated[bool, typer.Option("--allocate", help="a sparsity for each layer, by what it costs the predictions on the text")] = False,
    reconstruct: Annotated[
        str | None, typer.Option("--reconstruct", metavar="block|sublayer|linear", help="train a little of each until it computes again what it did")
    ] = None,
    retrain: Annotated[
        str | None, typer.Option("--retrain", metavar="VARIANT,...", help="then retrain these on the calibration text, as `compress retrain` does")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the method that draws at random; moves the windows of the calibration text")] = 0,
    set_: Set = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    include: Include = [],  # noqa: B006
) -> None:
    """Set weights to zero, or take out neurons and heads.

    `compress prune merged --sparsity 0.5`

    `compress prune code --pattern 2:4 --method wanda --calibration code.txt`
    """
    digests = None if how.resume else hash_early(model)
    from mergekit_plus.errors import OptionError
    from mergekit_plus.recipe import check
    from prune import PRUNERS

    if masks is not None and masks.exists() and not how.overwrite:
        raise OptionError(f"{masks} exists already; name another file with --masks, or replace it with --overwrite")
    used = structured or reconstruct or allocate or (method in PRUNERS and PRUNERS[method].calibrated)  # the text may be for --retrain alone
    reading = {"windows": windows, "window": window, "seed": seed if calibration else None}
    step = {
        "sparsity": sparsity, "pattern": pattern, "method": method, "scope": scope, "seed": seed, "exclude": exclude, "include": include,
        "structured": _shares(structured), "mask": "mask" if mask else None, "of": "model", "reconstruct": reconstruct,
        "allocate": allocate, **(calibration_key(calibration, **reading) if used or not retrain else {}), **settings(set_),
    }  # fmt: skip
    steps: list[dict[str, Any]] = [{"prune": step}]
    if retrain is not None:
        if not calibration:
            raise OptionError("--retrain trains on a text: give it with --calibration")
        steps.append({"retrain": {"train": retrain, "text": text_key(calibration, window=window, seed=seed), "seed": seed}})
    recipe = check({"inputs": {"model": model, **({"mask": mask} if mask else {})}, "steps": steps}, Path(), "compress prune")
    default = beside(model, "smaller" if structured else "pruned", "folder" if structured else "file")
    carry_out(recipe, how, default, digests)
    if masks is not None and not how.dry_run:
        from mergekit_plus.checkpoint import SaveOptions, save
        from prune.plan import PruneOptions, masks_of

        save(masks_of(open_model(str(how.out or default)), PruneOptions(tuple(exclude))), masks, SaveOptions(how.overwrite))


@app.command()
@writes()
def fold(
    *,
    how: Writing,
    model: Model = ".",
    remove: Annotated[float, typer.Option("--remove", help="blocks to take out: a share such as 0.25, or a number")] = 0,
    keep: Annotated[str | None, typer.Option("--keep", metavar="N,N,...", help="blocks that stay, in order, in place of --remove")] = None,
    by: Annotated[str, typer.Option("--by", help="what tells which blocks go: leave-one-out, gates or influence")] = "leave-one-out",
    share: Annotated[int, typer.Option("--share", min=1, help="blocks that share one set of linear weights")] = 1,
    map_: Annotated[
        Literal["sequence", "cycle", "middle_cycle"], typer.Option("--map", help="which blocks share: neighbours, or those of a cycle that is run again")
    ] = "sequence",
    parent: Annotated[
        Literal["first", "average", "stepwise", "loss"],
        typer.Option("--parent", help="whose weights those are: the first block's, the mean, a block's at regular intervals, or what a text likes best"),
    ] = "first",
    relax: Annotated[str | None, typer.Option("--relax", metavar="lora:RANK[:zero]", help="give each block that shares low-rank factors of its own")] = None,
    compact: Annotated[bool, typer.Option("--compact", help="store once what blocks share; transformers loads that with trust_remote_code")] = False,
    expand: Annotated[bool, typer.Option("--expand", help="turn a compact model into an ordinary one")] = False,
    export: Annotated[
        Literal["peft", "lora"] | None,
        typer.Option("--export", help="turn a compact model into OUT-base and OUT-adapter: layers that peft replicates, or all and a plain adapter"),
    ] = None,
    residual_scale: Annotated[bool, typer.Option("--residual-scale", help="fit a factor for each residual branch to the calibration text")] = False,
    budget: Annotated[float | None, typer.Option("--budget", help="write a plan, not a model: what goes and what shares for this share of the bytes")] = None,
    operations: Annotated[float | None, typer.Option("--operations", help="the same, for this share of what the blocks compute")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="plan.yaml of --budget: what goes and what shares")] = None,
    calibration: Calibrate = [],  # noqa: B006
    windows: FewWindows = 64,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
) -> None:
    """Take out the blocks that count least, or share their weights.

    `compress fold merged --remove 0.25 --calibration code.txt`
    """
    digests = None if how.resume else hash_early(model)
    from mergekit_plus.recipe import check

    how_it_shares = share > 1 or map_ != "sequence" or parent != "first" or relax or compact
    says = bool(remove or keep is not None or by != "leave-one-out" or how_it_shares or plan or residual_scale)
    plans = budget is not None or operations is not None
    if expand or export:
        folds = says or plans or bool(calibration) or (expand and export is not None)
        return _expand(model, how, folds, digests) if expand else _export(model, how, export or "peft", folds, digests)
    text = calibration_key(calibration, windows=windows, window=window, seed=seed) if calibration else {}
    if plans:
        if says:
            from mergekit_plus.errors import OptionError

            raise OptionError("a budget is for finding a plan, on which nothing else bears; fold with --plan then")
        return _plan_depth(model, budget, operations, text, how)
    step = {
        "remove": remove, "by": by, "share": share, "map": map_, "parent": parent, "relax": relax, "compact": compact, "of": "model",
        **({"keep": _numbers("--keep", keep)} if keep is not None else {}), "plan": plan and str(plan), "residual_scale": residual_scale, **text,
    }  # fmt: skip
    recipe = check({"inputs": {"model": model}, "steps": [{"fold": step}]}, Path(), "compress fold")
    carry_out(recipe, how, beside(model, "compact" if compact else "folded", "folder"), digests)


def _expand(model: str, how: Writing, folds: bool, digests: Digests | None) -> None:
    """`compress fold COMPACT --expand`: what a compact model opens as, written out."""
    from mergekit_plus.errors import OptionError
    from mergekit_plus.inspection import inspect
    from mergekit_plus.recipe import check

    if folds:
        raise OptionError("--expand writes out what a compact model stands for; fold that in a run of its own")
    if inspect(open_model(model))["compact"] is None:
        raise OptionError(f"{model} is not a compact model; --expand turns one into an ordinary model")
    carry_out(check({"inputs": {"model": model}}, Path(), "compress fold --expand"), how, beside(model, "expanded", "folder"), digests)


def _export(model: str, how: Writing, layout: str, folds: bool, digests: Digests | None) -> None:
    """`compress fold COMPACT --export peft`: a base, and an adapter that names it."""
    from mergekit_plus.checkpoint.upload import parse_target
    from mergekit_plus.errors import OptionError
    from mergekit_plus.recipe import check

    if folds:
        raise OptionError("--export writes out what a compact model stands for; fold, or expand, in a run of its own")
    out = how.out or beside(model, layout, "folder")
    if how.push or parse_target(str(out)):
        raise OptionError("--export writes two folders; write them here, and publish each of them")
    base, facts, lines = out.with_name(f"{out.name}-base"), dict[str, Any](), list[str]()
    for part in ("base", "adapter"):
        step = {"part": part, "layout": layout, **({"base": str(base)} if part == "adapter" else {})}
        recipe = check({"inputs": {"model": model}, "steps": [{"export_fold": step}]}, Path(), "compress fold --export")
        facts[part], told, _ = carried_out(recipe, replace(how, out=out.with_name(f"{out.name}-{part}")), None, digests)
        lines += told
    print_result(facts, lines, how.as_json)


def _plan_depth(model: str, budget: float | None, operations: float | None, text: dict[str, Any], how: Writing) -> None:
    """Find a plan for `compress fold --plan`, and write it."""
    from mergekit_plus.calibration.options import CalibrationOptions
    from mergekit_plus.checkpoint.upload import parse_target
    from mergekit_plus.depths import DepthOptions, facts, plan_depth
    from mergekit_plus.errors import OptionError
    from mergekit_plus.progress import on
    from mergekit_plus.show import depth_lines

    out = how.out or Path("plan.yaml")
    if how.dry_run or how.push or parse_target(str(out)):
        raise OptionError("a plan is one small file, which is written here; leave out --dry-run and --push")
    if not text:
        raise OptionError("a plan is found on a text: give one with --calibration FILE")
    check_device(how.device)
    options = CalibrationOptions.model_validate(text["calibration"])
    for problem in options.problems(Path()):
        raise OptionError(f"--calibration: {problem}")
    asked = DepthOptions(options, budget, operations, device=how.device, overwrite=how.overwrite)
    found = facts(plan_depth(open_model(model), asked, out, on()))
    print_result(found, depth_lines(found), how.as_json)


@app.command()
@writes()
def retrain(
    *,
    how: Writing,
    model: Model = ".",
    train: Annotated[str, typer.Option("--train", metavar="VARIANT,...", help="what trains: biases, norms, head, mask_lora, ...; see `compress methods`")],
    text: LessonText,
    steps: Annotated[int, typer.Option("--steps", help="steps of the optimiser")] = 200,
    lr: Annotated[float | None, typer.Option("--lr", help="largest learning rate (default 0.001)")] = None,
    tune_lr: Annotated[bool, typer.Option("--tune-lr", help="find the learning rate on a part of the text")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="rank of low-rank updates (default 16)")] = None,
    window: CalibrationWindow = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="model whose predictions are the goal, as a rule the one before pruning")] = None,
    distill: Annotated[float, typer.Option("--distill", min=0, max=1, help="the teacher's part of the loss; the rest is the text's")] = 1.0,
    tail: Annotated[int, typer.Option("--tail", min=0, help="last blocks that are drawn towards those of the teacher that they were, too")] = 0,
    tail_weight: Annotated[float, typer.Option("--tail-weight", min=0, help="how much the tail counts beside the predictions")] = 1.0,
    kept: Annotated[
        str | None, typer.Option("--kept", metavar="N,N,...", help="the teacher's blocks that the model's were, where a compact model does not say it")
    ] = None,
    allow_densify: Annotated[bool, typer.Option("--allow-densify", help="allow a variant that brings pruned weights back")] = False,
    seed: Annotated[int, typer.Option("--seed", help="seed of the start and of the order of the text")] = 0,
    set_: Set = [],  # noqa: B006
) -> None:
    """Retrain a few parameters of a pruned or folded model.

    It stays as sparse, and as compact, as it is.

    `compress retrain merged-pruned --train mask_lora -t code.txt --steps 20`
    """
    digests = None if how.resume else hash_early(model, *([teacher] if teacher else []))
    from mergekit_plus.recipe import check

    step = {
        "train": train, "text": text_key(text, window=window, seed=seed), "teacher": "teacher" if teacher else None, "distill": distill,
        "tail": tail, "tail_weight": tail_weight, **({"kept": _numbers("--kept", kept)} if kept is not None else {}),
        "tune_lr": tune_lr, "allow_densify": allow_densify, "of": "model", "steps": steps, "seed": seed,
        **({"lr": lr} if lr is not None else {}), **({"rank": rank} if rank is not None else {}), **settings(set_),
    }  # fmt: skip
    recipe = check({"inputs": {"model": model, **({"teacher": teacher} if teacher else {})}, "steps": [{"retrain": step}]}, Path(), "compress retrain")
    if (local := os.environ.get("LOCAL_RANK")) and how.device == "cuda":  # torchrun: a card for each process
        how = replace(how, device=f"cuda:{local}")
    if int(os.environ.get("RANK", 0)):
        from mergekit_plus.recipe import help_with

        return None if how.dry_run else help_with(recipe, execution_of(how, None, digests))
    carry_out(recipe, how, beside(model, "retrained", "folder"), digests)


def _shares(given: str | None) -> dict[str, Any] | None:
    """`mlp=0.25,heads=0.5` by name."""
    return None if given is None else settings(given.split(","), "--structured")


def _numbers(option: str, given: str) -> list[int]:
    """`0,1,5` as numbers."""
    from mergekit_plus.errors import OptionError

    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise OptionError(f"{option} {given}: write numbers with commas between, as in 0,1,5") from None
