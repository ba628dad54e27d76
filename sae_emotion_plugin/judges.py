"""Judges of generated text, none of which has seen what features are selected on. No model and no torch."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def valence(text: str) -> float:
    """VADER's compound valence of a text, from -1 (negative) to 1 (positive); 0 for a text without words.

    Judge the continuation alone: a prompt's own words would count for every dose alike. (Hutto & Gilbert 2014; a
    lexicon with rules for negation, degree and emphasis. English only: other languages score about 0.)
    """
    return float(_analyzer().polarity_scores(text)["compound"]) if text.strip() else 0.0


@cache
def _analyzer() -> "SentimentIntensityAnalyzer":
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
