import numpy as np
import pytest
from scipy.stats import norm

from sae_emotion_plugin.evidence import resampling
from sae_emotion_plugin.evidence.association import auroc
from sae_emotion_plugin.evidence.auroc_intervals import _auroc_and_error, _ranked, auroc_interval, compare_aurocs
from sae_emotion_plugin.evidence.resampling import Interval


def planted(
    rng: np.random.Generator, documents: int = 60, each: int = 3, shift: float = 1.0, share: float = 0.3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and documents; texts of a document share half of their variance."""
    document = np.repeat(np.arange(documents), each)
    positives = rng.random(len(document)) < share
    scores = shift * positives + np.sqrt(0.5) * (rng.normal(size=documents)[document] + rng.normal(size=len(document)))
    return scores, positives, document


@pytest.mark.parametrize("ties", [False, True])
def test_a_weighted_auroc_equals_that_of_repeated_texts(ties: bool) -> None:
    rng = np.random.default_rng(0)
    scores, positives, document = planted(rng, documents=12)
    scores = np.round(scores) if ties else scores
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=30)
    found, _ = _auroc_and_error(_ranked(scores, positives, document, "x"), counts.astype(float))
    for row, number in zip(counts, found, strict=True):
        repeated = np.repeat(np.arange(len(scores)), row[document])
        assert number == pytest.approx(auroc(scores[repeated], positives[repeated]))


def test_the_standard_error_of_single_texts_is_delongs() -> None:
    rng = np.random.default_rng(1)
    scores, positives, _ = planted(rng, documents=40, each=1)
    scores = np.round(scores, 1)
    compare = np.sign(scores[positives][:, None] - scores[~positives][None, :]) / 2 + 0.5
    n_in, n_out = compare.shape
    # Maximum likelihood's divisors, then the factor for the number of groups.
    delong = compare.mean(axis=1).var() / n_in + compare.mean(axis=0).var() / n_out
    _, error = _auroc_and_error(_ranked(scores, positives, np.arange(40), "x"), np.ones((1, 40)))
    assert error[0] == pytest.approx(np.sqrt(delong * 40 / 39))


def test_the_pull_of_a_document_is_the_derivative_by_its_weight() -> None:
    scores, positives, document = planted(np.random.default_rng(5), documents=8)
    ranked = _ranked(scores, positives, document, "x")
    weights = np.tile(np.arange(1.0, 9.0), (9, 1))
    weights[np.arange(8), np.arange(8)] += 1e-6
    moved, _ = _auroc_and_error(ranked, weights)
    _, error = _auroc_and_error(ranked, np.arange(1.0, 9.0)[None, :])
    slopes = (moved[:8] - moved[8]) / 1e-6
    assert error[0] == pytest.approx(np.sqrt((np.arange(1, 9) * slopes**2).sum() * 8 / 7), rel=1e-4)


def test_repeating_each_text_within_its_document_does_not_narrow_the_interval() -> None:
    scores, positives, _ = planted(np.random.default_rng(2), each=1)
    once = auroc_interval(scores, positives, resamples=500, seed=0)
    copies = (np.repeat(scores, 4), np.repeat(positives, 4))
    grouped = auroc_interval(*copies, groups=np.repeat(np.arange(60), 4), resamples=500, seed=0)
    ungrouped = auroc_interval(*copies, resamples=500, seed=0)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    assert ungrouped.high - ungrouped.low < 0.7 * (once.high - once.low)


def test_small_chunks_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, positives, document = planted(np.random.default_rng(3))
    whole = auroc_interval(scores, positives, groups=document, resamples=200, seed=4)
    monkeypatch.setattr("sae_emotion_plugin.evidence.auroc_intervals.RESAMPLED_CELLS_PER_CHUNK", 400)
    assert auroc_interval(scores, positives, groups=document, resamples=200, seed=4) == whole
    monkeypatch.setattr(resampling, "RESAMPLED_CELLS_PER_CHUNK", 300)
    assert auroc_interval(scores, positives, groups=document, resamples=200, seed=4) == whole


def test_degenerate_scores_have_an_interval_too() -> None:
    positives = np.arange(40) % 4 == 0
    assert auroc_interval(np.zeros(40), positives, seed=0) == Interval(0.5, 0.5, 0.5, 0.95, "studentised", 40)
    perfect = auroc_interval(positives.astype(float), positives, seed=0)
    assert (perfect.mean, perfect.low, perfect.high) == (1, 1, 1)
    scores = positives * 10.0 + np.arange(40) / 10
    nearly = auroc_interval(np.where(np.arange(40) == 1, 99, scores), positives, resamples=500, seed=0)
    assert 0 < nearly.low < nearly.mean < 1
    assert nearly.high <= 1
    low = auroc_interval(-np.where(np.arange(40) == 1, 99, scores), positives, resamples=500, seed=0)
    assert (low.low, low.high) == pytest.approx((1 - nearly.high, 1 - nearly.low), abs=0.02)


def test_what_has_no_interval_is_refused() -> None:
    positives = np.arange(12) % 3 == 0
    scores = np.arange(12.0)
    with pytest.raises(ValueError, match="positives of the label in at least 2 documents, got 1"):
        auroc_interval(scores, positives, groups=np.where(positives, 0, np.arange(12)), seed=0)
    with pytest.raises(ValueError, match="negatives of label 0 in at least 2 documents, got 0"):
        compare_aurocs(scores, scores, np.ones(12, dtype=bool), margin=0.0, seed=0)
    with pytest.raises(ValueError, match="scores must be finite, got nan"):
        auroc_interval(np.where(positives, np.nan, scores), positives, seed=0)
    with pytest.raises(ValueError, match="of the resamples lack a class"):
        auroc_interval(scores, np.arange(12) < 2, seed=0)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 95\.0"):
        auroc_interval(scores, positives, level=95.0, seed=0)
    with pytest.raises(ValueError, match="12 values, but 3 groups"):
        auroc_interval(scores, positives, groups=["a", "b", "c"], seed=0)
    with pytest.raises(ValueError, match=r"margin must be 0 or more, got -0\.1"):
        compare_aurocs(scores, -scores, positives, margin=-0.1, resamples=50, seed=0)
    with pytest.raises(ValueError, match="no label to compare"):
        compare_aurocs(np.zeros((4, 0)), np.zeros((4, 0)), np.zeros((4, 0), dtype=bool), margin=0.0, seed=0)


def test_a_paired_comparison_is_narrower_than_two_intervals_and_finds_a_planted_difference() -> None:
    rng = np.random.default_rng(6)
    scores, positives, document = planted(rng, documents=100)
    worse = scores + 0.5 * rng.normal(size=len(scores))
    found = compare_aurocs(scores, worse, positives, groups=document, margin=0.02, resamples=500, seed=1)
    single = auroc_interval(scores, positives, groups=document, resamples=500, seed=1)
    assert found.verdict == "superior"
    assert (found.first, found.second) == pytest.approx((auroc(scores, positives), auroc(worse, positives)))
    assert found.difference == pytest.approx(found.first - found.second)
    assert found.high - found.low < 0.7 * (single.high - single.low)
    back = compare_aurocs(worse, scores, positives, groups=document, margin=0.0, resamples=500, seed=1)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-3)
    assert back.verdict == "inferior"
    same = compare_aurocs(scores, scores, positives, groups=document, margin=0.01, resamples=50, seed=1)
    assert (same.difference, same.low, same.high, same.verdict) == (0, 0, 0, "non-inferior")


def test_several_labels_are_averaged_over_the_same_draws() -> None:
    rng = np.random.default_rng(7)
    scores, positives, document = planted(rng, documents=40)
    labels = np.column_stack([positives, rng.random(len(positives)) < 0.5])
    first, second = rng.normal(size=(2, len(scores), 2)) + labels
    found = compare_aurocs(first, second, labels, groups=document, margin=0.0, resamples=300, seed=2)
    by_label = [(auroc(first[:, i], labels[:, i]), auroc(second[:, i], labels[:, i])) for i in range(2)]
    assert (found.first, found.second) == pytest.approx(tuple(np.mean(by_label, axis=0)))
    twice = [np.column_stack([array[:, 0]] * 2) for array in (first, second, labels)]
    assert compare_aurocs(twice[0], twice[1], twice[2], groups=document, margin=0.0, resamples=300, seed=2) == (
        compare_aurocs(first[:, 0], second[:, 0], labels[:, 0], groups=document, margin=0.0, resamples=300, seed=2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.65, 1.8])
def test_auroc_intervals_cover_the_truth_as_often_as_they_say(shift: float) -> None:
    rng = np.random.default_rng(8)
    truth = norm.cdf(shift / np.sqrt(2))
    covered = 0
    for data_set in range(1000):
        scores, positives, document = planted(rng, documents=60, shift=shift)
        found = auroc_interval(scores, positives, groups=document, resamples=399, seed=data_set)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.slow
def test_intervals_of_paired_differences_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(9)
    truth = norm.cdf(1 / np.sqrt(2)) - norm.cdf(1 / np.sqrt(3))
    covered = 0
    for data_set in range(1000):
        scores, positives, document = planted(rng, documents=60)
        worse = scores + np.sqrt(0.5) * rng.normal(size=len(scores))
        found = compare_aurocs(scores, worse, positives, groups=document, margin=0.0, resamples=399, seed=data_set)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 1000 <= 0.97
