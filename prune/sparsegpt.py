"""SparseGPT: column by column, what is removed is made up for by the columns that are left."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergekit_plus.moments import Moments

from .masks import Sparsity, lowest, lowest_of_rows
from .pruner import pruner

Damp = Annotated[float, Field(gt=0, lt=10, description="added to the diagonal of the Gram matrix, as a share of its mean")]
Columns = Annotated[int, Field(ge=1, description="columns among whose weights those that go are chosen, before any of them is made up for")]


@pruner("sparsegpt", calibrated=True, scopes=("columns",), solves=True)
def sparsegpt(weight: Tensor, sparsity: Sparsity, *, moments: Moments, damp: Damp = 0.01, columns: Columns = 128) -> Tensor:
    """Weights go that cost least, and those right of them make up for it: least squares on a text's inputs, one pass over the columns.

    With U the upper Cholesky factor of the inverse of the damped Gram matrix, the cost of a weight is `w^2 / U_jj^2`; those that go are chosen in each
    block of `columns` over all rows (n:m: in each row at every m-th column, from the weights as they are then), and the error `e = (w - q) / U_jj` of column
    j moves the columns k > j by `-e U_jk`. Source: arXiv 2301.00774 and its released code, from which it differs in counting: there everything up to and
    with the element of rank `int(size * sparsity)` of a block goes, one more or, where costs tie, many; here exactly the asked number of the whole weight,
    dealt out to the blocks from left to right. A weight that is zero goes first and stays zero. Inputs that are zero throughout the text cost nothing (there
    all of their weights go, whatever is asked). A layer that no token reached is pruned by magnitude.
    """
    left = weight.float().clone()
    zero = weight == 0
    factor = torch.eye(left.shape[1], device=left.device) if moments.tokens == 0 else inverse_factor(moments.gram.to(left.device), damp)
    dead = torch.zeros(left.shape[1], dtype=torch.bool, device=left.device) if moments.tokens == 0 else moments.gram.to(left.device).diagonal() == 0
    group = sparsity.group or 1
    step = max(group, columns - columns % group)
    removed_before = 0
    for first in range(0, left.shape[1], step):
        last = min(first + step, left.shape[1])
        within = factor[first:last, first:last]
        own, scale = left[:, first:last], within.diagonal().square()

        def costs(start: int, stop: int, own: Tensor = own, scale: Tensor = scale, first: int = first) -> Tensor:
            found = (own[:, start:stop].square() / scale[start:stop]).masked_fill_(dead[first + start : first + stop], 0)
            return found.masked_fill_(zero[:, first + start : first + stop], -1)

        removed = zero[:, first:last].clone()
        if not sparsity.group:
            wanted = sparsity.count(len(left) * last) - removed_before
            removed_before += wanted
            removed |= lowest(costs(0, last - first).reshape(-1), wanted).view_as(removed)
        errors = torch.zeros_like(own)
        for column in range(last - first):
            if sparsity.group and column % group == 0:
                removed[:, column : column + group] |= lowest_of_rows(costs(column, column + group), sparsity)
            before = own[:, column].clone()
            errors[:, column] = torch.where(removed[:, column], before, 0) / within[column, column]
            own[:, column:] -= errors[:, column : column + 1] * within[column, column:]
            own[:, column] = before.masked_fill_(removed[:, column], 0)
        left[:, last:] -= errors @ factor[first:last, last:]
        own.masked_fill_(removed, 0)
    return left


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Gram matrix [in, in], float32; inputs that are always zero stand alone.

    Computed in float64, for the matrix is nearly singular where there are fewer tokens than inputs.
    """
    damped = gram.double()
    diagonal = damped.diagonal()  # a view
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor.float()
