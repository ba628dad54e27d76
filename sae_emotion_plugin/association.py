"""How features separate labelled texts: rank statistics from sparse rows, and corrections for many tests.

Arrays in, numbers out; no model, no text, no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int, Num
from scipy.special import erfc
from scipy.stats import rankdata

ENTRIES_PER_CHUNK = 2_000_000
COLUMNS_PER_CHUNK = 4_096
FEWEST_POSITIVES = 20
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
    columns = checked_columns(matrix, labels)
    n_texts, n_features = columns.get_shape()
    n_in = labels.sum(axis=0).astype(np.float64)[:, None]
    n_out = n_texts - n_in

    rank_sum = np.zeros((labels.shape[1], n_features))
    fires_in = np.zeros_like(rank_sum)
    fires = np.diff(columns.indptr).astype(np.float64)
    zero_rank = (n_texts - fires + 1) / 2
    rank_spread = (n_texts - fires) * (zero_rank - (n_texts + 1) / 2) ** 2
    sparse_labels = scipy.sparse.csr_matrix(labels, dtype=np.float64)
    for chunk in sorted_chunks(columns, entries_per_chunk=entries_per_chunk):
        here = slice(chunk.first, chunk.last)
        ranks = (n_texts - fires[here])[chunk.group] + chunk.mid_rank
        rank_spread[here] += np.bincount(
            chunk.group, weights=(ranks - (n_texts + 1) / 2) ** 2, minlength=chunk.last - chunk.first
        )
        shape = (chunk.last - chunk.first, n_texts)
        above_zero_rank = (ranks - zero_rank[here][chunk.group], chunk.text, chunk.indptr)
        fired = (np.ones(len(chunk.text)), chunk.text, chunk.indptr)
        for result, entries in ((rank_sum, above_zero_rank), (fires_in, fired)):
            product = scipy.sparse.csr_matrix(entries, shape=shape) @ sparse_labels
            result[:, here] = scipy.sparse.csr_matrix(product).toarray().T
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


def sparse_average_precision(
    matrix: scipy.sparse.spmatrix | scipy.sparse.sparray,
    labels: Bool[np.ndarray, "text label"],
    *,
    entries_per_chunk: int = ENTRIES_PER_CHUNK,
) -> Float[np.ndarray, "label feature"]:
    """Returns the average precision of every feature (column) for every label against the rest.

    The step-wise sum of precision over recall, without interpolation, as scikit-learn's
    `average_precision_score` defines it: texts of one value enter together, the zeros of a column as one
    block. Chance is not one half but the label's share of the texts, and so is a constant column's value.
    Arguments, memory and errors as in `sparse_auroc`.
    """
    columns = checked_columns(matrix, labels)
    n_texts, n_features = columns.get_shape()
    found = np.empty((labels.shape[1], n_features))
    for chunk in sorted_chunks(columns, entries_per_chunk=entries_per_chunk):
        n_columns = chunk.last - chunk.first
        at_least = chunk.indptr[1:][chunk.group] - chunk.tie_start
        for label, positive in enumerate(np.ascontiguousarray(labels.T)):
            n_in = int(positive.sum())
            entry = np.flatnonzero(positive[chunk.text])
            column = chunk.group[entry]
            fires_in = np.bincount(column, minlength=n_columns)
            # Positives stand in ascending order: those from a tie's first one to the column's end are at or above it.
            position = np.arange(len(entry))
            opens_tie = np.ones(len(entry), dtype=bool)
            opens_tie[1:] = chunk.tie_start[entry[1:]] != chunk.tie_start[entry[:-1]]
            first_of_tie = np.maximum.accumulate(np.where(opens_tie, position, 0))
            precision = (np.cumsum(fires_in)[column] - first_of_tie) / at_least[entry]
            total = np.bincount(column, weights=precision, minlength=n_columns)
            found[label, chunk.first : chunk.last] = (total + (n_in - fires_in) * (n_in / n_texts)) / n_in
    return found


@dataclass(frozen=True)
class SortedChunk:
    """The stored values of some neighbouring columns, in ascending order within each group.

    A group is a column or, with strata, a column's texts of one stratum.
    """

    first: int
    last: int
    """The columns `first` to `last - 1`."""
    indptr: Int[np.ndarray, "bound"]
    """Where each column of the chunk begins among the entries, and where the last one ends."""
    group: Int[np.ndarray, "entry"]
    """Column, from 0 in this chunk, times the number of strata, plus stratum."""
    text: Int[np.ndarray, "entry"]
    mid_rank: Float[np.ndarray, "entry"]
    """From 1, among the stored values of the group."""
    tie_start: Int[np.ndarray, "entry"]
    tie_stop: Int[np.ndarray, "entry"]
    """The entries `tie_start` to `tie_stop - 1` are in the same group and have the same value."""


def sorted_chunks(
    columns: scipy.sparse.csc_matrix,
    strata: Int[np.ndarray, "text"] | None = None,
    *,
    entries_per_chunk: int = ENTRIES_PER_CHUNK,
) -> Iterator[SortedChunk]:
    """Yields all columns in order, in chunks of about `entries_per_chunk` stored values and at most 4,096 columns.

    `columns` is what `checked_columns` returned; `strata` numbers each text's stratum from 0.
    """
    n_strata = 1 if strata is None else int(strata.max(initial=0)) + 1
    for first, last in _column_chunks(columns.indptr, entries_per_chunk):
        entries = slice(int(columns.indptr[first]), int(columns.indptr[last]))
        indptr = (columns.indptr[first : last + 1] - columns.indptr[first]).astype(np.int64)
        text = columns.indices[entries]
        group = np.repeat(np.arange(last - first) * n_strata, np.diff(indptr))
        if strata is not None:
            group += strata[text]
        values = columns.data[entries]
        order = _order_within(group, values)
        group, values, text = group[order], values[order], text[order]
        opens_tie = np.ones(len(values), dtype=bool)
        opens_tie[1:] = (values[1:] != values[:-1]) | (group[1:] != group[:-1])
        starts = np.flatnonzero(opens_tie)
        sizes = np.diff(np.append(starts, len(values)))
        tie_start, tie_stop = np.repeat(starts, sizes), np.repeat(starts + sizes, sizes)
        group_sizes = np.bincount(group, minlength=(last - first) * n_strata)
        group_start = (np.cumsum(group_sizes) - group_sizes)[group]
        mid_rank = (tie_start + tie_stop + 1) / 2 - group_start
        yield SortedChunk(first, last, indptr, group, text, mid_rank, tie_start, tie_stop)


def checked_columns(
    matrix: scipy.sparse.spmatrix | scipy.sparse.sparray, labels: Bool[np.ndarray, "text label"]
) -> scipy.sparse.csc_matrix:
    """Returns `matrix` by columns, duplicates summed and zeros dropped; the caller's stays as it was.

    ValueError as in `sparse_auroc`.
    """
    columns = scipy.sparse.csc_matrix(matrix)
    n_texts = columns.get_shape()[0]
    if labels.shape[0] != n_texts:
        raise ValueError(f"the matrix has {n_texts} texts, the labels have {labels.shape[0]}")
    if not np.isfinite(columns.data).all():
        raise ValueError(f"the matrix must be finite, got {_first_not_finite(columns.data)}")
    if columns.nnz and columns.data.min() < 0:
        raise ValueError(f"the matrix must be non-negative, got {columns.data.min()}")
    n_in = labels.sum(axis=0)
    single_class = np.flatnonzero((n_in == 0) | (n_in == n_texts))
    if len(single_class):
        raise ValueError(f"labels {single_class.tolist()} have a single class in {n_texts} texts")
    if not columns.has_canonical_format or (columns.data == 0).any():
        columns = columns.copy()
        columns.sum_duplicates()
        columns.eliminate_zeros()
    return columns


def common_enough(
    labels: Bool[np.ndarray, "text label"],
    names: Sequence[str],
    *,
    fewest: int = FEWEST_POSITIVES,
    skip_rare: bool = False,
) -> Int[np.ndarray, "kept"]:
    """Returns the positions of the labels that have at least `fewest` texts in and out of class.

    ValueError that names the others, unless `skip_rare` leaves them out; and when none is left.
    """
    if len(names) != labels.shape[1]:
        raise ValueError(f"{labels.shape[1]} labels, but {len(names)} names")
    n_in = labels.sum(axis=0)
    enough = np.minimum(n_in, len(labels) - n_in) >= fewest
    if not enough.all() and not (skip_rare and enough.any()):
        few = ", ".join(
            f"{names[i]} ({n_in[i]} in, {len(labels) - n_in[i]} out)" for i in np.flatnonzero(~enough).tolist()
        )
        raise ValueError(f"too few texts for {few}: each label needs {fewest} in and {fewest} out of class")
    return np.flatnonzero(enough)


def _column_chunks(indptr: Int[np.ndarray, "bound"], entries_per_chunk: int) -> Iterator[tuple[int, int]]:
    first, n_columns = 0, len(indptr) - 1
    while first < n_columns:
        last = int(np.searchsorted(indptr, int(indptr[first]) + entries_per_chunk, side="right")) - 1
        last = min(max(last, first + 1), first + COLUMNS_PER_CHUNK, n_columns)
        yield first, last
        first = last


def _order_within(group: Int[np.ndarray, "entry"], values: Num[np.ndarray, "entry"]) -> Int[np.ndarray, "entry"]:
    if values.dtype != np.float32 or (len(group) and group.max() >= 2**32):
        return np.lexsort((values, group))
    # Positive float32 numbers are ordered as their bits are, so that group and value fit one integer: ten times faster.
    return np.argsort((group.astype(np.uint64) << np.uint64(32)) | values.view(np.uint32))


def benjamini_hochberg(p: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """Returns the q value of each test, in the shape of `p`, over all tests in `p` together.

    Benjamini & Hochberg 1995. ValueError for a p that is not in [0, 1].
    """
    flat = _checked_p(p)
    order = np.argsort(flat)[::-1]
    raised = flat[order] * (len(flat) / np.arange(len(flat), 0, -1))
    q = np.empty_like(flat)
    q[order] = np.minimum.accumulate(np.minimum(raised, 1.0))
    return q.reshape(p.shape)


def holm(p: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """Returns the family-wise adjusted p of each test, in the shape of `p`, over all tests in `p` together.

    Step-down Bonferroni, valid under any dependence (Holm 1979). ValueError for a p that is not in [0, 1].
    """
    flat = _checked_p(p)
    order = np.argsort(flat)
    raised = flat[order] * np.arange(len(flat), 0, -1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted.reshape(p.shape)


def _checked_p(p: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "test"]:
    flat = p.ravel()
    wrong = flat[~((flat >= 0) & (flat <= 1))]
    if len(wrong):
        raise ValueError(f"p values must lie in [0, 1], got {wrong[0]}")
    return flat


def _first_not_finite(values: Num[np.ndarray, "..."]) -> float:
    return float(values[~np.isfinite(values)].flat[0])
