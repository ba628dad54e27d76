"""Intervals by resampling whole clusters, comparisons of two methods with a margin, and the mean that fits ratios.

Arrays in, numbers out; no model, no torch. An interval of a mean reaches, on each side, as far as the farther of two
ends: the studentised bootstrap's (bootstrap-t: Efron & Tibshirani 1993, ch. 12), which is too short for heavy tails,
and Student's t, which is too short for skewed values. Percentile intervals are too short with few clusters (Hesterberg
2015, section 3). Coverage of nominal 95 % intervals in 1,000 simulated data sets each, normal / skewed (exponential) /
heavy-tailed (t, 3 degrees of freedom) cluster effects, three values a cluster:

    clusters   percentile           studentised          Student's t          the farther of the last two
    10         90.9 / 86.7 / 89.9   96.1 / 92.8 / 93.5   95.8 / 91.0 / 95.6   97.0 / 93.8 / 96.2
    20         94.2 / 90.6 / 91.3   94.4 / 93.7 / 92.2   94.7 / 91.5 / 95.3   95.3 / 95.0 / 95.7
    50         93.6 / 92.4 / 92.7   95.7 / 93.7 / 92.1   95.7 / 93.3 / 94.2   96.2 / 95.4 / 94.5

What it costs: intervals 4 to 14 % longer than Student's for normal effects, and with yes/no values and 10 clusters they
cover 99 %.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.stats import t as student_t

RESAMPLED_CELLS_PER_CHUNK = 2_000_000
FEWEST_GROUPS_TO_STUDENTISE = 5
"""With fewer groups, many resamples hold one group alone and have no spread: Student's t is used instead."""
EFFECTIVELY_ZERO = 1e-9

