"""The two factors of a LoRA update at a few bits: the gauge in which they are coded, and the codes and scales that lose least of their product.

`B A` says nothing of how it is shared out between B and A: `B M` and `M^-1 A` are the same update. In the gauge of its SVD, `B = U S^1/2` and
`A = S^1/2 V^T` have orthogonal components, the largest first, each as large on both sides; coding them loses `1 - (1 - D)^2` of the update where a codebook
loses D of a normal variable: 0.595 at one bit. "balanced" turns that gauge by an orthogonal matrix that makes all components equally large, which
loses less: the errors of one component are then partly made good by the others.

`refitted` wins much of the rest back: component by component, on either side, it takes the codes and the scale that fit best what the
other components leave of the update.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from scipy.fft import dct
from torch import Tensor
from torch.nn.functional import pad

from mergekit_plus.adapters.lowrank import rank_of_product

from .coding import GROUP, Coded, Coding, decode, encode, fitted, nearest, positive, rescaled

SWEEPS = 8  # over all components of both factors; a gain below a hundredth ends them

Pair = tuple[Coded, Coded]
Gauge = Literal["balanced", "svd", "none"]


def turned(a: Tensor, b: Tensor, gauge: Gauge) -> tuple[Tensor, Tensor]:
    """A [rank, n] and B [m, rank] of the same product in another gauge, float64."""
    if gauge == "none":
        return a.double(), b.double()
    rank = len(a)
    a, b = rank_of_product([b], [a], rank)
    a, b = pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - b.shape[1]))  # a rank above the shorter side of the product
    if gauge == "svd":
        return a, b
    mix = torch.from_numpy(dct(torch.eye(rank, dtype=torch.float64).numpy(), norm="ortho"))  # orthogonal, every row of it spread over all columns
    return mix.T @ a, b @ mix


def encode_pair(a: Tensor, b: Tensor, coding: Coding, gauge: Gauge = "balanced", refit: bool = True) -> Pair:
    """A [rank, n] and B [m, rank] as codes: A's rows and B's columns are the rows that are coded."""
    a, b = turned(a, b, gauge)
    pair = encode(a, coding), encode(b.T, coding)
    return refitted(a, b.T, pair) if refit else pair


def lost(a: Tensor, rows_b: Tensor, pair: Pair) -> float:
    """The squared Frobenius norm of what is lost of the product, relative to the product's; 0 where that is 0. In float64, from the Gram matrices alone."""
    coded_a, coded_b = (decode(part).double() for part in pair)
    whole = _inner(a, rows_b, a, rows_b)
    error = whole - 2 * _inner(a, rows_b, coded_a, coded_b) + _inner(coded_a, coded_b, coded_a, coded_b)
    return max(0.0, error / whole) if whole else 0.0


