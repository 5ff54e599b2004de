"""Calibration: a text flows through a model one block at a time, and each block is worked on while the text stands before it.

    ids = read_text([Path("text.txt")], load_tokenizer(checkpoint), windows=128, window=256)
    walk(checkpoint, ids, process, work)

`process` gets a `Block`: its module with float32 weights, the linear ones by name, the moments of their inputs. What it leaves in the module is what the
blocks behind it see. One block's weights are in memory at a time, and the hidden states lie in a file.
"""

from .block import Block
from .options import CalibrationOptions
from .states import HiddenStates
from .text import read_text
from .walk import walk

__all__ = ["Block", "CalibrationOptions", "HiddenStates", "read_text", "walk"]
