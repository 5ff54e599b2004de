"""Checkpoints: opened from files, computed lazily, saved all or nothing."""

from .checkpoint import Checkpoint, TensorSource, TensorTable
from .deferred import Deferred, Work
from .layout import SaveOptions
from .manifest import Manifest
from .plan import Plan, Step, copy_step, renamed, steps_of
from .save import save
from .scan import Measured, Scan
from .spec import TensorSpec

__all__ = [
    "Checkpoint", "Deferred", "Manifest", "Measured", "Plan", "SaveOptions", "Scan", "Step", "TensorSource", "TensorSpec", "TensorTable", "Work", "copy_step",
    "renamed", "save", "steps_of",
]  # fmt: skip
