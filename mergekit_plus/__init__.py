"""mergekit-plus: merge and compress model checkpoints as one stream."""

__version__ = "0.1.0"
