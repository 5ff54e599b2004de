"""The `compress` program: thin doors, each to one library call. Heavy things are imported where they are used."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from mergekit_plus.checkpoint import Checkpoint
    from mergekit_plus.digests import Digests
    from mergekit_plus.recipe import Outcome, Recipe
    from mergekit_plus.steps import Execution

app = typer.Typer(
    name="compress",
    help="Merge and compress model checkpoints as one stream: read tensor by tensor, written once, checked.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

adapter = typer.Typer(help="Merge LoRA adapters, or extract one from a fine-tune; MODEL+ADAPTER is a model everywhere.", no_args_is_help=True)
app.add_typer(adapter, name="adapter")

_OWN_STEP = r"^compress ((?:adapter )?(\w+)): (?:step 1, )?\2(?:_adapters?)?: "  # what a command made of its arguments

Model = Annotated[
    str, typer.Argument(help="a model folder, a .safetensors file, or org/name[@revision][/folder] on the Hub; MODEL+ADAPTER applies a LoRA adapter")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="folder to write, a file where it ends in .safetensors, or hf://org/name[@branch]")]
Push = Annotated[str | None, typer.Option("--push", metavar="ORG/NAME[@BRANCH]", help="put the output folder on the Hub too, in one commit")]
Private = Annotated[bool, typer.Option("--private", help="make the repository private, where it has to be created")]
Set = Annotated[
    list[str], typer.Option("--set", "-s", metavar="NAME=VALUE", help="option of the method, as `compress methods` lists them; a,b,c: one value for each model")
]
Exclude = Annotated[list[str], typer.Option("--exclude", metavar="PATTERN", help="tensors to leave as they are; shell pattern, may be repeated")]
Include = Annotated[
    list[str], typer.Option("--include", metavar="PATTERN", help="write only these tensors, as in 'layers.3.*'; shell pattern, may be repeated")
]
Cache = Annotated[bool, typer.Option("--cache", help="bring models on the Hub into the local Hub cache first, in place of reading ranges of them")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")]
Resume = Annotated[bool, typer.Option("--resume", help="go on where an interrupted run of the same command stopped")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be read, written and needed; write nothing")]
Memory = Annotated[str | None, typer.Option("--memory", help="bytes in flight, as in 2GB (default: half of what is free)")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="threads that compute (default: one for each core)")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="largest file to write")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float dtype of the result (default: that of the inputs)")]
Device = Annotated[str, typer.Option("--device", help="where to compute: cpu, cuda, cuda:1")]
NonFinite = Annotated[bool, typer.Option("--allow-nonfinite", help="carry NaN and infinite values instead of refusing them")]
Search = Annotated[
    str | None,
    typer.Option("--search", metavar="OPTION[=LOW..HIGH],...", help="options to be found on --text; OPTION:each, :depth3, :kinds for a value each"),
]
Texts = Annotated[list[str], typer.Option("--text", "-t", metavar="[NAME=]FILE", help="text to measure on; may be repeated")]
HeldOut = Annotated[list[str], typer.Option("--heldout", metavar="[NAME=]FILE", help="text on which the outcome of --search is measured; may be repeated")]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="use only so many windows of each text")]
Calibrate = Annotated[
    list[str], typer.Option("--calibration", metavar="FILE", help="text for methods that look at the inputs of layers: .txt, .jsonl, a folder; may be repeated")
]
CalibrationWindows = Annotated[int | None, typer.Option("--windows", min=1, help="windows of the text, spread over it (default: 128)")]
FewWindows = Annotated[int, typer.Option("--windows", min=1, help="windows of the text, spread over it")]
CalibrationWindow = Annotated[int | None, typer.Option("--window", min=2, help="tokens in a window of the text (default: 256, or what the model takes)")]
CalibrationSeed = Annotated[int | None, typer.Option("--seed", help="moves the windows of the text (default: 0)")]
LessonText = Annotated[list[str], typer.Option("--text", "-t", metavar="FILE", help="text to train on: .txt, .jsonl, a folder; may be repeated")]
LessonWindow = CalibrationWindow
LessonSteps = Annotated[int, typer.Option("--steps", min=1, help="steps of the training")]
LessonBatch = Annotated[int, typer.Option("--batch", min=1, help="windows that a step reads")]
LessonRate = Annotated[float | None, typer.Option("--lr", help="learning rate; relative to the size of what trains, where that starts from something")]
LessonSeed = Annotated[int, typer.Option("--seed", help="seed of the order of the text, and of what starts at random")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@dataclass(frozen=True)
class Writing:
    """The options of every command that writes a checkpoint."""

    out: Out = None
    overwrite: Overwrite = False
    resume: Resume = False
    dry_run: DryRun = False
    memory: Memory = None
    workers: Workers = None
    max_shard_size: ShardSize = "5GB"
    device: Device = "cpu"
    allow_nonfinite: NonFinite = False
    cache: Cache = False
    push: Push = None
    private: Private = False
    as_json: Json = False


def writes(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter `how` stands for an option for each field of `Writing`, but for those that mean nothing to it."""

    def spelt_out(function: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            names = {field.name for field in fields(Writing)} & given.keys()
            function(how=Writing(**{name: given.pop(name) for name in names}), **given)

        hints = get_type_hints(function, include_extras=True)
        own = [parameter.replace(annotation=hints[name]) for name, parameter in signature(function).parameters.items() if name != "how"]
        hints = get_type_hints(Writing, include_extras=True)
        common = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(Writing)
            if field.name not in without
        ]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own] + common
        command.__signature__ = signature(function).replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return spelt_out


