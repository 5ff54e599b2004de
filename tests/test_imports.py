"""Imports point one way, methods do not know each other, and what must be quick does not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each part may import what stands on lower lines, and its neighbours on the line; not so merge, quant and prune: they do not know each other.
LAYERS = [
    [
        "cli", "mergekit_plus.__main__", "mergekit_plus.commands", "mergekit_plus.show", "mergekit_plus.listing", "mergekit_plus.report",
        "mergekit_plus.results", "mergekit_plus.api", "mergekit_plus.recipe_schema", "mergekit_plus.starter", "mergekit_plus.compare",
        "mergekit_plus.bits_plot",
    ],
    [
        "mergekit_plus.recipe", "mergekit_plus.recipe_file",
        "mergekit_plus.provenance", "mergekit_plus.steps", "mergekit_plus.mergekit", "mergekit_plus.checks", "mergekit_plus.card",
        "mergekit_plus.template", "mergekit_plus.trial", "mergekit_plus.search", "mergekit_plus.sparsities", "mergekit_plus.depths", "mergekit_plus.verify",
        "mergekit_plus.generate", "mergekit_plus.engines",
    ],
    ["mergekit_plus.merge", "mergekit_plus.moe", "quant", "prune"],
    [
        "mergekit_plus.training", "mergekit_plus.calibration", "mergekit_plus.evaluate", "mergekit_plus.diff", "mergekit_plus.inspection",
        "mergekit_plus.adapters", "mergekit_plus.vocabulary",
    ],
    ["mergekit_plus.model", "mergekit_plus.layers", "mergekit_plus.statistics", "mergekit_plus.moments", "mergekit_plus.noise"],
    ["mergekit_plus.checkpoint"],
    ["mergekit_plus.registry", "mergekit_plus.names", "mergekit_plus.options", "mergekit_plus.progress", "mergekit_plus.digests", "mergekit_plus.safe_yaml"],
    ["mergekit_plus.errors"],
]
METHODS = LAYERS[2]
DOORS = {  # `Checkpoint.open` opens what operations make too: model+adapter, packed adapters, compact models
    ("mergekit_plus.checkpoint.folder", "mergekit_plus.adapters.apply"), ("mergekit_plus.checkpoint.folder", "quant.adapters.container"),
    ("mergekit_plus.checkpoint.folder", "prune.fold.compact"),
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the project."""
    found = {"cli": ROOT / "cli.py"}
    for path in sorted(path for top in ("mergekit_plus", "quant", "prune") for path in (ROOT / top).rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of this project that a module names in import statements, wherever these stand."""
    found: set[str] = set()
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])] if node.level else filter(None, [node.module]))
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found & MODULES.keys() - {name}


def part(name: str) -> str:
    """The part of the tree that a module belongs to: "mergekit_plus.checkpoint", "quant"."""
    return ".".join(name.split(".")[: 2 if name.startswith("mergekit_plus.") else 1])


def line(name: str) -> int:
    for number, parts in enumerate(LAYERS):
        if part(name) in parts:
            return number
    raise AssertionError(f"say in LAYERS where {name} belongs")


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"mergekit_plus"}))
def test_imports_point_down(name: str) -> None:
    for other in imports(name) - {"mergekit_plus"} - {upper for lower, upper in DOORS if lower == name}:
        if part(other) != part(name):
            assert line(other) >= line(name), f"{name} imports {other}, which stands above it"
            assert not (part(name) in METHODS and part(other) in METHODS), f"{name} imports {other}: methods do not know each other"


def test_the_package_itself_names_its_api_alone_and_loads_it_when_it_is_asked_for() -> None:
    assert imports("mergekit_plus") == {"mergekit_plus.api"}
    lines = "import sys, mergekit_plus as mp; before = set(sys.modules); mp.merge; print({'torch', 'mergekit_plus.api'} & before, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set() True\n"


def test_the_merge_methods_do_not_import_each_other() -> None:
    from mergekit_plus.merge import METHODS

    files = {method.function.__module__ for method in METHODS.values()}
    assert len(files) > 3
    for name in files:
        assert not imports(name) & files, name


def test_specs_and_headers_need_no_torch() -> None:
    """Whoever imports them gets torch with the package; but they must not need it, so that it can be moved out of their way."""
    for name in ("spec", "safetensors"):
        assert "\nimport torch" not in MODULES[f"mergekit_plus.checkpoint.{name}"].read_text()
        assert not {f"mergekit_plus.checkpoint.{other}" for other in ("dtypes", "checkpoint", "plan", "save")} & imports(f"mergekit_plus.checkpoint.{name}")


@pytest.mark.parametrize("module", ["mergekit_plus", "mergekit_plus.errors", "mergekit_plus.progress", "mergekit_plus.digests", "mergekit_plus.registry"])
def test_what_must_be_quick_does_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
