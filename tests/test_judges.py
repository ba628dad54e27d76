import pytest

from sae_emotion_plugin.judges import valence


def test_valence_orders_a_friendly_a_plain_and_a_hostile_text() -> None:
    friendly, plain, hostile = map(valence, (" wonderful, kind friend", " man with a hat", " horrible, hateful liar"))
    assert 1 >= friendly > 0.5 > plain == 0.0 > -0.5 > hostile >= -1


def test_negation_turns_valence_round() -> None:
    assert valence("this is good") > 0 > valence("this is not good")


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_text_without_words_has_no_valence(text: str) -> None:
    assert valence(text) == 0.0
