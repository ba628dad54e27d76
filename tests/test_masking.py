from collections.abc import Sequence

import numpy as np
import pytest

from sae_emotion_plugin.judges.judge import Judge, Judgements, vader_judge
from sae_emotion_plugin.judges.masking import BLANK, Mask, emotion_mask, masked_change


@pytest.mark.parametrize(
    ("tokens", "text", "masked"),
    [
        ([" damn"], "Damn, damned. A madman", "___, ___. A madman"),
        (["ulence"], "such corpulence", "such ___"),
        ([" a", " he"], "a cat, he said, the heat", "___ cat, ___ said, the heat"),
        (["cute"], "so CUTE! acute, executed", "so ___! ___, executed"),
        (["!"], "so cute!!", "so cute ___  ___ "),
        (["😡"], "no😡way", "no ___ way"),
        (["", " ", "\ufffd", "__"], "a _ b", "a _ b"),
        (["don't"], "I don\u2019t know", "I ___ know"),
        (["분노"], "분노가 치민다. 내 분노했다", "___ 치민다. 내 ___"),
        (["욕"], "욕을 했다, 욕도, 욕심", "___ 했다, ___, 욕심"),
        (["怒り"], "彼は怒りを覚えた", "彼は ___ を覚えた"),
        (["怒"], "彼は怒りを覚えた", "彼は ___ りを覚えた"),
        (["の"], "彼のもの", "彼のもの"),
        (["ＤＡＭＮ"], "damn", "___"),
    ],
)
def test_promoted_tokens_are_blanked_as_pieces_of_words(tokens: list[str], text: str, masked: str) -> None:
    assert Mask(tuple(tokens))(text) == masked


def test_words_are_blanked_only_where_they_stand_alone() -> None:
    mask = Mask(words=frozenset(["hate", "love", ":)", "욕", "no way"]))
    assert mask("I HATE it, hated, love-hate :) glovers") == "I ___ it, hated, ___-___  ___  glovers"
    assert mask("욕은 나쁘다, 욕심") == "___ 나쁘다, 욕심"
    assert mask("No way! know ways") == " ___ ! know ways"


def test_a_mask_of_nothing_changes_nothing() -> None:
    text = "Ｆull width, “quotes” and ﬁ"
    assert Mask()(text) == text


def test_masking_twice_is_masking_once() -> None:
    mask = emotion_mask([" ang", "rage", "?"])
    once = mask("So angry? What an outrage, I hate this :( day")
    assert mask(once) == once and "hate" not in once and "outrage" not in once and "day" in once


def test_emotion_words_come_from_the_lexicon_unless_they_are_left_out() -> None:
    text = "a wonderful table"
    assert emotion_mask()(text) == f"a {BLANK} table"
    assert emotion_mask([" tabl"], lexicon=False)(text) == f"a wonderful {BLANK}"
    with pytest.raises(ValueError, match="not the string 'damn'"):
        emotion_mask("damn")


def swear_counter() -> Judge:
    def judge(texts: Sequence[str]) -> Judgements:
        scores = [[min(1.0, 0.5 * text.count("damn") + 0.25 * text.count("shout"))] for text in texts]
        return Judgements(("anger",), np.array(scores), None)

    return Judge("counter", "en", ("anger",), False, "nothing", judge)


def test_a_change_by_the_blanked_words_alone_vanishes_when_they_are_blanked() -> None:
    prompts = ["p", "q", "r", "s"]
    found = masked_change(
        swear_counter(), "anger", ["fine day"] * 4, ["damn day", "damn it", "damn damn", "damn"], prompts,
        Mask((" damn",)), resamples=200,
    )  # fmt: skip
    assert found.plain.mean == 0.625 and found.plain.low > 0
    assert (found.masked.mean, found.masked.low, found.masked.high) == (0, 0, 0)
    assert found.profanity_free is None and (found.n_pairs, found.n_profanity_free, found.n_empty) == (4, 0, 0)
    assert (found.blanked_share, found.baseline_blanked_share) == (5 / 7, 0)
    assert found.to_dict()["masked"]["mean"] == 0


def test_a_change_by_other_words_stays_and_clean_pairs_are_looked_at_alone() -> None:
    found = masked_change(
        swear_counter(), "anger", ["a", "a damn", "b", ""], ["shout", "shout", "damn shout", "shout"],
        ["p", "q", "r", "s"], Mask((" damn",)), resamples=200,
    )  # fmt: skip
    assert found.plain.mean == pytest.approx((0.25 - 0.25 + 0.75) / 3)
    assert found.masked.mean == 0.25
    assert (found.n_pairs, found.n_profanity_free, found.n_empty) == (3, 1, 1)
    assert found.profanity_free is None


def test_the_profanity_free_change_is_that_of_the_pairs_without_profanity() -> None:
    found = masked_change(
        swear_counter(), "anger", ["a", "b", "c"], ["shout", "b", "damn"], ["p", "q", "r"], Mask(), resamples=200
    )
    assert found.profanity_free is not None and found.profanity_free.mean == 0.125
    assert found.masked == found.plain


def test_vader_has_next_to_nothing_to_see_once_its_lexicon_is_masked() -> None:
    steered = ["a wonderful, lovely day", "I hate that horrible liar"]
    found = masked_change(vader_judge(), "valence", ["a day", "a man"], steered, ["p", "q"], emotion_mask())
    assert found.masked.mean == 0 and found.plain.low < -0.5


@pytest.mark.parametrize(
    ("baselines", "steered", "prompts", "message"),
    [
        (["a"], ["b", "c"], ["p", "q"], "1 baselines, 2 steered texts and 2 prompts"),
        (["", "a"], ["b", " "], ["p", "q"], "none of 2 pairs"),
        (["a", "a"], ["b", "b"], ["p", "p"], "at least 2 groups"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(
    baselines: list[str], steered: list[str], prompts: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        masked_change(swear_counter(), "anger", baselines, steered, prompts, Mask())


def test_a_measure_that_the_judge_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="does not know 'joy'"):
        masked_change(swear_counter(), "joy", ["a", "b"], ["a", "b"], ["p", "q"], Mask())