@app.command()
@writes()
def merge(
    *,
    how: Writing,
    models: Annotated[list[str], typer.Argument(help="the models to merge: files, folders or org/name")],
    method: Annotated[str, typer.Option("--method", "-m", help="see `compress methods`")] = "linear",
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model the others were tuned from")] = None,
    set_: Set = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    include: Include = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", help="seed of the methods that draw at random")] = 0,
    search: Search = None,
    text: Texts = [],  # noqa: B006
    objective: Annotated[Literal["mean", "worst", "kl"], typer.Option("--objective", help="what --search minimises, as docs/search.md says")] = "mean",
    budget: Annotated[int, typer.Option("--budget", min=2, help="models that --search measures")] = 40,
    windows: Annotated[int, typer.Option("--windows", min=1, help="windows of each text that --search reads")] = 8,
    heldout: HeldOut = [],  # noqa: B006
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="align the vocabularies to this tokenizer: union, base, or a model")] = None,
    pad_to_multiple_of: Annotated[int | None, typer.Option("--pad-to-multiple-of", min=1, help="length of the vocabulary, with --tokenizer")] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="auto (the most common one), chatml, llama3, mistral, alpaca, a model, or Jinja text")
    ] = None,
    dtype: Dtype = None,
) -> None:
    """Merge models: `compress merge a.safetensors b.safetensors`."""
    digests = None if how.resume else _hash_early(*models, *([base] if base else []))  # what was hashed before is not hashed again
    from mergekit_plus.recipe import check

    names = _distinct(models)
    step: dict[str, Any] = {"method": method, "models": list(names), "exclude": exclude, "include": include, "seed": seed, "dtype": dtype, **_settings(set_)}
    inputs = dict(names)
    if search is not None:
        from mergekit_plus.search.space import parse_axes

        step["search"] = {"options": parse_axes(search), "texts": _named(text), "objective": objective, "budget": budget,
                          "windows": windows, "heldout": _named(heldout)}  # fmt: skip
    elif text or heldout:
        from mergekit_plus.errors import OptionError

        raise OptionError("--text and --heldout are for a search; say what is searched, as in --search lambda, or measure the merge with `compress eval`")
    if base is not None:
        step["base"] = next((name for name, ref in names.items() if ref == base), "base")
        inputs.setdefault(step["base"], base)
    step["tokenizer"] = _tokenizer(tokenizer, pad_to_multiple_of, chat_template, inputs)
    recipe = check({"inputs": inputs, "steps": [{"merge": step}]}, Path(), "compress merge")
    single = all(Path(ref).is_file() or (ref.endswith(".safetensors") and not Path(ref).is_dir()) for ref in models)
    default = Path("merged.safetensors" if single else "merged")
    _carry_out(recipe, how, default, digests)


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
    """Merge adapters into one: `compress adapter merge ./code-lora ./docs-lora`."""
    from mergekit_plus.recipe import check

    names = _distinct(adapters)
    step = {"method": method, "models": list(names), "rank": rank, "seed": seed, "dtype": dtype, **_settings(set_)}
    recipe = check({"inputs": names, "steps": [{"merge_adapters": step}]}, Path(), "compress adapter merge")
    _carry_out(recipe, how, Path("merged-adapter"))


@adapter.command()
@writes("max_shard_size", "device", "allow_nonfinite")
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
) -> None:
    """Extract a LoRA adapter from a fine-tune, and say what it loses: `compress adapter extract org/base ./tuned --rank 16`."""
    from dataclasses import asdict

    from mergekit_plus.adapters.extract import kept
    from mergekit_plus.checkpoint import Checkpoint
    from mergekit_plus.recipe import check
    from mergekit_plus.show import kept_lines, outcome_facts, outcome_lines

    step = {"base": "base", "tuned": "tuned", "rank": rank, "energy": energy, "save_rest": save_rest, "exclude": exclude, "dtype": dtype}
    recipe = check({"inputs": {"base": base, "tuned": tuned}, "steps": [{"extract_adapter": step}]}, Path(), "compress adapter extract")
    opened = [Checkpoint.open(ref, how.cache) for ref in (base, tuned)]  # now: a branch on the Hub may be elsewhere when the report is made
    outcome = _outcome(recipe, how, _beside(tuned, "adapter", "folder"))
    if outcome is not None:
        report = kept(opened[0], opened[1], _open(str(outcome.out)), exclude)
        _print({**outcome_facts(outcome), "kept": [asdict(tensor) for tensor in report]}, kept_lines(report) + outcome_lines(outcome), how.as_json)


