"""Codes and ratings of the same texts -> how a feature goes with valence, arousal and dominance, with intervals."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Num

from sae_emotion_plugin.evidence.resampling import (
    RESAMPLED_CELLS_PER_CHUNK,
    check_resampling,
    checked_values,
    drawn_counts,
    group_numbers,
    studentised_interval,
)
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes

if TYPE_CHECKING:
    pass

FEWEST_GROUPS = 10


@dataclass(frozen=True)
class RatingCorrelation:
    """A feature and a rating over the same texts; all None for a feature that is the same in every text."""

    emotion: str
    feature: int
    rating: str
    pearson: float | None
    pearson_low: float | None
    pearson_high: float | None
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    fires: float
    """Share of the texts in which the feature is active."""


@dataclass(frozen=True, repr=False)
class RatingCorrelations(ResultTable):
    """One row for each feature and rating, and in `meta` how they were found."""

    row_type = RatingCorrelation
    head = ("emotion", "feature", "rating", "Pearson", "Spearman", "fires in")

    meta: dict[str, Any]
    rows: tuple[RatingCorrelation, ...]

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        summary = (
            f"correlation of features with ratings over {self.meta['n_texts']} texts, "
            f"{self.meta['level']:.0%} intervals over {self.meta['n_groups']} groups of them"
        )
        return summary, [
            (
                row.emotion,
                str(row.feature),
                row.rating,
                _cell(row.pearson, row.pearson_low, row.pearson_high),
                _cell(row.spearman, row.spearman_low, row.spearman_high),
                f"{row.fires:.1%}",
            )
            for row in self.rows
        ]


def rating_correlations(
    codes: SparseCodes,
    features: Mapping[str, int],
    ratings: Mapping[str, Num[np.ndarray, "text"]],
    *,
    pooling: Pooling = "max",
    groups: np.ndarray | Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> RatingCorrelations:
    """Returns the Pearson and Spearman correlation of each feature with each rating, with bootstrap intervals.

    `features` gives each emotion's feature, `ratings` each rating's value of each text (EmoBank's valence, arousal
    and dominance, say). Whole `groups` of texts (documents) are drawn, ranks are taken anew in every resample, and
    the interval is studentised on Fisher's z scale with the error by documents of a correlation's influence function.
    What ranks add to a Spearman correlation's error is left out of it, in the sample as in the resamples. Coverage of
    nominal 95 % in 300 simulated data sets each (30 documents of 3 texts, 100 of 3, 300 of 1; correlations 0.33 to
    0.47): Spearman 94 to 96 %; Pearson 91 to 95 % for an activation with many zeros, 87 to 89 % for a heavy-tailed one.

    ValueError for codes of other texts, ratings that are not finite or all the same, features that there are not,
    and fewer than 10 groups.
    """
    check_resampling(level, resamples)
    wrong = [f"{feature} ({emotion})" for emotion, feature in features.items() if not 0 <= feature < codes.d_sae]
    if wrong:
        raise ValueError(f"no such features: {', '.join(wrong)} (valid: 0 to {codes.d_sae - 1})")
    rated = {name: checked_values(values, f"ratings of {name}") for name, values in ratings.items()}
    for name, values in rated.items():
        if len(values) != codes.n_texts:
            raise ValueError(f"the codes are of {codes.n_texts} texts, but there are {len(values)} ratings of {name}")
        if np.ptp(values) == 0:
            raise ValueError(f"all ratings of {name} are {values[0]:g}: nothing goes with them")
    member = group_numbers(groups, codes.n_texts)
    n_groups = len(np.unique(member))
    if n_groups < FEWEST_GROUPS:
        raise ValueError(f"correlations need at least {FEWEST_GROUPS} groups of texts, got {n_groups}")
    # Texts of a group side by side, so that their sums are sums of neighbours.
    order = np.argsort(member, kind="stable")
    member = member[order]
    columns = codes.pooled(pooling).tocsc()[:, list(features.values())].toarray().astype(np.float64)[order]
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    rows = []
    for (emotion, feature), column in zip(features.items(), columns.T, strict=True):
        for name, values in rated.items():
            fires = float((column > 0).mean())
            if np.ptp(column) == 0:
                rows.append(RatingCorrelation(emotion, feature, name, None, None, None, None, None, None, fires))
                continue
            plain = _interval(column, values[order], member, ranked=False, **options)
            ranked = _interval(column, values[order], member, ranked=True, **options)
            rows.append(RatingCorrelation(emotion, feature, name, *plain, *ranked, fires))
    meta = {
        "hook_name": codes.hook_name,
        "d_sae": codes.d_sae,
        "pooling": pooling,
        **options,
        "n_texts": codes.n_texts,
        "n_groups": n_groups,
        "ratings": {name: {"mean": float(v.mean()), "sd": float(v.std())} for name, v in rated.items()},
    }
    return RatingCorrelations(meta, tuple(rows))


def _interval(
    first: Float[np.ndarray, "text"],
    second: Float[np.ndarray, "text"],
    member: Int[np.ndarray, "text"],
    *,
    ranked: bool,
    level: float,
    resamples: int,
    seed: int,
) -> tuple[float, float, float]:
    """Returns the correlation and the ends of its interval. `member` ascends."""
    n_groups = int(member[-1]) + 1
    estimates, errors = map(
        np.concatenate,
        zip(
            *(
                _correlations(first, second, member, weights, ranked=ranked)
                for weights in (np.ones((1, n_groups)), *_chunks(n_groups, len(member), resamples, seed))
            ),
            strict=True,
        ),
    )
    if abs(estimates[0]) > 1 - 1e-12:  # a straight line has no error, and no place on Fisher's scale
        straight = float(np.sign(estimates[0]))
        return straight, straight, straight
    with np.errstate(divide="ignore", invalid="ignore"):
        angles, angle_errors = np.arctanh(estimates), errors / (1 - estimates**2)
    found = studentised_interval(
        float(angles[0]), float(angle_errors[0]), angles[1:], angle_errors[1:], n_groups=n_groups, level=level
    )
    return float(estimates[0]), float(np.tanh(found.low)), float(np.tanh(found.high))


def _correlations(
    first: Float[np.ndarray, "text"],
    second: Float[np.ndarray, "text"],
    member: Int[np.ndarray, "text"],
    weights: Float[np.ndarray, "resample group"],
    *,
    ranked: bool,
) -> tuple[Float[np.ndarray, "resample"], Float[np.ndarray, "resample"]]:
    """Returns the correlation with each group's texts counted `weights` times, and its standard error by groups."""
    of_text = weights[:, member]
    total = of_text.sum(axis=1, keepdims=True)
    one, other = (
        _standardised(_mid_ranks(side, of_text) if ranked else side[None, :], of_text, total)
        for side in (first, second)
    )
    found = (of_text * one * other).sum(axis=1, keepdims=True) / total
    pull = (one * other - found * (one**2 + other**2) / 2) / total
    by_group = np.add.reduceat(pull, np.flatnonzero(np.diff(member, prepend=-1)), axis=1)
    n_groups = weights.shape[1]
    return found[:, 0], np.sqrt((weights * by_group**2).sum(axis=1) * n_groups / (n_groups - 1))


