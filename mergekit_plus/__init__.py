"""mergekit-plus: merge and compress model checkpoints as one stream.

    import mergekit_plus as mp

    mp.merge(["./code", "./docs"], "ties", base="org/base").quantize(bits=4).save("out")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import CheckFailed, CompressError, Model, RecipeError, merge, open_model, run_recipe

__version__ = "0.1.0"
__all__ = ["CheckFailed", "CompressError", "Model", "RecipeError", "merge", "open_model", "run_recipe"]


def __getattr__(name: str) -> Any:
    """What the API has, when it is asked for: importing the package loads no torch, so that `compress --help` is quick."""
    if name in __all__:
        return getattr(importlib.import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """`mp.merge` is the API's function, though the package of merge methods has that name too: `from mergekit_plus.merge import METHODS`."""

    @property
    def merge(self) -> Any:
        return __getattr__("merge")

    @merge.setter
    def merge(self, methods: ModuleType) -> None:
        """The import system's, when it has loaded that package; it finds it in `sys.modules`."""


sys.modules[__name__].__class__ = _Package
