from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.text_costs import (
    distinct_2,
    four_gram_repetition,
    is_degenerate,
    language_switch,
    letter_scripts,
    words,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30))
def test_repetition_is_the_share_of_four_grams_seen_before(tokens: list[int]) -> None:
    seen: Counter = Counter()
    repeated = 0
    for start in range(len(tokens) - 3):
        four_gram = tuple(tokens[start : start + 4])
        repeated += seen[four_gram] > 0
        seen[four_gram] += 1
    expected = repeated / seen.total() if seen else 0.0
    assert four_gram_repetition(tokens) == pytest.approx(expected)
    assert four_gram_repetition(np.array(tokens, dtype=np.int32)) == pytest.approx(expected)
    assert is_degenerate(tokens) == (expected > 0.3)


def test_repetition_of_plain_cases() -> None:
    assert four_gram_repetition([]) == four_gram_repetition([5, 5, 5]) == 0
    assert four_gram_repetition(range(50)) == 0
    assert four_gram_repetition([7] * 20) == pytest.approx(16 / 17)
    assert four_gram_repetition(["so", "so", "so", "so", "so"]) == 0.5
    assert is_degenerate([7] * 20)
    assert not is_degenerate([7] * 20, threshold=0.95)
    assert not is_degenerate([1, 2, 3])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=20))
def test_distinct_2_is_the_share_of_bigrams_seen_for_the_first_time(tokens: list[int]) -> None:
    seen: list[list[int]] = []
    for start in range(len(tokens) - 1):
        if tokens[start : start + 2] not in seen:
            seen.append(tokens[start : start + 2])
    assert distinct_2(tokens) == pytest.approx(len(seen) / (len(tokens) - 1))
    assert distinct_2(np.array(tokens)) == distinct_2(tokens)


def test_a_text_without_bigrams_has_no_distinct_2() -> None:
    assert distinct_2([]) is None and distinct_2([3]) is None and distinct_2(np.array([3])) is None
    assert distinct_2([3, 3]) == 1 and distinct_2(["so"] * 5) == 0.25


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 9 o’clock, SNAKE_case—Naïve!", ["it's", "9", "o’clock", "snake", "case", "naïve"]),
        ("'quoted' don't' x", ["quoted", "don't", "x"]),
        ("오늘은 날씨가 좋다.", ["오늘은", "날씨가", "좋다"]),
        ("昨日ABCを見た。", ["昨", "日", "abc", "を", "見", "た"]),
        ("ﾃﾚﾋﾞ ＡＢＣ", ["テ", "レ", "ビ", "abc"]),
        ("人々のコーヒー", ["人", "々", "の", "コ", "ー", "ヒ", "ー"]),
        ("café cafe\u0301", ["café", "café"]),
        ("… 😀 --- ___", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_and_single_east_asian_characters(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ångström, naïve 123 😀!", {"LATIN": 13}),
        ("Москва Ελλάδα", {"CYRILLIC": 6, "GREEK": 6}),
        ("한국어 韓", {"HANGUL": 3, "HAN": 1}),
        ("ひらがな カタカナー 漢字々 〆", {"KANA": 9, "HAN": 4}),
        ("ＡＢＣ ﾃﾚ 𝐱𝐲", {"LATIN": 5, "KANA": 2}),
        ("𠮷 﨑", {"HAN": 2}),
        ("مرحبا שלום नमस्ते สวัสดี", {"ARABIC": 5, "HEBREW": 4, "DEVANAGARI": 4, "THAI": 4}),
        ("oʻzbek", {"LATIN": 5}),
        ("カタカナ・ひらがな", {"KANA": 8}),
        ("e\u0301", {"LATIN": 1}),
        ("12 + 3 = …", {}),
    ],
)
def test_letters_are_counted_by_script(text: str, expected: dict[str, int]) -> None:
    assert letter_scripts(text) == Counter(expected)


@pytest.mark.parametrize(("language", "own"), [("en", {"LATIN"}), ("ko", {"HANGUL"}), ("ja", {"HAN", "KANA"})])
def test_the_bundled_texts_are_written_in_the_script_of_their_language(language: str, own: set[str]) -> None:
    counts = letter_scripts(" ".join(LabelledTexts.bundled(language).texts))
    assert sum(counts[script] for script in own) / counts.total() > 0.98


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("he is such a", " nice person", 0.0),
        ("he is such a", " Москва", 1.0),
        ("he is such a", " ab ДЖ 12 !!", 0.5),
        ("그는 정말", " 좋은 사람 ok", 2 / 6),
        ("彼はとても", "優しい人", 0.0),
        ("彼はとても", "친절", 1.0),
        ("すごく", "漢字", 0.0),
        ("漢字", "すごく", 1.0),
        ("그는", "漢字", 1.0),
        ("he is", "une fête", 0.0),
    ],
)
def test_a_language_switch_is_the_share_of_letters_in_foreign_scripts(
    reference: str, text: str, expected: float
) -> None:
    assert language_switch(reference, text) == pytest.approx(expected)


@pytest.mark.parametrize(("reference", "text"), [("he is", ""), ("he is", " 12 !"), ("", "word"), ("1 + 1 =", " two")])
def test_there_is_no_language_switch_where_letters_are_missing(reference: str, text: str) -> None:
    assert language_switch(reference, text) is None
