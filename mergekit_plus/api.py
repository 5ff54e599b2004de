"""Recipes written in Python: every operation returns a model that is not computed yet, and nothing is read or written before it is asked for.

    import mergekit_plus as mp

    small = mp.merge(["./code", "./docs"], method="ties", base="org/base", density=0.5).quantize(bits=4, group_size=64)
    small.plan("out")                                     # what it would take, from headers alone
    small.check(texts={"code": "code.txt"}, limits={"perplexity": 20}).save("out")

Operations, their keys and what is wrong with them are those of recipes (docs/recipes.md); so are outputs: `out/recipe.yaml` makes the same bytes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .checkpoint import Checkpoint, SaveOptions
from .checkpoint.shards import parse_size
from .checks import Checks, Row, measure
from .errors import CheckFailed, CompressError, OptionError, RecipeError
from .names import distinct
from .progress import on, quiet
from .recipe import Outcome, Recipe, build, check, load_all, outs, plan, run, with_found
from .steps import Execution

__all__ = ["CheckFailed", "CompressError", "Model", "RecipeError", "merge", "open_model", "run_recipe"]

Ref = str | Path  # a model folder, a .safetensors file, org/name[@revision] on the Hub, MODEL+ADAPTER


@dataclass(frozen=True)
class Model:
    """Checkpoints and what becomes of them. Made by `open_model` and `merge`; immutable: every operation returns another.

    inputs: where each input is, by its name. steps: what is done, one after the other. checks: what is measured on the result and must hold.
    """

    inputs: Mapping[str, str]
    steps: tuple[Mapping[str, Mapping[str, Any]], ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)

    # ---- operations ----

    def step(self, operation: str, **keys: Any) -> Model:
        """Any operation of recipes by its name, with its keys and its method's options; keys that are None are left at their defaults.

        Errors: RecipeError with every problem at once, here and not when it is computed.
        """
        given = {name.rstrip("_"): _plain(value) for name, value in keys.items() if value is not None}
        made = replace(self, steps=(*self.steps, {operation: given}))
        made.recipe  # noqa: B018  # what is wrong is said at once
        return made

    def quantize(self, bits: int | None = None, **keys: Any) -> Model:
        """Fewer bits for the linear layers: `quantize(bits=4)`, `quantize(bits=3, method="gptq", calibration="text.txt")`, `quantize(scheme="FP8")`."""
        return self.step("quantize", bits=bits, **keys)

    def dequantize(self) -> Model:
        """Packed weights as ordinary ones."""
        return self.step("dequantize")

    def convert(self, to: str) -> Model:
        """Packed weights in another format, code for code: `convert("gptq")`."""
        return self.step("convert", to=to)

    def prune(self, sparsity: float | None = None, **keys: Any) -> Model:
        """Weights to zero, or neurons and heads out: `prune(0.5)`, `prune(pattern="2:4", method="wanda", calibration="text.txt")`."""
        return self.step("prune", sparsity=sparsity, **keys)

    def retrain(self, train: Sequence[str], text: Ref | Sequence[Ref], **keys: Any) -> Model:
        """A few parameters trained, zeros kept: `retrain(["norms", "mask_lora"], "text.txt", steps=100)`."""
        return self.step("retrain", train=list(train), text=text, **keys)

    def fold(self, remove: float | None = None, **keys: Any) -> Model:
        """Fewer blocks, or blocks that share weights: `fold(0.25, calibration="text.txt")`, `fold(keep=[0, 1, 3])`, `fold(share=2)`."""
        return self.step("fold", remove=remove, **keys)

    # ---- what is measured ----

    def check(self, texts: Mapping[str, Ref] | None = None, limits: Mapping[str, Any] | None = None, **keys: Any) -> Model:
        """What `save` measures on the output and holds against limits: the keys of `checks:` in recipes (against, windows, load, sample, ...)."""
        given = {"texts": {name: str(text) for name, text in (texts or {}).items()}, "limits": dict(limits or {}), **keys}
        made = replace(self, checks={**self.checks, **{name: value for name, value in given.items() if value}})
        made.recipe  # noqa: B018
        return made

    def eval(self, texts: Mapping[str, Ref] | Ref, against: Model | Ref | None = None, window: int = 256, windows: int | None = None) -> Row:
        """Size, and perplexity on each text; against a reference KL (nats a token) and agreement too. Nothing is written: what is measured is computed."""
        named = texts if isinstance(texts, Mapping) else distinct([str(texts)])
        checks = Checks(texts={name: str(text) for name, text in named.items()}, window=window, windows=windows)
        if found := checks.problems(Path()):
            raise OptionError("; ".join(found))
        reference = None if against is None else (against if isinstance(against, Model) else open_model(against)).checkpoint()
        return measure(self.checkpoint(), checks, Path(), quiet(), reference)

    # ---- what comes of it ----

    @property
    def recipe(self) -> Recipe:
        """The recipe that this is. Errors: RecipeError with every problem found."""
        inputs = {name: {"ref": ref} for name, ref in self.inputs.items()}
        return check({"inputs": inputs, "steps": [dict(step) for step in self.steps], "checks": dict(self.checks)}, Path(), "mergekit_plus")

    def to_yaml(self) -> str:
        """The same as a file for `compress run`; paths are relative to where one stands."""
        steps = [{name: dict(keys) for name, keys in step.items()} for step in self.steps]
        content = {"inputs": dict(self.inputs), "steps": steps, "checks": dict(self.checks)}
        return yaml.safe_dump({name: value for name, value in content.items() if value}, sort_keys=False, allow_unicode=True)

    def checkpoint(self, device: str = "cpu") -> Checkpoint:
        """The result, tensor by tensor as it is read; what is to be found first (options, blocks) is searched now."""
        recipe, how = self.recipe, Execution(device=device)
        built = build(recipe, how)
        return build(with_found(recipe, built.inputs, how), how, built.inputs).result if recipe.is_open else built.result

    def plan(self, out: Ref, **how: Any) -> dict[str, Any]:
        """What `save` would do, as data, from headers alone: bytes read and written, memory, disk."""
        return plan(self.recipe, _execution(out, **how))

    def save(self, out: Ref, **how: Any) -> Outcome:
        """Compute, write and check: a folder that transformers and vLLM load, a `.safetensors` file, or `hf://org/name`.

        how: overwrite, resume, device, memory ("2GB"), workers, max_shard_size, push ("org/name"), private, cache, allow_nonfinite, progress (bars; off by
        default), engine ("ray") and ray_address.
        The outcome has the table and what became of the checks; `raise_failures()` raises CheckFailed where one was not kept.
        """
        return run(self.recipe, _execution(out, **how))


def open_model(ref: Ref) -> Model:
    """A model by where it is. Errors: CheckpointError where there is none, as soon as it is read."""
    return Model(distinct([str(ref)]))


def merge(models: Sequence[Ref] | Mapping[str, Mapping[str, Any]], method: str = "linear", *, base: Ref | None = None, **keys: Any) -> Model:
    """Several models as one: `merge(["a", "b"], "ties", base="base", density=0.5)`; options of one model stand with it, `{"a": {"weight": 0.7}, "b": {}}`.

    Errors: RecipeError with every problem found.
    """
    refs = [str(ref) for ref in models]
    names = distinct(list(dict.fromkeys([*refs, *([str(base)] if base is not None else [])])))
    of = {ref: name for name, ref in names.items()}
    listed = {of[str(ref)]: dict(own) for ref, own in models.items()} if isinstance(models, Mapping) else [of[ref] for ref in refs]
    return Model(names).step("merge", method=method, models=listed, base=None if base is None else of[str(base)], **keys)


def run_recipe(path: Ref, out: Ref | None = None, variables: Mapping[str, Any] | None = None, **how: Any) -> dict[str, Outcome]:
    """Carry out a recipe file, each combination of its matrix; by the combination ("" where there is no matrix), as `compress run` does.

    Errors: those of recipes and of what they do, of the first that fails.
    """
    recipes = load_all(Path(path), given=variables)
    places = outs(recipes, None if out is None else Path(out))
    return {name: run(recipe, _execution(places[name], **how)) for name, recipe in recipes.items()}


def _execution(
    out: Ref | None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "cpu",
    memory: str | int | None = None,
    workers: int | None = None,
    max_shard_size: str | int = "5GB",
    push: str | None = None,
    private: bool = False,
    cache: bool = False,
    allow_nonfinite: bool = False,
    progress: bool = False,
    engine: Literal["threads", "ray"] = "threads",
    ray_address: str | None = None,
) -> Execution:
    save = SaveOptions(
        overwrite, parse_size(max_shard_size), None if memory is None else parse_size(memory), workers, allow_nonfinite, on() if progress else quiet(),
        resume=resume,
    )  # fmt: skip
    return Execution(save, device, None if out is None else Path(out), cache, push, private, engine=engine, ray_address=ray_address)


def _plain(value: Any) -> Any:
    """Values as YAML has them: paths are texts, tuples are lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