IntervalKind = Literal["studentised", "student", "percentile"]
Verdict = Literal["superior", "non-inferior", "inferior", "inconclusive"]


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    level: float = 0.95
    resamples: int = 2_000
    seed: int = 0

    def ends(self, values: Float[np.ndarray, "prompt seed"]) -> tuple[float | None, float | None]:
        """The interval's ends, over prompts and then seeds; None with fewer than 2 prompts that have a value."""
        prompts, seeds = np.nonzero(~np.isnan(values))
        if len(set(prompts.tolist())) < 2:
            return None, None
        settings = {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        found = hierarchical_interval(values[prompts, seeds], prompts=prompts, seeds=seeds, **settings)
        return found.low, found.high


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval."""

    mean: float
    """The estimate; named for its commonest kind."""
    low: float
    high: float
    level: float
    kind: IntervalKind = "percentile"
    n_groups: int = 0
    """What was resampled: documents, prompts."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """What the first method has more than the second, in pairs, and whether that keeps a margin stated beforehand."""

    first: float
    second: float
    difference: float
    """first - second; above 0 is in favour of the first."""
    low: float
    high: float
    level: float
    margin: float
    """The first may be worse by less than this and still counts as non-inferior."""
    verdict: Verdict
    """"superior": the interval lies above 0; "non-inferior": above -margin; "inferior": below -margin; else
    "inconclusive". With the two-sided 95 % interval each one-sided claim has an error rate of 2.5 %."""
    n_groups: int

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def bootstrap_mean_interval(
    values: Num[np.ndarray, "value"] | Sequence[float | int],
    *,
    groups: np.ndarray | Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int,
    kind: str = "studentised",
) -> Interval:
    """Returns the mean of `values` with its bootstrap interval, studentised unless `kind` says otherwise.

    `groups` names what varies independently, one name per value (the prompt of each sample, say): whole
    groups are then resampled, and a group counts with all of its values. Without it every value is a group.
    A studentised interval may reach beyond the values' range; with fewer than 5 groups, or where too many
    resamples have no spread, it is Student's t (the result's `kind` tells). Coverages: the module's docstring.
    ValueError for values that are not finite, fewer than 2 groups, a level outside (0, 1) and an unknown kind.
    """
    array = checked_values(values, "values")
    check_resampling(level, resamples)
    if kind not in ("studentised", "percentile"):
        raise ValueError(f"kind must be studentised or percentile, got {kind!r}")
    member = group_numbers(groups, len(array))
    n_groups = len(np.unique(member))
    if n_groups < 2:
        raise ValueError(f"a bootstrap interval needs at least 2 groups of values, got {n_groups}")
    # Centred, so that squares lose no digits to a large mean. [1, value] sums and their products, per group:
    mean = float(array.mean())
    sums = np.bincount(member, weights=array - mean)
    counts = np.bincount(member).astype(np.float64)
    moments = np.column_stack([sums, counts, sums**2, sums * counts, counts**2])
    drawn = np.concatenate([weights @ moments for weights in drawn_counts(n_groups, resamples, seed)])
    means = drawn[:, 0] / drawn[:, 1]
    if kind == "percentile":
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return Interval(mean, mean + float(low), mean + float(high), level, "percentile", n_groups)
    correction = n_groups / (n_groups - 1)
    squares = drawn[:, 2] - 2 * means * drawn[:, 3] + means**2 * drawn[:, 4]
    errors = np.sqrt(np.maximum(squares, 0) * correction) / drawn[:, 1]
    error = float(np.sqrt((sums**2).sum() * correction) / counts.sum())
    return _interval_of_mean(mean, error, mean + means, errors, n_groups, level)


def hierarchical_interval(
    values: Num[np.ndarray, "value"] | Sequence[float | int],
    *,
    prompts: np.ndarray | Sequence[Hashable],
    seeds: np.ndarray | Sequence[Hashable],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int,
) -> Interval:
    """Returns the mean over prompts of each prompt's mean over seeds, with its hierarchical bootstrap interval.

    Prompts are resampled, then seeds within each drawn prompt; prompts weigh equally whatever their numbers of
    seeds, and several values of one prompt and seed are averaged first. Give paired differences (steered minus
    unsteered with the same prompt and seed). Resampling on two levels counts the seeds' noise twice, so that
    percentile ends would cover 97.5 % where seeds dominate and 89.6 % where prompts do (10 prompts, 3 seeds);
    studentised ones, with the error recomputed in each resample and no shorter than Student's, cover 95.7 to 97.0 %.
    ValueError for values that are not finite, unequal lengths and fewer than 2 prompts.
    """
    array = checked_values(values, "values")
    check_resampling(level, resamples)
    table = by_prompt_and_seed(array, prompts, seeds)
    n_prompts = len(table)
    if n_prompts < 2:
        raise ValueError(f"a bootstrap interval needs at least 2 prompts, got {n_prompts}")
    present = ~np.isnan(table)
    by_prompt = np.nanmean(table, axis=1)
    filled = np.where(present, table, 0.0)
    means, errors = [], []
    for drawn, picked in hierarchical_draws(present.sum(axis=1), resamples, seed):
        slots = (filled[drawn[:, :, None], picked] * (picked >= 0)).sum(axis=2) / (picked >= 0).sum(axis=2)
        means.append(slots.mean(axis=1))
        errors.append(slots.std(axis=1, ddof=1) / np.sqrt(n_prompts))
    error = float(by_prompt.std(ddof=1) / np.sqrt(n_prompts))
    replicates = np.concatenate(means), np.concatenate(errors)
    return _interval_of_mean(float(by_prompt.mean()), error, *replicates, n_prompts, level)


def compare_hierarchical(
    first: Num[np.ndarray, "value"] | Sequence[float | int],
    second: Num[np.ndarray, "value"] | Sequence[float | int],
    *,
    prompts: np.ndarray | Sequence[Hashable],
    seeds: np.ndarray | Sequence[Hashable],
    margin: float,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int,
) -> Comparison:
    """Returns the paired comparison of two methods' values on the same prompts and seeds, prompts weighing equally.

    As `hierarchical_interval` of first - second. ValueError as there, and for a margin below 0.
    """
    one, other = checked_values(first, "values"), checked_values(second, "values")
    if len(one) != len(other):
        raise ValueError(f"paired values must be equally many, got {len(one)} and {len(other)}")
    interval = hierarchical_interval(
        one - other, prompts=prompts, seeds=seeds, level=level, resamples=resamples, seed=seed
    )
    base = float(np.nanmean(by_prompt_and_seed(other, prompts, seeds), axis=1).mean())
    return compared(interval, base + interval.mean, base, margin)


def compared(interval: Interval, first: float, second: float, margin: float) -> Comparison:
    """Returns the verdict on an `interval` of first - second (see `Comparison`). ValueError for a margin below 0."""
    if not (np.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin must be 0 or more, got {margin}")
    verdict: Verdict = "inconclusive"
    if interval.low > 0:
        verdict = "superior"
    elif interval.low > -margin:
        verdict = "non-inferior"
    elif interval.high < -margin:
        verdict = "inferior"
    ends = (interval.low, interval.high, interval.level)
    return Comparison(first, second, interval.mean, *ends, float(margin), verdict, interval.n_groups)


def studentised_interval(
    estimate: float,
    error: float,
    replicates: Float[np.ndarray, "resample"],
    errors: Float[np.ndarray, "resample"],
    *,
    n_groups: int,
    level: float,
) -> Interval:
    """Returns the bootstrap-t interval from an estimate and its replicates, each with its own standard error.

    Student's t with `n_groups` - 1 degrees of freedom, when fewer than 5 groups or more resamples without
    spread than the tail holds leave no such interval. Replicates that are NaN are left out.
    """
    known = np.isfinite(replicates) & np.isfinite(errors)
    deviations, errors = replicates[known] - estimate, errors[known]
    if n_groups >= FEWEST_GROUPS_TO_STUDENTISE and len(deviations):
        flat = errors <= EFFECTIVELY_ZERO * error
        scaled = np.divide(deviations, errors, out=np.zeros_like(deviations), where=~flat)
        moved = flat & (np.abs(deviations) > EFFECTIVELY_ZERO * error)
        scaled[moved] = np.copysign(np.inf, deviations[moved])
        low, high = np.quantile(scaled, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        if np.isfinite(low) and np.isfinite(high):
            ends = float(estimate - high * error), float(estimate - low * error)
            return Interval(estimate, *ends, level, "studentised", n_groups)
    half = _student_half(error, n_groups, level)
    return Interval(estimate, estimate - half, estimate + half, level, "student", n_groups)


def _interval_of_mean(
    mean: float,
    error: float,
    replicates: Float[np.ndarray, "resample"],
    errors: Float[np.ndarray, "resample"],
    n_groups: int,
    level: float,
) -> Interval:
    """The studentised interval, no end of it nearer than Student's t has it (the module's docstring says why)."""
    found = studentised_interval(mean, error, replicates, errors, n_groups=n_groups, level=level)
    half = _student_half(error, n_groups, level)
    return replace(found, low=min(found.low, mean - half), high=max(found.high, mean + half))


def _student_half(error: float, n_groups: int, level: float) -> float:
    return float(student_t.ppf((1 + level) / 2, n_groups - 1)) * error


def drawn_counts(n_groups: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "resample group"]]:
    """Yields how often each group is drawn in each resample, in chunks of bounded memory."""
    rng = np.random.default_rng(seed)
    step = max(1, RESAMPLED_CELLS_PER_CHUNK // n_groups)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = rng.integers(n_groups, size=(rows, n_groups)) + n_groups * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n_groups).reshape(rows, n_groups).astype(np.float64)


def hierarchical_draws(
    n_seeds: Int[np.ndarray, "prompt"], resamples: int, seed: int
) -> Iterator[tuple[Int[np.ndarray, "resample slot"], Int[np.ndarray, "resample slot pick"]]]:
    """Yields the prompt drawn for each slot, and the seeds drawn of it as positions from 0, -1 beyond its number.

    There are as many slots as prompts; a drawn prompt gives as many seeds as it has. Bounded memory.
    """
    rng = np.random.default_rng(seed)
    n_prompts, most = len(n_seeds), int(n_seeds.max())
    step = max(1, RESAMPLED_CELLS_PER_CHUNK // (n_prompts * most))
    for first in range(0, resamples, step):
        drawn = rng.integers(n_prompts, size=(min(step, resamples - first), n_prompts))
        own = n_seeds[drawn][:, :, None]
        picked = (rng.random((*drawn.shape, most)) * own).astype(np.int64)
        yield drawn, np.where(np.arange(most) < own, picked, -1)


def by_prompt_and_seed(
    values: Float[np.ndarray, "value"],
    prompts: np.ndarray | Sequence[Hashable],
    seeds: np.ndarray | Sequence[Hashable],
) -> Float[np.ndarray, "prompt seed"]:
    """Returns the mean value of each prompt's seeds, prompts by first appearance; NaN behind a prompt's last seed."""
    for what, names in (("prompts", prompts), ("seeds", seeds)):
        if len(names) != len(values):
            raise ValueError(f"{len(values)} values, but {len(names)} {what}")
    prompt, own_seed = group_numbers(prompts, len(values)), group_numbers(seeds, len(values))
    unit = group_numbers(list(zip(prompt.tolist(), own_seed.tolist(), strict=True)), len(values))
    if not len(unit):
        return np.zeros((0, 0))
    _, first = np.unique(unit, return_index=True)
    of_unit = prompt[first]
    means = np.bincount(unit, weights=values) / np.bincount(unit)
    order = np.argsort(of_unit, kind="stable")
    counts = np.bincount(of_unit)
    position = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), int(counts.max())), np.nan)
    table[of_unit[order], position] = means[order]
    return table


def group_numbers(groups: np.ndarray | Sequence[Hashable] | None, n_values: int) -> Int[np.ndarray, "value"]:
    """Returns the number of each value's group, by first appearance; without `groups`, every value is its own."""
    if groups is None:
        return np.arange(n_values)
    if len(groups) != n_values:
        raise ValueError(f"{n_values} values, but {len(groups)} groups")
    number: dict[Hashable, int] = {}
    plain = groups.tolist() if isinstance(groups, np.ndarray) else groups
    return np.array([number.setdefault(name, len(number)) for name in plain], dtype=np.int64)


def check_resampling(level: float, resamples: int) -> None:
    """ValueError for a level outside (0, 1) and for fewer than 1 resample."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")


def checked_values(values: Num[np.ndarray, "..."] | Sequence[float | int], what: str) -> Float[np.ndarray, "..."]:
    """Returns `values` as float64. ValueError, calling them `what`, when one is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite, got {float(array[~np.isfinite(array)].flat[0])}")
    return array


def geometric_mean(values: Num[np.ndarray, "value"] | Sequence[float | int]) -> float:
    """Returns exp of the mean logarithm, the mean that fits ratios. ValueError unless all are above 0."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("the geometric mean of no values is undefined")
    if not (array > 0).all():
        raise ValueError(f"a geometric mean needs values above 0, got {array[~(array > 0)][0]}")
    return float(np.exp(np.log(array).mean()))
