"""Tokenizers in a merge: one vocabulary for all models, every row at its token."""

from .retokenize import retokenize
from .spec import ModelToken, TokenizerSpec, TokenRule, ZeroRow

__all__ = ["ModelToken", "TokenRule", "TokenizerSpec", "ZeroRow", "retokenize"]
