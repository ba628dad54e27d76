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
from jaxtyping import Bool, Float

FRONTIER_STEPS = 50

Slots: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Effects and log costs, [resample slot dose], NaN where a slot has no likelihood."""
CurveStatistic: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Mean effects and log costs [resample dose] -> value [resample], its derivatives by each [resample dose]."""


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
        effects, costs = (dose_means(values)[0] for values in slot_means(curve_table(self, *prompt_table([self]))))
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


def prompt_table(
    curves: Sequence[DoseCurve],
) -> tuple[dict[tuple[str, int], tuple[int, int]], Bool[np.ndarray, "prompt seed"]]:
    """Returns the place of each (prompt, seed) in a table, and which places are taken."""
    seeds: dict[str, dict[int, int]] = {}
    for curve in curves:
        for point in curve.points:
            own = seeds.setdefault(point.prompt, {})
            own.setdefault(point.seed, len(own))
    places = {(p, s): (row, column) for row, (p, own) in enumerate(seeds.items()) for s, column in own.items()}
    present = np.zeros((len(seeds), max(len(own) for own in seeds.values())), dtype=bool)
    for place in places.values():
        present[place] = True
    return places, present


def curve_table(
    curve: DoseCurve, places: dict[tuple[str, int], tuple[int, int]], present: Bool[np.ndarray, "prompt seed"]
) -> Slots:
    """Returns effects and log costs, [prompt seed dose], dose 0 first; NaN where there is no likelihood."""
    doses = {dose: i for i, dose in enumerate(curve.doses)}
    effects = np.full((*present.shape, len(doses)), np.nan)
    costs = effects.copy()
    for point in curve.points:
        if point.perplexity_ratio is not None:
            place = (*places[point.prompt, point.seed], doses[point.dose])
            effects[place], costs[place] = point.effect, math.log(point.perplexity_ratio)
    return effects, costs


def slot_means(table: Slots, drawn: np.ndarray | None = None, picked: np.ndarray | None = None) -> Slots:
    """Returns each slot's means over its seeds, [resample slot dose]: the prompts themselves where nothing is drawn."""
    known = ~np.isnan(table[0])
    if drawn is None or picked is None:
        used, chosen = known[None], tuple(values[None] for values in table)
    else:
        place = drawn[:, :, None], picked
        used = known[place] & (picked >= 0)[..., None]
        chosen = tuple(values[place] for values in table)
    count = used.sum(axis=2)
    sums = (np.where(used, values, 0.0).sum(axis=2) for values in chosen)
    effects, costs = (np.divide(s, count, out=np.full(s.shape, np.nan), where=count > 0) for s in sums)
    return effects, costs


def dose_means(slots: Float[np.ndarray, "resample slot dose"]) -> Float[np.ndarray, "resample dose"]:
    """Returns the mean over the slots that are known, NaN where none is."""
    known = ~np.isnan(slots)
    count = known.sum(axis=1)
    sums = np.where(known, slots, 0.0).sum(axis=1)
    return np.divide(sums, count, out=np.full(sums.shape, np.nan), where=count > 0)


def value_and_pulls(slots: Slots, statistic: CurveStatistic) -> tuple[np.ndarray, np.ndarray]:
    """Returns the statistic of each resample, and what each slot adds to it to first order, [resample slot].

    The pulls' standard deviation over the root of their number is the statistic's standard error (delta method).
    """
    means = [dose_means(values) for values in slots]
    start = np.zeros((len(means[0]), 1))
    value, *slopes = statistic(*(np.hstack([start, mean]) for mean in means))
    pulls = np.zeros(slots[0].shape[:2])
    for values, mean, slope in zip(slots, means, slopes, strict=True):
        known = ~np.isnan(values)
        weight = known.shape[1] / np.maximum(known.sum(axis=1, keepdims=True), 1)
        pulls += (np.where(known, values - mean[:, None], 0.0) * weight * slope[:, None, 1:]).sum(axis=2)
    return value, pulls


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


def _interpolated(
    target: float, effects: np.ndarray, costs: np.ndarray, pooling: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the effect at a log cost above 0 on pooled curves, NaN where it is not reached, and its derivatives."""
    rows = np.arange(len(costs))
    reached = costs >= target - 1e-12
    after = np.maximum(reached.argmax(axis=1), 1)
    before = after - 1
    gap = costs[rows, after] - costs[rows, before]
    gap = np.where(reached.any(axis=1), gap, np.nan)
    share = np.minimum((target - costs[rows, before]) / gap, 1.0)[:, None]
    rise = effects[rows, after] - effects[rows, before]
    by_effect = (1 - share) * pooling[rows, before] + share * pooling[rows, after]
    return effects[rows, before] + share[:, 0] * rise, by_effect, -(rise / gap)[:, None] * by_effect


def _log_range(ratio: float) -> float:
    if not (math.isfinite(ratio) and ratio > 1):
        raise ValueError(f"the perplexity ratio must be above 1, got {ratio}")
    return math.log(ratio)


def effect_at(ratio: float) -> CurveStatistic:
    """Returns the statistic "effect at this perplexity ratio", NaN where the curve does not reach it.

    ValueError for a ratio not above 1.
    """
    target = _log_range(ratio)

    def statistic(effects: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        monotone, pooling = monotone_costs(costs)
        pooled = np.einsum("rij,rj->ri", pooling, effects)
        return _interpolated(target, pooled, monotone, pooling)

    return statistic


def best_effect_up_to(ratio: float) -> CurveStatistic:
    """Returns the statistic "best effect at cost <= c, averaged over log c from 0 to log `ratio`", never below 0.

    ValueError for a ratio not above 1.
    """
    whole = _log_range(ratio)

    def statistic(effects: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        monotone, pooling = monotone_costs(costs)
        pooled = np.einsum("rij,rj->ri", pooling, effects)
        value, by_effect, by_cost = np.zeros(len(costs)), np.zeros_like(costs), np.zeros_like(costs)
        rows = np.arange(len(costs))
        for target in (np.arange(FRONTIER_STEPS) + 0.5) / FRONTIER_STEPS * whole:
            affordable = np.where(monotone <= target, pooled, -np.inf)
            best = affordable.argmax(axis=1)
            top = affordable[rows, best]
            there, effect_slope, cost_slope = _interpolated(target, pooled, monotone, pooling)
            between = np.nan_to_num(there, nan=-np.inf) > top
            something = np.where(between, there, top) > 0
            value += np.where(something, np.where(between, there, top), 0.0) / FRONTIER_STEPS
            effect_slope = np.where(between[:, None], effect_slope, pooling[rows, best])
            by_effect += np.where(something[:, None], effect_slope, 0.0) / FRONTIER_STEPS
            by_cost += np.where((between & something)[:, None], cost_slope, 0.0) / FRONTIER_STEPS
        return np.where(np.isnan(costs).any(axis=1), np.nan, value), by_effect, by_cost

    return statistic