@adapter.command("quantize")
@writes("max_shard_size", "device")
def quantize_adapter(
    *,
    how: Writing,
    adapter: Annotated[str, typer.Argument(help="a LoRA adapter: a folder as peft writes it, or org/name")],
    bits: Annotated[int, typer.Option("--bits", help="1, 2, 3, 4 or 8 bits for each number in the factors")] = 4,
    codebook: Annotated[str, typer.Option("--codebook", help="l2 (Lloyd-Max) or k-median (the 1-bit adapters of arXiv 2307.16867)")] = "l2",
    scale: Annotated[str, typer.Option("--scale", help="what shares a scale: tensor, component (row of A, column of B) or group (of 128)")] = "component",
    average_bits: Annotated[float | None, typer.Option("--average-bits", help="a width for each component, so many bits on the average")] = None,
    gauge: Annotated[str | None, typer.Option("--gauge", help="how B A is shared out before it is coded: balanced, svd, or none (as it is)")] = None,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="fit codes and scales to the product B A")] = True,
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model that it was trained on, to distil with --text")] = None,
    text: LessonText = [],  # noqa: B006
    window: LessonWindow = None,
    steps: LessonSteps = 200,
    batch: LessonBatch = 4,
    lr: LessonRate = None,
    seed: LessonSeed = 0,
) -> None:
    """Bring a LoRA adapter to a few bits, packed: `compress adapter quantize ./code-lora --bits 1 --base org/base --text code.txt`."""
    from mergekit_plus.recipe import check

    coding = {"bits": bits, "average_bits": average_bits, "codebook": codebook, "scale": scale, "gauge": gauge, "refit": refit}
    step = {**coding, **_lesson(text, window, steps, batch, lr, seed)}
    inputs = {"adapter": adapter}
    if base is not None:
        inputs["base"] = base
        step |= {"base": "base", "of": "adapter"}
    recipe = check({"inputs": inputs, "steps": [{"quantize_adapter": step}]}, Path(), "compress adapter quantize")
    _carry_out(recipe, how, _beside(adapter, f"{average_bits or bits:g}bit", "folder"))


@adapter.command()
@writes("max_shard_size")
def expand(
    *,
    how: Writing,
    adapter: Annotated[str, typer.Argument(help="a packed adapter, or the packed difference of a fine-tune")],
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model that a difference is of; the output is a model then")] = None,
) -> None:
    """Turn a packed adapter into an ordinary one, which peft and vLLM load; a packed difference and its base into a model."""
    from mergekit_plus.recipe import check

    ref = adapter if base is None else f"{base}+{adapter}"
    _carry_out(check({"inputs": {"adapter": ref}}, Path(), "compress adapter expand"), how, _beside(adapter, "expanded", "folder"))


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
    codebook: Annotated[str, typer.Option("--codebook", help="l2 (Lloyd-Max) or k-median (the 1-bit adapters of arXiv 2307.16867)")] = "l2",
    scale: Annotated[str, typer.Option("--scale", help="what shares a scale: tensor, component (row of A, column of B) or group (of 128)")] = "component",
    window: LessonWindow = None,
    steps: LessonSteps = 200,
    batch: LessonBatch = 4,
    lr: LessonRate = None,
    seed: LessonSeed = 0,
) -> None:
    """Train a LoRA adapter for few bits from scratch: `compress adapter train org/base --text code.txt --bits 1 --rank 16`."""
    from mergekit_plus.recipe import check

    step = {
        "base": "base", "bits": bits, "rank": rank, "target": target, "codebook": codebook, "scale": scale, **_lesson(text, window, steps, batch, lr, seed),
    }  # fmt: skip
    recipe = check({"inputs": {"base": base}, "steps": [{"train_adapter": step}]}, Path(), "compress adapter train")
    _carry_out(recipe, how, _beside(base, f"{bits}bit-adapter", "folder"))


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
    window: LessonWindow = None,
    steps: LessonSteps = 100,
    batch: LessonBatch = 4,
    lr: LessonRate = None,
    seed: LessonSeed = 0,
) -> None:
    """Bring the difference of a fine-tune to one bit a weight (BitDelta); --text trains its scales: `compress adapter delta org/base ./tuned`."""
    from mergekit_plus.recipe import check

    step = {
        "base": "base", "tuned": "tuned", "bits": bits, "scale": scale, "save_rest": save_rest, "exclude": exclude,
        **_lesson(text, window, steps, batch, lr, seed),
    }  # fmt: skip
    recipe = check({"inputs": {"base": base, "tuned": tuned}, "steps": [{"delta": step}]}, Path(), "compress adapter delta")
    _carry_out(recipe, how, _beside(tuned, "delta", "folder"))


@app.command()
@writes("device")
def moe(
    *,
    how: Writing,
    config: Annotated[Path, typer.Argument(help="base_model and experts with their prompts, in the schema of mergekit-moe")],
) -> None:
    """Make a mixture of experts of dense models: Mixtral, or Qwen2-MoE with a shared expert."""
    from mergekit_plus.recipe import load

    _carry_out(load(config), how)


