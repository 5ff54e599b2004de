"""Merge methods, one file each. Importing the package registers them, in the order in which they are listed."""

from . import linear, slerp, task_arithmetic, ties, dare, pcb, passthrough  # noqa: F401, I001  (this order is the registry's)
from .method import METHODS, MergeMethod

__all__ = ["METHODS", "MergeMethod"]
