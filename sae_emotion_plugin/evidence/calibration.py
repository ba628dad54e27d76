"""Whether the whole pipeline of tests keeps its promises when the labels mean nothing: a `Calibration`.

Arrays in, numbers out; no model, no text, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int
from scipy.stats import binom, binomtest, poisson
from tqdm.auto import tqdm

from sae_emotion_plugin.evidence.association import ENTRIES_PER_CHUNK, benjamini_hochberg, common_enough
from sae_emotion_plugin.evidence.stratified import (
    FEWEST_FIRING,
    Design,
    RankScores,
    checked_strata,
    deviations,
    permutation_p,
    rank_scores,
)

TAIL_THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5)
FIRING_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 5_000)
COARSEST_STEP = 0.1
"""Steps of more standard deviations than this make p values lumpy, so that they cannot be uniform in the middle."""
N_BINS = 1_000
SURELY_DISHONEST = 1e-4


@dataclass(frozen=True)
class Tail:
    """How often null p values of one group of tests fell below a threshold, over all permutations."""

    group: str
    threshold: float
    tests: int
    """Tests in the group, all permutations together."""
    observed: int
    expected: float
    """`threshold * tests`: fewer is conservative, more is dishonest."""
    chance: float
    """Of so many or more by luck; the tests of one permutation depend on each other, which counts."""

    @property
    def ratio(self) -> float:
        """`observed / expected`; 0 for a group without tests."""
        return self.observed / self.expected if self.expected else 0.0

    @property
    def honest(self) -> bool:
        """Whether what was observed is not surely too much."""
        return self.chance >= SURELY_DISHONEST


@dataclass(frozen=True, repr=False)
class Calibration:
    """What the pipeline found in permuted labels, where there is nothing to find; see `calibrate`."""

    permutations: int
    level: float
    n_texts: int
    n_labels: int
    n_features: int
    n_tested: int
    """Features that fire in at least `fewest_firing` texts: the family's."""
    fewest_firing: int
    runs_with_discovery: int
    share: float
    """Share of the permutations with any q below `level`."""
    low: float
    high: float
    """Clopper-Pearson interval (95 %) of the share."""
    deciles: tuple[float, ...]
    """Share of the p values in each tenth of [0, 1], of the tests whose sum moves in steps of at most 0.1 sd."""
    distance: float
    """Kolmogorov-Smirnov distance of those p values from uniform, over all permutations."""
    by_firing: tuple[Tail, ...]
    """Tails by the number of texts in which the feature fires, untested features included."""
    by_label: tuple[Tail, ...]
    """Tails of the tested features by label."""
    fewest_honest: int | None
    """Features that fire in at least so many texts have honest tails in every group; None if not even the densest."""

    @property
    def holds(self) -> bool:
        """Whether discoveries are as rare as promised, up to binomial error, and all tested groups' tails honest."""
        most = int(binom.ppf(0.975, self.permutations, self.level))
        honest = self.n_tested > 0 and self.fewest_honest is not None and self.fewest_honest <= self.fewest_firing
        return self.runs_with_discovery <= most and honest and all(tail.honest for tail in self.by_label)

    def __repr__(self) -> str:
        lines = [
            f"Calibration: {self.permutations} label permutations within strata, {self.n_texts} texts, "
            f"{self.n_labels} labels, {self.n_tested} of {self.n_features} features tested "
            f"(firing in at least {self.fewest_firing} texts); {'holds' if self.holds else 'DOES NOT HOLD'}",
            f"runs with any q < {self.level:g}: {self.runs_with_discovery} = {self.share:.1%} "
            f"[{self.low:.1%}, {self.high:.1%}]",
            "p values by tenths: " + " ".join(f"{share:.3f}" for share in self.deciles) + f"; KS {self.distance:.3f}",
            f"tails are honest from {self.fewest_honest} firing texts on; observed / expected count of p below:",
        ]
        for title, tails in (("firing texts", self.by_firing), ("label (texts)", self.by_label)):
            groups = dict.fromkeys(tail.group for tail in tails)
            width = max(map(len, (title, *groups)))
            lines.append(f"{title:<{width}}  " + "  ".join(f"{threshold:>12g}" for threshold in TAIL_THRESHOLDS))
            for group in groups:
                cells = (f"{t.ratio:.2f} ({t.observed}){' ' if t.honest else '!'}" for t in tails if t.group == group)
                lines.append(f"{group:<{width}}  " + "  ".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)


