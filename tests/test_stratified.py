import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from scipy.stats import hypergeom, mannwhitneyu, rankdata

from sae_emotion_plugin.evidence.association import sparse_auroc
from sae_emotion_plugin.evidence.stratified import (
    Design,
    checked_strata,
    length_strata,
    permutation_p,
    rank_scores,
    stratified_mann_whitney,
)


def sums_by_loop(values: np.ndarray, positive: np.ndarray, strata: np.ndarray) -> tuple[float, float, float]:
    """Sum of weighted rank sums less its expectation, its variance under permutation, and the stratified AUROC."""
    deviation = variance = won = pairs = 0.0
    for stratum in np.unique(strata):
        inside = strata == stratum
        n, n_in = inside.sum(), (inside & positive).sum()
        ranks = rankdata(values[inside])
        weight = 1 / (n + 1)
        deviation += weight * (ranks[positive[inside]].sum() - n_in * (n + 1) / 2)
        if n > 1:
            variance += weight**2 * n_in * (n - n_in) / n * ranks.var(ddof=1)
        for high, low in itertools.product(values[inside & positive], values[inside & ~positive]):
            won += weight * ((high > low) + (high == low) / 2)
            pairs += weight
    return deviation, variance, won / pairs


def adversarial_columns(rng: np.random.Generator, n: int) -> np.ndarray:
    columns = [
        np.zeros(n),
        np.full(n, 0.5),
        np.eye(n)[3],
        np.ceil(rng.gamma(1, 2, n)) * (rng.random(n) < 0.4),
        rng.gamma(1, 2, n) * (rng.random(n) < 0.9),
        rng.random(n),
        (rng.random(n) < 0.2) * 1.0,
    ]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.mark.parametrize("n_strata", [1, 2, 7, 30])
