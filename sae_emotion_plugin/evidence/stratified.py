"""Mann-Whitney tests within strata, from sparse rows: so that the length of a text cannot pass for an emotion.

Arrays in, numbers out; no model, no text, no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int, Num

from sae_emotion_plugin.evidence.association import (
    ENTRIES_PER_CHUNK,
    SMALLEST_P,
    SortedChunk,
    benjamini_hochberg,
    checked_columns,
    sorted_chunks,
)
from sae_emotion_plugin.evidence.permutation_tails import log_saddlepoint_tail, pearson_tail

FEWEST_FIRING = 10
MOST_STRATA, TEXTS_PER_STRATUM = 20, 50
SADDLEPOINT_BELOW = 1e-2
"""Two-sided p below which three moments are not enough."""
CELLS_PER_STRATUM = 4
"""Rank groups by which the saddlepoint describes a feature's stored values in a stratum; each keeps three moments."""
TESTS_PER_BATCH = 4_096
SMALLEST_DEVIATION = 1e-9
"""Rank scores differ by at least 1 / (2 N + 2), so that less is rounding."""


@dataclass(frozen=True)
class StratifiedAssociation:
    """How each feature separates each label's texts from others of their stratum; see `stratified_mann_whitney`."""

    auroc: Float[np.ndarray, "label feature"]
    """Mean of the strata's AUROCs, weighted as in the test."""
    p: Float[np.ndarray, "label feature"]
    """Two-sided; 1 where not tested."""
    q: Float[np.ndarray, "label feature"]
    """Benjamini-Hochberg over every label and every tested feature; 1 where not tested."""
    fires: Int[np.ndarray, "feature"]
    """Texts whose value is above zero."""
    tested: Bool[np.ndarray, "feature"]
    """Whether the feature fires in enough texts to be in the family of tests."""
    strata_used: Int[np.ndarray, "label"]
    """Strata that hold both classes; the others say nothing of the label and are left out."""
    texts_unused: Int[np.ndarray, "label"]
    """Texts in the strata that are left out."""


@dataclass(frozen=True)
class RankScores:
    """Some columns' ranks within strata as scores, and what the permutation distribution of their sums needs.

    A text's score is its mid-rank in its stratum of N texts over N + 1, less that of a text without the feature.
    """

    first: int
    last: int
    """The columns `first` to `last - 1`."""
    fires: Int[np.ndarray, "column"]
    scores: scipy.sparse.csr_matrix
    """[column text]"""
    mean: Float[np.ndarray, "column stratum"]
    second: Float[np.ndarray, "column stratum"]
    """Sum over the stratum's texts of the squared deviation from the mean score."""
    third: Float[np.ndarray, "column stratum"]
    """The same of the third power."""
    step: Float[np.ndarray, "column"]
    """The smallest score of a text that fires."""
    point: Float[np.ndarray, "column stratum point"]
    """Scores that stand for the stratum's texts, the first that of the silent ones."""
    weight: Float[np.ndarray, "column stratum point"]
    """Number of texts that each point stands for."""


@dataclass(frozen=True)
class Design:
    """How many texts of each label the strata hold, with the moments of drawing them without replacement."""

    n_in: Float[np.ndarray, "stratum label"]
    second: Float[np.ndarray, "stratum label"]
    third: Float[np.ndarray, "stratum label"]

    @classmethod
    def of(cls, labels: Bool[np.ndarray, "text label"], strata: Int[np.ndarray, "text"]) -> "Design":
        """Returns the design of `labels`; labels permuted within strata have the same."""
        n_strata = int(strata.max()) + 1
        n = np.bincount(strata, minlength=n_strata).astype(np.float64)[:, None]
        n_in = np.stack([np.bincount(strata[label], minlength=n_strata) for label in labels.T], axis=1).astype(float)
        second = n_in * (n - n_in) / (n * np.maximum(n - 1, 1))
        third = second * (n - 2 * n_in) / np.maximum(n - 2, 1)
        return cls(n_in, second, third)


