import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from sae_emotion_plugin.discovery.scores import LATER_FIELDS, FeatureScore, FeatureScores
from sae_emotion_plugin.discovery.scoring import choose_pooling, score_features
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import auroc, benjamini_hochberg, sparse_auroc
from sae_emotion_plugin.evidence.placements import auroc_above
from sae_emotion_plugin.evidence.stratified import stratified_mann_whitney
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes

D_SAE = 40
JOY_FEATURE, ANGER_FEATURE = 7, 11
LAST_TOKEN_FEATURE = 23
DEAD_FEATURES = (3, 39)
LETTERS = list("abcdefghijklmnopqrst    ")


def make_texts(n: int, seed: int = 0, prefix: str = "t") -> LabelledTexts:
    """Texts of random letters; a third joy, a third anger, a few both, the rest without any label."""
    rng = np.random.default_rng(seed)
    kinds = [("joy",), ("anger",), (), ("anger", "joy"), ("joy",), ("anger",)]
    return LabelledTexts(
        texts=tuple(f"{prefix}{i} " + "".join(rng.choice(LETTERS, size=60)) for i in range(n)),
        emotions=tuple(kinds[i % len(kinds)] for i in range(n)),
        ids=tuple(f"{prefix}{i}" for i in range(n)),
        language="en",
    )


def codes_of(dense: np.ndarray, text_index: np.ndarray, n_texts: int) -> SparseCodes:
    rows = scipy.sparse.csr_matrix(dense.astype(np.float32))
    return SparseCodes(
        values=rows.data,
        features=rows.indices.astype(np.int32),
        row_starts=rows.indptr.astype(np.int64),
        text_index=text_index.astype(np.int32),
        token_ids=np.zeros(len(text_index), dtype=np.int32),
        n_texts=n_texts,
        d_sae=dense.shape[1],
        hook_name="blocks.1.hook_resid_post",
    )


def make_codes(texts: LabelledTexts, seed: int = 0, tokens: int = 5, planted: bool = True) -> SparseCodes:
    """Noise, a joy feature and an anger feature on one token of their texts, and joy on each last token."""
    rng = np.random.default_rng(seed)
    text_index = np.repeat(np.arange(len(texts)), tokens)
    dense = rng.gamma(1.0, size=(len(text_index), D_SAE)) * (rng.random((len(text_index), D_SAE)) < 0.1)
    dense[:, DEAD_FEATURES] = 0
    if planted:
        for text, labels in enumerate(texts.emotions):
            for label, feature in (("joy", JOY_FEATURE), ("anger", ANGER_FEATURE)):
                if label in labels and rng.random() < 0.9:
                    dense[text * tokens + rng.integers(tokens), feature] = 5 + rng.random()
    return codes_of(dense, text_index, len(texts))


@pytest.fixture(scope="module")
def train() -> tuple[SparseCodes, LabelledTexts]:
    texts = make_texts(120)
    return make_codes(texts), texts


@pytest.fixture(scope="module")
def held_out() -> tuple[SparseCodes, LabelledTexts]:
    texts = make_texts(60, seed=9, prefix="h")
    return make_codes(texts, seed=9), texts


@pytest.fixture(scope="module")
def scores(train: tuple, held_out: tuple) -> FeatureScores:
    return score_features(*train, held_out=held_out, top=6)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("inside", [True, False])
def test_discovery_ranks_the_planted_feature_first(
    train: tuple, held_out: tuple, pooling: Pooling, inside: bool
) -> None:
    found = score_features(*train, held_out=None if inside else held_out, pooling=pooling)
    assert found.emotions == ("anger", "joy")
    for emotion, feature in (("joy", JOY_FEATURE), ("anger", ANGER_FEATURE)):
        first, second = found.top(emotion, 2)
        assert first.feature == feature
        assert first.auroc > 0.9 > 0.75 > second.auroc
        assert first.held_out_auroc is not None and first.held_out_auroc > 0.85
        assert first.q < 1e-6
        assert first.rate_in > 0.85


def plain_precision(values: np.ndarray, positives: np.ndarray) -> float:
    """Precision at each positive's value, averaged: every text at or above it counts."""
    at = [positives[values >= value].mean() for value in values[positives]]
    return float(np.mean(at))


def plain_f1(values: np.ndarray, positives: np.ndarray, threshold: float) -> float:
    called = [value >= threshold for value in values.astype(np.float32).astype(float)]
    right = sum(one and wanted for one, wanted in zip(called, positives, strict=True))
    return 2 * right / (sum(called) + sum(positives))


