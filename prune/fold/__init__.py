"""Folding depth: blocks that count least are removed, and blocks that remain share their linear weights.

FoldGPT-style: the paper (arXiv 2407.00928) names learnable gates under a removal rate, sharing within groups, and a cure by fine-tuning and distillation,
and has no code; what it leaves open is chosen here and said where it is chosen.
"""

from .compact import compacted, expanded, fold_of
from .find import count_of, find, find_parents
from .importance import SCORES, Importance, importance
from .maps import Map, Source, choose_parents, mapped
from .relax import rank_of, relaxed, voices
from .surgery import Fold, folded, kinds_of, shareable, stack_of
from .tied import load_tied, sites_of_compact, stored, without_voices

__all__ = [
    "SCORES", "Fold", "Importance", "Map", "Source", "choose_parents", "compacted", "count_of", "expanded", "find", "find_parents",
    "fold_of", "folded", "importance", "kinds_of", "load_tied", "mapped", "rank_of", "relaxed", "shareable", "sites_of_compact", "stack_of", "stored", "voices",
    "without_voices",
]  # fmt: skip