@app.command()
@writes()
def quantize(
    *,
    how: Writing,
    model: Model = ".",
    bits: Annotated[int | None, typer.Option("--bits", help="2 to 8 bits a weight (default: 4)")] = None,
    group_size: Annotated[int, typer.Option("--group-size", help="weights that share a scale; 0 for a whole output row")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="with zero points")] = False,
    scheme: Annotated[str | None, typer.Option("--scheme", help="W8A8, FP8, FP8_BLOCK, NVFP4 or MXFP4, in place of bits and groups")] = None,
    allocation: Annotated[Path | None, typer.Option("--allocation", metavar="FILE", help="bits.yaml of `compress allocate`: a scheme for each layer")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="see `compress methods`")] = "rtn",
    format_: Annotated[
        str | None, typer.Option("--format", help="pack-quantized (compressed-tensors, by default), gptq, gptq_v2, or dense: the dequantized weights")
    ] = None,
    set_: Set = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    include: Include = [],  # noqa: B006
    calibration: Calibrate = [],  # noqa: B006
    windows: CalibrationWindows = None,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
    order: Annotated[
        Literal["block", "layer"] | None,
        typer.Option("--order", help="layer: measure what stands behind other layers of a block again after these (default: block)"),
    ] = None,
    norm_passes: Annotated[
        int, typer.Option("--norm-passes", min=0, help="passes over the text in which the norms of each block are tuned to the original's outputs")
    ] = 0,
    biases: Annotated[bool, typer.Option("--biases", help="correct the biases of the layers, where they have some, for the mean of their outputs")] = False,
    moments: Annotated[str | None, typer.Option("--moments", metavar="FILE", help="what `compress calibrate` wrote, in place of a text")] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="write the residual stream in another basis first: fewer outliers, the same function")] = False,
) -> None:
    """Quantize a model's linear layers: `compress quantize --bits 4` in its folder; `--method gptq --calibration text.txt` looks at their inputs."""
    digests = None if how.resume else _hash_early(model)
    from mergekit_plus.recipe import check

    step = {
        "bits": 4 if (bits, scheme, allocation) == (None, None, None) else bits, "group_size": group_size, "symmetric": not asymmetric, "scheme": scheme,
        "allocation": allocation and str(allocation), "method": method, "format": format_, "exclude": exclude, "include": include, "rotate": rotate,
        "norm_passes": norm_passes, "biases": biases, **_calibration(calibration, windows=windows, window=window, seed=seed, order=order), **_settings(set_),
    }  # fmt: skip
    inputs = {"model": model}
    if moments is not None:
        inputs["moments"], step["moments"], step["of"] = moments, "moments", "model"
    recipe = check({"inputs": inputs, "steps": [{"quantize": step}]}, Path(), "compress quantize")
    what = scheme.lower() if scheme else "mixed" if allocation else f"{step['bits']}bit"
    default = _beside(model, f"{what}-dense", "file") if format_ == "dense" else _beside(model, what, "folder")
    _carry_out(recipe, how, default, digests)


@app.command()
@writes("allow_nonfinite")
def calibrate(
    *,
    how: Writing,
    model: Model = ".",
    text: Annotated[list[str], typer.Option("--text", "-t", metavar="FILE", help="text to flow through the model: .txt, .jsonl, a folder; may be repeated")],
    windows: CalibrationWindows = None,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
) -> None:
    """Measure the inputs of a model's linear layers on a text, for any number of `compress quantize --moments`."""
    from mergekit_plus.recipe import check

    step = {"text": _text(text, windows=windows, window=window, seed=seed)}
    recipe = check({"inputs": {"model": model}, "steps": [{"calibrate": step}]}, Path(), "compress calibrate")
    _carry_out(recipe, how, _beside(model, "moments", "file").with_suffix(".safetensors"))