def test_rows_equal_a_plain_computation_on_dense_codes(train: tuple, held_out: tuple, scores: FeatureScores) -> None:
    def pooled_by_loop(codes: SparseCodes) -> np.ndarray:
        dense = np.zeros((codes.n_texts, D_SAE))
        for token, text in enumerate(codes.text_index):
            for entry in range(codes.row_starts[token], codes.row_starts[token + 1]):
                feature = codes.features[entry]
                dense[text, feature] = max(dense[text, feature], codes.values[entry])
        return dense

    on_train, on_held_out = pooled_by_loop(train[0]), pooled_by_loop(held_out[0])
    emotions = ["anger", "joy"]
    active = [feature for feature in range(D_SAE) if on_train[:, feature].any()]
    assert set(range(D_SAE)) - set(active) == set(DEAD_FEATURES)
    labels, held_out_labels = (
        np.array([[emotion in each for emotion in emotions] for each in texts.emotions])
        for texts in (train[1], held_out[1])
    )
    one_stratum = np.zeros(len(labels), dtype=np.int64)  # all texts have one length
    expected = stratified_mann_whitney(scipy.sparse.csr_matrix(on_train), labels, one_stratum)
    assert len(scores.rows) == 12
    for i, emotion in enumerate(emotions):
        by_auroc = sorted(active, key=lambda feature: -auroc(on_train[:, feature], labels[:, i]))
        rows = scores.top(emotion, 100)
        assert [row.feature for row in rows] == by_auroc[:6]
        for row in rows:
            inside, outside = on_train[labels[:, i], row.feature], on_train[~labels[:, i], row.feature]
            assert row.auroc == pytest.approx(auroc(on_train[:, row.feature], labels[:, i]))
            assert row.held_out_auroc == pytest.approx(auroc(on_held_out[:, row.feature], held_out_labels[:, i]))
            assert (row.rate_in, row.rate_out) == pytest.approx(((inside > 0).mean(), (outside > 0).mean()))
            assert row.p == pytest.approx(expected.p[i, row.feature])
            assert row.q == pytest.approx(expected.q[i, row.feature])
            assert (row.mean_in, row.mean_out) == pytest.approx((inside.mean(), outside.mean()), rel=1e-5)
            assert row.average_precision == pytest.approx(plain_precision(on_train[:, row.feature], labels[:, i]))
            on_others = plain_precision(on_held_out[:, row.feature], held_out_labels[:, i])
            assert row.held_out_average_precision == pytest.approx(on_others)
            assert row.threshold is not None
            assert row.f1 == pytest.approx(plain_f1(on_train[:, row.feature], labels[:, i], row.threshold))
            on_others = plain_f1(on_held_out[:, row.feature], held_out_labels[:, i], row.threshold)
            assert row.held_out_f1 == pytest.approx(on_others)
    above = auroc_above(scipy.sparse.csr_matrix(on_train), labels).p
    q_above = benjamini_hochberg(above[:, expected.tested])
    of_feature = {feature: n for n, feature in enumerate(np.flatnonzero(expected.tested).tolist())}
    for row in scores.rows:
        wanted = q_above[emotions.index(row.emotion), of_feature[row.feature]] if row.feature in of_feature else 1.0
        assert row.q_above == pytest.approx(wanted)


def test_a_feature_that_follows_length_alone_is_no_emotion_feature() -> None:
    texts = make_texts(1000)
    rng = np.random.default_rng(0)
    is_joy = np.array(["joy" in labels for labels in texts.emotions])
    lengths = rng.integers(3, 12, size=1000) + 6 * is_joy * (rng.random(1000) < 0.7)
    text_index = np.repeat(np.arange(1000), lengths)
    dense = rng.gamma(1.0, size=(len(text_index), D_SAE)) * (rng.random((len(text_index), D_SAE)) < 0.03)
    long_text = 7
    dense[:, long_text] = rng.random(len(text_index)) * (rng.random(len(text_index)) < 0.3)
    codes = codes_of(dense, text_index, 1000)
    (of_joy,) = (row for row in score_features(codes, texts, top=D_SAE).top("joy", D_SAE) if row.feature == long_text)
    unstratified = sparse_auroc(codes.pooled("max"), is_joy[:, None])
    assert unstratified.p[0, long_text] < 1e-6 and of_joy.auroc > 0.58
    assert of_joy.p > 1e-3


