"""The reference pages of the docs site, read from the program, the registries and the schemas, so that they say what the code does.

    from site_reference import PAGES
    PAGES["reference/cli.md"]()   # Markdown
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, RootModel
from typer.core import TyperGroup

EXAMPLE = re.compile(r"^`(compress .+)`$", re.MULTILINE)  # in help, on a line of its own
ANNOTATION = re.compile(r"(: |-> )'([^']*)'")  # in a signature, where annotations are texts
COMMENT = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)  # of a schema's field


def commands() -> dict[str, Any]:
    """Every command of the program by what is typed for it, in the order of its help."""
    from mergekit_plus.commands import app

    def of(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            yield from of(command, *path, name) if isinstance(command, TyperGroup) else [(" ".join((*path, name)), command)]

    return dict(of(typer.main.get_command(app)))


def cli() -> str:
    """Commands with their examples, arguments and options."""
    parts = ["# Commands", "`compress --help` and `compress COMMAND --help` say the same. In the examples `code` and `docs` are fine-tunes of `base`."]
    for name, command in commands().items():
        about = command.help or ""
        examples = "\n".join(EXAMPLE.findall(about))
        said = EXAMPLE.sub("", about).strip()
        context = typer.Context(command, info_name=name)
        rows = {kind: [_row(parameter.get_help_record(context)) for parameter in command.params if parameter.param_type_name == kind]
                for kind in ("argument", "option")}  # fmt: skip
        parts += [f"## compress {name}", said, f"```\n{examples}\n```" if examples else ""]
        parts += [_table((kind, ""), rows[kind]) for kind in rows]
    return _page(parts)


def methods() -> str:
    """Every method with its options, by kind."""
    from mergekit_plus.listing import list_methods

    parts, kind = ["# Methods", "`compress methods NAME` says the same. Options are set with `-s name=value`, and in recipes beside `method`."], ""
    for name, entry in list_methods().items():
        if entry["kind"] != kind:
            kind = entry["kind"]
            parts.append(f"## {kind.capitalize()}s")
        base = "from `--base`, or the first of two models" if entry.get("from_first") else "needs `--base`" if entry.get("needs_base") else ""
        base = base or ("takes `--base`" if entry.get("takes_base") else "")
        rows = [
            (_code(option["name"]), option["type"] + (", one or one for each model" if option["per_model"] else ""),
             "required" if option["required"] else _code(option["default"]), option["help"])
            for option in entry["options"]
        ]  # fmt: skip
        parts += [f"### {name}", entry["summary"] + (f" ({base})" if base else ""), _table(("option", "type", "default", ""), rows)]
    return _page(parts)


def recipes() -> str:
    """The keys of recipes, of each step, and of what stands within them."""
    from mergekit_plus.recipe import Recipe
    from mergekit_plus.recipe_schema import BLANKS
    from mergekit_plus.steps import OPERATIONS

    inner = [model for model in within(Recipe, *OPERATIONS.values()) if model is not Recipe and model not in OPERATIONS.values()]
    parts = ["# Keys of recipes", "What [recipes](../recipes.md) may hold. `compress schema` prints the same for editors."]
    blanks = [(_code(name), "", "", blank["description"]) for name, blank in BLANKS.items()]
    parts += [_table(("key", "type", "default", ""), [*blanks, *_keys(Recipe)])]
    parts += ["## Steps", "Options of methods stand beside these keys: [methods](methods.md)."]
    for name, model in OPERATIONS.items():
        parts += [f"### {name}", _said(model), _table(("key", "type", "default", ""), _keys(model))]
    parts.append("## Tables within")
    for model in inner:
        parts += [f"### {model.__name__}", _said(model), _table(("key", "type", "default", ""), _keys(model))]
    return _page(parts)


def api() -> str:
    """What `import mergekit_plus as mp` has."""
    import mergekit_plus
    from mergekit_plus import api as module

    parts = ["# Python", inspect.cleandoc(module.__doc__ or ""), "Called in the [tutorial](../tutorial.md)."]
    for name in mergekit_plus.__all__:
        thing = getattr(mergekit_plus, name)
        parts += [f"## mp.{name}", _signature(name, thing), inspect.cleandoc(thing.__doc__ or "")]
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            for member, value in vars(thing).items():
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    called = f"{name}.{member}"
                    parts += [f"### {called}", _signature(called, value), inspect.cleandoc(value.__doc__ or "")]
    return _page(parts)


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli, "reference/methods.md": methods, "reference/recipes.md": recipes, "reference/api.md": api,
}  # fmt: skip


# ---- schemas ----


def within(*roots: type[BaseModel]) -> list[type[BaseModel]]:
    """Schemas and those that are part of them, each once."""
    found: list[type[BaseModel]] = []

    def visit(hint: Any) -> None:
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            if hint not in found:
                found.append(hint)
                for field in hint.model_fields.values():
                    visit(field.annotation)
        else:
            for inner in get_args(hint):
                visit(inner)

    for root in roots:
        visit(root)
    return found


def _keys(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """A row for each key; what it means stands in the field's description, or in the comment behind it."""
    if issubclass(model, RootModel):
        return []
    comments = {name: text for base in reversed(model.__mro__) if base.__module__.startswith(("mergekit_plus", "prune", "quant"))
                for name, text in COMMENT.findall(inspect.getsource(base))}  # fmt: skip
    rows = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        empty = default is None or default == [] or default == {} or isinstance(default, BaseModel)
        shown = "required" if field.is_required() else "" if empty else _code(default)
        rows.append((_code(field.alias or name), kind_of(field.annotation), shown, field.description or comments.get(name, "")))
    return rows


def kind_of(hint: Any) -> str:
    """A type in a reader's words; schemas link to their tables."""
    from mergekit_plus.steps import OPERATIONS

    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return kind_of(inner[0])
    if origin in (Union, types.UnionType):
        kinds = dict.fromkeys(kind_of(part) for part in inner if part is not type(None))
        return "[steps](#steps)" if {*inner} >= {*OPERATIONS.values()} else " or ".join(kinds)
    if origin is Literal:
        return ", ".join(_code(value) for value in inner)
    if origin in (list, tuple):
        return f"list of {kind_of(inner[0])}" if inner else "list"
    if origin is dict:
        of = kind_of(inner[1])
        return of if of == "[steps](#steps)" else f"table of {of}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return {str: "text", int: "integer", float: "number", bool: "true or false", dict: "table", Any: "anything"}.get(hint, str(hint))


def _said(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "")


# ---- Markdown ----


def _signature(name: str, thing: Any) -> str:
    if isinstance(thing, property) or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return ""
    parameters = inspect.signature(thing)
    text = f"{name}{parameters}".replace("(self, ", "(").replace("(self)", "()")
    text = ANNOTATION.sub(r"\1\2", text)
    return f"```python\n{text}\n```"


def _code(value: object) -> str:
    """A value as YAML has it; nothing for none."""
    text = str(value).lower() if isinstance(value, bool) else f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return "" if value is None else f"`{text}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    body = ["| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body]) if body else ""


def _row(record: tuple[str, str] | None) -> tuple[str, str]:
    """A parameter as help shows it."""
    name, about = record or ("", "")
    return _code(name), about


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
