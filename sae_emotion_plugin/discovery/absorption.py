"""Codes and a dense probe's scores -> where the probe is sure and the feature silent, and what fires there instead.

A feature that reads an emotion may stay silent on part of its texts because a narrower feature took them over
(Chanin et al. 2024, arXiv 2409.14507). AUROC hides that: here is how often it happens, and where to look.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Num
from scipy.stats import binomtest

from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import sparse_auroc
from sae_emotion_plugin.evidence.resampling import checked_values
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import SparseCodes

if TYPE_CHECKING:
    pass

FEWEST_SURE = 10
"""A threshold that fewer training texts pass has no precision worth the name."""
FEWEST_SILENT = 3
"""With fewer silent texts, what fires in them is chance."""
CANDIDATES = 5
EXAMPLES = 10


@dataclass(frozen=True)
class Absorber:
    """A feature that fires where the emotion's own is silent: the best of all features, so its AUROC is optimistic."""

    feature: int
    auroc: float
    """Of the silent texts that have the emotion over all other texts."""
    rate_in: float
    """Share of the silent texts with the emotion in which it fires."""
    rate_out: float
    """Share of all other texts in which it fires."""


@dataclass(frozen=True)
class AbsorptionRow:
    """How often one emotion's feature is silent where the dense probe is sure; near-duplicates count once."""

    emotion: str
    feature: int
    threshold: float | None
    """The probe's score from which on it is sure; None where no threshold has the precision on the training texts."""
    n_sure: int
    precision: float | None
    """Share of the sure texts that have the emotion."""
    rate: float | None
    """Share of the sure texts in which the feature fires on no token; None without any."""
    low: float | None
    high: float | None
    n_true: int
    """Sure texts that have the emotion."""
    true_rate: float | None
    """Share of these in which the feature is silent."""
    true_low: float | None
    true_high: float | None
    examples: tuple[int, ...]
    """Positions of up to 10 texts that have the emotion, of which the probe is sure and the feature silent; the surest
    first."""
    absorbers: tuple[Absorber, ...]
    """Up to 5 features that fire in such texts most specifically; none for fewer than 3 of them."""


@dataclass(frozen=True, repr=False)
class Absorption(ResultTable):
    """One row for each emotion, and in `meta` how they were found."""

    row_type = AbsorptionRow
    head = ("emotion", "feature", "silent", "silent and true", "precision", "fires there instead (in / out)")

    meta: dict[str, Any]
    rows: tuple[AbsorptionRow, ...]

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        summary = (
            f"how often a feature is silent where the dense probe is sure (precision {self.meta['precision']:.0%} on "
            f"training texts), {self.meta['level']:.0%} intervals; and what fires there instead"
        )
        return summary, [
            (
                row.emotion,
                str(row.feature),
                f"{_cell(row.rate, row.low, row.high)} of {row.n_sure}",
                f"{_cell(row.true_rate, row.true_low, row.true_high)} of {row.n_true}",
                "-" if row.precision is None else f"{row.precision:.0%}",
                " ".join(f"{one.feature} ({one.rate_in:.0%} / {one.rate_out:.1%})" for one in row.absorbers[:3]),
            )
            for row in self.rows
        ]


