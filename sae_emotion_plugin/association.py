"""How features separate labelled texts: rank statistics from sparse rows, and corrections for many tests.

Arrays in, numbers out; no model, no text, no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int, Num
from scipy.special import erfc
from scipy.stats import rankdata

ENTRIES_PER_CHUNK = 2_000_000
SMALLEST_P = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Association:
    """How each feature separates the texts of each label from all other texts; see `sparse_auroc`."""

    auroc: Float[np.ndarray, "label feature"]
    """Probability that a text with the label has the higher value, ties counting one half."""
    p: Float[np.ndarray, "label feature"]
    """Two-sided p of the Mann-Whitney test."""
    rate_in: Float[np.ndarray, "label feature"]
    """Share of the texts with the label whose value is above zero."""
    rate_out: Float[np.ndarray, "label feature"]
    """Share of the other texts whose value is above zero."""


def auroc(scores: Num[np.ndarray, "text"], positives: Bool[np.ndarray, "text"]) -> float:
    """Returns the probability that a positive scores above a negative, ties counting one half.

    ValueError for scores that are not finite and for a single class, where it is undefined.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {_first_not_finite(scores)}")
    n_in = int(positives.sum())
    n_out = len(positives) - n_in
    if n_in == 0 or n_out == 0:
        raise ValueError(f"AUROC needs both classes, got {n_in} positives and {n_out} negatives")
    rank_sum = float(rankdata(scores)[positives].sum())
    return (rank_sum - n_in * (n_in + 1) / 2) / (n_in * n_out)


def sparse_auroc(
    matrix: scipy.sparse.spmatrix | scipy.sparse.sparray,
    labels: Bool[np.ndarray, "text label"],
    *,
    entries_per_chunk: int = ENTRIES_PER_CHUNK,
) -> Association:
    """Returns AUROC, p and firing rates of every feature (column) for every label against the rest.

    `matrix` is [text, feature], sparse and non-negative. The p values are the two-sided Mann-Whitney test's
    in the normal approximation with tie correction and without continuity correction; all zeros of a column
    are one block of ties. A p below 2.2e-308 is given as 2.2e-308, an upper bound, and not as 0. A constant
    column has AUROC 0.5 and p 1.

    Columns are ranked in chunks of about `entries_per_chunk` stored values and never densified, so that
    beyond a column-ordered copy of the input and the result the memory does not grow.
    ValueError for negative or non-finite values, unequal numbers of texts, and a label with a single class.
    """
    columns = scipy.sparse.csc_matrix(matrix)
    n_texts, n_features = columns.get_shape()
    if labels.shape[0] != n_texts:
        raise ValueError(f"the matrix has {n_texts} texts, the labels have {labels.shape[0]}")
    if not np.isfinite(columns.data).all():
        raise ValueError(f"the matrix must be finite, got {_first_not_finite(columns.data)}")
    if columns.nnz and columns.data.min() < 0:
        raise ValueError(f"the matrix must be non-negative, got {columns.data.min()}")
    n_in = labels.sum(axis=0).astype(np.float64)[:, None]
    n_out = n_texts - n_in
    single_class = np.flatnonzero((n_in == 0) | (n_out == 0))
    if len(single_class):
        raise ValueError(f"labels {single_class.tolist()} have a single class in {n_texts} texts")
    if not columns.has_canonical_format or (columns.data == 0).any():
        columns = columns.copy()
        columns.sum_duplicates()
        columns.eliminate_zeros()

    rank_sum = np.zeros((labels.shape[1], n_features))
    fires_in = np.zeros_like(rank_sum)
    fires = np.diff(columns.indptr).astype(np.float64)
    zero_rank = (n_texts - fires + 1) / 2
    rank_spread = (n_texts - fires) * (zero_rank - (n_texts + 1) / 2) ** 2
    sparse_labels = scipy.sparse.csr_matrix(labels, dtype=np.float64)
    for first, last in _column_chunks(columns.indptr, entries_per_chunk):
        entries = slice(int(columns.indptr[first]), int(columns.indptr[last]))
        indptr = columns.indptr[first : last + 1] - columns.indptr[first]
        column = np.repeat(np.arange(first, last), np.diff(indptr))
        ranks = (n_texts - fires)[column] + _ranks_within(columns.data[entries], column - first, indptr)
        rank_spread[first:last] += np.bincount(
            column - first, weights=(ranks - (n_texts + 1) / 2) ** 2, minlength=last - first
        )
        texts = columns.indices[entries]
        shape = (last - first, n_texts)
        above_zero_rank = scipy.sparse.csr_matrix((ranks - zero_rank[column], texts, indptr), shape=shape)
        fired = scipy.sparse.csr_matrix((np.ones(len(texts)), texts, indptr), shape=shape)
        rank_sum[:, first:last] = scipy.sparse.csr_matrix(above_zero_rank @ sparse_labels).toarray().T
        fires_in[:, first:last] = scipy.sparse.csr_matrix(fired @ sparse_labels).toarray().T
    rank_sum += n_in * zero_rank

    # The variance of a rank sum under relabelling, from the spread of the mid-ranks themselves: equal to the
    # textbook's tie-corrected variance, without its cancellation when nearly all values are one tie.
    deviation = rank_sum - n_in * (n_texts + 1) / 2
    sd = np.sqrt(n_in * n_out * rank_spread / (n_texts * max(n_texts - 1, 1)))
    z = np.divide(deviation, sd, out=np.zeros_like(deviation), where=sd > 0)
    return Association(
        auroc=0.5 + deviation / (n_in * n_out),
        p=np.maximum(erfc(np.abs(z) / np.sqrt(2)), SMALLEST_P),
        rate_in=fires_in / n_in,
        rate_out=(fires - fires_in) / n_out,
    )