def calibrate(
    matrix: scipy.sparse.spmatrix | scipy.sparse.sparray,
    labels: Bool[np.ndarray, "text label"],
    strata: Int[np.ndarray, "number"],
    *,
    label_names: Sequence[str],
    permutations: int = 200,
    seed: int,
    level: float = 0.05,
    fewest_firing: int = FEWEST_FIRING,
    skip_rare: bool = False,
    entries_per_chunk: int = ENTRIES_PER_CHUNK,
    progress: bool = True,
) -> Calibration:
    """Returns how the tests of `stratified_mann_whitney` behave when whole rows of `labels` are permuted within strata.

    Each permutation reruns the pipeline: p of every feature and label, then Benjamini-Hochberg over all of them;
    a run with any q below `level` is a false discovery. Permuting whole rows keeps how labels go together, and the
    matrix keeps how features go together. The ranks are shared, so that a permutation costs one sparse product.

    Measured on 600 random features that fire in 1 to 20,000 of 43,000 texts and labels of 39, 88, 1,500 and 13,000
    texts, 14 strata, 200 permutations: a discovery in 3.0 % of the runs [1.1 %, 6.4 %], in 99.5 % with the normal
    approximation. Of p values below 0.0001 there were 0.1 (39 texts), 0.3 (88), 0.5 and 0.9 times as many as
    promised; with the normal approximation 86, 66, 8 and 1.0 times, and 2.6 times still where features fire in 5,000
    texts or more. No minimum of firing texts is needed for honesty, at the price of tests that are too careful where
    the sum moves in steps: up to ten times for 39 texts. The default minimum of 10 only keeps the family small.

    Memory: p values up to `level` of all runs, and the chunk at hand. ValueError for labels with fewer than 20 texts
    in or out of class, unless `skip_rare`, and as in `stratified_mann_whitney`.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    kept = common_enough(labels, label_names, skip_rare=skip_rare)
    labels = labels[:, kept]
    columns, strata = checked_strata(matrix, labels, strata)
    orders = _permutations(strata, permutations, seed)
    design = Design.of(labels, strata)
    positive = labels.astype(np.float64)
    n_labels, n_features = labels.shape[1], columns.get_shape()[1]
    small: list[list[Float[np.ndarray, "test"]]] = [[] for _ in orders]
    histogram = np.zeros(N_BINS)
    firing = _Counts(permutations, len(FIRING_BOUNDS))
    label = _Counts(permutations, n_labels)
    n_tested = 0
    bar = tqdm(total=n_features, desc="permuting labels", unit="feature", disable=not progress)
    for ranked in rank_scores(columns, strata, entries_per_chunk=entries_per_chunk):
        tested = ranked.fires >= fewest_firing
        n_tested += int(tested.sum())
        smooth = _smooth(ranked, design) & tested[:, None]
        bins = np.searchsorted(FIRING_BOUNDS, ranked.fires, side="right") - 1
        fires = bins >= 0
        for run, order in enumerate(orders):
            p = permutation_p(ranked, design, deviations(ranked, design, positive[order]), fewest_firing=1)
            in_family = p[tested]
            small[run].append(in_family[in_family <= level])
            histogram += np.histogram(p[smooth], bins=N_BINS, range=(0, 1))[0]
            firing.add(run, np.repeat(bins[fires], n_labels), p[fires].ravel())
            label.add(run, np.tile(np.arange(n_labels), int(tested.sum())), in_family.ravel())
        bar.update(ranked.last - ranked.first)
    bar.close()
    n_tests = n_tested * n_labels
    found = sum(_any_discovery(np.concatenate(p), n_tests, level) for p in small)
    interval = binomtest(found, permutations).proportion_ci(0.95)
    n_in = labels.sum(axis=0)
    by_firing = firing.tails([_range_name(i) for i in range(len(FIRING_BOUNDS))])
    by_label = label.tails([f"{label_names[i]} ({n})" for i, n in zip(kept.tolist(), n_in.tolist(), strict=True)])
    shares = histogram / max(histogram.sum(), 1)
    return Calibration(
        permutations=permutations,
        level=level,
        n_texts=len(labels),
        n_labels=n_labels,
        n_features=n_features,
        n_tested=n_tested,
        fewest_firing=fewest_firing,
        runs_with_discovery=found,
        share=found / permutations,
        low=float(interval.low),
        high=float(interval.high),
        deciles=tuple(shares.reshape(10, -1).sum(axis=1).tolist()),
        distance=float(np.abs(np.cumsum(shares) - np.arange(1, N_BINS + 1) / N_BINS).max()) if shares.any() else 0.0,
        by_firing=by_firing,
        by_label=by_label,
        fewest_honest=_fewest_honest(by_firing, fewest_firing),
    )


def _permutations(strata: Int[np.ndarray, "text"], permutations: int, seed: int) -> list[Int[np.ndarray, "text"]]:
    rng = np.random.default_rng(seed)
    place = np.argsort(strata, kind="stable")
    orders = []
    for _ in range(permutations):
        order = np.empty(len(strata), dtype=np.int32)
        order[place] = np.lexsort((rng.random(len(strata)), strata))
        orders.append(order)
    return orders


def _smooth(ranked: RankScores, design: Design) -> Bool[np.ndarray, "column label"]:
    return ranked.step[:, None] <= COARSEST_STEP * np.sqrt(ranked.second @ design.second)


def _any_discovery(small: Float[np.ndarray, "small"], n_tests: int, level: float) -> bool:
    """Returns whether any q is below `level`; of the `n_tests` p values only those up to `level` are given.

    The others cannot be discoveries and, as 1, raise no q of a smaller p.
    """
    if len(small) == 0:
        return False
    q = benjamini_hochberg(small)
    return bool(((q * (n_tests / len(small))) < level).any())


class _Counts:
    """Counts of p values below each threshold, by run and group."""

    def __init__(self, runs: int, groups: int) -> None:
        self.below = np.zeros((len(TAIL_THRESHOLDS), runs, groups))
        self.tests = np.zeros((runs, groups))

    def add(self, run: int, group: Int[np.ndarray, "test"], p: Float[np.ndarray, "test"]) -> None:
        groups = self.tests.shape[1]
        self.tests[run] += np.bincount(group, minlength=groups)
        for i, threshold in enumerate(TAIL_THRESHOLDS):
            self.below[i, run] += np.bincount(group[p < threshold], minlength=groups)

    def tails(self, names: Sequence[str]) -> tuple[Tail, ...]:
        runs = len(self.tests)
        tests = self.tests.sum(axis=0)
        found = []
        for group in np.flatnonzero(tests).tolist():
            for i, threshold in enumerate(TAIL_THRESHOLDS):
                counts, expected = self.below[i, :, group], threshold * tests[group]
                # Tests of one run depend on each other, so that counts come in clumps: clumps are as Poisson.
                mean = counts.mean()
                clump = max(1.0, counts.var(ddof=1) / mean) if runs > 1 and mean > 0 else 1.0
                observed = int(counts.sum())
                chance = float(poisson.sf(np.ceil(observed / clump) - 1, expected / clump))
                found.append(Tail(names[group], threshold, int(tests[group]), observed, float(expected), chance))
        return tuple(found)


def _range_name(i: int) -> str:
    if i + 1 == len(FIRING_BOUNDS):
        return f"{FIRING_BOUNDS[i]} or more"
    return f"{FIRING_BOUNDS[i]} to {FIRING_BOUNDS[i + 1] - 1}"


def _fewest_honest(by_firing: Sequence[Tail], fewest_firing: int) -> int | None:
    fewest = None
    for i in range(len(FIRING_BOUNDS) - 1, -1, -1):
        tails = [tail for tail in by_firing if tail.group == _range_name(i)]
        if not all(tail.honest for tail in tails):
            break
        # A group without features breaks no promise, but below the family's bound none is made.
        fewest = FIRING_BOUNDS[i] if tails or FIRING_BOUNDS[i] >= fewest_firing else fewest
    return fewest
