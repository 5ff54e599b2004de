"""Adapters of the peft library: read, applied to a base as a stream, and written."""

from .apply import apply
from .peft import Adapter, LowRank, open_adapter, read_adapter

__all__ = ["Adapter", "LowRank", "apply", "open_adapter", "read_adapter"]
