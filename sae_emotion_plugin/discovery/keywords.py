"""Which texts hold a keyword of an emotion: words learned from labels, the emotion's names, a lexicon. No model.

A feature that fires on "thanks" tells gratitude well and knows nothing of it. What it still tells where no keyword
stands, in and out of class alike, is what `specificity` and `transfer` ask.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.judges.judge import emotion_lexicon
from sae_emotion_plugin.judges.masking import Mask

NAME_STEMS: Mapping[str, tuple[str, ...]] = {
    "admiration": ("admir",),
    "amusement": ("amus",),
    "anger": ("anger", "angr"),
    "annoyance": ("annoy",),
    "anticipation": ("anticipat",),
    "approval": ("approv",),
    "caring": ("care", "caring"),
    "confusion": ("confus",),
    "curiosity": ("curio",),
    "desire": ("desir",),
    "disappointment": ("disappoint",),
    "disapproval": ("disapprov",),
    "disgust": ("disgust",),
    "embarrassment": ("embarrass",),
    "excitement": ("excite", "exciting"),
    "fear": ("fear",),
    "gratitude": ("gratitude", "gratef"),
    "grief": ("grief", "griev"),
    "joy": ("joy", "joyful", "joyous", "enjoy"),
    "love": ("love", "loving"),
    "nervousness": ("nervous",),
    "optimism": ("optimis",),
    "pride": ("pride", "proud"),
    "realization": ("realiz", "realis"),
    "relief": ("relief", "reliev"),
    "remorse": ("remorse",),
    "sadness": ("sad", "sadder", "sadly", "sadness"),
    "surprise": ("surpris",),
    "trust": ("trust",),
}
"""Beginnings of the words that name an emotion, for GoEmotions and XED; another emotion's are the words of its name.

Compared as `judges.masking.Mask` compares tokens: from 4 letters on a word may begin or end with one."""
DEFAULT_TOP = 50
FEWEST_TEXTS = 5
LEAST_Z = 1.96
LEAST_LOG_ODDS = float(np.log(5))
"""A keyword has five times the odds in the emotion's texts. On GoEmotions, with 2 times "you" and "what" were keywords,
with 4 still "i" (of love); with 5 such words are gone, and "thanks", "worry" and "why" remain."""
PRIOR_TEXTS = 1.0
"""Weight of the prior: as many texts of each side as this hold the word at its overall rate."""
_WORD = re.compile("[^\\W\\d_]+(?:'[^\\W\\d_]+)*")


@dataclass(frozen=True)
class Keyword:
    """A word and how much likelier it is in an emotion's texts; a text counts once, however often it has the word."""

    word: str
    n_in: int
    """Texts of the emotion that hold it."""
    n_out: int
    """Other texts that hold it."""
    log_odds: float
    """Natural logarithm of the ratio of its odds in and out, towards 0 for a rare word."""
    z: float
    """The same over its standard error."""


@dataclass(frozen=True)
class EmotionKeywords:
    """What counts as a keyword of an emotion, and whether a text holds one."""

    emotion: str
    learned: tuple[Keyword, ...]
    """The surest first."""
    names: tuple[str, ...]
    """Stems of the emotion's names."""
    lexicon: tuple[str, ...]
    """Words of the emotion lexicon that count for this emotion."""
    _mask: Mask = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = frozenset((*(keyword.word for keyword in self.learned), *self.lexicon))
        object.__setattr__(self, "_mask", Mask(self.names, words))

    def free(self, texts: Sequence[str]) -> Bool[np.ndarray, "text"]:
        """Returns which texts hold no keyword."""
        # No keyword has white space inside, and most pieces between it are in many texts: each is looked at once.
        pieces = [set(text.split()) for text in texts]
        hits = {piece for piece in set().union(*pieces) if self._mask(piece) != piece}
        return np.array([own.isdisjoint(hits) for own in pieces], dtype=bool)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        own = {"emotion": self.emotion, "names": list(self.names), "lexicon": list(self.lexicon)}
        return {**own, "learned": [asdict(keyword) for keyword in self.learned]}


