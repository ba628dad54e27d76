"""A stored corpus -> what is shown of each feature: histograms, sequences, and the features that fire with it.

Features are looked at in chunks, so that memory does not grow with the corpus or with the width of the dictionary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int, UInt64
from tqdm.auto import tqdm

from sae_emotion_plugin.dashboards.collect import NeuronSums
from sae_emotion_plugin.dashboards.corpus import SLAB_ENTRIES, StoredCorpus, new_array
from sae_emotion_plugin.dashboards.types import interval_ends

PAIR_ENTRIES = 8 * 1024 * 1024
"""Pairs of features whose correlations are in memory at a time."""


@dataclass(frozen=True)
class ByFeature:
    """The codes once more, features one behind the other, tokens ascending; memory-mapped."""

    starts: Int[np.ndarray, " d_sae_plus_1"]
    tokens: Int[np.ndarray, " entry"]
    values: Float[np.ndarray, " entry"]

    def chunks(self, entries: int = SLAB_ENTRIES, most: int | None = None) -> Iterator[slice]:
        """The features in slices of about `entries` codes, and of at most so many features."""
        d_sae, start = len(self.starts) - 1, 0
        while start < d_sae:
            end = int(np.searchsorted(self.starts, self.starts[start] + entries, side="right")) - 1
            end = min(max(end, start + 1), d_sae, start + (most or d_sae))
            yield slice(start, end)
            start = end


def by_feature(corpus: StoredCorpus, d_sae: int, folder: Path) -> ByFeature:
    """The corpus sorted by feature, written to the folder as arrays of `Dashboards`."""
    counts = np.zeros(d_sae, np.int64)
    for tokens in corpus.slabs():
        counts += np.bincount(corpus.features[slice(*corpus.row_starts[[tokens.start, tokens.stop]])], minlength=d_sae)
    starts = new_array(folder, "feature_starts", np.int64, (d_sae + 1,))
    starts[1:] = np.cumsum(counts)
    found = ByFeature(
        starts,
        new_array(folder, "entry_tokens", np.int32, (len(corpus.values),)),
        new_array(folder, "entry_values", np.float32, (len(corpus.values),)),
    )
    filled = np.array(starts[:-1])
    for tokens in corpus.slabs():
        columns = corpus.matrix(tokens, d_sae).tocsc()
        lengths = np.diff(columns.indptr)
        places = np.arange(columns.nnz) + np.repeat(filled - columns.indptr[:-1], lengths)
        found.tokens[places] = columns.indices + tokens.start
        found.values[places] = columns.data
        filled += lengths
    return found


def activation_arrays(
    corpus: StoredCorpus,
    codes: ByFeature,
    n_tokens: int,
    *,
    n_bins: int,
    n_strongest: int,
    n_intervals: int,
    n_sampled: int,
    seed: int,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """The arrays of `Dashboards` on activations and sequences, by name.

    A sequence counts once for a feature, by its maximum, and texts that occur several times count once. Ties go to
    the smaller key; a sample is the sequences with the smallest hash of key, feature and seed.
    """
    d_sae = len(codes.starts) - 1
    found = {
        "minima": np.zeros(d_sae, np.float32),
        "maxima": np.zeros(d_sae, np.float32),
        "activation_counts": np.zeros((d_sae, n_bins), np.int64),
        "interval_counts": np.zeros((d_sae, n_intervals), np.int64),
        "strongest": np.full((d_sae, n_strongest), -1, np.int64),
        "sampled": np.full((d_sae, n_intervals, n_sampled), -1, np.int64),
    }
    sequence_of = np.repeat(np.arange(len(corpus.sequence_keys)), np.diff(corpus.sequence_starts))
    keys = np.array(corpus.sequence_keys)
    first_of_text = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
    text_of = np.repeat(np.arange(len(first_of_text)), np.diff(np.r_[first_of_text, len(keys)]))
    with tqdm(total=d_sae, unit="feature", desc="activations", disable=not progress) as bar:
        for chunk in codes.chunks():
            starts = np.asarray(codes.starts[chunk.start : chunk.stop + 1])
            counts = np.diff(starts)
            own = slice(int(starts[0]), int(starts[-1]))
            values, feature = np.array(codes.values[own]), np.repeat(np.arange(len(counts)), counts)
            found["interval_counts"][chunk, 0] = n_tokens - counts
            if len(values):
                alive = np.flatnonzero(counts)
                begins = (starts[:-1] - starts[0])[alive]
                low, high = np.zeros((2, len(counts)), np.float32)
                low[alive], high[alive] = np.minimum.reduceat(values, begins), np.maximum.reduceat(values, begins)
                low[low == high] = 0
                ends = interval_ends(high, n_intervals)
                found["minima"][chunk], found["maxima"][chunk] = low, high
                found["activation_counts"][chunk] = _histogram(values, feature, low, high, n_bins)
                for interval in range(n_intervals):
                    inside = (values >= ends[feature, interval]) & (values <= ends[feature, interval + 1])
                    found["interval_counts"][chunk, interval] += np.bincount(feature[inside], minlength=len(counts))
                sequence = sequence_of[codes.tokens[own]]
                feature, sequence, value = _text_maxima(values, feature, sequence, text_of)
                found["strongest"][chunk] = _firsts((sequence, -value), feature, sequence, len(counts), n_strongest)
                interval = (value[:, None] >= ends[feature, 1:-1]).sum(axis=1)
                priority = _mixed(keys[sequence], feature + chunk.start, seed)
                cell = feature * n_intervals + interval
                drawn = _firsts((priority,), cell, np.arange(len(cell)), len(counts) * n_intervals, n_sampled)
                found["sampled"][chunk] = _descending(drawn, value, sequence).reshape(-1, n_intervals, n_sampled)
            bar.update(len(counts))
    return found


def related_features(
    corpus: StoredCorpus, codes: ByFeature, n_tokens: int, n_related: int, *, progress: bool = True
) -> dict[str, np.ndarray]:
    """The arrays of `Dashboards` on features that fire together: the largest positive Pearson correlations.

    Features that never fire together cannot have a positive one, so the sums over tokens on which both fire suffice.
    """
    d_sae = len(codes.starts) - 1
    which, pearson, cosine = _nothing(d_sae, n_related)
    sums, squares = feature_sums(codes)
    spread = np.sqrt(np.maximum(n_tokens * squares - sums**2, 0))
    kept: list[scipy.sparse.csr_matrix] = []
    slabs = list(corpus.slabs())
    if len(slabs) == 1:
        kept.append(corpus.matrix(slabs[0], d_sae))
    with tqdm(total=d_sae, unit="feature", desc="correlated features", disable=not progress) as bar:
        for chunk in codes.chunks(most=max(1, PAIR_ENTRIES // d_sae)):
            starts = np.asarray(codes.starts[chunk.start : chunk.stop + 1])
            own = slice(int(starts[0]), int(starts[-1]))
            rows = scipy.sparse.csr_matrix(
                (codes.values[own].astype(np.float64), np.array(codes.tokens[own]), starts - starts[0]),
                shape=(len(starts) - 1, len(corpus.token_ids)),
            )
            products = scipy.sparse.csr_matrix((len(starts) - 1, d_sae))
            for tokens in slabs:
                products += rows[:, tokens] @ (kept[0] if kept else corpus.matrix(tokens, d_sae))
            row = np.repeat(np.arange(len(starts) - 1), np.diff(products.indptr))
            column, product, feature = products.indices, products.data, row + chunk.start
            with np.errstate(invalid="ignore", divide="ignore"):
                value = (n_tokens * product - sums[feature] * sums[column]) / (spread[feature] * spread[column])
            wanted = np.flatnonzero((value > 0) & (feature != column) & np.isfinite(value))
            best = _firsts((column[wanted], -value[wanted]), row[wanted], wanted, len(starts) - 1, n_related)
            there = best >= 0
            at = best[there]
            which[chunk][there], pearson[chunk][there] = column[at], np.minimum(value[at], 1)
            cosine[chunk][there] = product[at] / np.sqrt(squares[feature[at]] * squares[column[at]])
            bar.update(len(starts) - 1)
    return dict(zip(("related_features", "related_features_pearson", "related_features_cosine"),
                    (which, pearson, cosine), strict=True))  # fmt: skip


def related_neurons(codes: ByFeature, sums: NeuronSums, n_related: int) -> dict[str, np.ndarray]:
    """The arrays of `Dashboards` on neurons: the largest Pearson correlations of every feature that fires."""
    d_sae, d_in = sums.products.shape
    n_tokens, n_related = int(sums.n_tokens), min(n_related, d_in)
    which, pearson, cosine = _nothing(d_sae, n_related)
    totals, squares = feature_sums(codes)
    spread = np.sqrt(np.maximum(n_tokens * sums.squares - sums.neurons**2, 0))
    step = max(1, PAIR_ENTRIES // d_in)
    for start in range(0, d_sae, step):
        chunk = slice(start, start + step)
        own = np.sqrt(np.maximum(n_tokens * squares[chunk] - totals[chunk] ** 2, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            value = n_tokens * sums.products[chunk] - totals[chunk, None] * sums.neurons
            value /= own[:, None] * spread
            near = sums.products[chunk] / np.sqrt(squares[chunk, None] * sums.squares)
        value = np.where(np.isfinite(value), value, 0).clip(-1, 1)
        best = np.argsort(-value, axis=1, kind="stable")[:, :n_related]
        which[chunk] = np.where(totals[chunk, None] > 0, best, -1)
        pearson[chunk] = np.take_along_axis(value, best, axis=1)
        cosine[chunk] = np.nan_to_num(np.take_along_axis(near, best, axis=1))
    return dict(zip(("related_neurons", "related_neurons_pearson", "related_neurons_cosine"),
                    (which, pearson, cosine), strict=True))  # fmt: skip


def feature_sums(codes: ByFeature) -> tuple[Float[np.ndarray, " d_sae"], Float[np.ndarray, " d_sae"]]:
    """The sum of each feature's activations, and of their squares."""
    sums, squares = np.zeros((2, len(codes.starts) - 1))
    for chunk in codes.chunks():
        starts = np.asarray(codes.starts[chunk.start : chunk.stop + 1])
        values = codes.values[int(starts[0]) : int(starts[-1])].astype(np.float64)
        feature = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        sums[chunk] = np.bincount(feature, values, len(starts) - 1)
        squares[chunk] = np.bincount(feature, values**2, len(starts) - 1)
    return sums, squares


