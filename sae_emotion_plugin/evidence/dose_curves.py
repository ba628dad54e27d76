"""A steering method's dose-response curve, and what is read off it: the effect at a cost, the area under the frontier.

Cost is the mean log perplexity ratio (steered over unsteered) over prompts, made monotone in the dose by pooling
adjacent violators, with the effects of pooled doses averaged; between doses the effect is linear in log cost. Every
curve starts at dose 0: ratio 1, effect 0. Nothing is extrapolated. Arrays in, numbers out; no model, no torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

FRONTIER_STEPS = 50

CurveStatistic: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Mean effects and log costs [resample dose] -> value [resample]."""


@dataclass(frozen=True)
class DosePoint:
    """One steered continuation against its unsteered one."""

    dose: float
    effect: float
    """Steered minus unsteered, in the direction that is wanted."""
    perplexity_ratio: float | None
    """Steered over unsteered; None for an empty continuation, which has no likelihood."""
    prompt: str
    seed: int = 0


@dataclass(frozen=True)
class MeanDose:
    """One dose over all prompts; prompts weigh equally."""

    dose: float
    effect: float
    perplexity_ratio: float
    n_points: int
    left_out: int
    """Points without a likelihood."""


@dataclass(frozen=True, repr=False)
class DoseCurve:
    """A method's points at several doses.

    ValueError for no points, doses not above 0, values that are not finite, ratios not above 0, one dose twice for
    a prompt and seed, and a dose of which every continuation is empty.
    """

    method: str
    points: tuple[DosePoint, ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError(f"{self.method} has no points")
        for point in self.points:
            ratio = 1.0 if point.perplexity_ratio is None else point.perplexity_ratio
            good = point.dose > 0 and ratio > 0 and all(map(math.isfinite, (point.dose, point.effect, ratio)))
            if not good:
                raise ValueError(f"{self.method}: dose and ratio must be above 0 and all values finite, got {point}")
        places = [(point.dose, point.prompt, point.seed) for point in self.points]
        if len(set(places)) != len(places):
            twice = next(place for i, place in enumerate(places) if place in places[:i])
            raise ValueError(f"{self.method} has more than one point for dose, prompt and seed {twice}")
        known = {point.dose for point in self.points if point.perplexity_ratio is not None}
        if empty := sorted({point.dose for point in self.points} - known):
            raise ValueError(f"{self.method}: every continuation at dose {empty[0]:g} is empty")

    @property
    def doses(self) -> tuple[float, ...]:
        """The doses, ascending."""
        return tuple(sorted({point.dose for point in self.points}))

    @property
    def left_out(self) -> int:
        """How many points have no likelihood (empty continuations)."""
        return sum(point.perplexity_ratio is None for point in self.points)

    def means(self) -> tuple[MeanDose, ...]:
        """The curve before anything is pooled: one entry a dose."""
        prompts = list(dict.fromkeys(point.prompt for point in self.points))
        effects, costs = (dose_means(values[None])[0] for values in prompt_means(self, prompts))
        rows = []
        for dose, effect, cost in zip(self.doses, effects.tolist(), costs.tolist(), strict=True):
            here = [point for point in self.points if point.dose == dose]
            missing = sum(point.perplexity_ratio is None for point in here)
            rows.append(MeanDose(dose, effect, math.exp(cost), len(here) - missing, missing))
        return tuple(rows)

    def to_dict(self) -> dict[str, Any]:
        """The method, its means and how many points were left out, ready for JSON."""
        return {"method": self.method, "means": [asdict(row) for row in self.means()], "left_out": self.left_out}

    def __repr__(self) -> str:
        n_prompts = len({point.prompt for point in self.points})
        lines = [f"DoseCurve({self.method}: {n_prompts} prompts, {self.left_out} points without likelihood left out)"]
        lines += [
            f"  dose {r.dose:g}: effect {r.effect:+.3f}, perplexity x{r.perplexity_ratio:.2f}" for r in self.means()
        ]
        return "\n".join(lines)


def prompt_means(curve: DoseCurve, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns effects and log costs, [prompt dose]: means over a prompt's seeds, NaN where none has a likelihood."""
    row, column = ({name: i for i, name in enumerate(names)} for names in (prompts, curve.doses))
    sums = np.zeros((3, len(row), len(column)))
    for point in curve.points:
        if point.perplexity_ratio is not None:
            sums[:, row[point.prompt], column[point.dose]] += (point.effect, math.log(point.perplexity_ratio), 1.0)
    effects, costs = (np.divide(s, sums[2], out=np.full(s.shape, np.nan), where=sums[2] > 0) for s in sums[:2])
    return effects, costs


def dose_means(drawn: Float[np.ndarray, "resample prompt dose"]) -> Float[np.ndarray, "resample dose"]:
    """Returns the mean over the prompts whose value is known, NaN where none is."""
    known = ~np.isnan(drawn)
    count = known.sum(axis=1)
    sums = np.where(known, drawn, 0.0).sum(axis=1)
    return np.divide(sums, count, out=np.full(sums.shape, np.nan), where=count > 0)


def curve_value(
    effects: Float[np.ndarray, "resample prompt dose"],
    costs: Float[np.ndarray, "resample prompt dose"],
    statistic: CurveStatistic,
) -> Float[np.ndarray, "resample"]:
    """Returns the statistic of each resample's mean curve, which starts at dose 0: no effect, ratio 1."""
    start = np.zeros((len(effects), 1))
    return statistic(*(np.hstack([start, dose_means(values)]) for values in (effects, costs)))


def monotone_costs(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the costs made non-decreasing along the doses (max-min formula), and the weights that pool equal ones."""
    n_doses = costs.shape[1]
    sums = np.concatenate([np.zeros((len(costs), 1)), np.cumsum(costs, axis=1)], axis=1)
    first, last = np.arange(n_doses)[:, None], np.arange(n_doses)[None, :]
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / np.maximum(last - first + 1, 1)
    monotone = np.stack(
        [means[:, : i + 1, i:].min(axis=2).max(axis=1) for i in range(n_doses)],
        axis=1,
    )
    same = np.abs(monotone[:, :, None] - monotone[:, None, :]) <= 1e-9
    return monotone, same / same.sum(axis=2, keepdims=True)


def _interpolated(target: float, effects: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Returns the effect at a log cost above 0 on pooled curves, NaN where it is not reached."""
    rows = np.arange(len(costs))
    reached = costs >= target - 1e-12
    after = np.maximum(reached.argmax(axis=1), 1)
    before = after - 1
    gap = costs[rows, after] - costs[rows, before]
    gap = np.where(reached.any(axis=1), gap, np.nan)
    share = np.minimum((target - costs[rows, before]) / gap, 1.0)
    return effects[rows, before] + share * (effects[rows, after] - effects[rows, before])


def _log_range(ratio: float) -> float:
    if not (math.isfinite(ratio) and ratio > 1):
        raise ValueError(f"the perplexity ratio must be above 1, got {ratio}")
    return math.log(ratio)


def effect_at(ratio: float) -> CurveStatistic:
    """Returns the statistic "effect at this perplexity ratio", NaN where the curve does not reach it.

    ValueError for a ratio not above 1.
    """
    target = _log_range(ratio)

    def statistic(effects: np.ndarray, costs: np.ndarray) -> np.ndarray:
        monotone, pooling = monotone_costs(costs)
        return _interpolated(target, np.einsum("rij,rj->ri", pooling, effects), monotone)

    return statistic


def best_effect_up_to(ratio: float) -> CurveStatistic:
    """Returns the statistic "best effect at cost <= c, averaged over log c from 0 to log `ratio`", never below 0.

    ValueError for a ratio not above 1.
    """
    whole = _log_range(ratio)

    def statistic(effects: np.ndarray, costs: np.ndarray) -> np.ndarray:
        monotone, pooling = monotone_costs(costs)
        pooled = np.einsum("rij,rj->ri", pooling, effects)
        value = np.zeros(len(costs))
        for target in (np.arange(FRONTIER_STEPS) + 0.5) / FRONTIER_STEPS * whole:
            affordable = np.where(monotone <= target, pooled, -np.inf).max(axis=1)
            between = np.nan_to_num(_interpolated(target, pooled, monotone), nan=-np.inf)
            value += np.maximum(np.maximum(affordable, between), 0.0) / FRONTIER_STEPS
        return np.where(np.isnan(costs).any(axis=1), np.nan, value)

    return statistic
