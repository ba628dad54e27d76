import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import false_discovery_control, mannwhitneyu, norm

from sae_emotion_plugin.association import (
    SMALLEST_P,
    auroc,
    benjamini_hochberg,
    common_enough,
    holm,
    sparse_auroc,
    sparse_average_precision,
)


def auroc_by_pairs(scores: np.ndarray, positives: np.ndarray) -> float:
    won = [
        1.0 if high > low else 0.5 if high == low else 0.0 for high in scores[positives] for low in scores[~positives]
    ]
    return float(np.mean(won))


def check_against_scipy(dense: np.ndarray, labels: np.ndarray, **options: int) -> None:
    found = sparse_auroc(scipy.sparse.csr_matrix(dense), labels, **options)
    dense = dense.astype(np.float64)  # scipy would compute its statistic in float32
    for label in range(labels.shape[1]):
        inside, outside = dense[labels[:, label]], dense[~labels[:, label]]
        for feature in range(dense.shape[1]):
            where = (label, feature)
            constant = np.ptp(dense[:, feature]) == 0
            expected_auroc, expected_p = 0.5, 1.0
            if not constant:
                test = mannwhitneyu(inside[:, feature], outside[:, feature], method="asymptotic", use_continuity=False)
                expected_auroc, expected_p = test.statistic / len(inside) / len(outside), test.pvalue
            assert found.auroc[where] == pytest.approx(expected_auroc, abs=1e-12)
            assert found.p[where] == pytest.approx(expected_p, rel=1e-9)
            assert found.rate_in[where] == pytest.approx((inside[:, feature] > 0).mean())
            assert found.rate_out[where] == pytest.approx((outside[:, feature] > 0).mean())


