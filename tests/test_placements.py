import numpy as np
import pytest
import scipy.sparse
from scipy.stats import brunnermunzel

from sae_emotion_plugin.evidence.association import checked_columns, sorted_chunks
from sae_emotion_plugin.evidence.placements import auroc_above, logit_p, placement_variances


def placements_by_loop(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    inside, outside = values[positive], values[~positive]
    won = (inside[:, None] > outside).astype(float) + (inside[:, None] == outside) / 2
    return float(won.mean(axis=1).var(ddof=1)), float((1 - won).mean(axis=0).var(ddof=1))


@pytest.mark.parametrize("entries_per_chunk", [7, 100, 1_000_000])
def test_standard_errors_equal_delongs_by_a_plain_loop(entries_per_chunk: int) -> None:
    rng = np.random.default_rng(0)
    n = 90
    labels = rng.random((n, 2)) < [0.3, 0.7]
    dense = rng.gamma(1, size=(n, 8)) * (rng.random((n, 8)) < np.linspace(0.1, 1, 8))
    dense[:, 2:5] = np.ceil(dense[:, 2:5])
    dense[:, 6] = labels[:, 0]
    dense[:, 7] = 0.5
    matrix = scipy.sparse.csr_matrix(dense.astype(np.float32))
    found = auroc_above(
        matrix, labels, 0.01, fewest_positives=2, fewest_firing_in=1, entries_per_chunk=entries_per_chunk
    )
    for label in range(2):
        positive = labels[:, label]
        for feature in range(8):
            spread_in, spread_out = placements_by_loop(dense[:, feature].astype(np.float32), positive)
            error = np.sqrt(spread_in / positive.sum() + spread_out / (~positive).sum())
            assert found.error[label, feature] == pytest.approx(error, abs=1e-12)


def test_placement_variances_give_scipys_brunner_munzel_statistic() -> None:
    rng = np.random.default_rng(1)
    positive = np.arange(200)[None, :] < 60
    values = (rng.gamma(1, size=(200, 1)) * (rng.random((200, 1)) < 0.6)).astype(np.float32)
    values[:60] *= 1.7
    (chunk,) = sorted_chunks(checked_columns(scipy.sparse.csr_matrix(values), positive.T))
    spread_in, spread_out = placement_variances(chunk, positive, np.array([0]), np.array([0]))
    found = auroc_above(scipy.sparse.csr_matrix(values), positive.T, 0.5)
    z = (found.auroc[0, 0] - 0.5) / np.sqrt(spread_in[0] / 60 + spread_out[0] / 140)
    assert z == pytest.approx(brunnermunzel(values[60:, 0], values[:60, 0]).statistic, rel=1e-6)


def null_p(rng: np.random.Generator, n_in: int, kind: str, runs: int) -> np.ndarray:
    """p values where the AUROC is exactly 0.60."""
    n_out = 600
    if kind == "sparse":  # fires in 20 % more of the positives, equally strongly
        inside = rng.random((n_in, runs)) * (rng.random((n_in, runs)) < 0.25)
        outside = rng.random((n_out, runs)) * (rng.random((n_out, runs)) < 0.05)
    else:  # always on, shifted: P(normal(d, 1) > normal(0, 1)) = 0.6
        inside = np.exp(rng.normal(0.2533471 * np.sqrt(2), 1, (n_in, runs)))
        outside = np.exp(rng.normal(0, 1, (n_out, runs)))
    matrix = scipy.sparse.csc_matrix(np.concatenate([inside, outside]).astype(np.float32))
    return auroc_above(matrix, np.arange(n_in + n_out)[:, None] < n_in, 0.6).p[0]


@pytest.mark.parametrize("n_in", [39, 88])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_size_at_an_auroc_of_exactly_the_null_is_the_level_or_less(n_in: int, kind: str) -> None:
    runs = 4_000
    p = null_p(np.random.default_rng(n_in), n_in, kind, runs)
    for level in (0.05, 0.01, 0.001):
        assert (p < level).sum() <= level * runs + 3 * np.sqrt(level * runs)
    if kind == "dense":
        assert (p < 0.05).mean() > 0.035, "not merely because it never rejects"


def test_a_planted_auroc_of_080_is_found_and_one_of_061_is_not() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(3_000)[:, None] < 88
    dense = np.exp(rng.normal(size=(3_000, 2)))
    dense[:88] *= np.exp([1.19, 0.395])
    found = auroc_above(scipy.sparse.csr_matrix(dense), labels)
    assert found.auroc[0] == pytest.approx([0.8, 0.61], abs=0.06)
    assert found.p[0, 0] < 1e-5 and found.p[0, 1] > 0.01


def test_nothing_is_claimed_below_the_null_or_from_too_few_texts() -> None:
    n = 200
    labels = np.stack([np.arange(n) < 19, np.arange(n) < 40], axis=1)
    dense = np.zeros((n, 4), dtype=np.float32)
    dense[:, 0] = np.arange(n)  # lower in class
    dense[:, 1] = 0.5
    dense[:9, 2] = 1
    dense[:40, 3] = 1 + np.arange(40)
    found = auroc_above(scipy.sparse.csr_matrix(dense), labels)
    assert (found.p[0] == 1).all(), "19 positives are too few"
    assert found.p[1, :3].tolist() == [1, 1, 1] and np.isnan(found.error[1, :3]).all()
    assert found.auroc[1].tolist() == [0.0, 0.5, pytest.approx(0.6125), 1.0]
    assert 0 < found.p[1, 3] < 1e-20, "a perfect feature has a p, and not 0"


def test_p_falls_as_the_auroc_rises_up_to_a_perfect_one() -> None:
    auroc = np.array([0.601, 0.7, 0.9, 0.99, 1.0])
    share = np.full(5, 1e-3)
    p = logit_p(auroc, 0.6, share, share, np.full(5, 40), np.full(5, 400))
    assert np.isfinite(p).all() and p[0] == pytest.approx(0.5, abs=0.02)
    perfect = logit_p(np.array([1.0]), 0.6, np.zeros(1), np.zeros(1), np.array([40]), np.array([400]))
    assert 0 < perfect[0] < 1e-6


@pytest.mark.parametrize("null", [0.0, 1.0, float("nan")])
def test_a_null_that_is_no_auroc_is_refused(null: float) -> None:
    with pytest.raises(ValueError, match="null must lie between 0 and 1, got"):
        auroc_above(scipy.sparse.csr_matrix(np.eye(4)), np.eye(4, dtype=bool), null)


def test_values_that_are_not_finite_and_single_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite, got nan"):
        auroc_above(scipy.sparse.csr_matrix(np.diag([1.0, np.nan])), np.eye(2, dtype=bool))
    with pytest.raises(ValueError, match=r"labels \[0\] have a single class"):
        auroc_above(scipy.sparse.csr_matrix(np.eye(2)), np.ones((2, 1), dtype=bool))
