"""Which score of a feature predicts that steering with it works? Rank correlations with judged success."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.evidence.rank_correlation import rank_correlation, rank_correlation_difference
from sae_emotion_plugin.feature_roles.output_scores import OutputScores
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.steering_studies.success import SteeringSuccess

if TYPE_CHECKING:
    pass

PREDICTORS = (
    "auroc", "held_out_auroc", "output_score", "delta_confidence", "delta_confidence_size", "kl", "causal_score",
)  # fmt: skip
SCOPES = ("within emotions", "all")


@dataclass(frozen=True)
class ScoredFeature:
    """One (emotion, feature) pair with all that may predict its success, and the success."""

    emotion: str
    feature: int
    auroc: float
    held_out_auroc: float | None
    output_score: float
    delta_confidence: float
    delta_confidence_size: float
    """Without its sign: features are chosen at both ends."""
    kl: float
    causal_score: float
    success: float


@dataclass(frozen=True)
class PredictorScore:
    """How well one predictor ranks steering success."""

    predictor: str
    scope: str
    """"within emotions": ranked among the features of the same emotion; "all": among all features."""
    correlation: float
    low: float
    high: float
    given_auroc: float | None
    """Partial rank correlation given the AUROC; None for the AUROC itself, and for what ranks features as it does."""
    given_low: float | None
    given_high: float | None


@dataclass(frozen=True)
class PredictorDifference:
    """By how much the first predictor's rank correlation exceeds the second's, in the same resamples."""

    first: str
    second: str
    scope: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class SteeringPrediction(ResultTable):
    """The answer (`rows`, `differences`), what it rests on (`features`), and in `meta` how it was found."""

    row_type = PredictorScore
    head = ("scope", "predictor", "rank correlation", "given the AUROC", "best one minus this")

    meta: dict[str, Any]
    rows: tuple[PredictorScore, ...]
    differences: tuple[PredictorDifference, ...]
    features: tuple[ScoredFeature, ...]

    def best(self, scope: str = SCOPES[0]) -> PredictorScore:
        """The predictor with the largest rank correlation. ValueError for an unknown scope."""
        rows = [row for row in self.rows if row.scope == scope]
        if not rows:
            raise ValueError(f"no scope {scope!r} (valid: {', '.join(SCOPES)})")
        return max(rows, key=lambda row: row.correlation)

    def to_dict(self) -> dict[str, Any]:
        """`meta`, and the rows of each table as objects."""
        tables = {name: [asdict(one) for one in getattr(self, name)] for name in ("rows", "differences", "features")}
        return {"meta": self.meta, **tables}

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        best = {scope: self.best(scope).predictor for scope in SCOPES}
        behind = {(one.first, one.second, one.scope): one for one in self.differences}
        cells = []
        for row in self.rows:
            gap = behind.get((best[row.scope], row.predictor, row.scope))
            cells.append(
                (
                    row.scope,
                    row.predictor,
                    _interval(row.correlation, row.low, row.high),
                    _interval(row.given_auroc, row.given_low, row.given_high),
                    "best" if row.predictor == best[row.scope] else _interval(*_ends(gap)),
                )
            )
        caption = (
            f"Rank correlation with steering success over {self.meta['n_features']} features of "
            f"{len(self.meta['n_by_emotion'])} emotions, {self.meta['level']:.0%} intervals; "
            f"the success itself is reliable to {_number(self.meta['reliability'])} (halves of the prompts)"
        )
        return caption, cells


def spread_features(scores: FeatureScores, emotions: Iterable[str], n: int) -> list[tuple[str, int]]:
    """`n` (emotion, feature) pairs, about equally many an emotion, evenly spaced in rank from the best to the last.

    Good and poor features alike, since predictors cannot be told apart among the best alone. ValueError for an
    emotion with too few rows.
    """
    names = tuple(emotions)
    if not names:
        raise ValueError(f"no emotions to spread {n} features over")
    pairs: list[tuple[str, int]] = []
    for place, emotion in enumerate(names):
        share = n // len(names) + (place < n % len(names))
        rows = scores.top(emotion, max(1, len(scores.rows)))
        if share > len(rows):
            raise ValueError(f"{share} features of {emotion!r} are wanted, the scores have {len(rows)}")
        pairs += [(emotion, rows[rank].feature) for rank in np.linspace(0, len(rows) - 1, share).round().astype(int)]
    return pairs


def steering_prediction(
    scores: FeatureScores,
    outputs: OutputScores,
    successes: Sequence[SteeringSuccess],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> SteeringPrediction:
    """Which of the features' scores ranks their steering success best: rank correlations, plain and given the AUROC.

    The AUROC that is given is the held-out one where all features have it. Within emotions a feature is ranked among
    those of its own emotion, so that an emotion which is easier to steer to, or a measure of another scale, counts for
    nothing. Resampled are features, with all their emotions. A predictor that is the same for all features is left out
    and named in `meta`. `meta["reliability"]` is the rank correlation within emotions of the success on every other
    prompt with that on the rest, stepped up to all prompts (Spearman-Brown): no predictor can be expected to correlate
    better than its square root.

    Raises:
        ValueError: a feature without scores, or fewer than 5 features.
    """
    known = {(row.emotion, row.feature): row for row in scores.rows}
    features = []
    for one in successes:
        row, output = known.get((one.emotion, one.feature)), outputs.of(one.feature)
        if row is None:
            raise ValueError(f"the scores have no feature {one.feature} for {one.emotion!r}")
        if one.emotion not in output.causal:
            raise ValueError(f"no causal score for {one.emotion!r} (there are: {', '.join(output.causal)})")
        features.append(
            ScoredFeature(
                emotion=one.emotion,
                feature=one.feature,
                auroc=row.auroc,
                held_out_auroc=row.held_out_auroc,
                output_score=output.output_score,
                delta_confidence=output.delta_confidence,
                delta_confidence_size=abs(output.delta_confidence),
                kl=output.kl,
                causal_score=output.causal[one.emotion],
                success=one.success,
            )
        )
    held_out = bool(features) and all(one.held_out_auroc is not None for one in features)
    covariate = "held_out_auroc" if held_out else "auroc"
    names = [name for name in PREDICTORS if held_out or name != "held_out_auroc"]
    values = {name: np.array([getattr(one, name) for one in features]) for name in (*names, "success")}
    constant = [name for name in names if len(np.unique(values[name])) == 1]
    names = [name for name in names if name not in constant or len(features) < 2]
    emotions, clusters = [one.emotion for one in features], [one.feature for one in features]
    settings: dict[str, Any] = {"clusters": clusters, "level": level, "resamples": resamples, "seed": seed}
    rows, differences = [], []
    for scope in SCOPES:
        settings["strata"] = emotions if scope == SCOPES[0] else None
        for name in names:
            plain = rank_correlation(values[name], values["success"], **settings)
            ends: tuple[float | None, float | None, float | None] = (None, None, None)
            if covariate not in constant and not np.array_equal(rankdata(values[name]), rankdata(values[covariate])):
                given = rank_correlation(values[name], values["success"], covariate=values[covariate], **settings)
                ends = (given.mean, given.low, given.high)
            rows.append(PredictorScore(name, scope, plain.mean, plain.low, plain.high, *ends))
        for first, second in itertools.combinations(names, 2):
            gap = rank_correlation_difference(values[first], values[second], values["success"], **settings)
            differences.append(PredictorDifference(first, second, scope, gap.mean, gap.low, gap.high))
            differences.append(PredictorDifference(second, first, scope, -gap.mean, -gap.high, -gap.low))
    meta = {
        "n_features": len(features),
        "n_by_emotion": {emotion: emotions.count(emotion) for emotion in dict.fromkeys(emotions)},
        "measures": {one.emotion: one.measure for one in successes},
        "covariate": covariate,
        "left_out": constant,
        "reliability": _reliability(successes, emotions),
        "level": level,
        "resamples": resamples,
        "seed": seed,
        "output_scores": outputs.meta,
    }
    return SteeringPrediction(meta, tuple(rows), tuple(differences), tuple(features))


def _reliability(successes: Sequence[SteeringSuccess], emotions: Sequence[str]) -> float | None:
    """Spearman-Brown of the two halves, 0 where they disagree; None where a half has nothing, or does not vary."""
    halves: list[Float[np.ndarray, "feature"]] = []
    for half in (0, 1):
        kept = [[change for change in one.changes[half::2] if change is not None] for one in successes]
        if not all(kept):
            return None
        halves.append(np.array([np.mean(some) for some in kept]))
    try:
        between = rank_correlation(halves[0], halves[1], strata=emotions, resamples=1, seed=0).mean
    except ValueError:
        return None
    return 2 * between / (1 + between) if between > 0 else 0.0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _ends(gap: PredictorDifference | None) -> tuple[float | None, float | None, float | None]:
    return (gap.difference, gap.low, gap.high) if gap else (None, None, None)


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None else f"{_number(value)} [{_number(low)}, {_number(high)}]"
