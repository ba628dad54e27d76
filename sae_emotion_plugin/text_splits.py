"""Groups of near-duplicate texts, and splits that keep these whole and the share of every label."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

NEAR_DUPLICATE_JACCARD = 0.8
"""Two texts whose sets of shingles have at least this Jaccard index count as near-duplicates."""

_PAIRS_AT_ONCE = 1_000_000
_SHINGLES_COUNTED_AT_ONCE = 2_000_000
_SKETCH_WORDS = 16
# Hangul, kana and Chinese characters say in one character what takes two or three letters elsewhere.
_DENSE_RANGES = ((0x1100, 0x11FF), (0x2E80, 0xA4CF), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_ASCII_LETTERS_ONLY = re.compile(r"[^0-9a-z]+")


class _Ignored(dict[int, int | None]):
    """A `str.translate` table, filled on demand, without white space, control characters and punctuation."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        category = unicodedata.category(character)
        # Emoji (So) stay: they may be all there is. Variation selectors only choose how one is drawn.
        ignored = category[0] in "PZ" or category in ("Cc", "Cf", "Sm", "Sk", "Sc") or 0xFE00 <= code <= 0xFE0F
        self[code] = None if ignored else code
        return self[code]


_IGNORED = _Ignored()
_BITS_IN_BYTE = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


def _count_bits(words: UInt64[np.ndarray, "word"]) -> UInt8[np.ndarray, "word"]:
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words)
    return _BITS_IN_BYTE[words.view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.uint8)


def comparison_key(text: str) -> str:
    """The text as compared for equality: NFKC, case-folded, without white space and punctuation.

    A text of nothing but punctuation keeps it, so that "!!!" and "?" stay different.
    """
    if text.isascii() and (key := _ASCII_LETTERS_ONLY.sub("", text.lower())):
        return key
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_IGNORED) or "".join(folded.split()) or text


def near_duplicate_groups(texts: Sequence[str], threshold: float = NEAR_DUPLICATE_JACCARD) -> Int[np.ndarray, "text"]:
    """The group number of each text, by first appearance; (near-)duplicates share a group, also in chains.

    Duplicates have equal `comparison_key`s. Near-duplicates have keys whose sets of shingles (three characters
    from each position; two where the first is Hangul, kana or Chinese) have a Jaccard index of at least
    `threshold`. The search is exact: prefix and positional filters (Xiao et al. 2008, PPJoin) propose pairs, a
    bit sketch rules out nearly all of them, the rest are counted. Memory grows with the texts, not the pairs.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    if not texts:
        return np.zeros(0, dtype=np.int64)
    number_of: dict[str, int] = {}
    key_of_text = np.array(
        [number_of.setdefault(comparison_key(text) or "\0", len(number_of)) for text in texts], dtype=int
    )
    components = _similar_components(list(number_of), threshold)
    return _renumbered(components[key_of_text])


def stratified_held_out(
    labels: Bool[np.ndarray, "text label"], groups: Int[np.ndarray, "text"], held_out: float, seed: int
) -> Bool[np.ndarray, "text"]:
    """Which texts are held out: about the share `held_out` of every label and of all texts, in whole groups.

    Iterative stratification (Sechidis et al. 2011): the label with the fewest texts left is dealt out first,
    each group to the side that lacks more of it. A label found in two or more groups wants one on both sides.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    groups = _renumbered(groups)
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    if n_groups < 2:
        raise ValueError(f"cannot split {len(groups)} text(s): all are near-duplicates of one another")
    # Two more columns, the texts without any label and all texts: they balance the sizes.
    columns = np.column_stack([labels, ~labels.any(axis=1), np.ones(len(groups), dtype=bool)])
    counts = np.zeros((n_groups, columns.shape[1]), dtype=np.int64)
    np.add.at(counts, groups, columns)
    totals = counts.sum(axis=0)
    held_out_share = totals * held_out
    several = (counts > 0).sum(axis=0) >= 2
    held_out_share[several] = held_out_share[several].clip(1, totals[several] - 1)
    wanted = np.stack([totals - held_out_share, held_out_share])

    rng = np.random.default_rng(seed)
    order = rng.permutation(n_groups)
    side = np.full(n_groups, -1)
    left = totals[:-1].copy()
    while (left > 0).any():
        label = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        members = order[(counts[order, label] > 0) & (side[order] < 0)]
        # Large groups first: single texts can then even out what they leave.
        for group in members[np.argsort(-counts[members, label], kind="stable")]:
            lack = wanted[1, [label, -1]] - wanted[0, [label, -1]]
            decisive = lack[np.abs(lack) > 1e-9]
            side[group] = int(decisive[0] > 0) if len(decisive) else int(rng.integers(2))
            wanted[side[group]] -= counts[group]
            left -= counts[group, :-1]
    if side.min() == side.max():  # a tiny corpus whose every label wants the same side
        side[order[np.argmin(counts[order, -1])]] = 1 - side[0]
    return side[groups] == 1


