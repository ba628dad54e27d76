import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.feature_labels import (
    FeatureLabel,
    labels_from_scores,
    merge_labels,
    read_labels,
    write_labels,
)

LABEL = FeatureLabel(
    7, ("joy", "love"), "joy: 기쁨", {"auroc": 0.9, "q": None, "corpus": "tiny", "n": 3}, "m", "1", "ada"
)
ROW: dict[str, Any] = json.loads(json.dumps(LABEL.to_dict()))

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
statistics = st.one_of(st.none(), texts, st.floats(allow_nan=False, allow_infinity=False))
rows = st.fixed_dictionaries(
    {
        "feature": st.integers(0, 50),
        "emotions": st.lists(texts.filter(str.strip), max_size=3).map(tuple),
        "text": texts.filter(str.strip),
        "statistics": st.dictionaries(texts, statistics, max_size=3),
        **dict.fromkeys(("method", "version", "author"), texts),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, max_size=5))
def test_labels_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    found = [FeatureLabel(**row) for row in rows]
    path = write_labels(tmp_path_factory.mktemp("labels") / "labels.jsonl", found)
    back = read_labels(path, d_sae=51)
    assert back == merge_labels(found)
    assert all(label in back for label in found)
    assert write_labels(path.with_name("again.jsonl"), list(reversed(found))).read_bytes() == path.read_bytes()


def test_a_line_is_an_object_and_lines_are_sorted_by_feature(tmp_path: Path) -> None:
    other = FeatureLabel(3, (), "line\u2028separators\nstay inside")
    path = write_labels(tmp_path / "labels.jsonl", [LABEL, other])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["feature"] for line in lines[:-1]] == [3, 7] and lines[-1] == ""
    assert "기쁨" in lines[1]
    assert read_labels(path) == (other, LABEL)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_labels(tmp_path / "absent" / "labels.jsonl", [LABEL])


BAD_LINES = [
    ("{", "line 1: .*"),
    ("[1]", r"\[1\] is no label; valid: an object with feature, emotions, text"),
    (json.dumps({**ROW, "colour": "red"}), "unknown key 'colour'; valid: feature"),
    (json.dumps({key: value for key, value in ROW.items() if key != "text"}), "text missing"),
    (json.dumps(ROW)[:-1] + ', "feature": 3}', "the key 'feature' stands twice"),
    (json.dumps({**ROW, "feature": 64}), "feature is 64; valid: 0 to 63"),
    (json.dumps({**ROW, "feature": -1}), "feature is -1; valid: a whole number from 0"),
    (json.dumps({**ROW, "feature": True}), "feature is True; valid: a whole number from 0"),
    (json.dumps({**ROW, "feature": 1.0}), "feature is 1.0; valid"),
    (json.dumps({**ROW, "emotions": "joy"}), "emotions is 'joy'; valid: a list of text"),
    (json.dumps({**ROW, "emotions": [" "]}), "an emotion of feature 7 is ' '"),
    (json.dumps({**ROW, "text": " "}), "text of feature 7 is empty"),
    (json.dumps({**ROW, "author": None}), "author is None; valid: text"),
    (json.dumps({**ROW, "statistics": {"auroc": math.nan}}), "NaN is no finite number"),
    (json.dumps({**ROW, "statistics": {"auroc": 1}}).replace(": 1}", ": -1e999}"), "auroc is -inf; valid: a finite"),
    (json.dumps({**ROW, "statistics": {"auroc": 10**400}}), "auroc is 1000.*; valid: a finite number"),
    (json.dumps({**ROW, "statistics": {"auroc": [1]}}), r"auroc is \[1\]; valid: a finite number"),
    (json.dumps({**ROW, "statistics": {"auroc": True}}), "auroc is True"),
    (json.dumps({**ROW, "text": "a\0b"}), "valid: text without NUL and lone surrogates"),
    (json.dumps({**ROW, "emotions": ["\ud800"]}), "valid: text without NUL and lone surrogates"),
    (json.dumps({**ROW, "statistics": {"corpus": "\udfff"}}), "valid: text without NUL and lone surrogates"),
    ("[" * 100_000, "line 2: "),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_refused_in_one_line_that_names_it(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line, encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("line 1", "line 2")) as error:
        read_labels(path, d_sae=64)
    assert "labels.jsonl, line 2: " in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of labels .*absent\.jsonl"):
        read_labels(tmp_path / "absent.jsonl")
    (tmp_path / "labels.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"labels\.jsonl is not UTF-8"):
        read_labels(tmp_path / "labels.jsonl")


def test_labels_of_several_authors_stand_side_by_side_and_equal_ones_once() -> None:
    theirs = FeatureLabel(7, ("joy",), "happy words", {}, "by hand", "2026", "grace")
    same = replace(LABEL, statistics=dict(reversed(list(LABEL.statistics.items()))))
    merged = merge_labels([LABEL, theirs], (same,), [theirs])
    assert merged == (LABEL, theirs) and [label.author for label in merged] == ["ada", "grace"]
    assert merge_labels((theirs,), (LABEL,)) == merged
    assert merge_labels() == ()


def score(emotion: str, feature: int, auroc: float, held_out: float | None, q: float = 0.001) -> FeatureScore:
    promotes = (" glad", "\n", "happy") if feature == 7 else ()
    return FeatureScore(emotion, feature, auroc, held_out, 0.0005, q, 0.5, 0.1, promotes)


SCORES = FeatureScores(
    {},
    (
        score("joy", 7, 0.9, 0.85),
        score("joy", 9, 0.8, 0.55),
        score("joy", 11, 0.7, 0.7, q=0.2),
        score("love", 7, 0.95, 0.8),
        score("fear", 3, 0.5, 0.9),
        score("fear", 5, 0.7, None),
    ),
)


def test_features_that_hold_on_the_held_out_texts_are_labelled_with_the_best_of_their_emotions_first() -> None:
    fear, joy = labels_from_scores(SCORES, author="ada", corpus="tiny", output_scores={7: 0.25})
    assert (fear.feature, fear.emotions, fear.text) == (5, ("fear",), "fear")
    assert fear.statistics["held_out_auroc"] is None and fear.statistics["output_score"] is None
    assert (joy.feature, joy.emotions, joy.text) == (7, ("joy", "love"), "joy, love (promotes: glad, happy)")
    assert joy.author == "ada" and joy.method == "sae-emotion discover"
    assert dict(joy.statistics) == {
        "auroc": 0.9,
        "held_out_auroc": 0.85,
        "held_out_auroc:love": 0.8,
        "q": 0.001,
        "rate_in": 0.5,
        "rate_out": 0.1,
        "output_score": 0.25,
        "corpus": "tiny",
    }


@pytest.mark.parametrize(
    ("change", "features"),
    [
        (lambda: labels_from_scores(SCORES, author="a", min_auroc=0.5), [3, 5, 7, 9]),
        (lambda: labels_from_scores(SCORES, author="a", max_q=1.0), [5, 7, 11]),
        (lambda: labels_from_scores(SCORES, author="a", min_auroc=0.99), []),
    ],
)
def test_the_limits_decide_what_is_labelled(
    change: Callable[[], tuple[FeatureLabel, ...]], features: list[int]
) -> None:
    assert [label.feature for label in change()] == features


def test_a_features_own_line_of_evidence_is_its_text() -> None:
    _, joy = labels_from_scores(SCORES, author="ada", texts={7: "promotes: glad; fires on: happy"})
    assert joy.text == "promotes: glad; fires on: happy"
