"""What the commands share: the program itself, options of the same name everywhere, and how what was asked for is carried out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from mergekit_plus.names import distinct

if TYPE_CHECKING:
    from mergekit_plus.checkpoint import Checkpoint
    from mergekit_plus.digests import Digests
    from mergekit_plus.recipe import Outcome, Recipe
    from mergekit_plus.steps import Execution


app = typer.Typer(
    name="compress",
    help="Merge and compress model checkpoints as one stream: read tensor by tensor, written once, checked.\n\n"
    "In the examples of each command, code and docs are fine-tunes of base: folders here, or models on the Hub by their names, org/name.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from mergekit_plus import __version__

        print(f"mergekit-plus {__version__}")
        raise typer.Exit


@app.callback()
def program(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    """What stands before a command."""


adapter = typer.Typer(help="Merge, extract, train and pack adapters.\n\nMODEL+ADAPTER is a model everywhere.", no_args_is_help=True)
app.add_typer(adapter, name="adapter")
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
Texts = Annotated[list[str], typer.Option("--text", "-t", metavar="[NAME=]FILE", help="text to measure on; may be repeated")]
Calibrate = Annotated[
    list[str], typer.Option("--calibration", metavar="FILE", help="text for methods that look at the inputs of layers: .txt, .jsonl, a folder; may be repeated")
]
CalibrationWindows = Annotated[int | None, typer.Option("--windows", min=1, help="windows of the text, spread over it (default: 128)")]
FewWindows = Annotated[int, typer.Option("--windows", min=1, help="windows of the text, spread over it")]
CalibrationWindow = Annotated[int | None, typer.Option("--window", min=2, help="tokens in a window of the text (default: 256, or what the model takes)")]
CalibrationSeed = Annotated[int | None, typer.Option("--seed", help="moves the windows of the text (default: 0)")]
LessonText = Annotated[list[str], typer.Option("--text", "-t", metavar="FILE", help="text to train on: .txt, .jsonl, a folder; may be repeated")]
Engine = Annotated[Literal["threads", "ray"], typer.Option("--engine", help="who computes the tensors: this process, or a Ray cluster (docs/scale.md)")]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", metavar="HOST:PORT", help="of the cluster of --engine ray (default: RAY_ADDRESS, or a cluster of this machine)")
]
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
    engine: Engine = "threads"
    ray_address: RayAddress = None
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


def open_model(ref: str) -> Checkpoint:
    from mergekit_plus.checkpoint import Checkpoint

    return Checkpoint.open(ref)


def carry_out(recipe: Recipe, how: Writing, default: Path | None = None, digests: Digests | None = None) -> None:
    """Write what a recipe makes and say what came of it; `default` is the output where none is named."""
    facts, lines, outcome = carried_out(recipe, how, default, digests)
    print_result(facts, lines, how.as_json)
    if outcome is not None:
        outcome.raise_failures()


def carried_out(
    recipe: Recipe, how: Writing, default: Path | None, digests: Digests | None = None
) -> tuple[dict[str, Any], list[str], Outcome | None]:
    """What came of a recipe, as data and as text; with --dry-run its plan, and no outcome."""
    from mergekit_plus.recipe import plan, run
    from mergekit_plus.show import outcome_facts, outcome_lines, plan_lines

    execution = execution_of(how, default, digests)
    if how.dry_run:
        facts = plan(recipe, execution)
        return facts, plan_lines(facts), None
    try:
        outcome = run(recipe, execution)
    except KeyboardInterrupt as interrupt:
        print("; ".join(["compress: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        raise typer.Exit(130) from None
    return outcome_facts(outcome), outcome_lines(outcome), outcome


def hash_early(*refs: str) -> Digests:
    """Begin to hash the local files of these models while torch is being imported."""
    from mergekit_plus.digests import Digests

    digests = Digests()
    for path in map(Path, refs):
        for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
            digests.start(file)
    return digests


def execution_of(how: Writing, default: Path | None, digests: Digests | None) -> Execution:
    from mergekit_plus.checkpoint import SaveOptions
    from mergekit_plus.checkpoint.shards import parse_size
    from mergekit_plus.progress import on
    from mergekit_plus.steps import Execution

    check_device(how.device)
    save = SaveOptions(
        how.overwrite, parse_size(how.max_shard_size), parse_size(how.memory) if how.memory else None, how.workers, how.allow_nonfinite, on(), digests,
        resume=how.resume,
    )  # fmt: skip
    return Execution(save, how.device, how.out or default, how.cache, how.push, how.private, engine=how.engine, ray_address=how.ray_address)


def check_device(name: str) -> None:
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


def settings(assignments: list[str], option: str = "-s") -> dict[str, Any]:
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


def text_key(texts: list[str], **how: Any) -> dict[str, Any]:
    """A text as steps take it, with what is said of how it is read."""
    return {"texts": texts, **{name: value for name, value in how.items() if value is not None}}


def calibration_key(texts: list[str], **how: Any) -> dict[str, Any]:
    """The `calibration` key of a step; nothing where no text is given, of which nothing can be said then."""
    from mergekit_plus.errors import OptionError

    if not texts and (said := [f"--{name}" for name, value in how.items() if value is not None]):
        raise OptionError(f"{' and '.join(said)} {'say' if len(said) > 1 else 'says'} how a text is read: give one with --calibration FILE")
    return {"calibration": text_key(texts, **how)} if texts else {}


def named(refs: list[str]) -> dict[str, str]:
    """`NAME=FILE` by name; a file alone goes by its own name."""
    from mergekit_plus.errors import OptionError

    alone = iter(distinct([ref for ref in refs if "=" not in ref]).items())
    pairs = [(ref.partition("=")[0], ref.partition("=")[2]) if "=" in ref else next(alone) for ref in refs]
    if len(dict(pairs)) < len(pairs):
        raise OptionError(f"two of {', '.join(name for name, _ in pairs)} have one name; write NAME=FILE")
    return dict(pairs)


def beside(model: str, suffix: str, of_file: Literal["file", "folder"]) -> Path:
    """`<name>-<suffix>` in the current folder; what a single file becomes is a file, or a folder where a config.json must say what it holds."""
    path = Path(model)
    if path.is_file():
        return Path(f"{path.stem}-{suffix}{'.safetensors' if of_file == 'file' else ''}")
    name = path.resolve().name if path.is_dir() else model.split("@")[0].split("/")[-1].removesuffix(".safetensors")
    return Path(f"{name}-{suffix}")


def print_result(data: dict[str, Any], text: list[str], as_json: bool) -> None:
    from mergekit_plus.errors import printable

    print(json.dumps(data, indent=2, default=str) if as_json else "\n".join(map(printable, text)))
