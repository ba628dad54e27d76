import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_codes import codes_of, texts_of
from scipy.stats import mannwhitneyu, norm

from sae_emotion_plugin.discovery.keywords import emotion_keywords
from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.discovery.specificity import GOEMOTIONS_VALENCE, Specificity, label_valence, specificity
from sae_emotion_plugin.emotion_texts import LabelledTexts

EMOTIONS = ("anger", "sadness", "joy")
OWN, VALENCE, KEYWORD, SWEARING, SADNESS, JOY = range(6)
EFFECT = 1.5
CLEAR = float(norm.cdf(EFFECT / np.sqrt(2)))
"""AUROC of a normal score that is `EFFECT` standard deviations higher."""


def slow_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    u = mannwhitneyu(scores[positive], scores[~positive]).statistic
    return float(u / (positive.sum() * (~positive).sum()))


@cache
def world(n: int = 700, seed: int = 0) -> tuple[Any, LabelledTexts, np.ndarray]:
    """Texts of four kinds, 20 % of each emotion; half of the anger has the word "grumblish", half of it "damn"."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, size=n, p=[0.2, 0.2, 0.2, 0.4])
    word, swears = (kind == 0) & (rng.random(n) < 0.5), (kind == 0) & (rng.random(n) < 0.5)
    words = [
        " ".join([*(["grumblish"] if has else []), *(["damn"] if does else [])])
        for has, does in zip(word, swears, strict=True)
    ]
    texts = texts_of([(EMOTIONS[k],) if k < 3 else () for k in kind], seed, words)
    # 6 above zero, so that nothing is cut off and the AUROCs are those of normal distributions.
    values = 6 + rng.normal(size=(n, 6))
    values[:, OWN] += EFFECT * (kind == 0)
    values[:, VALENCE] += EFFECT * (kind <= 1)
    values[:, KEYWORD] = word
    values[:, SWEARING] = swears
    values[:, SADNESS] += EFFECT * (kind == 1)
    values[:, JOY] += EFFECT * (kind == 2)
    return codes_of(values), texts, kind


TRAIN = world(1000, seed=1)[1]
KEYWORDS = emotion_keywords(TRAIN)


def specific(anger: int, made: Any = None, **options: Any) -> Specificity:
    codes, texts, _ = made or world()
    features = {"anger": anger, "sadness": SADNESS, "joy": JOY}
    options = {"keywords": KEYWORDS, "valence": label_valence(texts), "resamples": 50, **options}
    return specificity(codes, texts, features, **options)


@cache
def plain(anger: int) -> Specificity:
    return specific(anger)


def test_a_feature_of_its_own_emotion_keeps_its_auroc_in_every_control() -> None:
    found = plain(OWN)
    row = found.of("anger")
    for value in (row.auroc, row.direct, row.valence_free, row.keyword_free, row.profanity_free):
        assert value == pytest.approx(CLEAR, abs=0.05)
    # The rival's own texts are like all others to the feature, and the anger among its negatives is above them.
    assert found.matrix[0, 1:].mean() == pytest.approx(0.75 * 0.5 + 0.25 * (1 - CLEAR), abs=0.05)
    assert row.low > 0.3 and row.low < row.margin < row.high
    assert row.direct_low is not None and row.direct_high is not None
    assert row.direct_low < CLEAR < row.direct_high


def test_a_feature_of_valence_has_no_margin_no_direct_auroc_and_none_at_equal_valence() -> None:
    found = plain(VALENCE)
    row = found.of("anger")
    assert row.auroc == pytest.approx(0.25 * 0.5 + 0.75 * CLEAR, abs=0.05)
    assert row.rival == "sadness" and row.low < 0 < row.high
    assert row.valence_free == pytest.approx(0.5, abs=0.06) and row.direct == pytest.approx(0.5, abs=0.06)
    assert row.keyword_free is not None and row.keyword_free > 0.7
    assert row.n_valence_free == found.meta["class_counts"]["anger"]


def test_a_feature_of_one_word_tells_nothing_without_it() -> None:
    row = plain(KEYWORD).of("anger")
    assert row.auroc == pytest.approx(0.75, abs=0.06) and row.keyword_free == 0.5
    assert row.profanity_free == pytest.approx(0.75, abs=0.05)
    _, texts, kind = world()
    free = np.array(["grumblish" not in text and "damn" not in text for text in texts.texts])
    assert row.n_keyword_free == (free & (kind == 0)).sum()


def test_a_feature_of_swearing_tells_nothing_where_nobody_swears() -> None:
    row = plain(SWEARING).of("anger")
    assert row.auroc == pytest.approx(0.75, abs=0.06) and row.profanity_free == 0.5
    _, texts, kind = world()
    assert row.n_profanity_free == sum("damn" not in t for t, k in zip(texts.texts, kind, strict=True) if k == 0)
    assert row.profanity_free_low == row.profanity_free_high == 0.5


def test_the_matrix_has_every_features_auroc_for_every_emotion() -> None:
    codes, _, kind = world()
    found = plain(VALENCE)
    dense = codes.matrix().toarray()
    for i, feature in enumerate((VALENCE, SADNESS, JOY)):
        for j in range(3):
            assert found.matrix[i, j] == pytest.approx(slow_auroc(dense[:, feature], kind == j))
    assert found.emotions == EMOTIONS and found.features == {"anger": VALENCE, "sadness": SADNESS, "joy": JOY}
    for i, row in enumerate(found.rows):
        others = np.delete(found.matrix[i], i)
        assert row.rival_auroc == others.max() and row.margin == pytest.approx(found.matrix[i, i] - others.max())


def test_the_margins_interval_is_that_of_the_influence_of_each_text() -> None:
    made = world(400)
    codes, _, kind = made
    row = specific(VALENCE, made, resamples=500).of("anger")
    scores = codes.matrix().toarray()[:, VALENCE]
    pull = np.zeros(len(kind))
    for sign, k in ((1, 0), (-1, 1)):
        positive = kind == k
        whole = slow_auroc(scores, positive)
        for i, score in enumerate(scores):
            others = scores[~positive] if positive[i] else scores[positive]
            wins = (others < score).mean() if positive[i] else (others > score).mean()
            share = positive.sum() if positive[i] else (~positive).sum()
            pull[i] += sign * (wins - whole) / share
    half = 1.96 * np.sqrt((pull**2).sum())
    assert (row.low, row.high) == pytest.approx((row.margin - half, row.margin + half), abs=0.15 * half)


def test_a_text_with_both_labels_is_a_positive_of_both_and_no_part_of_the_direct_comparison() -> None:
    rng = np.random.default_rng(5)
    n = 600
    anger, sadness = rng.random(n) < 0.3, rng.random(n) < 0.3
    labels = [tuple(e for e, on in (("anger", a), ("sadness", s)) if on) for a, s in zip(anger, sadness, strict=True)]
    texts = texts_of(labels, 5)
    values = np.maximum(rng.normal(size=(n, 2)) + anger[:, None], 0)
    row = specificity(
        codes_of(values), texts, {"anger": 0, "sadness": 1}, keywords=emotion_keywords(texts), resamples=100
    ).of("anger")
    assert row.rival_auroc == pytest.approx(slow_auroc(values[:, 0].astype(np.float32), sadness))
    one_only = anger != sadness
    assert row.direct == pytest.approx(slow_auroc(values[one_only, 0].astype(np.float32), anger[one_only]))


def test_the_lower_end_holds_against_every_near_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    n = 800
    kind = rng.choice(4, size=n, p=[0.25, 0.35, 0.03, 0.37])
    texts = texts_of([(EMOTIONS[k],) if k < 3 else () for k in kind], 3)
    values = 6 + rng.normal(size=(n, 6))
    values[:, OWN] += 1.5 * (kind == 0) + 0.5 * (kind == 1) + 0.5 * (kind == 2)
    row = specific(OWN, (codes_of(values), texts, kind)).of("anger")
    # The few texts of joy leave its AUROC uncertain: it may well be larger than that of the rival.
    assert row.rival == "sadness"
    monkeypatch.setattr("sae_emotion_plugin.discovery.specificity.NEAREST_RIVALS", 1)
    alone = specific(OWN, (codes_of(values), texts, kind)).of("anger")
    assert row.low < alone.low - 0.01 and row.high == alone.high and row.margin == alone.margin


def test_copies_in_one_group_narrow_no_interval() -> None:
    codes, texts, _ = world(200)
    once = specific(OWN, (codes, texts, None), resamples=300).of("anger")
    copies = np.tile(np.arange(200), 3)
    words = ["damn" if "damn" in texts.texts[n] else "" for n in copies]
    tripled = texts_of([texts.emotions[n] for n in copies], 8, words)
    made = (codes.select_texts(copies), tripled, None)
    grouped = specific(OWN, made, groups=[f"document {n}" for n in copies], resamples=300).of("anger")
    apart = specific(OWN, made, resamples=300).of("anger")
    assert grouped.margin == pytest.approx(once.margin)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.15)
    assert apart.high - apart.low < 0.75 * (once.high - once.low)


def test_the_best_feature_of_scores_is_taken_with_their_pooling() -> None:
    codes, texts, _ = world()
    rows = [
        FeatureScore(emotion, feature, auroc, None, 0.0, 0.0, 0.0, 0.0)
        for emotion, feature, auroc in (("anger", OWN, 0.9), ("anger", VALENCE, 0.8), ("joy", JOY, 0.9))
    ]
    scores = FeatureScores({"pooling": "mean", "d_sae": 6, "hook_name": codes.hook_name}, tuple(rows))
    found = specificity(codes, texts, scores, keywords=KEYWORDS, resamples=50)
    assert found.features == {"anger": OWN, "joy": JOY} and found.meta["pooling"] == "mean"
    with pytest.raises(ValueError, match=r"the scores are of .*'d_sae': 7.*, the codes of .*'d_sae': 6"):
        specificity(codes, texts, FeatureScores({"d_sae": 7}, tuple(rows)), keywords=KEYWORDS)


def test_rare_emotions_are_left_out_by_name_and_few_texts_give_no_figure() -> None:
    codes, texts, kind = world()
    last = np.flatnonzero(kind == 2)
    kept = np.setdiff1d(np.arange(len(kind)), last[9:])
    found = specific(OWN, (codes.select_texts(kept), texts.select(kept), None), valence=None)
    assert found.meta["left_out"] == ["joy"] and found.emotions == ("anger", "sadness")
    assert "too few texts for joy" in repr(found)
    angry = np.flatnonzero(kind == 0)
    with_word = [n for n in angry if "grumblish" in texts.texts[n]]
    kept = np.setdiff1d(np.arange(len(kind)), np.setdiff1d(angry, with_word[:60]))
    row = specific(OWN, (codes.select_texts(kept), texts.select(kept), None)).of("anger")
    assert (row.keyword_free, row.keyword_free_low, row.n_keyword_free) == (None, None, 0)
    with pytest.raises(ValueError, match=r"specificity needs two emotions with 10 groups .* there are 1"):
        only = np.flatnonzero(np.isin(kind, [0, 3]))
        specific(OWN, (codes.select_texts(only), texts.select(only), None))


def test_valence_is_vaders_where_it_knows_the_words_and_none_elsewhere() -> None:
    codes, texts, kind = world()
    row = specific(OWN, valence=None)
    assert row.of("anger").valence_free is None and row.meta["valence"].startswith("none (VADER, not 0 in")
    pleasant = [("awful", "sad", "great", "fine")[k] for k in kind]
    spoken = texts_of(texts.emotions, 4, pleasant)
    found = specific(VALENCE, (codes, spoken, None), valence=None)
    assert found.meta["valence"] == "VADER, not 0 in 100% of the texts" and found.meta["valence_strata"] == 4


def test_a_valence_that_gives_the_emotion_away_leaves_no_valence_free_auroc() -> None:
    _, _, kind = world()
    row = specific(OWN, valence=np.where(kind == 0, -1.0, 0.0)).of("anger")
    assert row.valence_free is None and row.n_valence_free == 0


def test_label_valence_is_zero_for_both_sides_and_for_neither() -> None:
    texts = texts_of([("joy",), ("anger", "fear"), ("joy", "anger"), (), ("surprise",), ("surprise", "love")], 0)
    assert label_valence(texts).tolist() == [1, -1, 0, 0, 0, 1]
    assert label_valence(texts, {"surprise": 1}).tolist() == [0, 0, 0, 0, 1, 1]
    assert len(GOEMOTIONS_VALENCE) == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keywords": {"joy": KEYWORDS["joy"]}}, r"no keywords of anger, sadness \(there are those of joy\)"),
        ({"valence": np.zeros(3)}, "700 held-out texts, but 3 valences"),
        ({"valence": np.full(700, np.nan)}, "valences must be finite, got nan"),
        ({"groups": ["one"]}, "700 values, but 1 groups"),
        ({"level": 1.0}, "level must lie between 0 and 1"),
        ({"anger": 6}, r"no such features: 6 \(anger\) \(valid: 0 to 5\)"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specific(**{"anger": OWN, **options})


def test_codes_of_other_texts_are_refused() -> None:
    codes, texts, _ = world()
    with pytest.raises(ValueError, match="the codes are of 700 texts, but there are 10 held-out texts"):
        specific(OWN, (codes, texts.select(np.arange(10)), None))


def test_specificity_is_shown_as_a_table_and_saved_as_json(tmp_path: Path) -> None:
    found = plain(KEYWORD)
    assert found == found and "keyword-free (texts)" in repr(found) and "<td>anger</td>" in found._repr_html_()
    read = json.loads(found.save(tmp_path / "specificity.json").read_text())
    assert read == found.to_dict() and np.array(read["matrix"]) == pytest.approx(found.matrix)
    assert "grumblish" in [one["word"] for one in read["meta"]["keywords"]["anger"]["learned"]]
    frame = found.to_pandas()
    assert frame.emotion.tolist() == list(EMOTIONS) and frame.keyword_free[0] == 0.5
    with pytest.raises(ValueError, match=r"no specificity of 'awe' \(valid: anger, sadness, joy\)"):
        found.of("awe")