def test_rank_scores_equal_a_plain_loop_over_strata(n_strata: int) -> None:
    rng = np.random.default_rng(n_strata)
    n = 120
    dense = adversarial_columns(rng, n)
    labels = rng.random((n, 3)) < [0.1, 0.5, 0.9]
    strata = rng.integers(n_strata, size=n)
    columns, numbered = checked_strata(scipy.sparse.csr_matrix(dense), labels, strata)
    design = Design.of(labels, numbered)
    found = stratified_mann_whitney(columns, labels, strata, fewest_firing=1)
    for ranked in rank_scores(columns, numbered, entries_per_chunk=150):
        deviation = ranked.scores @ labels.astype(float) - ranked.mean @ design.n_in
        variance = ranked.second @ design.second
        for feature, label in itertools.product(range(ranked.first, ranked.last), range(3)):
            expected = sums_by_loop(dense[:, feature], labels[:, label], strata)
            assert deviation[feature - ranked.first, label] == pytest.approx(expected[0], abs=1e-9)
            assert variance[feature - ranked.first, label] == pytest.approx(expected[1], abs=1e-9)
            assert found.auroc[label, feature] == pytest.approx(expected[2], abs=1e-9)
        assert np.array_equal(ranked.weight.sum(axis=2), np.tile(np.bincount(numbered), (len(ranked.fires), 1)))
        by_points = (ranked.weight * ranked.point).sum(axis=2) / np.bincount(numbered)
        np.testing.assert_allclose(by_points, ranked.mean, atol=1e-12)
        squares = (ranked.weight * (ranked.point - ranked.mean[:, :, None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(squares, ranked.second, atol=1e-9)


def permuted_p(dense: np.ndarray, labels: np.ndarray, strata: np.ndarray, runs: int, seed: int) -> np.ndarray:
    """The p values of `runs` permutations of one label within strata, [run feature]."""
    rng = np.random.default_rng(seed)
    columns, numbered = checked_strata(scipy.sparse.csr_matrix(dense), labels, strata)
    design = Design.of(labels, numbered)
    (ranked,) = rank_scores(columns, numbered)
    place = np.argsort(numbered, kind="stable")
    permuted = np.empty((len(dense), runs))
    for run in range(runs):
        order = np.lexsort((rng.random(len(dense)), numbered))
        permuted[place, run] = labels[order, 0]
    deviation = ranked.scores @ permuted - (ranked.mean @ design.n_in)
    one = Design(*(np.repeat(part, runs, axis=1) for part in (design.n_in, design.second, design.third)))
    return permutation_p(ranked, one, deviation, fewest_firing=1).T


def test_p_equals_permutation_within_strata() -> None:
    rng = np.random.default_rng(0)
    n = 400
    strata = length_strata(rng.poisson(12, n), 5)
    dense = np.stack([rng.gamma(1, size=n), rng.gamma(1, size=n) * (rng.random(n) < 0.5)], axis=1)
    labels = rng.random((n, 1)) < 0.25
    dense[labels[:, 0]] *= [[1.5, 1.2]]
    columns, numbered = checked_strata(scipy.sparse.csr_matrix(dense), labels, strata)
    design = Design.of(labels, numbered)
    (ranked,) = rank_scores(columns, numbered)
    scores = ranked.scores.toarray()
    place = np.argsort(numbered, kind="stable")
    observed = np.abs(scores @ labels[:, 0] - ranked.mean @ design.n_in[:, 0])
    beyond = np.zeros(2)
    runs = 6_000
    for _ in range(runs):
        shuffled = np.empty(n, dtype=bool)
        shuffled[place] = labels[np.lexsort((rng.random(n), numbered)), 0]
        beyond += np.abs(scores @ shuffled - ranked.mean @ design.n_in[:, 0]) >= observed - 1e-9
    p = stratified_mann_whitney(columns, labels, strata).p[0]
    assert ((beyond > 50) & (beyond < 3_000)).all(), beyond
    np.testing.assert_allclose(p, beyond / runs, rtol=0.15)


@pytest.mark.parametrize(("n_in", "fires"), [(39, 10), (39, 100), (39, 2_000), (88, 20), (88, 500), (700, 60)])
def test_p_of_a_feature_with_two_values_is_twice_the_hypergeometric_tail(n_in: int, fires: int) -> None:
    n = 8_000
    labels = np.arange(n)[:, None] < n_in
    expected = n_in * fires / n
    both = [k for k in range(1, min(n_in, fires) + 1) if expected + 0.5 < k < expected + 25]
    dense = np.zeros((n, len(both)), dtype=np.float32)
    for column, k in enumerate(both):
        dense[:k, column] = 1
        dense[n - (fires - k) :, column] = 1
    p = stratified_mann_whitney(scipy.sparse.csr_matrix(dense), labels, np.zeros(n, dtype=int)).p[0]
    exact = np.minimum(2 * hypergeom.sf(np.array(both) - 1, n, fires, n_in), 1)
    small = exact < 5e-3
    assert small.any() and exact.min() < 1e-10
    np.testing.assert_allclose(p[small], exact[small], rtol=0.1)
    assert (p[~small] > 0.9 * exact[~small]).all() and (p[~small] < 1.5 * exact[~small]).all()


@pytest.mark.parametrize("n_in", [39, 88])
def test_null_p_values_of_rare_labels_are_honest_in_the_tail(n_in: int) -> None:
    rng = np.random.default_rng(n_in)
    n, runs = 3_000, 6_000
    rates = (10, 30, 100, 300, 1_000, 2_500)
    dense = np.stack(
        [rng.permutation(np.where(np.arange(n) < rate, rng.gamma(1, size=n), 0)) for rate in rates], axis=1
    )
    labels = np.arange(n)[:, None] % (n // n_in) == 0
    strata = length_strata(rng.poisson(12, n), 6)
    p = permuted_p(dense, labels, strata, runs, seed=0)
    for threshold in (0.05, 0.01, 1e-3, 1e-4):
        most = threshold * runs + 3.5 * np.sqrt(threshold * runs) + 1
        assert ((p < threshold).sum(axis=0) <= most).all(), (threshold, (p < threshold).sum(axis=0))
    # The densest feature hardly moves in steps: its p values are also nearly uniform, not merely few.
    for threshold in (0.05, 0.2, 0.5, 0.8):
        assert (p[:, -1] < threshold).mean() == pytest.approx(threshold, rel=0.12)


def test_the_normal_approximation_is_dishonest_where_ours_is_not() -> None:
    n, n_in, fires, both = 43_000, 39, 100, 4
    labels = np.arange(n)[:, None] < n_in
    dense = np.zeros((n, 1), dtype=np.float32)
    dense[:both] = dense[n - (fires - both) :] = 1
    matrix = scipy.sparse.csc_matrix(dense)
    exact = 2 * hypergeom.sf(both - 1, n, fires, n_in)
    assert sparse_auroc(matrix, labels).p[0, 0] < 1e-30 < 1e-6 < exact
    found = stratified_mann_whitney(matrix, labels, np.zeros(n, dtype=int))
    assert found.p[0, 0] == pytest.approx(exact, rel=0.05)


def test_one_stratum_and_many_texts_equal_scipys_mann_whitney_with_continuity() -> None:
    rng = np.random.default_rng(2)
    dense = rng.gamma(1, size=(2_000, 6))
    labels = rng.random((2_000, 1)) < 0.4
    dense[labels[:, 0], 3:] += 0.08
    found = stratified_mann_whitney(scipy.sparse.csr_matrix(dense), labels, np.zeros(2_000, dtype=int))
    test = mannwhitneyu(dense[labels[:, 0]], dense[~labels[:, 0]], method="asymptotic")
    np.testing.assert_allclose(found.p[0], test.pvalue, rtol=0.02)
    np.testing.assert_allclose(found.auroc[0], test.statistic / labels.sum() / (~labels).sum(), rtol=1e-9)


def test_a_length_confound_is_significant_without_strata_and_not_with_them() -> None:
    rng = np.random.default_rng(3)
    n = 8_000
    length = rng.integers(3, 31, n)
    # Longer texts carry the label more often, and the feature fires on length alone.
    labels = rng.random((n, 2)) < np.stack([length / 40, np.full(n, 0.3)], axis=1)
    per_token = rng.random((n, 20)) < (1 - 0.97 ** length[:, None])
    dense = (rng.gamma(1, size=(n, 20)) * per_token).astype(np.float32)
    dense[labels[:, 1], -1] *= 3
    matrix = scipy.sparse.csr_matrix(dense)
    assert (sparse_auroc(matrix, labels).p[0] < 1e-10).all()
    found = stratified_mann_whitney(matrix, labels, length_strata(length))
    assert (found.q[0] > 0.05).all()
    assert found.q[1, -1] < 1e-6, "an effect at equal length is still found"
    assert np.abs(found.auroc[0] - 0.5).max() < 0.03


def test_extreme_separation_gives_a_tiny_p_that_is_not_zero() -> None:
    n = 4_000
    labels = np.stack([np.arange(n) < 39, np.arange(n) < 2_000], axis=1)
    dense = np.stack([np.arange(n, 0.0, -1), np.arange(1.0, n + 1), np.arange(n) < 39], axis=1).astype(np.float32)
    p = stratified_mann_whitney(scipy.sparse.csr_matrix(dense), labels, np.arange(n) % 3).p
    assert (p > 0).all() and (p[1, :2] < 1e-250).all() and (p[0] < 1e-30).all()


def test_strata_are_quantile_bins_in_which_equal_lengths_stay_together() -> None:
    counts = np.random.default_rng(0).poisson(15, 5_000)
    strata = length_strata(counts, 10)
    assert np.array_equal(np.unique(strata), np.arange(10))
    for length in np.unique(counts):
        assert len(set(strata[counts == length].tolist())) == 1
    assert all(counts[strata == i].max() < counts[strata == i + 1].min() for i in range(9))
    assert np.bincount(strata).min() > 200
    assert length_strata(np.full(7, 3)).tolist() == [0] * 7
    assert length_strata(np.array([9.5, 1.0, 5.0]), 3).tolist() == [2, 0, 1]


def test_strata_without_both_classes_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(5)
    n = 200
    strata = np.arange(n) // 50 * 10
    labels = np.stack([(strata == 10) & (rng.random(n) < 0.5), rng.random(n) < 0.5], axis=1)
    labels[strata == 30, 1] = True
    dense = rng.random((n, 4))
    found = stratified_mann_whitney(scipy.sparse.csr_matrix(dense), labels, strata)
    assert found.strata_used.tolist() == [1, 3]
    assert found.texts_unused.tolist() == [150, 50]
    alone = strata == 10
    only = stratified_mann_whitney(scipy.sparse.csr_matrix(dense[alone]), labels[alone][:, [0]], strata[alone])
    np.testing.assert_allclose(found.p[0], only.p[0], rtol=1e-9)


def test_features_that_fire_seldom_or_always_alike_are_not_tested() -> None:
    labels = np.arange(60)[:, None] < 30
    dense = np.zeros((60, 4))
    dense[:9, 1] = 1
    dense[:10, 2] = 1
    dense[:, 3] = 0.5
    found = stratified_mann_whitney(scipy.sparse.csr_matrix(dense), labels, np.zeros(60, dtype=int))
    assert found.fires.tolist() == [0, 9, 10, 60]
    assert found.tested.tolist() == [False, False, True, True]
    assert found.p[0, [0, 1, 3]].tolist() == [1, 1, 1] and found.auroc[0, [0, 3]].tolist() == [0.5, 0.5]
    assert found.q[0, 2] == pytest.approx(2 * found.p[0, 2]), "untested features are not in the family"


def test_memory_of_stratified_tests_grows_with_the_chunk_and_not_with_the_matrix() -> None:
    rng = np.random.default_rng(6)
    matrix = scipy.sparse.random(4_000, 8_192, density=0.01, format="csc", dtype=np.float32, rng=rng)
    labels = rng.random((4_000, 3)) < 0.2
    tracemalloc.start()
    stratified_mann_whitney(matrix, labels, rng.integers(4, size=4_000), entries_per_chunk=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000 < 4_000 * 8_192 * 4 / 4


@pytest.mark.parametrize(
    ("strata", "labels", "options", "message"),
    [
        ([0, 1], [[0], [1], [1]], {}, "the labels have 3 texts, the strata have 2"),
        ([0, 1, 1], [[0], [1], [1]], {}, r"labels \[0\] have no stratum with both classes"),
        ([0, 0, 0], [[1], [1], [1]], {}, r"labels \[0\] have a single class"),
        ([0, 0, 0], [[0], [1], [1]], {"fewest_firing": 0}, "fewest_firing must be at least 1, got 0"),
    ],
)
def test_stratified_tests_refuse_what_they_cannot_compare(
    strata: list[int], labels: list[list[int]], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_mann_whitney(
            scipy.sparse.csr_matrix(np.eye(3)), np.array(labels, dtype=bool), np.array(strata), **options
        )


@pytest.mark.parametrize(
    ("counts", "bins", "message"),
    [
        ([1.0, np.nan], 2, "must be finite and not negative, got nan"),
        ([1.0, -2.0], 2, r"got -2\.0"),
        ([], 2, "there is no text"),
        ([1.0], 0, "bins must be at least 1, got 0"),
    ],
)
def test_strata_refuse_counts_that_are_no_lengths(counts: list[float], bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        length_strata(np.array(counts), bins)