def emotion_keywords(
    texts: LabelledTexts,
    emotions: Sequence[str] | None = None,
    *,
    top: int = DEFAULT_TOP,
    whole_lexicon: bool = False,
) -> dict[str, EmotionKeywords]:
    """Returns the keywords of each emotion (by default of every label), learned from `texts`: give training texts.

    Learned are the `top` words by z of the log odds ratio with an informative prior (Monroe, Colaresi & Quinn 2008,
    section 3.5.1), counted once a text, among those in at least 5 texts of the emotion, with five times the odds in
    them and z of 1.96 or more. The words of VADER's lexicon (valence of size 1 or more) with such odds join them,
    however rare; with `whole_lexicon` all of its words and emoticons do, for every emotion: that is stricter, and
    leaves a quarter of GoEmotions. Words are what stands between spaces
    and punctuation: Japanese and Chinese have none worth learning.

    ValueError for an emotion that no text has or that all have, and for `top` below 0.
    """
    if top < 0:
        raise ValueError(f"top must be 0 or more, got {top}")
    chosen = texts.labels if emotions is None else tuple(dict.fromkeys(emotions))
    unknown = [emotion for emotion in chosen if emotion not in texts.labels]
    if unknown:
        raise ValueError(f"unknown emotions: {', '.join(unknown)}; the texts have: {', '.join(texts.labels)}")
    words_of = [_words(text) for text in texts.texts]
    overall = Counter(word for words in words_of for word in words)
    lexicon = [word for word in emotion_lexicon() if not re.search(r"\s", word)]
    found = {}
    for emotion in chosen:
        inside = [words for words, labels in zip(words_of, texts.emotions, strict=True) if emotion in labels]
        if len(inside) == len(texts):
            raise ValueError(f"all {len(texts)} texts are {emotion}: its keywords need other texts to compare with")
        counts = Counter(word for words in inside for word in words)
        ranked = sorted(_compared(counts, overall, len(inside), len(texts)), key=lambda one: (-one.z, one.word))
        learned = [one for one in ranked if one.n_in >= FEWEST_TEXTS and one.z >= LEAST_Z][:top]
        own = lexicon if whole_lexicon else {one.word for one in ranked} & set(lexicon)
        names = NAME_STEMS.get(emotion) or tuple(_WORD.findall(emotion))
        found[emotion] = EmotionKeywords(emotion, tuple(learned), names, tuple(sorted(own)))
    return found


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()))


def _compared(inside: Counter[str], overall: Counter[str], n_inside: int, n_texts: int) -> list[Keyword]:
    """Returns the words whose odds inside are high enough, in no order."""
    words = list(inside)
    n_in = np.array([inside[word] for word in words], dtype=np.float64)
    total = np.array([overall[word] for word in words], dtype=np.float64)
    share = total / n_texts
    # Texts with and without the word, each side joined by a prior that holds it at its overall rate.
    with_in, with_out = n_in + PRIOR_TEXTS * share, total - n_in + PRIOR_TEXTS * share
    without_in = n_inside - n_in + PRIOR_TEXTS * (1 - share)
    without_out = n_texts - n_inside - (total - n_in) + PRIOR_TEXTS * (1 - share)
    # A word of every text has nothing without it on either side, and tells nothing.
    everywhere = share == 1
    without_in[everywhere] = without_out[everywhere] = 1.0
    log_odds = np.log(with_in / without_in) - np.log(with_out / without_out)
    log_odds[everywhere] = 0.0
    errors = np.sqrt(1 / with_in + 1 / with_out + 1 / without_in + 1 / without_out)
    return [
        Keyword(words[i], int(n_in[i]), int(total[i] - n_in[i]), float(log_odds[i]), float(log_odds[i] / errors[i]))
        for i in np.flatnonzero(log_odds >= LEAST_LOG_ODDS)
    ]
