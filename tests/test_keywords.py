import json

import numpy as np
import pytest
from planted_codes import texts_of

from sae_emotion_plugin.discovery.keywords import EmotionKeywords, emotion_keywords
from sae_emotion_plugin.emotion_texts import LabelledTexts


def corpus() -> LabelledTexts:
    """80 texts, 20 of gratitude: "zonk" in 15 of them and 2 others, "you" in half of each, "thanks" in 2 and none."""
    words = ["zonk"] * 15 + [""] * 5 + ["Zonk, zonk"] * 2 + [""] * 58
    for n in range(0, 80, 2):
        words[n] += " you"
    words[18] += " Thanks"
    words[19] += " thanks!"
    emotions = [("gratitude",)] * 20 + [("anger",)] * 30 + [()] * 30
    return texts_of(emotions, 0, words)


def test_a_keyword_is_learned_with_its_counts_and_odds() -> None:
    (found,) = emotion_keywords(corpus())["gratitude"].learned
    assert (found.word, found.n_in, found.n_out) == ("zonk", 15, 2)
    share = 17 / 80
    cells = [15 + share, 5 + 1 - share, 2 + share, 58 + 1 - share]
    assert found.log_odds == pytest.approx(np.log(cells[0] * cells[3] / (cells[1] * cells[2])))
    assert found.z == pytest.approx(found.log_odds / np.sqrt(sum(1 / cell for cell in cells)))


def test_words_as_common_elsewhere_are_no_keywords_and_rare_ones_are_not_learned() -> None:
    keywords = emotion_keywords(corpus())
    assert [one.word for one in keywords["gratitude"].learned] == ["zonk"] and keywords["anger"].learned == ()
    # "thanks" is in 2 texts only, but the lexicon knows it.
    assert "thanks" in keywords["gratitude"].lexicon and "thanks" not in keywords["anger"].lexicon
    assert keywords["anger"].names == ("anger", "angr")


def test_texts_with_a_learned_word_a_name_or_a_word_of_the_lexicon_are_not_free() -> None:
    keywords = emotion_keywords(corpus())["gratitude"]
    texts = ["a ZONK!", "zonking", "so grateful", "thanks", "thanked", "anger, you know", "great"]
    assert keywords.free(texts).tolist() == [False, True, False, False, True, True, True]


def test_the_whole_lexicon_is_stricter() -> None:
    keywords = emotion_keywords(corpus(), ["anger"], whole_lexicon=True)["anger"]
    assert list(emotion_keywords(corpus(), ["anger"])) == ["anger"]
    assert keywords.free(["great", "a table", "so :)", "furious"]).tolist() == [False, True, False, False]


def test_top_keeps_the_surest() -> None:
    words = ["alpha beta"] * 10 + ["alpha"] * 10 + [""] * 40
    texts = texts_of([("joy",)] * 20 + [()] * 40, 1, words)
    assert [one.word for one in emotion_keywords(texts)["joy"].learned] == ["alpha", "beta"]
    assert [one.word for one in emotion_keywords(texts, top=1)["joy"].learned] == ["alpha"]
    assert emotion_keywords(texts, top=0)["joy"].learned == ()


def test_a_word_of_every_text_is_no_keyword() -> None:
    texts = texts_of([("joy",)] * 20 + [()] * 40, 1, ["omni"] * 60)
    assert emotion_keywords(texts)["joy"].learned == ()


def test_other_names_stand_for_themselves_and_korean_words_may_have_particles() -> None:
    texts = texts_of([("화남/분노",)] * 20 + [()] * 40, 1, ["그냥"] * 20 + [""] * 40)
    keywords = emotion_keywords(texts)["화남/분노"]
    assert keywords.names == ("화남", "분노")
    assert keywords.free(["그냥은 안돼", "분노했다", "좋은 날"]).tolist() == [False, False, True]


def test_keywords_are_ready_for_json() -> None:
    keywords = emotion_keywords(corpus())["gratitude"]
    read = json.loads(json.dumps(keywords.to_dict()))
    assert read["learned"][0]["word"] == "zonk" and read["emotion"] == "gratitude"
    assert keywords == emotion_keywords(corpus())["gratitude"] and isinstance(keywords, EmotionKeywords)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown emotions: awe; the texts have: anger, gratitude"):
        emotion_keywords(corpus(), ["awe"])
    with pytest.raises(ValueError, match="top must be 0 or more, got -1"):
        emotion_keywords(corpus(), top=-1)
    with pytest.raises(ValueError, match="all 30 texts are joy"):
        emotion_keywords(texts_of([("joy",)] * 30, 0))
