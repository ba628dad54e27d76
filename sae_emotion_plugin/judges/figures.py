"""AUROC of a score with its clustered bootstrap interval, as a judge's `Figure`. Arrays in, numbers out."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from sae_emotion_plugin.evidence.resampling import group_numbers
from sae_emotion_plugin.judges.judge import Figure

FEWEST = 10
"""Texts on either side below which no AUROC is stated."""
_CELLS_AT_ONCE = 2_000_000


def auroc_figure(
    measure: str,
    on: str,
    scores: Num[np.ndarray, "text"],
    positives: Bool[np.ndarray, "text"],
    groups: Num[np.ndarray, "text"] | Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Figure:
    """The AUROC of `scores` with the ends of its interval: 95 % percentile bootstrap over whole `groups`.

    With fewer than 10 positives or 10 others the AUROC is not stated, only the counts. Resamples without one of the
    classes are left out. ValueError for scores that are not finite, and for unequal lengths.
    """
    if not len(scores) == len(positives) == len(groups):
        raise ValueError(f"{len(scores)} scores, {len(positives)} labels and {len(groups)} groups")
    if not np.isfinite(scores).all():
        raise ValueError(f"{measure}: scores must be finite, got {scores[~np.isfinite(scores)][0]}")
    n_positive, n = int(positives.sum()), len(positives)
    if min(n_positive, n - n_positive) < FEWEST:
        return Figure(measure, on, None, None, None, n_positive, n)
    values, level = np.unique(scores, return_inverse=True)
    whole = _weighted_auroc(level, len(values), positives, np.ones((1, n)))[0]
    member = group_numbers(groups, n)
    n_groups = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = []
    step = max(1, _CELLS_AT_ONCE // n)
    for first in range(0, resamples, step):
        chosen = rng.integers(n_groups, size=(min(step, resamples - first), n_groups))
        times = np.stack([np.bincount(one, minlength=n_groups) for one in chosen])
        drawn.append(_weighted_auroc(level, len(values), positives, times[:, member].astype(np.float64)))
    low, high = np.nanquantile(np.concatenate(drawn), [0.025, 0.975])
    return Figure(measure, on, round(float(whole), 4), round(float(low), 4), round(float(high), 4), n_positive, n)


def _weighted_auroc(
    level: Int[np.ndarray, "text"],
    n_levels: int,
    positives: Bool[np.ndarray, "text"],
    weights: Float[np.ndarray, "draw text"],
) -> Float[np.ndarray, "draw"]:
    """AUROC of each row of weights, ties counting one half; NaN where a class has no weight."""
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(n_levels))
    above = np.add.reduceat((weights * positives)[:, order], starts, axis=1)
    below = np.add.reduceat((weights * ~positives)[:, order], starts, axis=1)
    won = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    pairs = above.sum(axis=1) * below.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
