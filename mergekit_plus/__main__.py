"""`compress`, `mergekit-plus` and `python -m mergekit_plus`."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Run the program, unless one of its top-level packages is somebody else's."""
    for name in ("quant", "prune"):
        foreign = _foreign(name)
        if foreign:
            sys.exit(
                f"compress: the package '{name}' at {foreign} is not mergekit-plus's; another distribution (or a folder where you stand) "
                "took its name. Install mergekit-plus in an environment of its own."
            )
    _cli().main()


def _foreign(name: str) -> str | None:
    """Where a package that should be ours is, if it is not."""
    ours = Path(__file__).resolve().parent.parent / name
    spec = find_spec(name)
    found = spec.submodule_search_locations if spec else None
    if spec is None or not found:
        return str(spec.origin) if spec else "nowhere"
    return None if Path(next(iter(found))).resolve() == ours else next(iter(found))


def _cli() -> ModuleType:
    """cli.py: inside the package where it was installed from a wheel, beside it in a checkout; always loaded by its place, never by its name."""
    shipped = Path(__file__).with_name("cli.py")
    place = shipped if shipped.exists() else Path(__file__).parent.with_name("cli.py")
    spec = spec_from_file_location("mergekit_plus.cli", place)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