@pytest.mark.parametrize("firing_rate", [0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_sparse_association_equals_scipys_mann_whitney(firing_rate: float, rounded: bool) -> None:
    rng = np.random.default_rng(3)
    dense = rng.gamma(1.0, 2.0, size=(150, 12)) * (rng.random((150, 12)) < firing_rate)
    dense = np.ceil(dense) if rounded else dense
    labels = rng.random((150, 3)) < [0.1, 0.5, 0.85]
    dense[labels[:, 0], 0] += 3
    check_against_scipy(dense.astype(np.float32), labels)


def test_association_of_adversarial_columns_equals_scipys() -> None:
    n = 40
    labels = np.zeros((n, 2), dtype=bool)
    labels[:7, 0] = True
    labels[5, 1] = True
    columns = {
        "never active": np.zeros(n),
        "always the same": np.full(n, 0.25),
        "one text": np.eye(n)[5],
        "all but one": 1 - np.eye(n)[5],
        "the label itself": labels[:, 0].astype(float),
        "the label's opposite": 1.0 - labels[:, 0],
        "two values": np.where(np.arange(n) % 3 == 0, 2.0, 1.0),
        "rising": np.arange(n, dtype=float),
        "almost equal": 1 + np.arange(n) * np.finfo(np.float64).eps,
        "smallest and largest": np.where(np.arange(n) % 2 == 0, 5e-324, 1e308),
    }
    check_against_scipy(np.stack(list(columns.values()), axis=1), labels)


@settings(max_examples=60, deadline=None)
@given(
    dense=arrays(np.float64, (9, 4), elements=st.sampled_from([0.0, 0.0, 1.0, 1.5, 7.0])),
    labels=arrays(np.bool_, (9, 2)).filter(lambda x: bool((x.any(axis=0) & ~x.all(axis=0)).all())),
    entries_per_chunk=st.integers(1, 12),
)
def test_association_equals_scipys_whatever_the_ties_and_chunks(
    dense: np.ndarray, labels: np.ndarray, entries_per_chunk: int
) -> None:
    check_against_scipy(dense, labels, entries_per_chunk=entries_per_chunk)


def test_dense_and_sparse_auroc_equal_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, size=60).astype(np.float32)
    positives = rng.random(60) < 0.3
    expected = auroc_by_pairs(scores, positives)
    found = sparse_auroc(scipy.sparse.csr_matrix(scores[:, None]), positives[:, None])
    assert auroc(scores, positives) == pytest.approx(expected)
    assert found.auroc[0, 0] == pytest.approx(expected)
    assert auroc(-scores, positives) == pytest.approx(1 - expected)


def test_storage_format_does_not_change_the_association() -> None:
    rng = np.random.default_rng(1)
    dense = rng.integers(0, 3, size=(30, 5)).astype(np.float32)
    labels = rng.random((30, 2)) < 0.5
    rows, columns = np.indices(dense.shape).reshape(2, -1)
    halves = np.concatenate([dense.ravel() / 2, dense.ravel() / 2])
    twice_with_stored_zeros = scipy.sparse.coo_array((halves, (np.tile(rows, 2), np.tile(columns, 2))))
    unsorted = scipy.sparse.csc_matrix(dense)
    unsorted.indices, unsorted.data = unsorted.indices.copy(), unsorted.data.copy()
    for start, stop in zip(unsorted.indptr[:-1], unsorted.indptr[1:], strict=True):
        unsorted.indices[start:stop] = unsorted.indices[start:stop][::-1]
        unsorted.data[start:stop] = unsorted.data[start:stop][::-1]
    unsorted.has_sorted_indices = False
    with_stored_zeros = scipy.sparse.csc_matrix(
        (dense.T.ravel(), rows.reshape(dense.shape).T.ravel(), np.arange(0, dense.size + 1, len(dense)))
    )
    expected = sparse_auroc(scipy.sparse.csr_matrix(dense), labels)
    for matrix in (twice_with_stored_zeros, with_stored_zeros, unsorted, scipy.sparse.csc_array(dense)):
        before = matrix.copy()
        found = sparse_auroc(matrix, labels)
        for name in ("auroc", "p", "rate_in", "rate_out"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
        assert matrix.nnz == before.nnz, "the caller's matrix must stay as it was"
        assert np.array_equal(matrix.data, before.data)


def test_tiny_p_values_keep_their_exponent_and_never_become_zero() -> None:
    def p_of(n: int) -> tuple[float, float]:
        labels = np.arange(2 * n)[:, None] < n
        ranks = np.where(labels[:, 0], np.arange(2 * n) + 2 * n, np.arange(2 * n)) + 1.0
        found = sparse_auroc(scipy.sparse.csr_matrix(ranks[:, None]), labels)
        z = (n * n / 2) / np.sqrt(n * n * (2 * n + 1) / 12)
        return float(found.p[0, 0]), float((np.log(2) + norm.logsf(z)) / np.log(10))

    p, log10_p = p_of(400)
    assert log10_p < -100
    assert np.log10(p) == pytest.approx(log10_p, rel=1e-9)
    p, log10_p = p_of(2000)
    assert log10_p < -400
    assert p == SMALLEST_P > 0


def test_p_values_are_uniform_when_labels_mean_nothing() -> None:
    rng = np.random.default_rng(4)
    values = rng.gamma(1.0, size=(600, 1500)) * (rng.random((600, 1500)) < 0.5)
    labels = rng.random((600, 1)) < 0.3
    p = sparse_auroc(scipy.sparse.csr_matrix(values), labels).p.ravel()
    for threshold in (0.05, 0.2, 0.5, 0.8):
        assert (p < threshold).mean() == pytest.approx(threshold, abs=0.04)


def test_memory_stays_far_below_a_dense_matrix() -> None:
    rng = np.random.default_rng(5)
    features = rng.integers(0, 8_192, size=8_000 * 32, dtype=np.int32)
    row_starts = np.arange(0, 8_000 * 32 + 1, 32)
    values = rng.random(8_000 * 32, dtype=np.float32)
    matrix = scipy.sparse.csr_matrix((values, features, row_starts), shape=(8_000, 8_192))
    labels = rng.random((8_000, 4)) < 0.2
    tracemalloc.start()
    found = sparse_auroc(matrix, labels, entries_per_chunk=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.auroc.shape == (4, 8_192)
    assert peak < 16_000_000 < 8_000 * 8_192 * 4 / 10


@pytest.mark.parametrize(
    ("matrix", "labels", "message"),
    [
        (np.eye(3), np.ones((4, 1), dtype=bool), r"the matrix has 3 texts, the labels have 4"),
        (-np.eye(3), np.eye(3, dtype=bool), r"must be non-negative, got -1\.0"),
        (np.eye(3) * np.nan, np.eye(3, dtype=bool), r"must be finite, got nan"),
        (np.diag([1.0, np.inf, 1.0]), np.eye(3, dtype=bool), r"must be finite, got inf"),
        (
            np.eye(3),
            np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=bool),
            r"labels \[1, 2\] have a single",
        ),
        (np.zeros((0, 3)), np.zeros((0, 1), dtype=bool), r"labels \[0\] have a single class in 0 texts"),
    ],
)
def test_association_refuses_what_it_cannot_rank(matrix: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_auroc(scipy.sparse.csr_matrix(matrix), labels)


def test_auroc_refuses_one_class_and_nan() -> None:
    with pytest.raises(ValueError, match="got 3 positives and 0 negatives"):
        auroc(np.arange(3.0), np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="got nan"):
        auroc(np.array([0.0, np.nan]), np.array([True, False]))


@pytest.mark.parametrize("shape", [(1,), (50,), (4, 9)])
def test_q_values_equal_scipys_false_discovery_control(shape: tuple[int, ...]) -> None:
    p = np.random.default_rng(0).random(shape) ** 3
    p.flat[0] = p.flat[-1]
    expected = false_discovery_control(p.ravel(), method="bh").reshape(shape)
    np.testing.assert_allclose(benjamini_hochberg(p), expected, rtol=1e-12)


def test_q_values_at_the_edges() -> None:
    assert benjamini_hochberg(np.ones(5)).tolist() == [1.0] * 5
    assert benjamini_hochberg(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert benjamini_hochberg(np.array([])).shape == (0,)


@pytest.mark.parametrize("wrong", [np.nan, -0.1, 1.5])
def test_q_values_refuse_what_is_no_p_value(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"got {wrong}"):
        benjamini_hochberg(np.array([0.5, wrong]))


def average_precision_by_loop(scores: np.ndarray, positives: np.ndarray) -> float:
    """As in scikit-learn: over falling thresholds, the gain in recall times the precision there."""
    found, recall = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        above = scores >= threshold
        now = positives[above].sum() / positives.sum()
        found, recall = found + (now - recall) * positives[above].mean(), now
    return found


@settings(max_examples=60, deadline=None)
@given(
    dense=arrays(np.float32, (11, 4), elements=st.sampled_from([0.0, 0.0, 0.5, 1.5, 7.0])),
    labels=arrays(np.bool_, (11, 2)).filter(lambda x: bool((x.any(axis=0) & ~x.all(axis=0)).all())),
    entries_per_chunk=st.integers(1, 40),
)
def test_average_precision_equals_a_plain_loop_whatever_the_ties_and_chunks(
    dense: np.ndarray, labels: np.ndarray, entries_per_chunk: int
) -> None:
    found = sparse_average_precision(scipy.sparse.csr_matrix(dense), labels, entries_per_chunk=entries_per_chunk)
    for label in range(2):
        for feature in range(4):
            expected = average_precision_by_loop(dense[:, feature], labels[:, label])
            assert found[label, feature] == pytest.approx(expected, abs=1e-12)


def test_average_precision_of_a_perfect_a_constant_and_a_silent_feature() -> None:
    labels = np.arange(50)[:, None] < 5
    dense = np.stack([labels[:, 0] * np.arange(1.0, 51), np.full(50, 2.0), np.zeros(50)], axis=1)
    found = sparse_average_precision(scipy.sparse.csr_matrix(dense), labels)
    assert found[0].tolist() == pytest.approx([1.0, 0.1, 0.1])


def test_many_random_columns_have_the_average_precision_of_a_plain_loop() -> None:
    rng = np.random.default_rng(6)
    dense = (rng.gamma(1, size=(300, 9)) * (rng.random((300, 9)) < np.linspace(0.01, 1, 9))).astype(np.float32)
    labels = rng.random((300, 3)) < [0.05, 0.4, 0.9]
    found = sparse_average_precision(scipy.sparse.csc_matrix(dense), labels)
    expected = [[average_precision_by_loop(column, label) for column in dense.T] for label in labels.T]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_float32_and_float64_values_are_ordered_alike() -> None:
    rng = np.random.default_rng(7)
    tiny = np.finfo(np.float32)
    steps = np.array([0, tiny.smallest_subnormal, tiny.tiny, 1, 1 + tiny.eps, tiny.max], dtype=np.float64)
    dense = rng.choice(steps, size=(80, 6))
    labels = rng.random((80, 2)) < 0.5
    narrow, wide = (sparse_auroc(scipy.sparse.csr_matrix(dense.astype(kind)), labels) for kind in ("f4", "f8"))
    assert np.array_equal(narrow.auroc, wide.auroc) and np.array_equal(narrow.p, wide.p)


def test_holm_equals_the_definition_and_statsmodels_numbers() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.005]])
    # statsmodels.stats.multitest.multipletests(p, method="holm")
    np.testing.assert_allclose(holm(p), [[0.03, 0.06], [0.06, 0.02]])
    random = np.random.default_rng(1).random(30) ** 4
    random[3] = random[4]
    order = np.argsort(random)
    expected = [min(1.0, max(float(random[order[j]]) * (30 - j) for j in range(i + 1))) for i in range(30)]
    np.testing.assert_allclose(holm(random)[order], expected, rtol=1e-12)
    assert (holm(random) >= benjamini_hochberg(random)).all()
    assert holm(np.array([])).shape == (0,)
    with pytest.raises(ValueError, match="got nan"):
        holm(np.array([0.5, np.nan]))


def test_labels_with_too_few_texts_are_refused_by_name_or_skipped() -> None:
    labels = np.arange(60)[:, None] < [19, 20, 41, 30]
    names = ("grief", "relief", "neutral", "joy")
    with pytest.raises(ValueError, match=r"grief \(19 in, 41 out\), neutral \(41 in, 19 out\): each label needs 20"):
        common_enough(labels, names)
    assert common_enough(labels, names, skip_rare=True).tolist() == [1, 3]
    assert common_enough(labels, names, fewest=19).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="too few texts for grief"):
        common_enough(labels[:, :1], names[:1], skip_rare=True)
    with pytest.raises(ValueError, match="4 labels, but 1 names"):
        common_enough(labels, names[:1])