def stratified_folds(
    labels: Bool[np.ndarray, "text label"], groups: Int[np.ndarray, "text"], n_folds: int, seed: int
) -> tuple[Int[np.ndarray, "fold_text"], ...]:
    """The text indices of each fold, ascending: `n_folds` disjoint parts in whole groups, every label spread evenly.

    The parts are split off one by one with `stratified_held_out`. ValueError for fewer than 2 folds and for fewer
    groups than folds.
    """
    if n_folds < 2:
        raise ValueError(f"folds must be at least 2, got {n_folds}")
    n_groups = len(np.unique(groups))
    if n_groups < n_folds:
        raise ValueError(f"{n_folds} folds need as many groups of texts, got {n_groups}")
    parts, rest = [], np.arange(len(groups))
    for remaining in range(n_folds, 1, -1):
        part = _split_off(labels[rest], groups[rest], remaining, seed)
        parts.append(rest[part])
        rest = rest[~part]
    return (*parts, rest)


def _split_off(
    labels: Bool[np.ndarray, "text label"], groups: Int[np.ndarray, "text"], remaining: int, seed: int
) -> Bool[np.ndarray, "text"]:
    """Returns which texts make the next of `remaining` folds, leaving a group for each of the others."""
    part = stratified_held_out(labels, groups, 1 / remaining, seed)
    # Few groups, each with a label that wants one on both sides: the smallest go back until enough are left.
    lacking = remaining - 1 - len(np.unique(groups[~part]))
    if lacking > 0:
        taken, sizes = np.unique(groups[part], return_counts=True)
        part &= ~np.isin(groups, taken[np.argsort(sizes, kind="stable")][:lacking])
    return part


def joined_groups(first: Int[np.ndarray, "text"], second: Int[np.ndarray, "text"]) -> Int[np.ndarray, "text"]:
    """The group number of each text, by first appearance, when texts that share a group in either one belong together.

    For splits by document (`first`) that keep near-duplicates (`second`) together too; chains count.
    """
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    one, other = _renumbered(first), _renumbered(second)
    n_nodes = int(one.max()) + 1 + int(other.max()) + 1
    links = coo_matrix((np.ones(len(one)), (one, other + one.max() + 1)), shape=(n_nodes, n_nodes))
    return _renumbered(connected_components(links, directed=False)[1][one].astype(np.int64))


def _renumbered(groups: Int[np.ndarray, "text"]) -> Int[np.ndarray, "text"]:
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _similar_components(keys: list[str], threshold: float) -> Int[np.ndarray, "key"]:
    shingles = _shingle_matrix(keys)
    sizes = np.diff(shingles.indptr)
    by_size = np.argsort(sizes, kind="stable")
    shingles, sizes = shingles[by_size], sizes[by_size].astype(np.int64)
    sketches = _sketches(shingles)
    share = (1 - threshold) / (1 + threshold)  # Jaccard >= t, said of the symmetric difference: at most share * sizes
    components = np.arange(len(keys))
    for left, right in _candidates(shingles, threshold):
        unknown = components[left] != components[right]
        left, right = left[unknown], right[unknown]
        limit = share * (sizes[left] + sizes[right]) + 1e-9
        distance = np.zeros(len(left), dtype=np.int64)
        for word in sketches:  # a sketch's Hamming distance never exceeds the symmetric difference
            distance += _count_bits(word[left] ^ word[right])
            near = np.flatnonzero(distance <= limit)
            left, right, limit, distance = left[near], right[near], limit[near], distance[near]
        left, right = np.divmod(np.unique(left * len(keys) + right), len(keys))
        for part in np.split(np.arange(len(left)), _cuts(sizes[left] + sizes[right], _SHINGLES_COUNTED_AT_ONCE)):
            part = part[components[left[part]] != components[right[part]]]
            shared = np.asarray(shingles[left[part]].multiply(shingles[right[part]]).sum(axis=1)).ravel()
            both = sizes[left[part]] + sizes[right[part]]
            similar = part[both - 2 * shared <= share * both + 1e-9]
            if len(similar):
                components = _joined(components, components[left[similar]], components[right[similar]])
    in_order = np.empty(len(keys), dtype=np.int64)
    in_order[by_size] = components
    return in_order


def _joined(
    components: Int[np.ndarray, "key"], left: Int[np.ndarray, "pair"], right: Int[np.ndarray, "pair"]
) -> Int[np.ndarray, "key"]:
    edges = coo_matrix((np.ones(len(left), dtype=bool), (left, right)), shape=(len(components), len(components)))
    return connected_components(edges, directed=False)[1][components].astype(np.int64)