def _standardised(
    values: Float[np.ndarray, "rows text"],
    of_text: Float[np.ndarray, "resample text"],
    total: Float[np.ndarray, "resample 1"],
) -> Float[np.ndarray, "resample text"]:
    """Returns the values less their weighted mean, over their weighted spread: NaN where they have none."""
    centred = values - (of_text * values).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((of_text * centred**2).sum(axis=1, keepdims=True) / total)
    return np.divide(centred, spread, out=np.full_like(centred, np.nan), where=spread > 1e-12)


def _mid_ranks(
    values: Float[np.ndarray, "text"], of_text: Float[np.ndarray, "resample text"]
) -> Float[np.ndarray, "resample text"]:
    """Returns each text's mid-rank among the drawn ones, less one half, which no correlation sees."""
    order = np.argsort(values, kind="stable")
    opens_tie = np.diff(values[order], prepend=np.nan) != 0
    in_tie = np.add.reduceat(of_text[:, order], np.flatnonzero(opens_tie), axis=1)
    tie_of_text = np.empty(len(values), dtype=np.int64)
    tie_of_text[order] = np.cumsum(opens_tie) - 1
    return (np.cumsum(in_tie, axis=1) - in_tie / 2)[:, tie_of_text]


def _chunks(n_groups: int, n_texts: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "resample group"]]:
    rows = max(1, RESAMPLED_CELLS_PER_CHUNK // n_texts)
    for drawn in drawn_counts(n_groups, resamples, seed):
        for start in range(0, len(drawn), rows):
            yield drawn[start : start + rows]


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