@app.command()
def allocate(
    model: Model = ".",
    bits_per_weight: Annotated[float | None, typer.Option("--bits-per-weight", help="budget: stored bits of a quantized weight, scales and all")] = None,
    size: Annotated[str | None, typer.Option("--size", help="budget: bytes of the weight files, as in 8.1MB, with all that is not quantized")] = None,
    max_loss: Annotated[float | None, typer.Option("--max-loss", help="fewest bits within this KL, nats a token")] = None,
    choices: Annotated[str, typer.Option("--choices", help="bits to choose from; 4g32: with a group size of its own, 4a: asymmetric")] = "2,3,4,6,8",
    group_size: Annotated[int, typer.Option("--group-size", help="weights that share a scale; 0 for a whole output row")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="with zero points")] = False,
    calibration: Calibrate = [],  # noqa: B006
    windows: FewWindows = 24,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
    sensitivity: Annotated[Literal["kl", "fisher", "gram"], typer.Option("--sensitivity", help="how a layer's loss is measured")] = "kl",
    reference: Annotated[
        str | None, typer.Option("--reference", help="the choice of all other layers while one is measured, or dense (default: the middle choice)")
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="see `compress methods`")] = "rtn",
    format_: Annotated[str, typer.Option("--format", help="what will be stored: pack-quantized, ...")] = "pack-quantized",
    set_: Set = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="allocations that are measured on held-out windows")] = 8,
    sensitivities: Annotated[Path | None, typer.Option("--sensitivities", help="file of losses: read where it exists, else written")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="picture of the bits of each layer: .svg, .png or .pdf (needs matplotlib)")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write")] = Path("bits.yaml"),
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Give each layer the bits that it needs, within a budget, provably: `compress allocate --bits-per-weight 3.5 --calibration text.txt`."""
    from mergekit_plus.calibration.options import CalibrationOptions
    from mergekit_plus.checkpoint.shards import parse_size
    from mergekit_plus.compare import check_picture
    from mergekit_plus.errors import OptionError
    from mergekit_plus.progress import on
    from mergekit_plus.show import allocation_lines
    from quant.allocation import AllocateOptions, allocate_bits, facts, parse_choice, parse_choices
    from quant.mixed import Budget

    if not calibration:
        raise OptionError("allocate measures on a text: give one with --calibration FILE")
    if plot is not None:
        check_picture(plot)
    _check_device(device)
    text = CalibrationOptions.model_validate(_text(calibration, windows=windows, window=window, seed=seed))
    for problem in text.problems(Path()):
        raise OptionError(f"--calibration: {problem}")
    dense = reference is None or reference == "dense"
    options = AllocateOptions(
        Budget(bits_per_weight, parse_size(size) if size else None, max_loss), parse_choices(choices, group_size, not asymmetric), text, sensitivity,
        reference if dense else parse_choice(str(reference), group_size, not asymmetric), method, _settings(set_), format_, tuple(exclude), candidates,
        sensitivities, overwrite, device,
    )  # fmt: skip
    written = allocate_bits(_open(model), options, out, on())
    if plot is not None:
        from mergekit_plus.bits_plot import draw_bits

        draw_bits(written.table.groups, written.table.choices, written.result.chosen.selection, plot)
    found = facts(written)
    _print(found, allocation_lines(found), as_json)


@app.command()
@writes("device", "allow_nonfinite")
def dequantize(
    *,
    how: Writing,
    model: Model = ".",
) -> None:
    """Turn a packed model (compressed-tensors, GPTQ, AWQ) back into a dense one."""
    from mergekit_plus.recipe import check

    recipe = check({"inputs": {"model": model}, "steps": [{"dequantize": {}}]}, Path(), "compress dequantize")
    _carry_out(recipe, how, _beside(model, "dense", "file"))


@app.command()
@writes("device", "allow_nonfinite")
def convert(
    *,
    how: Writing,
    model: Model = ".",
    to: Annotated[str, typer.Option("--to", help="pack-quantized, gptq, gptq_v2 or int-quantized")],
) -> None:
    """Store a packed model in another format, code for code: `compress convert MODEL --to gptq`."""
    from mergekit_plus.recipe import check

    recipe = check({"inputs": {"model": model}, "steps": [{"convert": {"to": to}}]}, Path(), "compress convert")
    _carry_out(recipe, how, _beside(model, to, "folder"))


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
    """Set the least important weights to zero, or take out neurons and heads: `compress prune MODEL --sparsity 0.5`."""
    digests = None if how.resume else _hash_early(model)
    from mergekit_plus.errors import OptionError
    from mergekit_plus.recipe import check
    from prune import PRUNERS

    if masks is not None and masks.exists() and not how.overwrite:
        raise OptionError(f"{masks} exists already; name another file with --masks, or replace it with --overwrite")
    used = structured or reconstruct or allocate or (method in list(PRUNERS) and PRUNERS[method].calibrated)  # the text may be for --retrain alone
    reading = {"windows": windows, "window": window, "seed": seed if calibration else None}
    step = {
        "sparsity": sparsity, "pattern": pattern, "method": method, "scope": scope, "seed": seed, "exclude": exclude, "include": include,
        "structured": _shares(structured), "mask": "mask" if mask else None, "of": "model", "reconstruct": reconstruct,
        "allocate": allocate, **(_calibration(calibration, **reading) if used or not retrain else {}), **_settings(set_),
    }  # fmt: skip
    steps: list[dict[str, Any]] = [{"prune": step}]
    if retrain is not None:
        if not calibration:
            raise OptionError("--retrain trains on a text: give it with --calibration")
        steps.append({"retrain": {"train": retrain, "text": _text(calibration, window=window, seed=seed), "seed": seed}})
    recipe = check({"inputs": {"model": model, **({"mask": mask} if mask else {})}, "steps": steps}, Path(), "compress prune")
    default = _beside(model, "smaller" if structured else "pruned", "folder" if structured else "file")
    _carry_out(recipe, how, default, digests)
    if masks is not None and not how.dry_run:
        from mergekit_plus.checkpoint import SaveOptions, save
        from prune.plan import PruneOptions, masks_of

        save(masks_of(_open(str(how.out or default)), PruneOptions(tuple(exclude))), masks, SaveOptions(how.overwrite))


@app.command()
@writes()
def fold(
    *,
    how: Writing,
    model: Model = ".",
    remove: Annotated[float, typer.Option("--remove", help="blocks to take out: a share such as 0.25, or a number")] = 0,
    keep: Annotated[str | None, typer.Option("--keep", metavar="N,N,...", help="blocks that stay, in order, in place of --remove")] = None,
    by: Annotated[str, typer.Option("--by", help="what tells which blocks go: leave-one-out, gates or influence")] = "leave-one-out",
    share: Annotated[int, typer.Option("--share", min=1, help="neighbouring blocks that share one set of linear weights")] = 1,
    parent: Annotated[Literal["first", "average"], typer.Option("--parent", help="whose weights those are: the first block's, or the mean")] = "first",
    calibration: Calibrate = [],  # noqa: B006
    windows: FewWindows = 64,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
) -> None:
    """Take out the blocks that count least, and let blocks share weights: `compress fold MODEL --remove 0.25 --calibration text.txt`."""
    digests = None if how.resume else _hash_early(model)
    from mergekit_plus.recipe import check

    step = {
        "remove": remove, "by": by, "share": share, "parent": parent, "of": "model", **({"keep": _numbers("--keep", keep)} if keep is not None else {}),
        **(_calibration(calibration, windows=windows, window=window, seed=seed) if calibration else {}),
    }  # fmt: skip
    recipe = check({"inputs": {"model": model}, "steps": [{"fold": step}]}, Path(), "compress fold")
    _carry_out(recipe, how, _beside(model, "folded", "folder"), digests)


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
    window: LessonWindow = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="model whose predictions are the goal, as a rule the one before pruning")] = None,
    distill: Annotated[float, typer.Option("--distill", min=0, max=1, help="the teacher's part of the loss; the rest is the text's")] = 1.0,
    allow_densify: Annotated[bool, typer.Option("--allow-densify", help="allow a variant that brings pruned weights back")] = False,
    seed: Annotated[int, typer.Option("--seed", help="seed of the start and of the order of the text")] = 0,
    set_: Set = [],  # noqa: B006
) -> None:
    """Retrain a few parameters of a pruned model, which stays as sparse: `compress retrain MODEL --train norms,mask_lora --text FILE`."""
    digests = None if how.resume else _hash_early(model, *([teacher] if teacher else []))
    from mergekit_plus.recipe import check

    step = {
        "train": train, "text": _text(text, window=window, seed=seed), "teacher": "teacher" if teacher else None, "distill": distill,
        "tune_lr": tune_lr, "allow_densify": allow_densify, "of": "model", "steps": steps, "seed": seed,
        **({"lr": lr} if lr is not None else {}), **({"rank": rank} if rank is not None else {}), **_settings(set_),
    }  # fmt: skip
    recipe = check({"inputs": {"model": model, **({"teacher": teacher} if teacher else {})}, "steps": [{"retrain": step}]}, Path(), "compress retrain")
    if (local := os.environ.get("LOCAL_RANK")) and how.device == "cuda":  # torchrun: a card for each process
        how = replace(how, device=f"cuda:{local}")
    if int(os.environ.get("RANK", 0)):
        from mergekit_plus.recipe import help_with

        return None if how.dry_run else help_with(recipe, _execution(how, None, digests))
    _carry_out(recipe, how, _beside(model, "retrained", "folder"), digests)


@app.command()
@writes()
def run(
    *,
    how: Writing,
    recipe: Annotated[Path, typer.Argument(help="a recipe, ours or mergekit's")],
    mergekit_lenient: Annotated[bool, typer.Option("--mergekit-lenient", help="warn of keys that mergekit ignores instead of refusing them")] = False,
) -> None:
    """Carry out a YAML recipe; exit code 1 when a check of it fails."""
    from mergekit_plus.recipe import load

    _carry_out(load(recipe, mergekit_lenient), how)


@app.command()
def inspect(
    model: Model = ".",
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, from its headers alone."""
    from mergekit_plus.inspection import inspect as look
    from mergekit_plus.show import inspection_lines

    facts = look(_open(model), tensors)
    _print(facts, inspection_lines(facts), as_json)


