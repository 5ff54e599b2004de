"""The merge methods in float64 with whole tensors in memory, each written from its formula and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Reference = Callable[..., Array]


def unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def on_circle(a: Array, b: Array, t: float) -> Array:
    """Shoemake's formula for one pair of vectors."""
    angle = np.arccos(np.clip(unit(a) @ unit(b), -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(base: Array | None, models: Sequence[Array], weight: Sequence[float], nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True) -> Array:
    a, b = (model - (0 if base is None else base) for model in models)
    t = weight[1] / sum(weight)
    if nuslerp_flatten:
        merged = on_circle(a.ravel(), b.ravel(), t).reshape(a.shape)
    elif nuslerp_row_wise:
        flat = a.reshape(len(a), -1), b.reshape(len(b), -1)
        merged = np.stack([on_circle(one, other, t) for one, other in zip(flat[0].T, flat[1].T, strict=True)], 1).reshape(a.shape)
    else:
        flat = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        merged = np.stack([on_circle(one, other, t) for one, other in zip(*flat, strict=True)]).reshape(a.shape)
    return merged + (0 if base is None else base)


def multislerp(base: Array | None, models: Sequence[Array], weight: Sequence[float], normalize_weights: bool = True) -> Array:
    """With the step in the tangent space that mergekit takes."""
    vectors = [(model - (0 if base is None else base)).ravel() for model in models]
    share = np.array(weight) / (sum(weight) if normalize_weights else 1)
    units = [unit(vector) for vector in vectors]
    mean = unit(sum(w * u for w, u in zip(share, units, strict=True)))  # type: ignore[arg-type]
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(share, units, strict=True))
    length = np.linalg.norm(tangent) + 1e-8
    point = np.cos(length) * mean + np.sin(length) / length * tangent
    merged = point * sum(w * np.linalg.norm(vector) for w, vector in zip(share, vectors, strict=True))
    return np.asarray(merged.reshape(models[0].shape) + (0 if base is None else base))


def karcher(base: None, models: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    units = [unit(model.ravel()) for model in models]
    mean = unit(np.mean(units, axis=0))
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for point in units:
            angle = np.arccos(np.clip(point @ mean, -1, 1))
            if angle >= tol:
                tangent += angle / np.sin(angle) * (point - (point @ mean) * mean) / len(units)
        length = np.linalg.norm(tangent)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
    return np.asarray(mean.reshape(models[0].shape) * np.mean([np.linalg.norm(model) for model in models]))


def elected(terms: Sequence[Array], weight: Sequence[float], normalize: bool) -> Array:
    """The sum, or mean, of the weighted terms that have the sign of their sum."""
    weighted = [w * term for w, term in zip(weight, terms, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1, -1)  # type: ignore[operator]
    agreeing = [np.sign(term) == sign for term in weighted]
    top = sum(agree * term for agree, term in zip(agreeing, weighted, strict=True))
    below = sum(agree * w for agree, w in zip(agreeing, weight, strict=True))
    return np.asarray(top / np.where(below == 0, 1, below) if normalize else top)


def ties_global(base: Array, models: Sequence[Array], weight: Sequence[float], density: float, normalize: bool = True) -> Array:
    """Of one tensor, which is the whole model."""
    terms = []
    for model in models:
        vector = model - base
        cut = np.sort(np.abs(vector).ravel())[-max(1, int(density * vector.size))]
        terms.append(np.where(np.abs(vector) >= cut, vector, 0))
    return base + elected(terms, weight, normalize)


def crumbs(vector: Array, density: float, gamma: float, rescale: bool) -> Array:
    if density >= 1:
        return vector
    size, kept = vector.size, int(density * vector.size)
    bottom = max(0, size - kept - int(gamma * size))
    ascending = np.lexsort((-np.arange(size), np.abs(vector).ravel()))
    stays = np.zeros(size, bool)
    stays[ascending[bottom : bottom + kept]] = True
    result = np.where(stays.reshape(vector.shape), vector, 0)
    return result * (np.abs(vector).sum() / np.abs(result).sum()) if rescale and result.any() else result


def breadcrumbs(base: Array, models: Sequence[Array], weight: Sequence[float], density: float, gamma: float, rescale: bool = False) -> Array:
    return np.asarray(base + sum(w * crumbs(model - base, density, gamma, rescale) for w, model in zip(weight, models, strict=True)))


def breadcrumbs_ties(
    base: Array, models: Sequence[Array], weight: Sequence[float], density: float, gamma: float, rescale: bool = False, normalize: bool = False
) -> Array:
    return base + elected([crumbs(model - base, density, gamma, rescale) for model in models], weight, normalize)


def sce(base: Array, models: Sequence[Array], select_topk: float) -> Array:
    vectors = np.stack([model - base for model in models])
    if select_topk < 1:
        variance = vectors.var(0).astype(np.float32)
        count = int(np.count_nonzero(variance) * select_topk)
        if not count:
            return base
        vectors = vectors * (variance >= np.sort(variance.ravel())[-count])
    energy = np.array([np.mean(vector**2) for vector in vectors])
    if not energy.sum():
        return base
    weight = energy / energy.sum()
    sign = np.where(vectors.sum(0) >= 0, 1, -1)
    agree = np.stack([w * (np.sign(vector) == sign) for w, vector in zip(weight, vectors, strict=True)])
    below = agree.sum(0)
    return np.asarray(base + (agree * vectors).sum(0) / np.where(below == 0, 1, below))


def ram(base: Array, models: Sequence[Array], epsilon: float = 1e-5, r: float = 0.0, alpha: float = 0.0) -> Array:
    """With r = 0 RAM, else RAM+."""
    vectors = np.stack([model - base for model in models])
    changed = np.abs(vectors) > epsilon
    owners = changed.sum(0)
    merged = np.zeros_like(base)
    for vector, mine in zip(vectors, changed, strict=True):
        shared, alone = int((mine & (owners > 1)).sum()), int((mine & (owners == 1)).sum())
        factor = 1 + r * min(alpha, shared / alone if alone else np.inf if shared else 0)
        merged += np.where(mine & (owners == 1), factor * vector, np.where(mine, vector / np.maximum(owners, 1), 0))
    return base + merged


def model_stock(base: Array, models: Sequence[Array], filter_wise: bool = False) -> Array:
    vectors = [model - base for model in models]
    rows = [vector.reshape(-1, vector.shape[-1]) if filter_wise else vector.reshape(1, -1) for vector in vectors]
    count = len(models)
    merged = np.zeros_like(rows[0])
    for index in range(len(merged)):
        cosine = max(0.0, float(np.mean([unit(a[index]) @ unit(b[index]) for a, b in combinations(rows, 2)])))
        t = count * cosine / (1 + (count - 1) * cosine)
        merged[index] = t * np.mean([row[index] for row in rows], axis=0)
    return base + merged.reshape(base.shape)


def nearswap(base: Array, models: Sequence[Array], t: float) -> Array:
    distance = np.abs(models[0] - base)
    k = np.clip(t / np.where(distance == 0, 1, distance), 0, 1)
    return k * models[0] + (1 - k) * base


def arcee_fusion(base: Array, models: Sequence[Array]) -> Array:
    def softmax(rows: Array) -> Array:
        powers = np.exp(rows - rows.max(-1, keepdims=True))
        return np.asarray(powers / powers.sum(-1, keepdims=True) + 1e-8)

    p, q = softmax(models[0]), softmax(base)
    importance = np.abs(models[0] - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ascending, last = np.sort(importance.ravel()), importance.size - 1
    low, median, high = (ascending[int(share * last)] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), models[0], base)


def consensus(base: Array, models: Sequence[Array], mask_lambda: float, k: int = 2) -> Array:
    total = sum(model - base for model in models)
    claims = sum(np.abs(base - model) > mask_lambda * np.abs(base + total - model) for model in models)
    return np.asarray(base + np.where(claims >= k, total, 0))


def emr(base: Array, models: Sequence[Array]) -> Array:
    vectors = np.stack([model - base for model in models])
    sign = np.where(vectors.mean(0) > 0, 1, -1)
    return np.asarray(base + sign * np.where(np.sign(vectors) == sign, np.abs(vectors), 0).max(0))


def polar(matrix: Array) -> Array:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u @ v)


def tsv(base: Array, models: Sequence[Array]) -> Array:
    """Eq. for one matrix: every task's leading parts in columns of its own, zeros elsewhere, then the polar factors of both."""
    found = [np.linalg.svd(model - base, full_matrices=False) for model in models]
    rank = min(base.shape)
    own = rank // len(models)
    u, s, v = np.zeros((base.shape[0], rank)), np.zeros(rank), np.zeros((rank, base.shape[1]))
    for index, (left, values, right) in enumerate(found):
        place = slice(index * own, (index + 1) * own)
        u[:, place], s[place], v[place] = left[:, :own], values[:own], right[:own]
    used = len(models) * own
    return np.asarray(base + polar(u[:, :used]) @ np.diag(s[:used]) @ polar(v[:used]))


def iso_c(base: Array, models: Sequence[Array]) -> Array:
    u, s, v = np.linalg.svd(sum(model - base for model in models), full_matrices=False)
    return np.asarray(base + s.mean() * u @ v)


def iso_cts(base: Array, models: Sequence[Array], common: float = 0.8) -> Array:
    count, rank = len(models), min(base.shape)
    specific = round((rank - int(rank * common)) / count) * count
    u, s, v = np.linalg.svd(sum(model - base for model in models), full_matrices=False)
    u, s, v = u[:, : rank - specific], s[: rank - specific], v[: rank - specific]
    left, values, right = [u], [s], [v]
    for model in models:
        parts = np.linalg.svd((np.eye(len(u)) - u @ u.T) @ (model - base), full_matrices=False)
        own = specific // count
        left.append(parts[0][:, :own]), values.append(parts[1][:own]), right.append(parts[2][:own])
    return np.asarray(base + np.concatenate(values).mean() * polar(np.concatenate(left, 1)) @ polar(np.concatenate(right)))


def knots(base: Array, models: Sequence[Array], weight: Sequence[float], density: float = 0.2) -> Array:
    u, s, v = np.linalg.svd(np.concatenate([model - base for model in models], 1), full_matrices=False)
    tasks = np.split(s[:, None] * v, len(models), 1)
    kept = []
    for task in tasks:
        cut = np.sort(np.abs(task).ravel())[-max(1, int(density * task.size))]
        kept.append(np.where(np.abs(task) >= cut, task, 0))
    return np.asarray(base + u @ elected(kept, weight, True))


OF: dict[str, Callable[..., Any]] = {
    "nuslerp": nuslerp, "multislerp": multislerp, "karcher": karcher, "ties_global": ties_global, "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties, "sce": sce, "ram": ram, "ramplus_tl": ram, "model_stock": model_stock, "nearswap": nearswap,
    "arcee_fusion": arcee_fusion, "consensus": consensus, "emr": emr, "tsv": tsv, "iso_c": iso_c, "iso_cts": iso_cts, "knots": knots,
}  # fmt: skip