def test_a_rare_emotion_is_left_out_when_asked(train: tuple, held_out: tuple) -> None:
    codes, texts = train
    rare = relabelled(texts, [(*labels, "awe") if i < 5 else labels for i, labels in enumerate(texts.emotions)])
    found = score_features(codes, rare, held_out=held_out, skip_rare=True)
    assert found.emotions == ("anger", "joy") and found.meta["skipped_rare"] == ["awe"]


def test_meta_tells_how_the_scores_were_made(scores: FeatureScores) -> None:
    best = [scores.top(emotion, 1)[0].held_out_auroc or 0.0 for emotion in scores.emotions]
    assert scores.meta == {
        "hook_name": "blocks.1.hook_resid_post",
        "d_sae": D_SAE,
        "pooling": "max",
        "seed": 0,
        "split": "held-out texts given",
        "n_texts": {"train": 120, "held_out": 60},
        "class_counts": {"train": {"anger": 60, "joy": 60}, "held_out": {"anger": 30, "joy": 30}},
        "texts_on_both_sides": 0,
        "skipped_rare": [],
        "length_strata": 1,
        "n_tests": 2 * (D_SAE - 2),
        "n_active_features": D_SAE - 2,
        "mean_best_held_out_auroc": pytest.approx(np.mean(best)),
    }


def test_held_out_texts_change_neither_the_choice_nor_its_p_values(train: tuple, held_out: tuple) -> None:
    codes, texts = held_out
    shuffled = dataclasses.replace(texts, emotions=texts.emotions[1:] + texts.emotions[:1])
    plain = score_features(*train, held_out=held_out)
    misled = score_features(*train, held_out=(codes, shuffled))
    for one, other in zip(plain.rows, misled.rows, strict=True):
        unseen = {"held_out_auroc": None, "held_out_average_precision": None, "held_out_f1": None}
        assert dataclasses.replace(one, **unseen) == dataclasses.replace(other, **unseen)
    assert misled.meta["mean_best_held_out_auroc"] < 0.7 < plain.meta["mean_best_held_out_auroc"]


def test_without_a_planted_feature_the_held_out_auroc_shows_that_nothing_was_found() -> None:
    texts = make_texts(300)
    found = score_features(make_codes(texts, planted=False), texts, top=1)
    assert all(row.auroc > 0.53 for row in found.rows)
    assert found.meta["mean_best_held_out_auroc"] < 0.57
    assert all(row.q > 0.05 for row in found.rows)


def test_inner_split_gives_each_text_to_one_side_and_depends_on_the_seed(train: tuple) -> None:
    found = score_features(*train, seed=3)
    sides = found.meta["n_texts"]
    assert sides["train"] + sides["held_out"] == 120
    assert abs(sides["train"] - sides["held_out"]) <= 4
    assert found.meta["split"] == "half of the texts held out"
    assert found == score_features(*train, seed=3)
    assert found.rows != score_features(*train, seed=4).rows


def test_near_duplicates_stay_on_one_side_of_the_inner_split() -> None:
    texts = make_texts(60)
    codes = make_codes(texts)
    twins = LabelledTexts(
        texts=texts.texts + tuple(text + "!" for text in texts.texts),
        emotions=texts.emotions * 2,
        ids=texts.ids + tuple(f"{text_id}-twin" for text_id in texts.ids),
        language="en",
    )
    seen_by: list[tuple[int, ...]] = []

    @dataclasses.dataclass(frozen=True)
    class WatchedCodes(SparseCodes):
        def select_texts(self, indices: np.ndarray) -> SparseCodes:  # type: ignore[override]
            seen_by.append(tuple(np.asarray(indices) % 60))
            return super().select_texts(indices)

    both = codes.select_texts(list(range(60)) * 2)
    watched = WatchedCodes(**{field.name: getattr(both, field.name) for field in dataclasses.fields(both)})
    score_features(watched, twins)
    assert len(seen_by) == 2
    assert not set(seen_by[0]) & set(seen_by[1])


