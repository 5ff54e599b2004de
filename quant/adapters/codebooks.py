"""Codebooks for a few bits: the 2^b levels that stand best for a standard normal variable.

"k-median" minimises E|x - q(x)|: boundaries are midpoints of levels, levels the medians of their cells (Jie, Wang and Deng, arXiv 2307.16867, whose
one-bit levels are therefore +-0.67449); "l2" minimises E(x - q(x))^2: levels are the means of their cells (Lloyd and Max). Both are the fixed point
of that rule, found by a few hundred plain iterations from the quantiles and then by Newton's method: plain iteration alone takes
hundreds of thousands of steps at 8 bits.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Codebook = Literal["l2", "k-median"]
BITS = (1, 2, 3, 4, 8)
WIDTHS = (0, *BITS)  # of a row among others: with 0 bits it is left out
_PLAIN = 300  # iterations before Newton's, from where it converges at every width

Array = NDArray[np.float64]


@cache
def levels(codebook: Codebook, bits: int) -> tuple[float, ...]:
    """The 2^bits levels in ascending order, exactly antisymmetric; at 0 bits the one level 0."""
    if not bits:
        return (0.0,)
    v = -ndtri(_upper_quantiles(1 << (bits - 1)))
    for _ in range(_PLAIN):
        v = _rule(v, codebook)[0]
    for _ in range(20):
        image, below, above = _rule(v, codebook)
        # d image_k / d v = (below_k of boundary k) + (above_k of boundary k+1), each boundary half of two levels, the lowest fixed at 0
        slope = np.diag(np.append(above[:-1], 0.0) / 2 + np.insert(below[1:], 0, 0.0) / 2)
        slope += np.diag(above[:-1] / 2, 1) + np.diag(below[1:] / 2, -1)
        step = np.linalg.solve(np.eye(len(v)) - slope, image - v)
        v = v + step
        if np.abs(step).max() < 1e-15:
            break
    return (*(-v[::-1]).tolist(), *v.tolist())


def residual(values: tuple[float, ...], codebook: Codebook) -> float:
    """How far levels are from the fixed point."""
    v = np.array(values[len(values) // 2 :])
    return float(np.abs(_rule(v, codebook)[0] - v).max())


def boundaries(values: tuple[float, ...]) -> tuple[float, ...]:
    """Where one level's cell ends and the next begins: the midpoints."""
    return tuple((low + high) / 2 for low, high in zip(values, values[1:], strict=False))


@cache
def product_loss(codebook: Codebook, bits: int) -> float:
    """What is lost of a product of two independent normal matrices whose elements are both coded, relative to it: `1 - 2 a^2 + b^2` with
    a = E[x q(x)] and b = E[q(x)^2]; 0.595 for l2 at one bit."""
    found = levels(codebook, bits)
    edges = np.array([-np.inf, *boundaries(found), np.inf])
    along = float((np.array(found) * (_density(edges[:-1]) - _density(edges[1:]))).sum())
    size = float((np.array(found) ** 2 * (ndtr(edges[1:]) - ndtr(edges[:-1]))).sum())
    return 1 - 2 * along**2 + size**2


def _upper_quantiles(count: int) -> Array:
    """P(X > level) of the positive levels in the middle of cells of equal weight."""
    return 0.5 - (np.arange(count) + 0.5) / (2 * count)


def _rule(v: Array, codebook: Codebook) -> tuple[Array, Array, Array]:
    """The next positive levels, and their derivatives by the boundary below each and above it.

    In upper tails, P(X > t), which keep their digits where 1 - P would lose them.
    """
    low = np.concatenate([[0.0], (v[:-1] + v[1:]) / 2])
    high = np.append(low[1:], np.inf)
    tail_low, tail_high = ndtr(-low), ndtr(-high)
    density_low, density_high = _density(low), _density(high)
    if codebook == "k-median":
        image = -ndtri((tail_low + tail_high) / 2)
        return image, density_low / (2 * _density(image)), density_high / (2 * _density(image))
    mass = tail_low - tail_high
    image = (density_low - density_high) / mass
    return image, density_low * (image - low) / mass, density_high * (np.where(np.isinf(high), 0.0, high) - image) / mass


def _density(x: Array) -> Array:
    density: Array = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    return density