def _cuts(amounts: Int[np.ndarray, "item"], at_most: int) -> Int[np.ndarray, "cut"]:
    """Where to cut so that each piece adds up to about `at_most` (one item may exceed it)."""
    return np.flatnonzero(np.diff(np.cumsum(amounts) // at_most)) + 1


def _shingle_matrix(keys: list[str]) -> csr_matrix:
    """Ones where a key has a shingle; columns run from the rarest shingle to the commonest."""
    lengths = np.array([len(key) for key in keys], dtype=np.int64)
    codes = np.frombuffer("".join(keys).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    ends = np.repeat(np.cumsum(lengths), lengths)
    positions = np.arange(len(codes))
    owner = np.repeat(np.arange(len(keys)), lengths)
    dense = np.zeros(len(codes), dtype=bool)
    for low, high in _DENSE_RANGES:
        dense |= (codes >= low) & (codes <= high)
    width = np.where(dense, 2, 3)
    padded = np.concatenate([codes, np.zeros(2, dtype=np.uint64)])
    shingle = codes << np.uint64(42)  # three code points of 21 bits: no two shingles collide
    shingle |= np.where(positions + 1 < ends, padded[1:-1], 0).astype(np.uint64) << np.uint64(21)
    shingle |= np.where((positions + 2 < ends) & ~dense, padded[2:], 0).astype(np.uint64)
    starts = positions == ends - np.repeat(lengths, lengths)
    kept = (positions + width <= ends) | starts  # a key too short for a shingle is its own
    names, column = np.unique(shingle[kept], return_inverse=True)
    pairs = np.unique(owner[kept] * len(names) + column)
    row, column = np.divmod(pairs, max(len(names), 1))
    frequency = np.bincount(column, minlength=len(names))
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(names))
    matrix = csr_matrix((np.ones(len(row), dtype=np.int32), (row, rank[column])), shape=(len(keys), len(names)))
    matrix.sort_indices()
    return matrix


def _sketches(shingles: csr_matrix) -> UInt64[np.ndarray, "word key"]:
    """1,024 bits for each row: bit b is the parity of the number of its shingles that hash to b."""
    n_keys, n_shingles = len(shingles.indptr) - 1, int(shingles.indices.max()) + 1
    bit = np.random.default_rng(0).integers(64 * _SKETCH_WORDS, size=n_shingles)
    words = np.zeros((_SKETCH_WORDS, n_keys), dtype=np.uint64)
    for word in range(_SKETCH_WORDS):
        value = np.where(bit // 64 == word, np.uint64(1) << (bit % 64).astype(np.uint64), np.uint64(0))
        words[word] = np.bitwise_xor.reduceat(value[shingles.indices], shingles.indptr[:-1])
    return words


def _candidates(
    shingles: csr_matrix, threshold: float
) -> Iterator[tuple[Int[np.ndarray, "pair"], Int[np.ndarray, "pair"]]]:
    """Chunks of pairs of rows (sorted by size) that hold all pairs with Jaccard >= threshold; some repeat.

    If two sets have so many elements in common, then in whatever order of the elements the first common one
    stands early enough in both to leave room for the others. With the rarest first, few other pairs pass.
    """
    sizes = np.diff(shingles.indptr).astype(np.int64)
    row = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(shingles.nnz) - shingles.indptr[row]
    share = 2 * threshold / (1 + threshold)  # of the mean size, in common
    size = sizes[row]
    probes = np.flatnonzero(place <= size - np.ceil(threshold * size - 1e-9))
    probes = probes[np.argsort(shingles.indices[probes], kind="stable")]  # sizes ascend within a shingle
    # Of two rows the smaller comes first, and `share` is of the mean size: its own prefix may be shorter.
    early = place[probes] <= size[probes] - np.ceil(share * size[probes] - 1e-9)
    indexed = probes[early]
    scale = int(sizes.max(initial=0)) + 1
    keys = shingles.indices[indexed].astype(np.int64) * scale + size[indexed]
    smallest = np.ceil(threshold * size[probes] - 1e-9).astype(np.int64)
    first = np.searchsorted(keys, shingles.indices[probes].astype(np.int64) * scale + smallest)
    last = np.cumsum(early) - early  # the indexed entries before this one
    partners = np.maximum(last - first, 0)
    for part in np.split(np.arange(len(probes)), _cuts(partners, _PAIRS_AT_ONCE)):
        number = partners[part]
        right = np.repeat(probes[part], number)
        left = indexed[np.arange(len(right)) + np.repeat(first[part] - np.cumsum(number) + number, number)]
        room = np.minimum(size[left] - place[left], size[right] - place[right])
        fits = room >= share / 2 * (size[left] + size[right]) - 1e-9
        yield row[left[fits]], row[right[fits]]
