"""Pruning: a pruner says which weights count least, a mask holds which are zero, a plan makes the pruned checkpoint."""

from .magnitude import magnitude
from .masks import Sparsity, has_pattern, pack, unpack
from .pruner import PRUNERS, Pruner, Scope, pruner
from .random import random
from .sparsegpt import sparsegpt
from .wanda import wanda

__all__ = ["PRUNERS", "Pruner", "Scope", "Sparsity", "has_pattern", "magnitude", "pack", "pruner", "random", "sparsegpt", "unpack", "wanda"]
