"""What a quantised weight looks like on disk: one file for each format, in the registry `FORMATS`."""

from . import dense, pack_quantized  # noqa: F401  (they register themselves)
from .config import read_config
from .format import FORMATS, Format
from .pack_quantized import decode

__all__ = ["FORMATS", "Format", "decode", "read_config"]
