"""Folding depth: blocks that count least are removed, and blocks that remain share their linear weights.

FoldGPT-style: the paper (arXiv 2407.00928) names learnable gates under a removal rate, sharing within groups, and a cure by fine-tuning and distillation,
and has no code; what it leaves open is chosen here and said where it is chosen.
"""

from .find import count_of, find
from .importance import SCORES, Importance, importance
from .surgery import Fold, folded, shareable, stack_of

__all__ = ["SCORES", "Fold", "Importance", "count_of", "find", "folded", "importance", "shareable", "stack_of"]