def absorption(
    codes: SparseCodes,
    texts: LabelledTexts,
    features: Mapping[str, int],
    dense_scores: Mapping[str, Num[np.ndarray, "text"]],
    *,
    train: LabelledTexts,
    train_scores: Mapping[str, Num[np.ndarray, "train_text"]],
    precision: float = 0.8,
    level: float = 0.95,
) -> Absorption:
    """Returns for each emotion's feature how often it is silent in the held-out texts of which a dense probe is sure.

    The probe is sure from the lowest score on at which its precision on the training texts is `precision`, if at
    least 10 of them have it. Silent means that the feature fires on no token of the text. Rates are over texts of
    which no two are near-duplicates, with Clopper-Pearson intervals.

    Args:
        codes: of `texts`, which are held out.
        dense_scores: the probe's score of each text for each emotion, in any unit.
        train_scores: those of the training texts, from probes that did not see the text (cross-validated): a fitted
            probe is surer of its own texts than it should be.

    ValueError for emotions without scores, scores of other texts, and a precision outside (0, 1].
    """
    if not 0 < precision <= 1:
        raise ValueError(f"precision must be above 0 and at most 1, got {precision}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if codes.n_texts != len(texts):
        raise ValueError(f"the codes are of {codes.n_texts} texts, but there are {len(texts)} held-out texts")
    wrong = [f"{feature} ({emotion})" for emotion, feature in features.items() if not 0 <= feature < codes.d_sae]
    if wrong:
        raise ValueError(f"no such features: {', '.join(wrong)} (valid: 0 to {codes.d_sae - 1})")
    pooled = scipy.sparse.csc_matrix(codes.pooled("max"))
    _, first_copy = np.unique(texts.duplicate_groups, return_index=True)
    once = np.zeros(len(texts), dtype=bool)
    once[first_copy] = True
    rows = []
    for emotion, feature in features.items():
        scores = _scores_of(dense_scores, emotion, len(texts), "held-out")
        positive = texts.label_matrix([emotion])[:, 0]
        threshold = sure_threshold(
            _scores_of(train_scores, emotion, len(train), "training"),
            train.label_matrix([emotion])[:, 0],
            precision,
        )
        silent = pooled[:, [feature]].toarray()[:, 0] <= 0
        sure = once & (scores >= (np.inf if threshold is None else threshold))
        missed = sure & positive & silent
        surest = np.flatnonzero(missed)[np.argsort(-scores[missed], kind="stable")]
        rate, true_rate = _rate(silent[sure], level), _rate(silent[sure & positive], level)
        rows.append(
            AbsorptionRow(
                emotion=emotion,
                feature=feature,
                threshold=threshold,
                n_sure=int(sure.sum()),
                precision=float(positive[sure].mean()) if sure.any() else None,
                rate=rate[0],
                low=rate[1],
                high=rate[2],
                n_true=int((sure & positive).sum()),
                true_rate=true_rate[0],
                true_low=true_rate[1],
                true_high=true_rate[2],
                examples=tuple(surest[:EXAMPLES].tolist()),
                absorbers=_absorbers(pooled, missed),
            )
        )
    meta = {
        "hook_name": codes.hook_name,
        "d_sae": codes.d_sae,
        "precision": precision,
        "level": level,
        "n_texts": {"train": len(train), "held_out": len(texts)},
        "n_distinct": int(once.sum()),
    }
    return Absorption(meta, tuple(rows))


def sure_threshold(
    scores: Num[np.ndarray, "text"], positives: Bool[np.ndarray, "text"], precision: float
) -> float | None:
    """Returns the lowest score from which on the share of positives is at least `precision`; None if there is none.

    At least 10 texts must reach it. ValueError for scores that are not finite.
    """
    values = checked_values(scores, "scores")
    order = np.argsort(-values, kind="stable")
    called = np.arange(1, len(values) + 1)
    # Texts of one score are called together, so only the last of a tie can be a threshold.
    last_of_tie = np.r_[np.diff(values[order]) != 0, True][: len(values)]
    good = (np.cumsum(positives[order]) >= precision * called) & (called >= FEWEST_SURE) & last_of_tie
    return float(values[order][np.flatnonzero(good)[-1]]) if good.any() else None


def _absorbers(pooled: scipy.sparse.csc_matrix, missed: Bool[np.ndarray, "text"]) -> tuple[Absorber, ...]:
    if missed.sum() < FEWEST_SILENT or missed.all():
        return ()
    found = sparse_auroc(pooled, missed[:, None])
    best = np.argsort(-found.auroc[0], kind="stable")[:CANDIDATES].tolist()
    return tuple(
        Absorber(one, float(found.auroc[0, one]), float(found.rate_in[0, one]), float(found.rate_out[0, one]))
        for one in best
        if found.auroc[0, one] > 0.5
    )


def _scores_of(
    scores: Mapping[str, Num[np.ndarray, "text"]], emotion: str, n_texts: int, side: str
) -> Num[np.ndarray, "text"]:
    if emotion not in scores:
        raise ValueError(f"no {side} scores of {emotion!r} (there are those of {', '.join(scores)})")
    values = checked_values(scores[emotion], f"{side} scores of {emotion}")
    if len(values) != n_texts:
        raise ValueError(f"{n_texts} {side} texts, but {len(values)} scores of {emotion}")
    return values


def _rate(silent: Bool[np.ndarray, "sure"], level: float) -> tuple[float | None, float | None, float | None]:
    if len(silent) == 0:
        return None, None, None
    n_silent = int(silent.sum())
    ends = binomtest(n_silent, len(silent)).proportion_ci(confidence_level=level, method="exact")
    return n_silent / len(silent), float(ends.low), float(ends.high)


def _cell(rate: float | None, low: float | None, high: float | None) -> str:
    return "-" if rate is None else f"{rate:.0%} [{low:.0%}, {high:.0%}]"