@app.command()
def diff(a: Model, b: Model, as_json: Json = False) -> None:
    """Compare two checkpoints tensor by tensor; exit code 1 when they differ."""
    from dataclasses import asdict

    from mergekit_plus.diff import diff as compare

    found = compare(_open(a), _open(b))
    text = [f"only in {label}: {name}" for label, names in ((a, found.only_a), (b, found.only_b)) for name in names]
    text += [f"{name}: other shape or dtype" for name in found.unlike]
    text += [f"{t.name}: {t.changed:.2%} changed, largest {t.max_abs:.3g}, relative {t.relative:.3g}" for t in found.tensors if t.changed]
    text.append("the same" if found.same else f"{sum(t.changed > 0 for t in found.tensors)} of {len(found.tensors)} common tensors differ in value")
    _print({**asdict(found), "same": found.same}, text, as_json)
    if not found.same:
        raise typer.Exit(1)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="an output: its folder, or its .safetensors file")],
    inputs: Annotated[bool, typer.Option("--inputs", help="check the files that it was made of too, where they were then")] = False,
    as_json: Json = False,
) -> None:
    """Compare an output with its manifest, and packed weights with config.json; exit code 1 when a file is not what was written, or would be loaded wrongly."""
    from dataclasses import asdict

    from mergekit_plus.progress import on
    from mergekit_plus.show import verification_lines
    from mergekit_plus.verify import verify as check

    facts = asdict(check(out, inputs, on()))
    _print(facts, verification_lines(facts), as_json)
    if facts["problems"] or facts["wrong"]:
        raise typer.Exit(1)


