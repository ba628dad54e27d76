"""Which of an emotion's features to steer with: by what adding them does, not by how well they tell its texts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import EMOTIONS, labelled

from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.feature_roles import output_scores
from sae_emotion_plugin.feature_roles.output_scores import steering_order
from sae_emotion_plugin.feature_roles.steering_ranks import SteeringRanks, steering_ranks

PROMPTS = ("he is such a", "w3 w4", "w9 is w7 w6")


@pytest.fixture(scope="module")
def scores(bridge: Any, emotional_sae: Any) -> FeatureScores:
    return discover(bridge, emotional_sae, labelled(40, seed=1), top=6, progress=False).scores


@pytest.fixture(scope="module")
def ranks(bridge: Any, emotional_sae: Any, scores: FeatureScores) -> SteeringRanks:
    return steering_ranks(bridge, emotional_sae, scores, candidates=5, prompts=PROMPTS, progress=False)


def test_the_order_is_that_which_steering_takes(
    bridge: Any, emotional_sae: Any, scores: FeatureScores, ranks: SteeringRanks
) -> None:
    for emotion in EMOTIONS:
        candidates = [row.feature for row in scores.top(emotion, 5)]
        wanted = steering_order(bridge, emotional_sae, emotion, candidates, prompts=PROMPTS, progress=False)
        assert tuple(row.feature for row in ranks.top(emotion, 5)) == wanted
        assert [row.place for row in ranks.top(emotion, 5)] == [1, 2, 3, 4, 5]
        causal = [row.causal or 0.0 for row in ranks.top(emotion, 5)]
        assert causal == sorted(causal, reverse=True) and len(set(causal)) == 5


def test_each_candidate_keeps_its_place_by_auroc_and_has_the_scores_of_its_feature(
    bridge: Any, emotional_sae: Any, scores: FeatureScores, ranks: SteeringRanks
) -> None:
    effects = output_scores.output_scores(
        bridge, emotional_sae, [row.feature for row in ranks.rows], prompts=PROMPTS, progress=False
    )
    for row in ranks.rows:
        best = scores.top(row.emotion, 5)
        assert best[row.auroc_place - 1].feature == row.feature and best[row.auroc_place - 1].auroc == row.auroc
        effect = effects.of(row.feature)
        assert (row.output_score, row.delta_confidence, row.kl) == pytest.approx(
            (effect.output_score, effect.delta_confidence, effect.kl)
        )
        assert row.causal == pytest.approx(effect.causal[row.emotion])


def test_a_label_without_words_keeps_its_order_by_auroc(bridge: Any, emotional_sae: Any, scores: FeatureScores) -> None:
    names = {"joy": "warmth"}
    renamed = replace(
        scores, rows=tuple(replace(row, emotion=names.get(row.emotion, row.emotion)) for row in scores.rows)
    )
    found = steering_ranks(bridge, emotional_sae, renamed, candidates=3, prompts=PROMPTS, progress=False)
    assert [(row.place, row.auroc_place, row.causal) for row in found.top("warmth", 3)] == [
        (1, 1, None), (2, 2, None), (3, 3, None),
    ]  # fmt: skip
    assert found.meta["ranked_by_auroc"] == ["warmth"]
    assert all(row.causal is not None for row in found.top("anger", 3))


def test_ranks_are_shown_and_saved(ranks: SteeringRanks, tmp_path: Path) -> None:
    shown = repr(ranks)
    assert "5 best features of each emotion by causal score" in shown
    assert len(shown.splitlines()) == 2 + 3 * len(EMOTIONS)
    saved = json.loads(ranks.save(tmp_path / "ranks.json").read_text(encoding="utf-8"))
    assert len(saved["rows"]) == 5 * len(EMOTIONS) and saved["meta"]["ranked_by"] == "causal score"
    assert list(ranks.to_pandas().columns)[:3] == ["emotion", "feature", "place"]


def test_what_cannot_be_ranked_is_refused(
    bridge: Any, emotional_sae: Any, scores: FeatureScores, ranks: SteeringRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        steering_ranks(bridge, emotional_sae, scores, candidates=0)
    with pytest.raises(ValueError, match="unknown emotion 'envy'; there are candidates of: "):
        ranks.top("envy")
    monkeypatch.setattr(output_scores, "emotion_words", lambda: {"joy": ("nowhere",)})
    with pytest.raises(ValueError, match="none of the words of joy is a single token of the model"):
        steering_ranks(bridge, emotional_sae, scores, prompts=PROMPTS, progress=False)
