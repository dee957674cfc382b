"""The best one-to-one matching of two dictionaries, exact: solved on candidates, proved on the whole matrix."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

N_CANDIDATES = 24
"""Entries a row, on average, that are tried first."""
N_SAMPLED, BLOCK_VALUES = 1 << 20, 1 << 24
"""Entries that say how large the largest are, and entries looked at together."""
TOLERANCE = 1e-7
"""A reduced cost below this is rounding: the sum found is within this times the number of pairs of the best one."""

Ints = npt.NDArray[np.int64]


def best_matching(weight: Float[Tensor, "row column"]) -> tuple[Tensor, Tensor]:
    """The one-to-one matching of all of the smaller side with the largest sum: row and column indices, int64 [pair].

    Hungarian matching, for weights in [0, 1]. A sparse matching on the largest entries of every row and column is solved
    first; its dual prices prove, in one pass over the matrix, that no other entry can improve it, or name those that could,
    which become candidates in turn. Extra memory: one matrix of the same size, at most.
    """
    if weight.shape[0] > weight.shape[1]:
        column, row = best_matching(weight.T)
        order = row.argsort()
        return row[order], column[order]
    n_rows, n_columns = weight.shape
    keys = candidates(weight)
    while True:
        keys = np.unique(keys)
        rows, columns = np.divmod(keys, n_columns)
        values = weight[torch.from_numpy(rows), torch.from_numpy(columns)].double().cpu().numpy()
        graph = csr_matrix(
            (values + 1, (rows, columns)), shape=(n_rows, n_columns)
        )  # + 1: no entry is an explicit zero
        matched = min_weight_full_bipartite_matching(graph, maximize=True)[1].astype(np.int64)
        price = prices(rows, columns, values, matched, n_columns)
        more = improving(weight, matched, price)
        if not len(more):
            return torch.arange(n_rows), torch.from_numpy(matched)
        keys = np.concatenate([keys, more])


def candidates(weight: Float[Tensor, "row column"]) -> Ints:
    """Entries, as row · n_columns + column, to try first: the largest of the matrix, some N_CANDIDATES a row, the largest of
    every row and column, and the diagonal, so that a matching of every row is among them."""
    n_rows, n_columns = weight.shape
    size = max(1, weight.numel() // N_SAMPLED)
    some = weight.flatten()[size // 2 :: size].float()
    bound = some.kthvalue(max(1, round(len(some) * (1 - min(1, N_CANDIDATES / n_columns))))).values
    rows, columns = torch.arange(n_rows), torch.arange(n_columns)
    parts = [
        large_entries(weight, bound.expand(n_rows, 1)),
        rows * n_columns + weight.argmax(1).cpu(),
        weight.argmax(0).cpu() * n_columns + columns,
        rows * (n_columns + 1),
    ]
    return torch.cat(parts).numpy()


def large_entries(weight: Float[Tensor, "row column"], bound: Float[Tensor, "row 1"]) -> Tensor:
    """Entries above their row's bound, as row · n_columns + column, on the CPU."""
    found = []
    for first in range(0, len(weight), step := max(1, BLOCK_VALUES // weight.shape[1])):
        row, column = (weight[first : first + step] > bound[first : first + step]).nonzero(as_tuple=True)
        found.append(((row + first) * weight.shape[1] + column).cpu())
    return torch.cat(found)


def prices(
    rows: Ints, columns: Ints, values: npt.NDArray[np.float64], matched: Ints, n_columns: int
) -> npt.NDArray[np.float64]:
    """Prices of columns, at least 0 and 0 where unmatched, at which each row's matched column is its best candidate.

    The least ones: longest paths over price[j] ≥ price[matched[i]] + value[i, j] − value[i, matched[i]], which end because
    the matching is the best of the candidates.
    """
    own = np.empty(len(matched))
    is_own = matched[rows] == columns
    own[rows[is_own]] = values[is_own]
    step, price = values - own[rows], np.zeros(n_columns)
    for _ in range(len(matched) + 1):
        asked = price[matched[rows]] + step
        raised = asked > price[columns] + TOLERANCE / 2
        if not raised.any():
            return price
        np.maximum.at(price, columns[raised], asked[raised])
    raise AssertionError("the matching is not the best of its candidates")


def improving(weight: Float[Tensor, "row column"], matched: Ints, price: npt.NDArray[np.float64]) -> Ints:
    """Entries, as row · n_columns + column, that a row would rather have at these prices; none proves the matching best."""
    cost = torch.from_numpy(price).to(weight.device, weight.dtype)
    at = torch.from_numpy(matched).to(weight.device)
    found = []
    for first in range(0, len(weight), step := max(1, BLOCK_VALUES // weight.shape[1])):
        gain = weight[first : first + step] - cost
        own = gain.gather(1, at[first : first + step, None])
        found.append(large_entries(gain, own + TOLERANCE) + first * weight.shape[1])
    return torch.cat(found).numpy()
