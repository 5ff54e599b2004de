"""Factors out of shared pools: MoS, mixture of shards (Wang et al., arXiv 2410.00938).

The modules of one kind, the q_proj of all blocks, share two pools: pieces of rows of A, and pieces of columns of B. A row of a module's A is some pieces
side by side; which ones was drawn at random once, apart for A and for B. Some pieces of each pool are a module's own. What trains is as large as LoRA of
the pool's rank, and every module has the rank of the adapter: what is written is that plain LoRA, as the authors' code does it; the pools are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from mergekit_plus.adapters.layout import Product
from mergekit_plus.errors import OptionError

from .coding import Coding
from .latent import Factors, small


@dataclass(frozen=True)
class Sharing:
    """The pools: how many ranks of each module they are as large as, how many of these are the module's own, and into how many pieces a row is cut."""

    rank: int
    private: int = 1
    shards: int = 4

    def problems(self, rank: int) -> list[str]:
        """Everything wrong with them for an adapter of this rank, a sentence each."""
        found = [] if 1 <= self.rank <= rank else [f"pools of rank {self.rank} for an adapter of rank {rank}: 1 up to the adapter's"]
        found += [] if 0 <= self.private < self.rank else [f"{self.private} private ranks in pools of rank {self.rank}: they must be fewer"]
        return found + ([] if self.shards > 0 else [f"a row has 1 piece or more, not {self.shards}"])


class Pool(nn.Module):
    """What the modules of a kind share: pieces of A [pieces, in / shards], and of B, relative to `alpha`, [pieces, out / shards]."""

    def __init__(self, a: Tensor, rows_b: Tensor, alpha: float) -> None:
        super().__init__()
        self.a, self.rows_b, self.alpha = nn.Parameter(a), nn.Parameter(rows_b), alpha


class Pooled(Factors):
    """The factors of one module: which pieces of its pool its rows are, [rank, shards] each for A and for B."""

    def __init__(self, pool: Pool, shape: tuple[int, int], places: tuple[Tensor, Tensor], coding: Coding | None) -> None:
        super().__init__(shape, 1.0, coding)
        self.pool, self.places = pool, places

    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows, put together."""
        a, rows_b = (pieces[places].flatten(1) for pieces, places in zip((self.pool.a, self.pool.rows_b), self.places, strict=True))
        return a, rows_b * self.pool.alpha


def pooled(products: Sequence[Product], rank: int, sharing: Sharing, coding: Coding | None, alpha: float, generator: torch.Generator) -> Mapping[str, Pooled]:
    """Factors of this rank for modules, by name, out of pools for each kind: the modules of one last name and shape. A begins as of LoRA, B at zero."""
    kinds: dict[tuple[str, tuple[int, ...]], list[Product]] = {}
    for product in products:
        kinds.setdefault((product.module.rpartition(".")[2], product.shape), []).append(product)
    found: dict[str, Pooled] = {}
    for (_, (out, width)), own in kinds.items():
        pieces = sharing.rank * len(own) * sharing.shards
        bound = 1 / sqrt(width)  # of whole rows
        a = torch.empty(pieces, width // sharing.shards).uniform_(-bound, bound, generator=generator)
        pool = Pool(a, small((pieces, out // sharing.shards), coding, generator), alpha)
        for place, product in enumerate(own):
            drawn = _draw(place, len(own), rank, sharing, generator), _draw(place, len(own), rank, sharing, generator)
            found[product.module] = Pooled(pool, (out, width), drawn, coding)
    return {product.module: found[product.module] for product in products}


def check_pools(products: Sequence[Product], rank: int, sharing: Sharing) -> None:
    """OptionError for a module whose rows cannot be cut into so many pieces, or which has no such rank."""
    for product in products:
        if uneven := [length for length in product.shape if length % sharing.shards]:
            raise OptionError(f"{product.module}: {uneven[0]} numbers cannot be cut into {sharing.shards} pieces; give another number of shards")
        if rank > min(product.shape):
            raise OptionError(f"{product.module}: {product.shape} has no rank {rank}; give a smaller rank, or leave the module out with --target")


def _draw(place: int, count: int, rank: int, sharing: Sharing, generator: torch.Generator) -> Tensor:
    """The pieces of a module's rows, [rank, shards]: of the shared ones that come first in the pool, none again before all were drawn; then its own."""
    shared, own, asked = (sharing.rank - sharing.private) * count * sharing.shards, sharing.private * sharing.shards, (rank - sharing.private) * sharing.shards
    drawn = torch.cat([torch.randperm(shared, generator=generator) for _ in range(-(-asked // shared))])[:asked]
    return torch.cat([drawn, shared + place * own + torch.arange(own)]).view(rank, sharing.shards)
