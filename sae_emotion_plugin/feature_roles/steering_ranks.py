"""Scores of a discovery -> which of each emotion's features to steer with: `SteeringRanks`, by their causal score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.feature_roles.output_scores import CANDIDATES, EMOTION_WORDS, output_scores
from sae_emotion_plugin.result_table import ResultTable

SHOWN = 3
"""Rows of an emotion in the table."""


@dataclass(frozen=True)
class SteeringRank:
    """One candidate of one emotion: what adding it does to the next word, and its place by that."""

    emotion: str
    feature: int
    place: int
    """1 is the one to try first."""
    auroc_place: int
    """Its place by training AUROC, which tells texts and not what steering does."""
    auroc: float
    held_out_auroc: float | None
    causal: float | None
    """Change of the log-odds that the next token is one of the emotion's words; None where no words are listed for it,
    and the place is that by AUROC."""
    output_score: float
    """From 0 to 1 (Arad et al., arXiv 2505.20063)."""
    delta_confidence: float
    """In nats (arXiv 2510.03659)."""
    kl: float
    promotes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class SteeringRanks(ResultTable):
    """The candidates of each emotion, the best to steer with first, and in `meta` how they were found."""

    row_type = SteeringRank
    head = ("emotion", "feature", "causal", "AUROC", "by AUROC", "output score", "delta confidence", "KL", "promotes")

    meta: dict[str, Any]
    rows: tuple[SteeringRank, ...]

    def top(self, emotion: str, n: int = 3) -> tuple[SteeringRank, ...]:
        """Returns the `n` first of an emotion. ValueError for one that has no candidates."""
        emotions = tuple(dict.fromkeys(row.emotion for row in self.rows))
        if emotion not in emotions:
            raise ValueError(f"unknown emotion {emotion!r}; there are candidates of: {', '.join(emotions)}")
        return tuple(row for row in self.rows if row.emotion == emotion)[:n]

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        meta = self.meta
        caption = (
            f"what to steer with: the {meta['candidates']} best features of each emotion by causal score, "
            f"{meta['causal_amount']:g} of the residual norm on {meta['n_prompts']} neutral openings; {SHOWN} shown"
        )
        return caption, [
            (
                row.emotion,
                str(row.feature),
                "-" if row.causal is None else f"{row.causal:+.3f}",
                f"{row.auroc:.3f}",
                str(row.auroc_place),
                f"{row.output_score:.3f}",
                f"{row.delta_confidence:+.3f}",
                f"{row.kl:.3f}",
                " ".join(repr(token) for token in row.promotes[:5]),
            )
            for row in self.rows
            if row.place <= SHOWN
        ]


def steering_ranks(
    model: HookedModel,
    sae: Any,
    scores: FeatureScores,
    *,
    candidates: int = CANDIDATES,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
) -> SteeringRanks:
    """Returns each emotion's best features by AUROC, ranked by what adding them does to the emotion's words.

    The order is that of `steering_order`, which `steer --emotion` takes: of AUROC, output score, delta confidence, KL
    and causal score only the last predicted beyond doubt how steering succeeds (`benchmarks/steering_prediction.py`),
    and weakly. A feature that is a candidate of several emotions is asked once. Labels without a list of words
    (`EMOTION_WORDS`) keep their order by AUROC.

    ValueError for fewer than one candidate, and what `output_scores` refuses.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    best = {emotion: scores.top(emotion, candidates) for emotion in scores.emotions}
    features = [row.feature for rows in best.values() for row in rows]
    found = output_scores(model, sae, features, prompts=prompts, progress=progress)
    by_feature = {row.feature: row for row in found.rows}
    worded = [emotion for emotion in best if emotion in EMOTION_WORDS and emotion in found.rows[0].causal]
    ranked = []
    for emotion, rows in best.items():
        places = {row.feature: place for place, row in enumerate(rows, start=1)}
        causal = {one: by_feature[one].causal[emotion] for one in places} if emotion in worded else {}
        ordered = sorted(rows, key=lambda row: -causal.get(row.feature, 0.0))  # stable: without words by AUROC
        for place, row in enumerate(ordered, start=1):
            effect = by_feature[row.feature]
            ranked.append(
                SteeringRank(
                    emotion=emotion,
                    feature=row.feature,
                    place=place,
                    auroc_place=places[row.feature],
                    auroc=row.auroc,
                    held_out_auroc=row.held_out_auroc,
                    causal=causal.get(row.feature),
                    output_score=effect.output_score,
                    delta_confidence=effect.delta_confidence,
                    kl=effect.kl,
                    promotes=row.promotes,
                )
            )
    meta = {
        **found.meta,
        "ranked_by": "causal score",
        "candidates": candidates,
        "ranked_by_auroc": [emotion for emotion in best if emotion not in worded],
    }
    return SteeringRanks(meta, tuple(ranked))