def _histogram(
    values: Float[np.ndarray, " entry"],
    feature: Int[np.ndarray, " entry"],
    low: Float[np.ndarray, " feature"],
    high: Float[np.ndarray, " feature"],
    n_bins: int,
) -> Int[np.ndarray, "feature bin"]:
    width = (high.astype(np.float64) - low)[feature]
    place = ((values.astype(np.float64) - low[feature]) / width * n_bins).astype(np.int64)
    cell = feature * n_bins + np.minimum(place, n_bins - 1)
    return np.bincount(cell, minlength=len(low) * n_bins).reshape(len(low), n_bins)


def _text_maxima(
    values: Float[np.ndarray, " entry"],
    feature: Int[np.ndarray, " entry"],
    sequence: Int[np.ndarray, " entry"],
    text_of: Int[np.ndarray, " sequence"],
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
    """Of each feature and different text in which it fires: the feature, the text's sequence, the maximum there."""
    text = text_of[sequence]
    begins = np.flatnonzero(_changes(feature) | _changes(text))
    maxima = np.maximum.reduceat(values, begins)
    pair = np.cumsum(_changes(feature) | _changes(text)) - 1
    reached = np.flatnonzero(values == maxima[pair])
    first = reached[_changes(pair[reached])]
    return feature[begins], sequence[first], maxima


def _changes(values: Int[np.ndarray, " entry"]) -> Bool[np.ndarray, " entry"]:
    """Where a value differs from the one before; the first does."""
    return np.r_[True, values[1:] != values[:-1]][: len(values)]


def _firsts(
    keys: tuple[np.ndarray, ...],
    group: Int[np.ndarray, " row"],
    rows: Int[np.ndarray, " row"],
    n_groups: int,
    most: int,
) -> Int[np.ndarray, "group most"]:
    """The first rows of each group in the order of `keys`, the last of which counts most; -1 behind them."""
    found = np.full((n_groups, most), -1, np.int64)
    order = np.lexsort((*keys, group))
    sorted_group = group[order]
    begins = np.flatnonzero(_changes(sorted_group))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.r_[begins, len(order)]))
    taken = rank < most
    found[sorted_group[taken], rank[taken]] = rows[order[taken]]
    return found


def _descending(
    drawn: Int[np.ndarray, "cell sample"], value: Float[np.ndarray, " pair"], sequence: Int[np.ndarray, " pair"]
) -> Int[np.ndarray, "cell sample"]:
    """The sequences of the pairs drawn, in each cell the strongest first, and -1 at its end."""
    there = drawn >= 0
    strength = np.where(there, value[drawn], -np.inf)
    which = np.where(there, sequence[drawn], -1)
    return np.take_along_axis(which, np.lexsort((which, -strength), axis=-1), axis=-1)


def _mixed(
    keys: UInt64[np.ndarray, " pair"], feature: Int[np.ndarray, " pair"], seed: int
) -> UInt64[np.ndarray, " pair"]:
    """A hash of key, feature and seed (the finaliser of SplitMix64, Steele et al. 2014), uniform over 64 bits."""

    def mix(bits: np.ndarray) -> np.ndarray:
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        own = mix((feature.astype(np.uint64) + np.uint64(1)) * step + np.array([seed % 2**64], np.uint64))
        return mix(keys + own * step)


def _nothing(d_sae: int, n_related: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (d_sae, n_related)
    return np.full(shape, -1, np.int64), np.zeros(shape), np.zeros(shape)
