"""The commands of the program: thin doors, each to one library call. Their order is that of `compress --help`."""

from . import merging, quantizing, pruning, recipes, looking, running, adapters  # isort: skip
from .common import app

__all__ = ["adapters", "app", "looking", "merging", "pruning", "quantizing", "recipes", "running"]
