"""Intervals by resampling whole clusters, and the mean that fits ratios. Arrays in, numbers out; no model, no torch."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Num

RESAMPLED_CELLS_PER_CHUNK = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float
    level: float


def bootstrap_mean_interval(
    values: Num[np.ndarray, "value"] | Sequence[float | int],
    *,
    groups: np.ndarray | Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int,
) -> Interval:
    """Returns the mean of `values` with its percentile bootstrap interval.

    `groups` names what varies independently, one name per value (the prompt of each sample, say): whole
    groups are then resampled, and a group counts with all of its values. Without it every value is a group.
    ValueError for values that are not finite, fewer than 2 groups, and a level outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, got {_first_not_finite(array)}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if groups is not None and len(groups) != len(array):
        raise ValueError(f"{len(array)} values, but {len(groups)} groups")
    member = np.arange(len(array)) if groups is None else _numbered(groups)
    n_groups = len(np.unique(member))
    if n_groups < 2:
        raise ValueError(f"a bootstrap interval needs at least 2 groups of values, got {n_groups}")
    sums = np.bincount(member, weights=array)
    counts = np.bincount(member).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, RESAMPLED_CELLS_PER_CHUNK // n_groups)
    for first in range(0, resamples, step):
        drawn = rng.integers(n_groups, size=(min(step, resamples - first), n_groups))
        means[first : first + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(array.mean()), low=float(low), high=float(high), level=level)


def _numbered(names: np.ndarray | Sequence[Hashable]) -> Int[np.ndarray, "value"]:
    number: dict[Hashable, int] = {}
    plain = names.tolist() if isinstance(names, np.ndarray) else names
    return np.array([number.setdefault(name, len(number)) for name in plain], dtype=np.int64)


def geometric_mean(values: Num[np.ndarray, "value"] | Sequence[float | int]) -> float:
    """Returns exp of the mean logarithm, the mean that fits ratios. ValueError unless all are above 0."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("the geometric mean of no values is undefined")
    if not (array > 0).all():
        raise ValueError(f"a geometric mean needs values above 0, got {array[~(array > 0)][0]}")
    return float(np.exp(np.log(array).mean()))


def _first_not_finite(values: Num[np.ndarray, "..."]) -> float:
    return float(values[~np.isfinite(values)].flat[0])
