"""Several dose curves of a kind (random directions) as one method: their mean at a cost, alone or less another curve.

Each curve has its own dose of the cost; the same drawn prompts serve all. With one curve the numbers are those of
`equal_cost.effect_at_cost`, `compare_at_cost` and `frontier_area`. Arrays in, numbers out; no model, no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student_t

from sae_emotion_plugin.evidence.dose_curves import (
    CurveStatistic,
    DoseCurve,
    curve_value,
    dose_means,
    monotone_costs,
    prompt_means,
)
from sae_emotion_plugin.evidence.equal_cost import LARGEST_UNREACHED_SHARE
from sae_emotion_plugin.evidence.resampling import Resampling

RESAMPLES_AT_ONCE = 250


@dataclass(frozen=True)
class CurveEstimate:
    """An estimate with the ends of its interval and its two-sided p against 0; None for what is not known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def turned(one: CurveEstimate) -> CurveEstimate:
    """The second minus the first, where `one` is the first minus the second."""
    value, low, high = (None if end is None else -end for end in (one.value, one.high, one.low))
    return CurveEstimate(value, low, high, one.p)


def group_estimate(
    curves: Sequence[DoseCurve], reference: DoseCurve | None, statistic: CurveStatistic, draw: Resampling
) -> tuple[CurveEstimate, int]:
    """The mean of the curves' values, less the reference's where there is one; and how many curves have a value.

    The interval is Student's t with the bootstrap's standard error over prompts, as in `evidence.equal_cost`.
    """
    others = [] if reference is None else [reference]
    if reference is not None:
        curves, others = shared_points(curves, others)
    prompts = prompts_of([*curves, *others])
    own = curve_values(curves, prompts, statistic)
    n_reached = int((~np.isnan(own)).sum())
    base = curve_values(others, prompts, statistic).sum()
    if not n_reached or math.isnan(base):
        return CurveEstimate(), n_reached
    value, n = float(np.nanmean(own) - base), len(prompts)
    if n < 2 or draw.resamples < 1:
        return CurveEstimate(value), n_reached
    drawn = _drawn([*curves, *others], prompts, statistic, draw)
    mine = drawn[: len(curves)]
    missing = np.isnan(mine).all(axis=0)
    means = np.where(missing, np.nan, np.nansum(mine, axis=0) / np.maximum((~np.isnan(mine)).sum(axis=0), 1))
    values = means - drawn[len(curves) :].sum(axis=0)
    known = values[~np.isnan(values)]
    if len(known) < (1 - LARGEST_UNREACHED_SHARE) * draw.resamples:
        return CurveEstimate(value), n_reached
    error = float(known.std()) * math.sqrt(n / (n - 1))
    half = float(student_t.ppf((1 + draw.level) / 2, n - 1)) * error
    p = 2 * float(student_t.sf(abs(value) / error, n - 1)) if error else float(value == 0)
    return CurveEstimate(value, value - half, value + half, p), n_reached


def curve_values(
    curves: Sequence[DoseCurve], prompts: Sequence[str], statistic: CurveStatistic
) -> Float[np.ndarray, " curve"]:
    """Each curve's value, NaN where it has none."""
    tables = [prompt_means(curve, prompts) for curve in curves]
    return np.array([float(curve_value(effects[None], costs[None], statistic)[0]) for effects, costs in tables])


def _drawn(
    curves: Sequence[DoseCurve], prompts: Sequence[str], statistic: CurveStatistic, draw: Resampling
) -> Float[np.ndarray, "curve resample"]:
    """Each curve's value in each resample of the prompts, all curves have the same draws."""
    tables = [prompt_means(curve, prompts) for curve in curves]
    rng = np.random.default_rng(draw.seed)
    parts = []
    for first in range(0, draw.resamples, RESAMPLES_AT_ONCE):
        size = (min(RESAMPLES_AT_ONCE, draw.resamples - first), len(prompts))
        picked = rng.integers(len(prompts), size=size)
        parts.append([curve_value(effects[picked], costs[picked], statistic) for effects, costs in tables])
    return np.concatenate([np.array(part) for part in parts], axis=1)


def cost_weights(curve: DoseCurve, statistic: CurveStatistic) -> Float[np.ndarray, " dose"] | None:
    """The weight of each dose's mean in the curve's effect at a cost (`effect_at`); None where it is not reached."""
    _, costs = prompt_means(curve, prompts_of([curve]))
    n_doses = len(curve.doses) + 1
    mean_costs = np.concatenate([[0.0], dose_means(costs[None])[0]])
    # The effect at a cost is linear in the doses' effects: what it makes of unit vectors are their weights.
    weights = statistic(np.eye(n_doses), np.tile(mean_costs, (n_doses, 1)))[1:]
    return None if np.isnan(weights).any() else weights


def prompt_effects(curve: DoseCurve, weights: Float[np.ndarray, " dose"]) -> Float[np.ndarray, " prompt"]:
    """Each prompt's own mean effect with these weights of the doses; without prompts that lack one of them."""
    effects, _ = prompt_means(curve, prompts_of([curve]))
    used = weights != 0
    found = effects[:, used] @ weights[used]
    return found[~np.isnan(found)]


def reach(curve: DoseCurve) -> float:
    """The largest perplexity ratio that the curve reaches, once made monotone."""
    costs = np.array([[0.0, *(math.log(row.perplexity_ratio) for row in curve.means())]])
    return math.exp(float(monotone_costs(costs)[0].max()))


def shared_points(first: Sequence[DoseCurve], second: Sequence[DoseCurve]) -> tuple[list[DoseCurve], list[DoseCurve]]:
    """Both without the points of prompts and seeds that some of the curves lack. ValueError when nothing is left."""
    places = set.intersection(*({(one.prompt, one.seed) for one in curve.points} for curve in (*first, *second)))
    if not places:
        raise ValueError(f"{first[0].method} and {second[0].method} have no prompt and seed in common")

    def kept(curve: DoseCurve) -> DoseCurve:
        points = [one for one in curve.points if (one.prompt, one.seed) in places]
        known = {one.dose for one in points if one.perplexity_ratio is not None}
        return replace(curve, points=tuple(one for one in points if one.dose in known))

    return [kept(curve) for curve in first], [kept(curve) for curve in second]


def prompts_of(curves: Sequence[DoseCurve]) -> list[str]:
    """The prompts of the curves, each once."""
    return list(dict.fromkeys(point.prompt for curve in curves for point in curve.points))