@app.command()
def eval(
    model: Model,
    text: Annotated[list[Path], typer.Option("--text", "-t", help="text to measure on; may be repeated")],
    against: Annotated[str | None, typer.Option("--against", help="reference model for KL and top-1 agreement")] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="tokens in a window; windows do not overlap")] = 256,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="use only so many windows of each text")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, divergence from a reference, and size."""
    from mergekit_plus.checks import Checks, measure
    from mergekit_plus.progress import on
    from mergekit_plus.show import table

    names = _distinct([str(path) for path in text])
    checks = Checks(texts=names, window=window, windows=windows)
    reference = _open(against) if against else None
    rows = ([measure(reference, checks, Path(), on())] if reference else []) + [measure(_open(model), checks, Path(), on(), reference)]
    _print({"rows": rows}, table(rows), as_json)


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="recipes (.yaml), and models")],
    text: Texts = [],  # noqa: B006
    base: Annotated[str | None, typer.Option("--base", "-b", help="the model whose normalised loss is 0, with --expert")] = None,
    expert: Annotated[list[str], typer.Option("--expert", metavar="TEXT=MODEL", help="the model whose normalised loss on its own text is 1")] = [],  # noqa: B006
    window: Annotated[int, typer.Option("--window", min=2, help="tokens in a window; windows do not overlap")] = 256,
    windows: Windows = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="picture to draw: .svg, .png or .pdf (needs matplotlib)")] = None,
    as_json: Json = False,
) -> None:
    """Measure what recipes make, and models, on every text; nothing is written but the picture."""
    from mergekit_plus.checks import Checks
    from mergekit_plus.compare import compare as measure_all
    from mergekit_plus.compare import draw
    from mergekit_plus.progress import on
    from mergekit_plus.show import comparison_lines

    checks = Checks(texts=_named(text), window=window, windows=windows)
    rows = measure_all(_distinct(models), checks, base, _named(expert), plot, on())
    if plot is not None:
        draw(rows, list(checks.texts), plot)
    _print({"rows": rows}, comparison_lines(rows), as_json)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="one method, with its options")] = None, as_json: Json = False) -> None:
    """List merge methods, quantizers and pruners with their options."""
    from mergekit_plus.listing import list_methods
    from mergekit_plus.show import method_lines

    facts = list_methods(name)
    _print(facts, method_lines(facts), as_json)


def _open(ref: str) -> Checkpoint:
    from mergekit_plus.checkpoint import Checkpoint

    return Checkpoint.open(ref)


def _carry_out(recipe: Recipe, how: Writing, default: Path | None = None, digests: Digests | None = None) -> None:
    """Write what a recipe makes and say what came of it; `default` is the output where none is named."""
    from mergekit_plus.show import outcome_facts, outcome_lines

    outcome = _outcome(recipe, how, default, digests)
    if outcome is not None:
        _print(outcome_facts(outcome), outcome_lines(outcome), how.as_json)
        outcome.raise_failures()


def _outcome(recipe: Recipe, how: Writing, default: Path | None, digests: Digests | None = None) -> Outcome | None:
    """What came of a recipe; None where only its plan was to be shown."""
    from mergekit_plus.recipe import plan
    from mergekit_plus.recipe import run as carry_out
    from mergekit_plus.show import plan_lines

    execution = _execution(how, default, digests)
    if how.dry_run:
        facts = plan(recipe, execution)
        _print(facts, plan_lines(facts), how.as_json)
        return None
    try:
        return carry_out(recipe, execution)
    except KeyboardInterrupt as interrupt:
        print("; ".join(["compress: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        raise typer.Exit(130) from None


def _hash_early(*refs: str) -> Digests:
    """Begin to hash the local files of these models while torch is being imported."""
    from mergekit_plus.digests import Digests

    digests = Digests()
    for path in map(Path, refs):
        for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
            digests.start(file)
    return digests


def _execution(how: Writing, default: Path | None, digests: Digests | None) -> Execution:
    from mergekit_plus.checkpoint import SaveOptions
    from mergekit_plus.checkpoint.shards import parse_size
    from mergekit_plus.progress import on
    from mergekit_plus.steps import Execution

    _check_device(how.device)
    save = SaveOptions(
        how.overwrite, parse_size(how.max_shard_size), parse_size(how.memory) if how.memory else None, how.workers, how.allow_nonfinite, on(), digests,
        resume=how.resume,
    )  # fmt: skip
    return Execution(save, how.device, how.out or default, how.cache, how.push, how.private)


def _check_device(name: str) -> None:
    """Refuse a device that is not here."""
    if name == "cpu":
        return
    import torch

    from mergekit_plus.errors import OptionError

    try:
        there = torch.device(name).type != "cuda" or (torch.device(name).index or 0) < torch.cuda.device_count()
    except RuntimeError:
        raise OptionError(f"--device {name}: no such device; write cpu, cuda or cuda:1") from None
    if not there:
        raise OptionError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here; leave --device out to compute on the CPU")


def _tokenizer(source: str | None, multiple: int | None, template: str | None, inputs: dict[str, str]) -> dict[str, Any] | None:
    """The tokenizer key of a merge step; a model that is no input yet becomes one."""
    from mergekit_plus.errors import OptionError
    from mergekit_plus.vocabulary.spec import source_problem

    if source is not None and (problem := source_problem(source, inputs)):
        raise OptionError(f"--tokenizer: {problem}")
    given = {"source": source, "pad_to_multiple_of": multiple, "chat_template": template}
    named = {ref: name for name, ref in inputs.items()}
    for key, ref in given.items():
        if not isinstance(ref, str) or ref in ("union", "base"):
            continue
        if ref in named or ref in inputs:
            given[key] = named.get(ref, ref)
        elif key == "source" or Path(ref).exists():
            name = next(name for name in ("tokenizer", *(f"tokenizer-{number}" for number in range(2, 9))) if name not in inputs)
            inputs[name] = ref
            given[key] = name
    return given if any(value is not None for value in given.values()) else None


def _settings(assignments: list[str], option: str = "-s") -> dict[str, Any]:
    """`name=value` pairs; values are read as YAML, commas make a list (one value for each model) where there is no table."""
    from mergekit_plus.errors import OptionError
    from mergekit_plus.safe_yaml import parse

    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise OptionError(f"{option} {assignment}: write name=value")
        listed = "," in value and not value.startswith("{")
        settings[name] = [parse(part, f"{option} {name}") for part in value.split(",")] if listed else parse(value, f"{option} {name}")
    return settings


def _shares(given: str | None) -> dict[str, Any] | None:
    """`mlp=0.25,heads=0.5` by name."""
    return None if given is None else _settings(given.split(","), "--structured")


def _numbers(option: str, given: str) -> list[int]:
    """`0,1,5` as numbers."""
    from mergekit_plus.errors import OptionError

    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise OptionError(f"{option} {given}: write numbers with commas between, as in 0,1,5") from None


def _text(texts: list[str], **how: Any) -> dict[str, Any]:
    """A text as steps take it, with what is said of how it is read."""
    return {"texts": texts, **{name: value for name, value in how.items() if value is not None}}


def _calibration(texts: list[str], **how: Any) -> dict[str, Any]:
    """The `calibration` key of a step; nothing where no text is given, of which nothing can be said then."""
    from mergekit_plus.errors import OptionError

    if not texts and (said := [f"--{name}" for name, value in how.items() if value is not None]):
        raise OptionError(f"{' and '.join(said)} {'say' if len(said) > 1 else 'says'} how a text is read: give one with --calibration FILE")
    return {"calibration": _text(texts, **how)} if texts else {}


def _distinct(refs: list[str]) -> dict[str, str]:
    """A short name for each reference, in order: the last part of its path, numbered where two would be the same."""
    names: dict[str, str] = {}
    for ref in refs:
        stem = Path(ref).name.removesuffix(".safetensors").removesuffix(".txt").removesuffix(".yaml") or ref
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names[name] = ref
    return names


def _named(refs: list[str]) -> dict[str, str]:
    """`NAME=FILE` by name; a file alone goes by its own name."""
    from mergekit_plus.errors import OptionError

    alone = iter(_distinct([ref for ref in refs if "=" not in ref]).items())
    pairs = [(ref.partition("=")[0], ref.partition("=")[2]) if "=" in ref else next(alone) for ref in refs]
    if len(dict(pairs)) < len(pairs):
        raise OptionError(f"two of {', '.join(name for name, _ in pairs)} have one name; write NAME=FILE")
    return dict(pairs)


def _beside(model: str, suffix: str, of_file: Literal["file", "folder"]) -> Path:
    """`<name>-<suffix>` in the current folder; what a single file becomes is a file, or a folder where a config.json must say what it holds."""
    path = Path(model)
    if path.is_file():
        return Path(f"{path.stem}-{suffix}{'.safetensors' if of_file == 'file' else ''}")
    name = path.resolve().name if path.is_dir() else model.split("@")[0].split("/")[-1].removesuffix(".safetensors")
    return Path(f"{name}-{suffix}")


def _lesson(text: list[str], window: int | None, steps: int, batch: int, lr: float | None, seed: int) -> dict[str, Any]:
    """The keys of a step that trains on a text; nothing where no text is given."""
    return {"text": _text(text, window=window, seed=seed), "steps": steps, "batch": batch, "lr": lr, "seed": seed} if text else {}


def _print(data: dict[str, Any], text: list[str], as_json: bool) -> None:
    from mergekit_plus.errors import printable

    print(json.dumps(data, indent=2, default=str) if as_json else "\n".join(map(printable, text)))


def main() -> None:
    """Run the program: one line on stderr and exit code 2 for the user's mistakes, 1 where a check failed."""
    from mergekit_plus.errors import CheckFailed, CompressError, printable

    gc.set_threshold(100_000)  # a plan is very many small objects that live until the end: looking for garbage among them takes longer than making them
    warnings.formatwarning = lambda message, *_: printable(f"compress: warning: {message}") + "\n"
    try:
        app()
    except CompressError as error:
        message = re.sub(_OWN_STEP, r"\1: ", str(error)).removeprefix("compress ")  # a recipe made of arguments goes by its command
        print(printable(f"compress: {message}"), file=sys.stderr)
        sys.exit(2)
    except CheckFailed as error:
        print(printable(f"compress: check failed: {error}"), file=sys.stderr)
        sys.exit(1)
