"""What a judge of generated text is, and VADER, the judge that needs no fitting. No model and no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

VALENCE = "valence"
"""The measure beside the emotions: from -1 (negative) to 1 (positive)."""
POSITIVE_EMOTIONS = ("joy", "trust")
NEGATIVE_EMOTIONS = ("anger", "disgust", "fear", "sadness")
"""Surprise and anticipation are on neither side: both come in pleasant and unpleasant kinds."""


@dataclass(frozen=True)
class Figure:
    """How well a judge tells the texts with an emotion from those without, or positive valence from negative."""

    measure: str
    on: str
    """The texts it was measured on; none of them had a part in fitting the judge."""
    auroc: float | None
    """None with fewer than 10 texts on either side: the counts are then all there is to say."""
    low: float | None
    """Ends of the bootstrap interval (95 %) over documents, near-duplicate groups or prompts."""
    high: float | None
    n_positive: int
    n: int


@dataclass(frozen=True)
class Judgements:
    """What a judge says of some texts."""

    emotions: tuple[str, ...]
    scores: Float[np.ndarray, "text emotion"]
    """Between 0 and 1, each emotion for itself: a text may carry several, or none."""
    valence: Float[np.ndarray, "text"] | None
    """Between -1 and 1; None for a judge that knows no valence."""

    def of(self, measure: str) -> Float[np.ndarray, "text"]:
        """The scores for one emotion, or for "valence". ValueError for a measure that the judge does not know."""
        if measure == VALENCE and self.valence is not None:
            return self.valence
        if measure not in self.emotions:
            known = (*self.emotions, *((VALENCE,) if self.valence is not None else ()))
            raise ValueError(f"the judge does not know {measure!r}; it knows {', '.join(known)}")
        return self.scores[:, self.emotions.index(measure)]


@dataclass(frozen=True)
class Judge:
    """A judge of text: what it knows, what it was fitted on, how good it is, and the function that judges.

    Call it with texts to get `Judgements`. Give it continuations alone: a prompt's own words would count for every
    dose alike. An empty text is refused, since a score of 0 for it would be an invention.
    """

    name: str
    language: str
    emotions: tuple[str, ...]
    has_valence: bool
    fitted_on: str
    """Corpus and licence."""
    judge: Callable[[Sequence[str]], Judgements]
    figures: tuple[Figure, ...] = ()
    """Its quality on texts held out of fitting."""

    @property
    def measures(self) -> tuple[str, ...]:
        """The emotions, and "valence" where it is known."""
        return (*self.emotions, *((VALENCE,) if self.has_valence else ()))

    def __call__(self, texts: Sequence[str]) -> Judgements:
        """The judgements of `texts`, in their order. ValueError for no texts, a lone string and an empty text."""
        check_texts(texts, self.name)
        return self.judge(texts)

    def __repr__(self) -> str:
        return f"Judge({self.name!r}, {self.language}: {', '.join(self.measures)}; fitted on {self.fitted_on})"


def check_texts(texts: Sequence[str], judge: str) -> None:
    """Raises ValueError, naming the place, for texts that cannot be judged."""
    if isinstance(texts, str):
        raise ValueError(f"the judge {judge!r} takes a list of texts, not one string")
    if len(texts) == 0:
        raise ValueError(f"the judge {judge!r} was given no texts")
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {place} is {text!r}: the judge {judge!r} cannot judge an empty continuation")


def vader_judge() -> Judge:
    """VADER as a judge: English valence from a lexicon with rules for negation, degree and emphasis; no emotions."""

    def judge(texts: Sequence[str]) -> Judgements:
        return Judgements((), np.zeros((len(texts), 0)), np.array([valence(text) for text in texts]))

    return Judge("vader", "en", (), True, "nothing (a lexicon rated by people, MIT)", judge)


def valence(text: str) -> float:
    """VADER's compound valence of a text, from -1 (negative) to 1 (positive); 0 for a text without words.

    Judge the continuation alone: a prompt's own words would count for every dose alike. (Hutto & Gilbert 2014; a
    lexicon with rules for negation, degree and emphasis. English only: other languages score about 0.)
    """
    return float(_analyzer().polarity_scores(text)["compound"]) if text.strip() else 0.0


def emotion_lexicon(least: float = 1.0) -> dict[str, float]:
    """The entries of VADER's lexicon, words and emoticons, whose valence (-4 to 4) has at least the size `least`."""
    return {word: rated for word, rated in _analyzer().lexicon.items() if abs(rated) >= least}


@cache
def _analyzer() -> "SentimentIntensityAnalyzer":
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