def length_strata(token_counts: Num[np.ndarray, "text"], bins: int | None = None) -> Int[np.ndarray, "text"]:
    """Returns the stratum of each text, numbered from 0, shortest first: about `bins` bins of equal size.

    Without `bins` there is one for every 50 texts, at most 20.
    Texts of one length share a stratum, so that there may be fewer strata. Within a stratum length still varies:
    of a confound that is linear in length a bin keeps a part, so more bins are better for more texts.
    ValueError for counts that are not finite or below 0, no text, and fewer than 1 bin.
    """
    wrong = token_counts[~(np.isfinite(token_counts) & (token_counts >= 0))]
    if len(wrong):
        raise ValueError(f"token counts must be finite and not negative, got {wrong[0]}")
    if len(token_counts) == 0:
        raise ValueError("there is no text to put into strata")
    if bins is None:
        bins = max(1, min(MOST_STRATA, len(token_counts) // TEXTS_PER_STRATUM))
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = np.quantile(token_counts, np.arange(1, bins) / bins)
    return np.unique(np.searchsorted(edges, token_counts, side="left"), return_inverse=True)[1].astype(np.int64)


def stratified_mann_whitney(
    matrix: scipy.sparse.spmatrix | scipy.sparse.sparray,
    labels: Bool[np.ndarray, "text label"],
    strata: Int[np.ndarray, "number"],
    *,
    fewest_firing: int = FEWEST_FIRING,
    entries_per_chunk: int = ENTRIES_PER_CHUNK,
) -> StratifiedAssociation:
    """Returns van Elteren's test of every feature (column) for every label against the rest, within strata.

    The sum over strata of (rank sum of the label's texts) / (N + 1), where N is the number of the stratum's texts
    (van Elteren 1960; Lehmann 1975, section 3.3). These weights suit an effect that is alike in all strata; with
    strata of nearly equal size, as `length_strata` makes them, plain rank sums would give nearly the same.

    The reference is the permutation of labels within strata, in which mid-ranks correct for ties by themselves.
    Its tail is not normal for a rare label: a feature that fires in 100 of 43,000 texts meets 4 of 39 positives
    with probability 2e-6, where the normal approximation says 6e-39. So p is twice the smaller tail,
    with half the feature's smallest step as continuity correction: Pearson's type III above 0.01 and a double
    saddlepoint approximation below (`permutation_tails`). A p below 2.2e-308 is given as 2.2e-308.

    `strata` numbers each text's stratum from 0. A feature that fires in fewer than `fewest_firing` texts is not
    tested: it has p 1 and is no part of the family over which q is taken. Memory and errors as in `sparse_auroc`;
    ValueError also for a label whose classes never share a stratum.
    """
    columns, strata = checked_strata(matrix, labels, strata)
    if fewest_firing < 1:
        raise ValueError(f"fewest_firing must be at least 1, got {fewest_firing}")
    design = Design.of(labels, strata)
    n = np.bincount(strata).astype(np.float64)[:, None]
    pairs = (design.n_in * (n - design.n_in) / (n + 1)).sum(axis=0)[:, None]
    shape = (labels.shape[1], columns.get_shape()[1])
    auroc, p, fires = np.full(shape, 0.5), np.ones(shape), np.zeros(shape[1], dtype=np.int64)
    positive = labels.astype(np.float64)
    for ranked in rank_scores(columns, strata, entries_per_chunk=entries_per_chunk):
        here = slice(ranked.first, ranked.last)
        fires[here] = ranked.fires
        deviation = deviations(ranked, design, positive)
        auroc[:, here] += deviation.T / pairs
        p[:, here] = permutation_p(ranked, design, deviation, fewest_firing=fewest_firing).T
    tested = fires >= fewest_firing
    q = np.ones(shape)
    q[:, tested] = benjamini_hochberg(p[:, tested])
    used = (design.n_in > 0) & (design.n_in < n)
    return StratifiedAssociation(
        auroc=auroc,
        p=p,
        q=q,
        fires=fires,
        tested=tested,
        strata_used=used.sum(axis=0),
        texts_unused=(~used * n).sum(axis=0).astype(np.int64),
    )


def checked_strata(
    matrix: scipy.sparse.spmatrix | scipy.sparse.sparray,
    labels: Bool[np.ndarray, "text label"],
    strata: Int[np.ndarray, "number"],
) -> tuple[scipy.sparse.csc_matrix, Int[np.ndarray, "number"]]:
    """Returns the matrix by columns and the strata renumbered without gaps. ValueError for what cannot be tested."""
    columns = checked_columns(matrix, labels)
    if len(strata) != len(labels):
        raise ValueError(f"the labels have {len(labels)} texts, the strata have {len(strata)}")
    numbered = np.unique(strata, return_inverse=True)[1].astype(np.int64)
    never = np.flatnonzero(~Design.of(labels, numbered).second.any(axis=0))
    if len(never):
        raise ValueError(f"labels {never.tolist()} have no stratum with both classes")
    return columns, numbered


def rank_scores(
    columns: scipy.sparse.csc_matrix, strata: Int[np.ndarray, "text"], *, entries_per_chunk: int = ENTRIES_PER_CHUNK
) -> Iterator[RankScores]:
    """Yields the rank scores of all columns in order, in chunks of about `entries_per_chunk` stored values.

    Both arguments are what `checked_strata` returned.
    """
    n = np.bincount(strata).astype(np.float64)
    for chunk in sorted_chunks(columns, strata, entries_per_chunk=entries_per_chunk):
        yield _scored(chunk, n)


def _scored(chunk: SortedChunk, n: Float[np.ndarray, "stratum"]) -> RankScores:
    shape = (chunk.last - chunk.first, len(n))
    n_groups = shape[0] * shape[1]
    fires = np.bincount(chunk.group, minlength=n_groups)
    size = np.tile(n, shape[0])
    # Mid-rank less the silent texts' (N - fires + 1) / 2, both within the stratum.
    score = (((size - fires - 1) / 2)[chunk.group] + chunk.mid_rank) / (size + 1)[chunk.group]

    def by_group(values: Float[np.ndarray, "entry"]) -> Float[np.ndarray, "group"]:
        return np.bincount(chunk.group, weights=values, minlength=n_groups)

    mean = by_group(score) / size
    away = score - mean[chunk.group]
    silent = size - fires
    second = by_group(away**2) + silent * mean**2
    third = by_group(away**3) - silent * mean**3
    point, weight = _points(chunk.group, score, fires)
    step = np.full(shape[0], np.inf)
    np.minimum.at(step, chunk.group // shape[1], score)
    return RankScores(
        first=chunk.first,
        last=chunk.last,
        fires=fires.reshape(shape).sum(axis=1),
        scores=scipy.sparse.csr_matrix((score, chunk.text, _indptr(fires, shape)), shape=(shape[0], int(n.sum()))),
        mean=mean.reshape(shape),
        second=second.reshape(shape),
        third=third.reshape(shape),
        step=np.where(np.isfinite(step), step, 0.0),
        point=point.reshape(*shape, -1),
        weight=np.concatenate([silent[:, None], weight], axis=1).reshape(*shape, -1),
    )


def _indptr(fires: Int[np.ndarray, "group"], shape: tuple[int, int]) -> Int[np.ndarray, "bound"]:
    return np.concatenate([[0], np.cumsum(fires.reshape(shape).sum(axis=1))])


def _points(
    group: Int[np.ndarray, "entry"], score: Float[np.ndarray, "entry"], fires: Int[np.ndarray, "group"]
) -> tuple[Float[np.ndarray, "group point"], Float[np.ndarray, "group cell"]]:
    """Returns the silent texts' score, 0, and two points for each cell of neighbouring ranks; and their weights.

    Mean plus and minus one standard deviation, half the cell each: up to two texts a cell, that is exact.
    """
    position = np.arange(len(group)) - (np.cumsum(fires) - fires)[group]
    cell = group * CELLS_PER_STRATUM + position * CELLS_PER_STRATUM // np.maximum(fires[group], 1)
    n_cells = len(fires) * CELLS_PER_STRATUM
    count = np.bincount(cell, minlength=n_cells)
    mean = np.bincount(cell, weights=score, minlength=n_cells) / np.maximum(count, 1)
    variance = np.bincount(cell, weights=(score - mean[cell]) ** 2, minlength=n_cells) / np.maximum(count, 1)
    mean, sd = mean.reshape(len(fires), -1), np.sqrt(variance).reshape(len(fires), -1)
    half = count.reshape(len(fires), -1) / 2
    silent = np.zeros((len(fires), 1))
    return np.concatenate([silent, mean - sd, mean + sd], axis=1), np.concatenate([half, half], axis=1)


def deviations(
    ranked: RankScores, design: Design, positive: Float[np.ndarray, "text label"]
) -> Float[np.ndarray, "column label"]:
    """Returns the sums of the scores of each label's texts, where `positive` is 1 and not 0, less what is expected."""
    deviation = ranked.scores @ positive - ranked.mean @ design.n_in
    deviation[np.abs(deviation) < SMALLEST_DEVIATION] = 0
    return deviation


def permutation_p(
    ranked: RankScores, design: Design, deviation: Float[np.ndarray, "column label"], *, fewest_firing: int
) -> Float[np.ndarray, "column label"]:
    """Returns the two-sided p of the deviations of score sums from what is expected; 1 for columns that fire less."""
    variance = ranked.second @ design.second
    tested = (variance > 0) & (ranked.fires >= fewest_firing)[:, None]
    sd = np.sqrt(np.where(tested, variance, 1.0))
    skewness = np.sign(deviation) * (ranked.third @ design.third) / sd**3
    nearer = np.abs(deviation) - ranked.step[:, None] / 2
    p = np.minimum(2 * pearson_tail(nearer / sd, skewness), 1.0)
    p[~tested | (nearer <= 0)] = 1.0
    column, label = np.nonzero(p < SADDLEPOINT_BELOW)
    for first in range(0, len(column), TESTS_PER_BATCH):
        i, j = column[first : first + TESTS_PER_BATCH], label[first : first + TESTS_PER_BATCH]
        expected = (ranked.mean[i] * design.n_in.T[j]).sum(axis=1)
        log_p = log_saddlepoint_tail(
            expected + np.sign(deviation[i, j]) * nearer[i, j],
            ranked.point[i],
            ranked.weight[i],
            design.n_in.T[j],
            ranked.step[i],
        )
        p[i, j] = np.minimum(2 * np.exp(log_p), 1.0)
    return np.maximum(p, SMALLEST_P)
