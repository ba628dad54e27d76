"""AUROC of a score with its clustered bootstrap interval, as a judge's `Figure`. Arrays in, numbers out."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Num

from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval
from sae_emotion_plugin.evidence.resampling import FEWEST_GROUPS_TO_STUDENTISE, group_numbers
from sae_emotion_plugin.judges.judge import Figure

FEWEST = 10
"""Texts on either side below which no AUROC is stated."""


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
    """The AUROC of `scores` with the ends of its 95 % interval over whole `groups` (`auroc_interval`).

    With fewer than 10 positives or 10 others, or either in fewer than 5 groups, the AUROC is not stated, only the
    counts. ValueError for scores that are not finite, and for unequal lengths.
    """
    n_positive, n = int(positives.sum()), len(positives)
    if not len(scores) == n == len(groups):
        raise ValueError(f"{len(scores)} scores, {n} labels and {len(groups)} groups")
    member = group_numbers(groups, n)
    fewest_groups = min(len(np.unique(member[side])) for side in (positives, ~positives))
    if min(n_positive, n - n_positive) < FEWEST or fewest_groups < FEWEST_GROUPS_TO_STUDENTISE:
        return Figure(measure, on, None, None, None, n_positive, n)
    found = auroc_interval(scores, positives, groups=member, resamples=resamples, seed=seed)
    return Figure(measure, on, round(found.mean, 4), round(found.low, 4), round(found.high, 4), n_positive, n)
