import pytest

from sae_emotion_plugin.judges.profanity import is_profane


@pytest.mark.parametrize(
    "text",
    [
        "What the fuck?", "FUCKING great", "absofuckinglutely", "you motherfucker", "f*ck this", "f**k", "sh*t",
        "fuuuuck", "shiiit", "sh1t", "a$$hole", "this is bullshit!", "damn it", "go to hell", "bitches",
        "a bitchy remark", "shit.", "he is a prick", "ｆｕｃｋ", "dumb-ass",
        "씨발 뭐야", "존나 춥다", "이 개새끼가", "ㅅㅂ", "クソゲー", "ちくしょう！",
    ],
)  # fmt: skip
def test_swearing_is_found_whatever_its_case_ending_or_stars(text: str) -> None:
    assert is_profane(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "a cup of tea", "Scunthorpe", "assess the class", "cocktail", "Dickens", "hello, he'll come", "shell",
        "shiitake and shitake", "a Wankel engine", "pass the grass", "amass", "Essex", "titular", "crapulent?",
        "시발점에서 출발", "불이 꺼져 있다", "엄마를 졸라서", "새끼손가락", "死ねばいい話ではない", "5 * 3 * 2",
        "idiot",
    ],
)  # fmt: skip
def test_words_that_only_look_like_swearing_are_not(text: str) -> None:
    assert not is_profane(text)
