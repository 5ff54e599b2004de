"""Doors to merging. Heavy things are imported where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mergekit_plus.names import distinct

from .common import Dtype, Exclude, Include, Set, Texts, Writing, app, carry_out, hash_early, named, settings, writes

Search = Annotated[
    str | None,
    typer.Option("--search", metavar="OPTION[=LOW..HIGH],...", help="options to be found on --text; OPTION:each, :depth3, :kinds for a value each"),
]
HeldOut = Annotated[list[str], typer.Option("--heldout", metavar="[NAME=]FILE", help="text on which the outcome of --search is measured; may be repeated")]


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
    """Merge models.

    `compress merge code docs --method ties --base base`
    """
    digests = None if how.resume else hash_early(*models, *([base] if base else []))  # what was hashed before is not hashed again
    from mergekit_plus.recipe import check

    names = distinct(models)
    step: dict[str, Any] = {"method": method, "models": list(names), "exclude": exclude, "include": include, "seed": seed, "dtype": dtype, **settings(set_)}
    inputs = dict(names)
    if search is not None:
        from mergekit_plus.search.space import parse_axes

        step["search"] = {"options": parse_axes(search), "texts": named(text), "objective": objective, "budget": budget,
                          "windows": windows, "heldout": named(heldout)}  # fmt: skip
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
    carry_out(recipe, how, default, digests)


@app.command()
@writes("device")
def moe(
    *,
    how: Writing,
    config: Annotated[Path, typer.Argument(help="base_model and experts with their prompts, in the schema of mergekit-moe")],
) -> None:
    """Make a mixture of experts of dense models.

    The result is a Mixtral, or a Qwen2-MoE with a shared expert.

    `compress moe experts.yaml --out experts`
    """
    from mergekit_plus.recipe import load

    carry_out(load(config), how)


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
