"""Checkpoints: opened from files, computed lazily, saved all or nothing."""

from .checkpoint import Checkpoint, Measured, Plan, Scan, Step, TensorSource, TensorTable, copy_step, renamed, steps_of
from .layout import SaveOptions
from .manifest import Manifest
from .save import save
from .spec import TensorSpec

__all__ = [
    "Checkpoint", "Manifest", "Measured", "Plan", "SaveOptions", "Scan", "Step", "TensorSource", "TensorSpec", "TensorTable", "copy_step",
    "renamed", "save", "steps_of",
]  # fmt: skip
