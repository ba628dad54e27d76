import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.feature_roles.output_scores import OutputScore, OutputScores
from sae_emotion_plugin.steering_studies.prediction import SteeringPrediction, spread_features, steering_prediction
from sae_emotion_plugin.steering_studies.success import SteeringSuccess

EMOTIONS = ("joy", "anger", "fear")


def planted(n: int = 60, *, held_out: bool = True, noise: float = 0.3, seed: int = 0) -> tuple[Any, Any, Any]:
    """`n` features an emotion whose success is their causal score and noise; nothing else has to do with it.

    Emotions differ in both by far more than their features do.
    """
    rng = np.random.default_rng(seed)
    scores, outputs, successes = [], [], []
    for place, emotion in enumerate(EMOTIONS):
        for feature in range(n * place, n * (place + 1)):
            causal = rng.normal()
            auroc = 0.6 + 0.1 * rng.random()
            changes = tuple((causal + 20 * place + noise * rng.normal(size=4)).tolist())
            again = auroc + 0.02 * rng.normal() if held_out else None
            scores.append(FeatureScore(emotion, feature, auroc, again, 0.1, 0.1, 0.5, 0.1))
            causes = {one: causal if one == emotion else rng.normal() for one in EMOTIONS}
            outputs.append(OutputScore(feature, rng.random(), rng.normal(), rng.random(), causes))
            successes.append(SteeringSuccess(emotion, feature, emotion, float(np.mean(changes)), 0.0, changes, 0.0))
    return FeatureScores({}, tuple(scores)), OutputScores({}, tuple(outputs)), successes


@pytest.fixture(scope="module")
def found() -> SteeringPrediction:
    return steering_prediction(*planted(), resamples=200)


def test_the_planted_predictor_is_found(found: SteeringPrediction) -> None:
    best = found.best()
    assert best.predictor == "causal_score"
    assert best.low > 0.9
    assert best.given_low is not None and best.given_low > 0.9
    for row in found.rows:
        if row.predictor != "causal_score" and row.scope == "within emotions":
            assert row.low < 0 < row.high or abs(row.correlation) < 0.25
    ahead = [one for one in found.differences if one.first == "causal_score" and one.scope == "within emotions"]
    assert len(ahead) == 6 and all(one.low > 0 for one in ahead)


def test_what_separates_emotions_counts_for_nothing_within_them(found: SteeringPrediction) -> None:
    within, overall = found.best("within emotions"), found.best("all")
    assert overall.correlation < 0.75 < within.correlation  # the emotions' own sizes have nothing to do with causes
    outcome = [one.success for one in found.features]
    by_hand = stats.spearmanr([one.causal_score for one in found.features], outcome)[0]
    assert next(
        row for row in found.rows if (row.predictor, row.scope) == ("causal_score", "all")
    ).correlation == pytest.approx(by_hand, abs=1e-12)


def test_the_reliability_is_that_of_the_halves_stepped_up(found: SteeringPrediction) -> None:
    assert found.meta["reliability"] > 0.95
    _, outputs, successes = planted(noise=3.0)
    scores = planted(noise=3.0)[0]
    noisy = steering_prediction(scores, outputs, successes, resamples=20)
    # Four values with an error variance of 9 and a true variance of 1: 4 / (4 + 9).
    assert noisy.meta["reliability"] == pytest.approx(4 / 13, abs=0.15)
    assert noisy.best().correlation < found.best().correlation


def test_the_aurocs_have_no_partial_correlation_with_themselves(found: SteeringPrediction) -> None:
    assert found.meta["covariate"] == "held_out_auroc"
    rows = {row.predictor: row for row in found.rows if row.scope == "all"}
    assert rows["held_out_auroc"].given_auroc is None
    assert list(rows) == [
        *("auroc", "held_out_auroc", "output_score"),
        *("delta_confidence", "delta_confidence_size", "kl", "causal_score"),
    ]
    assert all(one.delta_confidence_size == abs(one.delta_confidence) for one in found.features)


def test_the_held_out_auroc_is_left_out_when_a_feature_has_none() -> None:
    plain = steering_prediction(*planted(held_out=False), resamples=20)
    assert plain.meta["covariate"] == "auroc"
    assert "held_out_auroc" not in {row.predictor for row in plain.rows}
    assert all((row.given_auroc is None) == (row.predictor == "auroc") for row in plain.rows)


def test_a_predictor_without_variation_is_left_out_and_one_that_repeats_the_auroc_has_no_partial_correlation() -> None:
    scores, outputs, successes = planted(n=10)
    same = OutputScores({}, tuple(replace(row, output_score=0.0) for row in outputs.rows))
    aurocs = FeatureScores({}, tuple(replace(row, auroc=(row.held_out_auroc or 0) / 2) for row in scores.rows))
    found = steering_prediction(aurocs, same, successes, resamples=20)
    assert found.meta["left_out"] == ["output_score"]
    rows = {row.predictor: row for row in found.rows if row.scope == "all"}
    assert "output_score" not in rows and rows["auroc"].given_auroc is None
    assert rows["auroc"].correlation == pytest.approx(rows["held_out_auroc"].correlation)


def test_the_answer_is_shown_and_saved(found: SteeringPrediction, tmp_path: Path) -> None:
    saved = json.loads(found.save(tmp_path / "prediction.json").read_text())
    assert len(saved["features"]) == 180 and saved["meta"]["n_by_emotion"] == {one: 60 for one in EMOTIONS}
    assert "best one minus this" in repr(found) and "180 features of 3 emotions" in repr(found)
    assert "<table>" in found._repr_html_()
    assert len(found.to_pandas()) == 14
    with pytest.raises(ValueError, match="no scope 'each'"):
        found.best("each")


def test_features_are_spread_from_the_best_to_the_last() -> None:
    scores = planted(n=9)[0]
    pairs = spread_features(scores, ("joy", "fear"), 7)
    assert pairs == [("joy", 0), ("joy", 3), ("joy", 5), ("joy", 8), ("fear", 18), ("fear", 22), ("fear", 26)]
    with pytest.raises(ValueError, match="10 features of 'joy' are wanted, the scores have 9"):
        spread_features(scores, ("joy",), 10)
    with pytest.raises(ValueError, match="no emotions"):
        spread_features(scores, (), 10)


def test_features_without_scores_are_refused() -> None:
    scores, outputs, successes = planted(n=5)
    stranger = SteeringSuccess("joy", 14, "joy", 0.1, 0.1, (0.1,), 0.0)
    with pytest.raises(ValueError, match="no feature 14 for 'joy'"):
        steering_prediction(scores, outputs, [*successes, stranger], resamples=20)
    with pytest.raises(ValueError, match="feature 14 was not scored"):
        steering_prediction(scores, OutputScores({}, outputs.rows[:-1]), successes, resamples=20)
    silent = tuple(OutputScore(row.feature, 0.0, 0.0, 0.0, {"joy": 1.0}) for row in outputs.rows)
    with pytest.raises(ValueError, match="no causal score for 'anger'"):
        steering_prediction(scores, OutputScores({}, silent), successes, resamples=20)
    with pytest.raises(ValueError, match="needs 5 values"):
        steering_prediction(scores, outputs, successes[:3], resamples=20)
