"""The site's reference leaves nothing out, and the links of the docs lead somewhere on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import site_reference as reference
import yaml
from site_hooks import FROM_ROOT, placed

import mergekit_plus
from mergekit_plus.listing import list_methods
from mergekit_plus.recipe import Recipe
from mergekit_plus.recipe_schema import recipe_schema
from mergekit_plus.steps import OPERATIONS

REPOSITORY = Path(__file__).parents[1]


def sections(page: str) -> dict[str, str]:
    """A page by its headings."""
    parts = re.split(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_there_with_its_options_and_examples() -> None:
    page, known = sections(reference.cli()), reference.commands()
    assert {"merge", "quantize", "run", "adapter extract"} <= known.keys()
    for name, command in known.items():
        section = page[f"compress {name}"]
        assert "```\ncompress " in section
        missing = [spelt for parameter in command.params for spelt in parameter.opts if f"{spelt}" not in section]
        assert missing == [], name


def test_every_method_is_there_with_its_options() -> None:
    page = sections(reference.methods())
    assert {"Merge methods", "Quantizers", "Pruners"} <= page.keys()
    for name, entry in list_methods().items():
        assert entry["summary"] in page[name]
        assert [option["name"] for option in entry["options"] if f"| `{option['name']}` | " not in page[name]] == []
    assert "| `weight` | number, one or one for each model | `1.0` | how much of this model goes in |" in page["ties"]


def test_every_step_and_key_that_the_schema_knows_is_there() -> None:
    page, schema = sections(reference.recipes()), recipe_schema()
    tables = {model.__name__: name for name, model in OPERATIONS.items()}
    assert [key for key in schema["properties"] if f"| `{key}` |" not in page["Keys of recipes"]] == []
    assert OPERATIONS.keys() <= page.keys()
    for model in reference.within(Recipe, *OPERATIONS.values()):
        section = page[tables.get(model.__name__, model.__name__ if model is not Recipe else "Keys of recipes")]
        assert [name for name in model.model_fields if name != "root" and f"| `{name}` |" not in section] == []
    assert {"Checks", "Limits", "CalibrationOptions", "SearchOptions"} <= page.keys()
    assert "| `windows` | integer |  | use only so many windows of each text |" in page["Checks"]


def test_everything_that_is_imported_is_there() -> None:
    page = sections(reference.api())
    assert [name for name in mergekit_plus.__all__ if f"mp.{name}" not in page] == []
    assert 'method: str = \'linear\', *, base: Ref | None = None' in page["mp.merge"]
    assert {"Model.quantize", "Model.save", "Model.recipe"} <= page.keys()


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(entry: object) -> list[str]:
        return [entry] if isinstance(entry, str) else [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]

    listed = pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted([*FROM_ROOT, *reference.PAGES, *(path.name for path in (REPOSITORY / "docs").glob("*.md"))])


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("index.md", "[docs/hub.md](docs/hub.md)", "[docs/hub.md](hub.md)"),
        ("index.md", "[recipes/](recipes)", "`recipes`"),
        ("recipes.md", "[a workflow](ci/compress.yml)", "[a workflow](ci/compress.yml)"),
        ("recipes.md", "[rules](merging.md#pcb)", "[rules](merging.md#pcb)"),
        ("hub.md", "[start](../README.md#install)", "[start](index.md#install)"),
        ("adapters.md", "[its format](../quant/adapters/container.py)", "its format (`quant/adapters/container.py`)"),
        ("reference/cli.md", "[recipes](../recipes.md)", "[recipes](../recipes.md)"),
        ("hub.md", "[elsewhere](https://example.org/a.md), [here](#below)", "[elsewhere](https://example.org/a.md), [here](#below)"),
        ("hub.md", "```\n[code](../setup.py)\n```", "```\n[code](../setup.py)\n```"),
        ("merging.md", r"| `\|d\|` | a \| b |", r"| `|d|` | a \| b |"),
    ],
)
def test_pages_are_as_the_site_has_them(page: str, link: str, there: str) -> None:
    assert placed(link, page) == there


def test_with_an_address_of_the_repository_its_files_are_linked_to() -> None:
    assert placed("[recipes/](recipes)", "index.md", "https://example.org/r/") == "[recipes/](https://example.org/r/blob/main/recipes)"
