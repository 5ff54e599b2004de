"""Merge methods, one file each. Importing the package registers them, in the order in which they are listed."""

from . import passthrough, linear, slerp, nuslerp, multislerp, karcher, nearswap, arcee_fusion  # noqa: F401, I001  (this order is the registry's)
from . import task_arithmetic, ties, dare, breadcrumbs, della, sce, ram, model_stock  # noqa: F401
from . import pcb, consensus, emr, tsv, iso, knots  # noqa: F401
from .method import METHODS, MergeMethod

__all__ = ["METHODS", "MergeMethod"]
