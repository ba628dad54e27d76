"""The quality of sets beside words, on codes and texts made to order."""

from typing import Any

import numpy as np
import pytest
from planted_codes import codes_of, texts_of
from scipy.stats import mannwhitneyu

from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.monitoring.quality import FEATURES, KEYWORDS, WORDS, MonitorQuality, monitor_quality
from sae_emotion_plugin.monitoring.thresholds import SetThreshold, Thresholds

LABELS = {"hostility": ("anger", "disgust"), "joy": ("joy",)}


def labelled(n: int, seed: int, told: float) -> tuple[LabelledTexts, np.ndarray]:
    """Texts of which the share `told` of each emotion holds a word of its own; the features tell anger, not joy."""
    rng = np.random.default_rng(seed)
    emotions = [(("anger", "disgust", "joy", "neutral")[n % 4],) for n in range(n)]
    words = [one[0] + "word" if one[0] != "neutral" and rng.random() < told else "" for one in emotions]
    values = rng.random((n, 4))
    values[:, 1] += [one[0] in LABELS["hostility"] for one in emotions]
    return texts_of(emotions, seed, words), values


def thresholds_of(text_threshold: float) -> Thresholds:
    nothing = dict.fromkeys(("text_rate", "text_low", "text_high", "token_rate", "token_low", "token_high"), 0.0)
    rows = (
        SetThreshold(name=name, features=(f,), weights=(1.0,), scales=(1.0,), text_threshold=text_threshold,
                     token_threshold=1.0, **nothing)
        for name, f in (("joy", 2), ("hostility", 1))
    )  # fmt: skip
    return Thresholds({"pooling": "max", "false_positive_rate": 0.1}, tuple(rows))


@pytest.fixture(scope="module")
def found() -> tuple[MonitorQuality, LabelledTexts, np.ndarray]:
    train, _ = labelled(240, 1, 0.9)
    held_out, values = labelled(200, 2, 0.6)
    neutral = texts_of([()] * 60, 3).texts
    made = monitor_quality(
        thresholds_of(1.2), codes_of(values), held_out, LABELS, train=train, neutral_texts=neutral, resamples=200
    )
    return made, held_out, values


def test_the_features_figures_are_those_of_plain_counting(found: Any) -> None:
    made, held_out, values = found
    for name, column in (("hostility", 1), ("joy", 2)):
        positive = np.array([bool(set(own) & set(LABELS[name])) for own in held_out.emotions])
        scores = values[:, column].astype(np.float32)
        row = made.of(name)
        u = mannwhitneyu(scores[positive], scores[~positive]).statistic
        assert row.auroc == pytest.approx(u / (positive.sum() * (~positive).sum()))
        assert row.true_positive_rate == np.mean(scores[positive] > 1.2)
        assert row.false_positive_rate == np.mean(scores[~positive] > 1.2)
        assert row.low <= row.auroc <= row.high and row.n_positive == positive.sum()
    assert made.of("hostility").auroc == 1.0 and made.of("joy").low < 0.5 < made.of("joy").high


def test_words_and_keywords_find_what_is_said_and_no_more(found: Any) -> None:
    made, held_out, _ = found
    for name, labels in LABELS.items():
        said = np.array([any(f"{label}word" in text for label in labels) for text in held_out.texts])
        positive = np.array([bool(set(own) & set(labels)) for own in held_out.emotions])
        keywords = made.of(name, KEYWORDS)
        assert keywords.true_positive_rate == said[positive].mean() and keywords.false_positive_rate == 0
        assert keywords.auroc == pytest.approx(0.5 + said[positive].mean() / 2)
        assert made.of(name, WORDS).auroc >= keywords.auroc - 0.1
    gain = made.of("hostility", KEYWORDS)
    assert gain.advantage == pytest.approx(1 - gain.auroc) and gain.advantage_low > 0
    assert made.of("joy", WORDS).advantage_high < 0, "and a set that knows nothing is shown to lose"


def test_the_table_names_methods_and_sets_and_refuses_others(found: Any) -> None:
    made, _, _ = found
    assert all(word in repr(made) for word in (FEATURES, WORDS, KEYWORDS, "hostility", "chance is 0.5"))
    with pytest.raises(ValueError, match="'envy' by 'features'"):
        made.of("envy")
    assert len(made.to_pandas()) == 6


def test_what_cannot_be_compared_is_refused() -> None:
    train, values = labelled(80, 1, 0.9)
    held_out, _ = labelled(80, 2, 0.9)
    given: dict[str, Any] = {"train": train, "neutral_texts": texts_of([()] * 60, 3).texts, "resamples": 50}
    with pytest.raises(ValueError, match="'envy'"):
        monitor_quality(thresholds_of(1.0), codes_of(values), held_out, {"envy": ("joy",)}, **given)
    with pytest.raises(ValueError, match="codes of 79 texts for 80"):
        monitor_quality(thresholds_of(1.0), codes_of(values[:79]), held_out, LABELS, **given)
    with pytest.raises(ValueError, match="envy"):
        monitor_quality(thresholds_of(1.0), codes_of(values), held_out, {"joy": ("envy",)}, **given)
    few = {**given, "neutral_texts": texts_of([()] * 8, 3).texts}
    with pytest.raises(ValueError, match="needs at least 9 values, got 8"):
        monitor_quality(thresholds_of(1.0), codes_of(values), held_out, LABELS, **few)
