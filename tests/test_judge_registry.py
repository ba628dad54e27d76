import logging

import pytest

from sae_emotion_plugin.judges import names as judge_registry
from sae_emotion_plugin.judges.names import judge_language, judge_names, judges_for, load_judge, stored_figures


def test_every_judge_that_comes_with_the_package_has_a_language_and_vader_alone_no_figures() -> None:
    names = judge_names()
    assert names[0] == "vader" and {"xed-words", "xed-sentences", "kote-characters", "nsmc-characters"} < set(names)
    assert {judge_language(name) for name in names} == {"en", "ko"}
    assert [name for name in names if not stored_figures(name)] == ["vader"]


def test_a_judge_is_loaded_by_its_name() -> None:
    assert load_judge("vader").measures == ("valence",)
    judge = load_judge("kote-characters")
    assert judge.language == "ko" and judge.figures == stored_figures("kote-characters")


@pytest.mark.parametrize("ask", [load_judge, judge_language, stored_figures])
def test_an_unknown_name_is_refused_with_the_known_ones(ask: object) -> None:
    with pytest.raises(ValueError, match=r"no judge 'ghost'; choose from vader, .*xed-words, or hub:owner/name"):
        ask("ghost")  # type: ignore[operator]


def test_korean_has_its_own_judges() -> None:
    assert [judge.name for judge in judges_for("ko")] == ["kote-characters", "nsmc-characters"]


def test_japanese_is_answered_with_what_is_missing_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no openly licensed Japanese texts.*hub:owner/name"):
        judges_for("ja")


def test_an_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no judge for 'xx'; there are some for en, ko"):
        judges_for("xx")


def test_a_judge_whose_extra_is_missing_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(judge_registry, "has_encoder", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert [judge.name for judge in judges_for("en")] == ["vader", "xed-words"]
    assert "'xed-sentences' is left out: it needs the extra judges" in caplog.text


def test_a_hub_name_goes_to_the_hub_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(name: str) -> object:
        asked.append(name)
        return load_judge("vader")

    monkeypatch.setattr(judge_registry, "hub_judge", fake)
    load_judge("hub:owner/name")
    assert asked == ["owner/name"]