def _inner(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> float:
    """`<B A, B' A'>`, rows being components."""
    return float(((a @ other_a.T) * (b @ other_b.T)).sum())


def refitted(a: Tensor, rows_b: Tensor, pair: Pair) -> Pair:
    """Codes and scales of both factors that lose no more of the product: never worse than `pair`, the sweeps being kept only while they gain."""
    best, least = pair, lost(a, rows_b, pair)
    for _ in range(SWEEPS):
        coded_a, coded_b = best
        coded_b = _sweep(rows_b, a, coded_b, decode(coded_a).double())
        coded_a = _sweep(a, rows_b, coded_a, decode(coded_b).double())
        coded_b = rescaled(coded_b, scale_factors(rows_b, a, coded_b, coded_a))
        coded_a = rescaled(coded_a, scale_factors(a, rows_b, coded_a, coded_b))
        error = lost(a, rows_b, (coded_a, coded_b))
        gain = least - error
        if gain > 0:
            best, least = (coded_a, coded_b), error
        if gain < 1e-2 * least:
            break
    return best


def wanted(a: Tensor, rows_b: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """What each component would be if it were not coded, to fit best what the other components leave; coding it gives the component again where
    `refitted` has come to its end. [rank, n] and [rank, m], float64: where training starts from."""
    coded_a, coded_b = (decode(part).double() for part in pair)
    return _wanted(a, rows_b, coded_a, coded_b), _wanted(rows_b, a, coded_b, coded_a)


def _wanted(mine: Tensor, other: Tensor, values: Tensor, against: Tensor) -> Tensor:
    between = against @ against.T
    sizes = between.diagonal()[:, None]
    return torch.where(sizes > 0, (against @ other.T @ mine - between @ values) / positive(sizes) + values, mine)


def scale_factors(mine: Tensor, other: Tensor, coded: Coded, coded_other: Coded) -> Tensor:
    """What to multiply each scale of one factor with, [scales], so that the product is fitted best: the exact least squares for these codes.

    mine, other: the rows of this factor and of the other as they were, [rank, width]. Scales that share no element (groups of different columns) do not
    meet in the normal equations, which are solved for all of them together.
    """
    values, against = decode(coded).double(), decode(coded_other).double()
    owners = coded.coding.owners(*values.shape)
    scales = coded.coding.scales(*values.shape)
    between, target = against @ against.T, (other @ against.T).T @ mine  # [rank, rank], [rank, width]
    part = torch.zeros(scales, dtype=torch.float64).index_add(0, owners.flatten(), (values * target).flatten())
    if coded.coding.scale == "tensor":
        return part / positive((between * (values @ values.T)).sum()[None])
    groups = scales // len(values)  # of each row
    size = GROUP if coded.coding.scale == "group" else values.shape[1]
    blocks = pad(values, (0, groups * size - values.shape[1])).view(len(values), groups, size).transpose(0, 1)  # [groups, rank, size]
    normal = (blocks @ blocks.mT) * between  # [groups, rank, rank]
    found = torch.linalg.pinv(normal, hermitian=True) @ part.view(len(values), groups).T[..., None]
    return cast(Tensor, found[..., 0].T.flatten())


def _sweep(mine: Tensor, other: Tensor, coded: Coded, against: Tensor) -> Coded:
    """One pass over the components of a factor: each is coded anew to fit what the others leave, where that fits better.

    against: the other factor as it is coded, [rank, width].
    """
    coding, values = coded.coding, decode(coded).double()
    codes, stats = coded.codes.clone(), coded.stats.clone()
    between, target = against @ against.T, against @ other.T @ mine  # [rank, rank], [rank, width]
    of_row = stats.shape[0] // len(values) if coding.scale != "tensor" else 0
    for k in range(len(values)):
        row = coding.row(k)
        if between[k, k] <= 0 or row.bits == (0,):
            continue
        wanted = (target[k] - between[k] @ values) / between[k, k] + values[k]  # the row that would fit exactly best
        own = slice(k * of_row, (k + 1) * of_row) if of_row else slice(0, 1)
        choices = [_with_scales(wanted, stats[own], row)]
        if of_row and (row.bits != 1 or row.columns > 1):  # a sign does not depend on the scale
            choices.append(_anew(wanted, row))
        for new_codes, new_stats in choices:
            new = decode(Coded(new_codes, new_stats, row)).double()[0]
            if (new - wanted).square().sum() < (values[k] - wanted).square().sum():
                codes[k], stats[own], values[k] = new_codes[0], new_stats, new
    return Coded(codes, stats, coding)


def _anew(row: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    coded = encode(row[None], coding)
    return coded.codes, coded.stats


def _with_scales(row: Tensor, stats: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """The nearest codes under the scales that there are; then, where these are the row's own and have no mean, the best scales for them."""
    scale = coding.spread(torch.where(stats[:, -1] != 0, stats[:, -1], torch.ones_like(stats[:, -1])).double(), 1, len(row))
    mean = coding.spread(stats[:, 0].double(), 1, len(row)) if coding.columns == 2 else 0.0
    codes = nearest((row[None] - mean) / scale, coding)
    if coding.columns == 1 and coding.scale != "tensor":
        stats = fitted(row[None], codes, coding)[:, None].float()
    return codes, stats