def _column_chunks(indptr: Int[np.ndarray, "bound"], entries_per_chunk: int) -> Iterator[tuple[int, int]]:
    first, n_columns = 0, len(indptr) - 1
    while first < n_columns:
        last = int(np.searchsorted(indptr, int(indptr[first]) + entries_per_chunk, side="right")) - 1
        last = min(max(last, first + 1), n_columns)
        yield first, last
        first = last


def _ranks_within(
    values: Num[np.ndarray, "entry"], column: Int[np.ndarray, "entry"], indptr: Int[np.ndarray, "bound"]
) -> Float[np.ndarray, "entry"]:
    """Returns the mid-rank, from 1, of each value among the values of its column."""
    order = np.lexsort((values, column))
    ordered = values[order]
    starts_tie = np.ones(len(values), dtype=bool)
    starts_tie[1:] = ordered[1:] != ordered[:-1]
    starts_tie[indptr[:-1][np.diff(indptr) > 0]] = True
    tie_start = np.flatnonzero(starts_tie)
    tie_size = np.diff(np.append(tie_start, len(values)))
    mid_position = tie_start + (tie_size + 1) / 2
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(mid_position, tie_size)
    return ranks - indptr[column]


def benjamini_hochberg(p: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """Returns the q value of each test, in the shape of `p`, over all tests in `p` together.

    Benjamini & Hochberg 1995. ValueError for a p that is not in [0, 1].
    """
    flat = p.ravel()
    wrong = flat[~((flat >= 0) & (flat <= 1))]
    if len(wrong):
        raise ValueError(f"p values must lie in [0, 1], got {wrong[0]}")
    order = np.argsort(flat)[::-1]
    raised = flat[order] * (len(flat) / np.arange(len(flat), 0, -1))
    q = np.empty_like(flat)
    q[order] = np.minimum.accumulate(np.minimum(raised, 1.0))
    return q.reshape(p.shape)


def _first_not_finite(values: Num[np.ndarray, "..."]) -> float:
    return float(values[~np.isfinite(values)].flat[0])