def test_a_text_on_both_sides_is_counted_and_warned_of(train: tuple, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = score_features(*train, held_out=train)
    assert found.meta["texts_on_both_sides"] == 120
    assert "120 distinct texts are both among the training and the held-out texts" in caplog.text


def test_chosen_emotions_are_scored_alone_and_in_the_order_given(train: tuple, held_out: tuple) -> None:
    only = score_features(*train, held_out=held_out, emotions=["joy", "joy"], top=2)
    assert only.emotions == ("joy",)
    assert len(only.rows) == 2
    assert only.meta["n_tests"] == D_SAE - 2
    both = score_features(*train, held_out=held_out, emotions=["joy", "anger"], top=1)
    assert both.emotions == ("joy", "anger")


def test_more_rows_than_active_features_are_not_made_up(train: tuple, held_out: tuple) -> None:
    found = score_features(*train, held_out=held_out, top=10_000)
    features = [row.feature for row in found.top("joy", 10_000)]
    assert sorted(features) == [feature for feature in range(D_SAE) if feature not in DEAD_FEATURES]


def relabelled(texts: LabelledTexts, emotions: list[tuple[str, ...]]) -> LabelledTexts:
    return dataclasses.replace(texts, emotions=tuple(emotions))


def test_texts_that_cannot_be_scored_are_refused_by_name(train: tuple, held_out: tuple) -> None:
    codes, texts = train
    with pytest.raises(ValueError, match="the codes are of 120 texts, but there are 60 texts"):
        score_features(codes, held_out[1])
    with pytest.raises(ValueError, match="the codes are of 60 texts, but there are 120 held-out texts"):
        score_features(codes, texts, held_out=(held_out[0], texts))
    with pytest.raises(ValueError, match="none of the 120 texts has a label"):
        score_features(codes, relabelled(texts, [()] * 120))
    with pytest.raises(ValueError, match="training texts are of a single class: joy"):
        score_features(codes, relabelled(texts, [("joy",)] * 120))
    rare = relabelled(texts, [("joy", "awe") if i == 0 else ("joy",) if i < 60 else () for i in range(120)])
    with pytest.raises(ValueError, match=r"too few texts for awe \(1 in, 119 out\): each label needs 20"):
        score_features(codes, rare, held_out=held_out)
    with pytest.raises(ValueError, match=r"too few held-out texts for anger \(0 in, 60 out\)"):
        one_sided = relabelled(held_out[1], [("joy",) if i < 30 else () for i in range(60)])
        score_features(codes, texts, held_out=(held_out[0], one_sided))


def test_other_bad_arguments_are_refused_with_the_valid_ones(train: tuple, held_out: tuple) -> None:
    with pytest.raises(ValueError, match="unknown emotions: glee, zest; the texts have: anger, joy"):
        score_features(*train, emotions=["glee", "joy", "zest"])
    with pytest.raises(ValueError, match="no emotion was asked for; the texts have: anger, joy"):
        score_features(*train, emotions=[])
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        score_features(*train, top=0)
    wider = dataclasses.replace(held_out[0], d_sae=64)
    with pytest.raises(ValueError, match=r"resid_post', 40\), the held-out codes of .*resid_post', 64\)"):
        score_features(*train, held_out=(wider, held_out[1]))
    silent = codes_of(np.zeros((120, D_SAE)), np.arange(120), 120)
    with pytest.raises(ValueError, match="no feature is active in any training text"):
        score_features(silent, train[1], held_out=held_out)


def planted_for(pooling: str, texts: LabelledTexts) -> SparseCodes:
    """Codes in which joy shows only in the largest code, only in the mean, or only in the last token's."""
    tokens = 6
    rng = np.random.default_rng(1)
    dense = rng.random((len(texts) * tokens, 4)) * (rng.random((len(texts) * tokens, 4)) < 0.3)
    for text, labels in enumerate(texts.emotions):
        rows = slice(text * tokens, (text + 1) * tokens)
        feature = np.full(tokens, 2.0)
        if pooling == "max":
            feature = np.zeros(tokens)
            feature[rng.integers(tokens - 1)] = 6.0 if "joy" in labels else 3.0
            if "joy" not in labels:
                feature[:2] = feature[2:4] = 3.0
        elif pooling == "mean":
            feature[:] = 0
            feature[: 5 if "joy" in labels else 2] = 2.0
            feature = rng.permutation(feature)
        else:
            feature = rng.permutation([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
            if "joy" in labels:
                feature = np.append(rng.permutation(feature[feature != 6.0]), 6.0)
        dense[rows, LAST_TOKEN_FEATURE % 4] = feature
    return codes_of(dense, np.repeat(np.arange(len(texts)), tokens), len(texts))


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
def test_the_pooling_that_shows_the_emotion_is_chosen(pooling: str) -> None:
    texts = make_texts(120)
    texts = relabelled(texts, [("joy",) if "joy" in labels else () for labels in texts.emotions])
    assert choose_pooling(planted_for(pooling, texts), texts, seed=2) == pooling


def test_the_sum_is_chosen_where_the_number_of_firing_tokens_says_the_emotion() -> None:
    texts = make_texts(120)
    texts = relabelled(texts, [("joy",) if "joy" in labels else () for labels in texts.emotions])
    lengths = [6 if "joy" in labels else 3 for labels in texts.emotions]
    dense = np.random.default_rng(2).random((sum(lengths), 4)) * [1.0, 0.1, 0.1, 0.1] + 1.0
    codes = codes_of(dense, np.repeat(np.arange(len(texts)), lengths), len(texts))
    assert choose_pooling(codes, texts) == "sum"


def test_poolings_are_compared_on_texts_that_did_not_choose_the_feature(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = make_texts(240)
    with caplog.at_level(logging.INFO, logger="sae_emotion_plugin.discovery.scoring"):
        choose_pooling(make_codes(texts, planted=False), texts)
    mean_auroc = caplog.records[0].args
    assert isinstance(mean_auroc, dict) and set(mean_auroc) == {"max", "mean", "last", "sum"}
    assert all(0.42 < value < 0.58 for value in mean_auroc.values() if isinstance(value, float))


def test_an_emotion_too_rare_for_a_fold_does_not_sway_the_choice_of_a_pooling(
    train: tuple, caplog: pytest.LogCaptureFixture
) -> None:
    codes, texts = train
    with_rare = relabelled(texts, [(*labels, "awe") if i == 0 else labels for i, labels in enumerate(texts.emotions)])
    with caplog.at_level(logging.INFO, logger="sae_emotion_plugin.discovery.scoring"):
        assert choose_pooling(codes, with_rare, emotions=["anger", "joy"]) == choose_pooling(codes, with_rare)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second and "'max': 0.9" in first
    with pytest.raises(ValueError, match="120 texts are too few for 3 folds"):
        choose_pooling(codes, with_rare, emotions=["awe"])
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        choose_pooling(codes, texts, folds=1)


def row(emotion: str = "joy", feature: int = 7, **changes: object) -> FeatureScore:
    values = {"auroc": 0.9, "held_out_auroc": 0.8, "p": 1e-9, "q": 1e-7, "rate_in": 0.5, "rate_out": 0.1}
    return FeatureScore(emotion=emotion, feature=feature, **{**values, **changes})  # type: ignore[arg-type]


def test_saved_scores_follow_the_contract_and_load_back_equal(scores: FeatureScores, tmp_path: Path) -> None:
    tokens = (" <b>", "기쁨", '"', "\n", "\u2028", "😀")
    rows = (*scores.rows, row(promotes=tokens, suppresses=("x",), held_out_auroc=None, p=2.3e-308))
    path = FeatureScores(scores.meta, rows).save(tmp_path / "scores.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == ["meta", "rows"]
    measures = ["auroc", "held_out_auroc", "p", "q", "rate_in", "rate_out"]
    fields = ["emotion", "feature", *measures, "promotes", "suppresses", *LATER_FIELDS]
    assert all(list(each) == fields for each in content["rows"])
    assert content["rows"][-1]["promotes"] == list(tokens)
    assert FeatureScores.load(path) == FeatureScores(json.loads(json.dumps(scores.meta)), rows)
    assert [each.name for each in tmp_path.iterdir()] == ["scores.json"]


def test_scores_saved_as_parquet_load_back_equal_and_open_in_pandas(scores: FeatureScores, tmp_path: Path) -> None:
    rows = (dataclasses.replace(scores.rows[0], promotes=("<b>", "기쁨"), held_out_auroc=None), *scores.rows[1:], row())
    path = FeatureScores(scores.meta, rows).save(tmp_path / "scores.parquet")
    assert FeatureScores.load(path) == FeatureScores(json.loads(json.dumps(scores.meta)), rows)
    frame = pd.read_parquet(path)
    assert frame.feature.tolist() == [own.feature for own in rows]
    assert list(frame.promotes[0]) == ["<b>", "기쁨"]
    assert [child.name for child in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_file_that_is_no_parquet_and_one_without_our_meta_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"broken\.parquet is not Parquet: "):
        FeatureScores.load(tmp_path / "broken.parquet")
    pd.DataFrame({"feature": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet is not a scores file"):
        FeatureScores.load(tmp_path / "other.parquet")


def test_scores_of_a_later_version_with_more_fields_load(tmp_path: Path) -> None:
    path = FeatureScores({}, (row(),)).save(tmp_path / "scores.json")
    content = json.loads(path.read_text())
    content["rows"][0]["invented_later"] = 0.5
    path.write_text(json.dumps(content))
    assert FeatureScores.load(path).rows == (row(),)


def test_scores_of_an_earlier_version_load_without_what_they_lack(tmp_path: Path) -> None:
    full = row(q_above=0.2, average_precision=0.4, mean_in=2.5, mean_out=0.1, threshold=1.5, f1=0.5, held_out_f1=0.4)
    path = FeatureScores({}, (full,)).save(tmp_path / "scores.json")
    assert FeatureScores.load(path).rows == (full,)
    content = json.loads(path.read_text())
    for name in LATER_FIELDS:
        del content["rows"][0][name]
    path.write_text(json.dumps(content))
    assert FeatureScores.load(path).rows == (row(),)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = FeatureScores({}, (row(),)).save(tmp_path / "scores.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        FeatureScores({}, (row(auroc=float("nan")),)).save(path)
    with pytest.raises(UnicodeEncodeError):
        FeatureScores({}, (row(promotes=("\ud800",)),)).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["scores.json"]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        FeatureScores({}, ()).save(tmp_path / "nowhere" / "scores.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auroc": 1.5}, r"row 0: auroc is 1\.5"),
        ({"auroc": "high"}, "row 0: auroc is 'high'"),
        ({"q": None}, "row 0: q is None"),
        ({"rate_in": True}, "row 0: rate_in is True"),
        ({"p": float("nan")}, "row 0: p is nan"),
        ({"feature": -1}, "row 0: feature is -1"),
        ({"feature": 1.0}, r"row 0: feature is 1\.0"),
        ({"emotion": 3}, "row 0: emotion is 3"),
        ({"promotes": "joy"}, "row 0: promotes is 'joy'"),
        ({"suppresses": [1]}, r"row 0: suppresses is \[1\]"),
    ],
)
def test_a_broken_row_is_named_with_its_value(change: dict, message: str, tmp_path: Path) -> None:
    path = FeatureScores({}, (row(),)).save(tmp_path / "scores.json")
    content = json.loads(path.read_text())
    content["rows"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        FeatureScores.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a scores file"),
        ('{"meta": {}}', "is not a scores file"),
        ('{"meta": [], "rows": []}', "is not a scores file"),
        ('{"meta": {}, "rows": [3]}', "row 0: must be an object with emotion, feature"),
        ('{"meta": {}, "rows": [{"emotion": "joy"}]}', "row 0: must be an object with emotion, feature"),
    ],
)
def test_what_is_no_scores_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        FeatureScores.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no scores file .*missing\.json"):
        FeatureScores.load(tmp_path / "missing.json")


def test_top_refuses_an_unknown_emotion_and_an_empty_list(scores: FeatureScores) -> None:
    with pytest.raises(ValueError, match="unknown emotion 'glee'; the scores have: anger, joy"):
        scores.top("glee", 3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        scores.top("joy", 0)


def test_scores_show_as_a_table_with_the_best_features(scores: FeatureScores) -> None:
    lines = repr(scores).splitlines()
    assert lines[0] == ("FeatureScores: 12 rows for 2 emotions, 6 shown; hook blocks.1.hook_resid_post, pooling max")
    assert lines[1].split()[:3] == ["emotion", "feature", "AUROC"]
    assert [line.split()[0] for line in lines[2:]] == ["anger"] * 3 + ["joy"] * 3
    assert lines[2].split()[1] == str(ANGER_FEATURE)
    assert lines[2].index(f"{scores.rows[0].auroc:.3f}") == lines[1].index("AUROC")
    assert repr(FeatureScores({}, ())).startswith("FeatureScores: 0 rows for 0 emotions")


def test_html_of_scores_escapes_tokens_and_names() -> None:
    rows = (row(emotion="<i>joy</i>", promotes=("<script>alert(1)</script>",)),)
    shown = FeatureScores({"hook_name": "<hook>"}, rows)._repr_html_()
    assert "<script>" not in shown and "<i>" not in shown and "<hook>" not in shown
    assert "&lt;script&gt;" in shown and "&lt;i&gt;joy" in shown
    assert shown.count("<tr>") == 2


def test_a_data_frame_has_one_line_per_row(scores: FeatureScores) -> None:
    frame = scores.to_pandas()
    assert list(frame.columns) == [field.name for field in dataclasses.fields(FeatureScore)]
    assert frame["feature"].tolist() == [each.feature for each in scores.rows]
    assert list(FeatureScores({}, ()).to_pandas().columns) == list(frame.columns)
