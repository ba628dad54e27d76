import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sae_emotion_plugin.judges.linear import (
    SHIPPED,
    NgramModel,
    NgramSettings,
    fitted_names,
    judge_facts,
    linear_judge,
    ngrams,
    save_linear_judge,
    sigmoid,
    tfidf,
)

WORDS = NgramSettings("word", 1, 2)
CHARACTERS = NgramSettings("character", 2, 3)


def test_word_ngrams_are_single_words_then_pairs() -> None:
    assert ngrams("Well, DON\u2019T go!", WORDS) == [
        "well", "don't", "go", "!", "well don't", "don't go", "go !",
    ]  # fmt: skip


def test_character_ngrams_stay_inside_a_word_with_its_edges() -> None:
    assert ngrams("ab c", CHARACTERS) == [" a", "ab", "b ", " ab", "ab ", " c", "c ", " c "]
    assert ngrams("행복", CHARACTERS) == [" 행", "행복", "복 ", " 행복", "행복 "]


@pytest.mark.parametrize("settings", [WORDS, CHARACTERS])
def test_case_width_placeholders_and_long_runs_make_no_difference(settings: NgramSettings) -> None:
    assert ngrams("Ｈello [PERSON] noooooo", settings) == ngrams("hello nooo", settings)


def test_a_blank_joins_nothing() -> None:
    assert "not good" not in ngrams("not ___ good", WORDS)
    assert not {gram for gram in ngrams("a___b", CHARACTERS) if "a" in gram and "b" in gram}
    assert ngrams("___", CHARACTERS) == []


@pytest.mark.parametrize(("unit", "smallest", "largest"), [("line", 1, 2), ("word", 0, 1), ("word", 3, 2)])
def test_settings_that_make_no_ngrams_are_refused(unit: str, smallest: int, largest: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        NgramSettings(unit, smallest, largest)  # type: ignore[arg-type]


def model() -> NgramModel:
    rng = np.random.default_rng(1)
    vocabulary = {term: place for place, term in enumerate(["good", "bad", "not", "not good", "day"])}
    return NgramModel(WORDS, vocabulary, rng.uniform(1, 5, 5), rng.normal(size=(2, 5)), np.array([0.5, -1.0]))


def test_probabilities_equal_the_formulas_written_out() -> None:
    judge = model()
    texts = ["not good, not good at all", "a bad bad bad day", "nothing known here"]
    found = judge.probabilities(texts)
    for row, text in enumerate(texts):
        words = text.replace(",", "").split()
        counts = Counter([*words, *map(" ".join, pairwise(words))])
        values = {
            term: (1 + math.log(counts[term])) * judge.idf[place]
            for term, place in judge.vocabulary.items()
            if counts[term]
        }
        norm = math.sqrt(sum(value**2 for value in values.values())) or 1.0
        for measure in range(2):
            logit = judge.bias[measure] + sum(
                judge.weights[measure, judge.vocabulary[term]] * value / norm for term, value in values.items()
            )
            assert found[row, measure] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-12)


def test_a_text_without_known_ngrams_has_no_features_and_the_probability_of_the_bias() -> None:
    judge = model()
    features, values = tfidf("nothing", WORDS, judge.vocabulary, judge.idf)
    assert features.shape == values.shape == (0,)
    assert judge.probabilities(["nothing"])[0].tolist() == sigmoid(judge.bias[None])[0].tolist()


def test_sigmoid_does_not_overflow() -> None:
    assert sigmoid(np.array([[-1e4, 0.0, 1e4]])).tolist() == [[0.0, 0.5, 1.0]]


def about(name: str = "mine") -> dict:
    return {
        "name": name, "language": "en", "measures": ["joy", "valence"], "corpus": "lines", "licence": "CC0",
        "figures": [{"measure": "joy", "on": "lines, held out", "auroc": 0.8, "low": 0.7, "high": 0.9,
                     "n_positive": 12, "n": 40}],
    }  # fmt: skip


def test_a_saved_judge_judges_as_its_rounded_model_and_keeps_its_facts(tmp_path: Path) -> None:
    saved = model()
    save_linear_judge(tmp_path, about(), saved)
    judge = linear_judge("mine", tmp_path)
    texts = ["not good", "a bad day"]
    rounded = NgramModel(
        WORDS,
        saved.vocabulary,
        saved.idf.astype(np.float16).astype(float),
        saved.weights.astype(np.float16).astype(float),
        saved.bias.astype(np.float32).astype(float),
    ).probabilities(texts)
    judged = judge(texts)
    np.testing.assert_array_equal(judged.of("joy"), rounded[:, 0])
    np.testing.assert_array_equal(judged.of("valence"), 2 * rounded[:, 1] - 1)
    assert judge.measures == ("joy", "valence") and judge.fitted_on == "lines (CC0)"
    assert judge.figures[0].auroc == 0.8
    assert fitted_names(tmp_path) == ("mine",) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file_name", ["mine.vocabulary.json", "mine.safetensors"])
def test_a_changed_or_missing_file_is_refused_by_its_hash(tmp_path: Path, file_name: str) -> None:
    save_linear_judge(tmp_path, about(), model())
    (tmp_path / file_name).write_bytes((tmp_path / file_name).read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"{file_name} is not the file that judge 'mine' was saved with"):
        linear_judge("mine", tmp_path)
    (tmp_path / file_name).unlink()
    with pytest.raises(ValueError, match="SHA-256 nothing"):
        linear_judge("mine", tmp_path)


def test_an_unknown_judge_is_refused_with_those_there_are(tmp_path: Path) -> None:
    save_linear_judge(tmp_path, about(), model())
    with pytest.raises(FileNotFoundError, match=r"no judge 'other' in .*; there are: mine"):
        linear_judge("other", tmp_path)


def test_the_shipped_judges_fit_in_five_megabytes_and_say_what_they_are() -> None:
    names = fitted_names()
    assert {"xed-words", "xed-sentences", "kote-characters", "nsmc-characters"} == set(names)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 5_000_000
    for name in names:
        facts = judge_facts(name)
        assert facts["licence"] in ("CC BY 4.0", "MIT", "CC0 1.0") and facts["attribution"] and facts["source"]
        assert len(facts["corpus_sha256"]) == 64 and facts["n_train"] > facts["n_held_out"] > 1000
        assert "GoEmotions" not in json.dumps(facts)


@pytest.mark.parametrize(
    ("name", "measure", "more", "less"),
    [
        ("xed-words", "anger", "Shut up, you damn idiot!", "A cup of tea, please."),
        ("xed-words", "fear", "I'm scared, don't hurt me.", "A cup of tea, please."),
        ("xed-words", "valence", "I love you, my beautiful friend.", "He killed her, the evil bastard."),
        ("kote-characters", "anger", "진짜 화난다 열받네", "오늘 점심은 비빔밥이다"),
        ("kote-characters", "joy", "너무 행복하고 즐거워요", "오늘 점심은 비빔밥이다"),
        ("nsmc-characters", "valence", "정말 최고의 영화, 감동적이에요", "지루하고 돈 아까운 쓰레기 영화"),
    ],
)
def test_a_shipped_judge_tells_plain_examples_apart(name: str, measure: str, more: str, less: str) -> None:
    high, low = linear_judge(name)([more, less]).of(measure)
    assert high > low + 0.1
