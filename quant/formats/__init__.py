"""What a quantised weight looks like on disk: one file for each format, in the registry `FORMATS`."""

from .config import read_config
from .dense import FORMATS
from .format import Format
from .pack_quantized import decode

__all__ = ["FORMATS", "Format", "decode", "read_config"]
