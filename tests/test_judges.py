import numpy as np
import pytest

from sae_emotion_plugin.judges.judge import Judge, Judgements, emotion_lexicon, vader_judge, valence


def test_valence_orders_a_friendly_a_plain_and_a_hostile_text() -> None:
    friendly, plain, hostile = map(valence, (" wonderful, kind friend", " man with a hat", " horrible, hateful liar"))
    assert 1 >= friendly > 0.5 > plain == 0.0 > -0.5 > hostile >= -1


def test_negation_turns_valence_round() -> None:
    assert valence("this is good") > 0 > valence("this is not good")


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_text_without_words_has_no_valence(text: str) -> None:
    assert valence(text) == 0.0


def test_vader_as_a_judge_gives_the_same_valence_and_knows_no_emotion() -> None:
    judge = vader_judge()
    texts = ["I love it", "the table", "I hate it"]
    judged = judge(texts)
    assert judge.measures == ("valence",) and judged.scores.shape == (3, 0)
    assert judged.of("valence").tolist() == [valence(text) for text in texts]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no texts"),
        ("one string", "not one string"),
        (["fine", ""], "text 1 is ''.*empty continuation"),
        ([" \n"], "text 0 is ' .n'.*empty continuation"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_place(texts: list[str] | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vader_judge()(texts)


def test_a_measure_that_the_judge_does_not_know_is_refused_with_those_it_knows() -> None:
    judged = Judgements(("anger", "joy"), np.array([[0.1, 0.9]]), None)
    assert judged.of("joy").tolist() == [0.9]
    with pytest.raises(ValueError, match="does not know 'valence'; it knows anger, joy"):
        judged.of("valence")


def test_a_judge_shows_what_it_was_fitted_on() -> None:
    judge = Judge("mine", "en", ("joy",), True, "a corpus (CC0)", lambda texts: Judgements((), np.zeros((1, 0)), None))
    assert repr(judge) == "Judge('mine', en: joy, valence; fitted on a corpus (CC0))"


def test_the_emotion_lexicon_has_strong_words_and_leaves_out_weak_ones() -> None:
    lexicon = emotion_lexicon()
    assert lexicon["love"] > 1 and lexicon[":)"] > 1 and lexicon["hate"] < -1 and not {"table", "the"} & set(lexicon)
    assert len(emotion_lexicon(3.0)) < len(lexicon) < len(emotion_lexicon(0.0))
