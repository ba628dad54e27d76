import numpy as np
import pytest

from sae_emotion_plugin.evidence.thresholds import best_threshold, f1_at


def f1_by_counting(scores: list[float], positives: list[bool], threshold: float) -> float:
    right = wrong = missed = 0
    for score, positive in zip(scores, positives, strict=True):
        right += score >= threshold and positive
        wrong += score >= threshold and not positive
        missed += score < threshold and positive
    return 2 * right / (2 * right + wrong + missed)


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_the_threshold_is_the_best_of_all_by_counting(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    for _ in range(50):
        positives = rng.random(40) < 0.4
        positives[0] = True
        scores = np.round(np.maximum(rng.normal(size=40) + positives, 0), decimals)
        threshold, f1 = best_threshold(scores, positives)
        every = {one: f1_by_counting(scores.tolist(), positives.tolist(), one) for one in scores[scores > 0].tolist()}
        assert f1 == pytest.approx(max(every.values()))
        assert threshold == max(one for one, value in every.items() if value == pytest.approx(f1))
        assert threshold is not None and f1_at(scores, positives, threshold) == pytest.approx(f1)


def test_a_silent_score_has_no_threshold_and_one_beyond_all_scores_calls_nothing() -> None:
    positives = np.array([True, False, True])
    assert best_threshold(np.zeros(3), positives) == (None, None)
    assert f1_at(np.zeros(3), positives, 1.0) == 0.0
    assert f1_at(np.zeros(0), np.zeros(0, dtype=bool), 1.0) == 0.0


def test_what_has_no_f1_is_refused() -> None:
    with pytest.raises(ValueError, match="F1 needs positives, got none of 3 texts"):
        best_threshold(np.ones(3), np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="scores must be finite, got nan"):
        best_threshold(np.array([np.nan, 1.0]), np.array([True, False]))
