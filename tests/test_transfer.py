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
from sae_emotion_plugin.discovery.transfer import (
    GOEMOTIONS_TO_KOTE,
    GOEMOTIONS_TO_XED,
    TransferRow,
    TransferTable,
    merged_labels,
    shared_names,
    transfer,
)
from sae_emotion_plugin.judges.corpora import KOTE_LABELS
from sae_emotion_plugin.text_splits import stratified_held_out

SAME, BETTER, KEYWORD, NOISE = range(4)
NAMES = {"anger": ("화남", "짜증"), "joy": "기쁨"}


@cache
def world(n: int = 800, seed: int = 0) -> dict[str, Any]:
    """A second corpus: joy's feature is the best, anger's is beaten by another; half of anger says "grumblish"."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, size=n, p=[0.15, 0.15, 0.3, 0.4])
    anger, joy = kind <= 1, kind == 2
    word = anger & (rng.random(n) < 0.5)
    labels = [((("화남",), ("짜증",), ("기쁨",), ("other",))[k]) for k in kind]
    values = 6 + rng.normal(size=(n, 5))
    values[:, SAME] += 1.5 * joy
    values[:, BETTER] += 2.0 * anger
    values[:, KEYWORD] = word
    texts = texts_of(labels, seed, ["grumblish" if has else "" for has in word])
    return {"codes": codes_of(values), "texts": texts, "anger": anger, "joy": joy, "word": word}


def scores_of(anger: int = KEYWORD, **meta: Any) -> FeatureScores:
    rows = (
        FeatureScore("anger", anger, 0.9, 0.88, 0.0, 0.0, 0.0, 0.0),
        FeatureScore("anger", NOISE, 0.8, 0.7, 0.0, 0.0, 0.0, 0.0),
        FeatureScore("joy", SAME, 0.9, None, 0.0, 0.0, 0.0, 0.0),
    )
    return FeatureScores({"pooling": "mean", "d_sae": 5, **meta}, rows)


def transferred(made: dict[str, Any] | None = None, **options: Any) -> TransferTable:
    made = made or world()
    options = {"names": NAMES, "resamples": 60, **options}
    return transfer(options.pop("scores", scores_of()), made["codes"], made["texts"], **options)


def row_of(found: TransferTable, emotion: str, subset: str) -> TransferRow:
    (row,) = (row for row in found.rows if (row.emotion, row.subset) == (emotion, subset))
    return row


def test_a_feature_that_is_as_good_in_the_second_corpus_is_its_own_ceiling() -> None:
    row = row_of(transferred(), "joy", "all")
    assert row.auroc == pytest.approx(norm.cdf(1.5 / np.sqrt(2)), abs=0.05)
    assert row.low is not None and row.high is not None and row.low < norm.cdf(1.5 / np.sqrt(2)) < row.high
    assert (row.ceiling_feature, row.rank, row.gap, row.gap_low, row.gap_high) == (SAME, 1, 0, 0, 0)
    assert row.source_auroc is None and row.labels == ("기쁨",)


def test_a_feature_of_one_word_falls_short_of_the_ceiling_and_to_chance_without_the_word() -> None:
    found = transferred()
    row, free = row_of(found, "anger", "all"), row_of(found, "anger", "keyword-free")
    clear = norm.cdf(2.0 / np.sqrt(2))
    assert row.auroc == pytest.approx(0.75, abs=0.05) and row.source_auroc == 0.88
    assert row.ceiling_feature == BETTER and row.ceiling == pytest.approx(clear, abs=0.05) and row.rank == 2
    assert row.gap is not None and row.gap_low is not None and row.gap_low > 0.05
    assert row.ceiling is not None and row.auroc is not None and row.gap == pytest.approx(row.ceiling - row.auroc)
    assert free.auroc == 0.5 and free.ceiling == pytest.approx(clear, abs=0.06) and free.ceiling_feature == BETTER
    assert free.n_in < row.n_in and found.meta["keywords"]["anger"]["learned"][0]["word"] == "grumblish"


def test_one_half_chooses_and_the_other_is_scored() -> None:
    made = world()
    row = row_of(transferred(made), "anger", "all")
    labels = np.column_stack([made["anger"], made["joy"]])
    scoring = stratified_held_out(labels, made["texts"].duplicate_groups, 0.5, 0)
    dense, positive = made["codes"].matrix().toarray()[scoring], made["anger"][scoring]
    for feature, value in ((KEYWORD, row.auroc), (BETTER, row.ceiling)):
        u = mannwhitneyu(dense[positive, feature], dense[~positive, feature]).statistic
        assert value == pytest.approx(u / (positive.sum() * (~positive).sum()))
    assert (row.n_in, row.n_out) == (positive.sum(), (~positive).sum())
    # Another feature that is best on the scoring half alone is not the ceiling.
    values = made["codes"].matrix().toarray()
    values[:, NOISE] = np.where(scoring, 6 + 5 * made["anger"], 6)
    assert row_of(transferred({**made, "codes": codes_of(values)}), "anger", "all").ceiling_feature == BETTER


def test_the_rank_counts_the_features_that_the_choosing_half_prefers() -> None:
    row = row_of(transferred(scores=scores_of(anger=4)), "anger", "all")
    assert row.rank in (3, 4, 5) and row.gap is not None and row.gap > 0.3


def test_given_keywords_and_profanity_select_the_texts() -> None:
    made = world()
    keywords = emotion_keywords(merged_labels(world(seed=1)["texts"], NAMES))
    found = transferred(made, subsets=("keyword-free", "profanity-free"), keywords=keywords)
    assert row_of(found, "anger", "keyword-free").auroc == 0.5
    polite = row_of(found, "anger", "profanity-free")
    assert polite.auroc == row_of(transferred(made), "anger", "all").auroc
    assert [row.subset for row in found.rows] == ["keyword-free", "profanity-free"] * 2


def test_too_few_texts_give_a_row_without_figures() -> None:
    made = world()
    angry = np.flatnonzero(made["anger"] & ~made["word"])
    kept = np.setdiff1d(np.arange(800), angry[10:])
    fewer = {"codes": made["codes"].select_texts(kept), "texts": made["texts"].select(kept)}
    found = transferred(fewer)
    row = row_of(found, "anger", "keyword-free")
    assert (row.auroc, row.ceiling, row.gap_low, row.rank) == (None,) * 4 and row.n_in <= 10
    assert row_of(found, "anger", "all").auroc is not None and " -  " in repr(found)
    rare = np.setdiff1d(np.arange(800), np.flatnonzero(made["anger"])[4:])
    fewest = {"codes": made["codes"].select_texts(rare), "texts": made["texts"].select(rare)}
    both = {"anger": made["texts"].emotions[rare[np.flatnonzero(made["anger"][rare])[0]]], "joy": "기쁨"}
    assert row_of(transferred(fewest, names=both), "anger", "keyword-free").auroc is None


def test_merged_labels_rename_and_drop() -> None:
    texts = texts_of([("화남", "기쁨"), ("짜증", "화남"), ("other",), ()], 0)
    assert merged_labels(texts, NAMES).emotions == (("anger", "joy"), ("anger",), (), ())


def test_shared_names_are_the_same_labels_or_those_of_kote() -> None:
    assert shared_names(("anger", "joy", "awe"), ("joy", "anger", "trust")) == {"anger": "anger", "joy": "joy"}
    assert shared_names(("joy",), ("envy",)) == {}
    kote = tuple(label for labels in GOEMOTIONS_TO_KOTE.values() for label in labels)
    assert shared_names(("anger", "awe"), kote) == {"anger": GOEMOTIONS_TO_KOTE["anger"]}
    assert shared_names(("joy",), kote[:1]) == {}


def test_the_mappings_are_of_the_basic_emotions() -> None:
    six = ["anger", "disgust", "fear", "joy", "sadness", "surprise"]
    assert list(GOEMOTIONS_TO_XED) == six and all(GOEMOTIONS_TO_XED[name] == name for name in six)
    assert sorted(GOEMOTIONS_TO_KOTE) == six
    assert all(set(GOEMOTIONS_TO_KOTE[name]) == set(KOTE_LABELS[name]) for name in six)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"awe": "기쁨"}}, "unknown emotions: awe; the scores have: anger, joy"),
        ({"names": {"joy": "환희"}}, "unknown labels: 환희; the texts have: other, "),
        ({"names": {}}, "no emotion to transfer; the scores have: anger, joy"),
        ({"subsets": ("clean",)}, r"unknown subset 'clean' \(valid: all, keyword-free, profanity-free\)"),
        ({"scores": scores_of(d_sae=7)}, "the scores are of .*'d_sae': 7"),
        ({"scores": scores_of(hook_name="other")}, "the scores are of .*'hook_name': 'other'"),
        ({"keywords": {}}, "no keywords of anger, joy"),
        ({"groups": ["one"]}, "800 values, but 1 groups"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transferred(**options)


def test_codes_of_other_texts_are_refused() -> None:
    made = world()
    with pytest.raises(ValueError, match="the codes are of 800 texts, but there are 5 texts"):
        transferred({"codes": made["codes"], "texts": made["texts"].select(np.arange(5))})


def test_the_table_is_saved_as_json_and_listed_as_a_frame(tmp_path: Path) -> None:
    found = transferred()
    assert "<td>keyword-free</td>" in found._repr_html_() and "ceiling (feature)" in repr(found)
    read = json.loads(found.save(tmp_path / "transfer.json").read_text())
    assert read["rows"][0]["labels"] == ["화남", "짜증"] and read["meta"]["pooling"] == "mean"
    assert found.to_pandas().emotion.tolist() == ["anger", "anger", "joy", "joy"]
