"""What a quantised weight looks like on disk: one file for each family of formats; `FORMATS` are written, `READERS` are read."""

from . import dense, pack_quantized  # noqa: F401, I001  (they register themselves, in this order)
from . import plain, fp4, gptq, awq  # noqa: F401
from .format import FORMATS, READERS, AnyScheme, Codes, Format, Reader
from .pack_quantized import decode
from .reading import Module, holds_codes, modules_of, read_config, stored_as

__all__ = ["FORMATS", "READERS", "AnyScheme", "Codes", "Format", "Module", "Reader", "decode", "holds_codes", "modules_of", "read_config", "stored_as"]
