"""Judged texts of many steering variants -> what each method does at the same cost, and against random directions."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sae_emotion_plugin.evidence.association import holm
from sae_emotion_plugin.evidence.curve_groups import (
    CurveEstimate,
    cost_weights,
    curve_values,
    group_estimate,
    prompt_effects,
    prompts_of,
    reach,
    shared_points,
    turned,
)
from sae_emotion_plugin.evidence.dose_curves import (
    DoseCurve,
    DosePoint,
    best_effect_up_to,
    dose_means,
    effect_at,
    prompt_means,
)
from sae_emotion_plugin.evidence.resampling import Resampling, check_resampling
from sae_emotion_plugin.generation.records import mean_of_known
from sae_emotion_plugin.steering_studies.method_effects import MethodEffect, MethodEffects, NullComparison
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScores

logger = logging.getLogger(__name__)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Tried:
    """A variant of the scores: which method it belongs to, and the emotion that it is meant to move (None: any)."""

    variant: str
    method: str
    emotion: str | None


def method_effects(
    scores: SweepScores,
    tried: Sequence[Tried],
    measures: Mapping[tuple[str, str], tuple[str, int]],
    *,
    reference: str,
    nulls: Sequence[str] = (),
    perplexity_ratios: Sequence[float] = (1.5,),
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
) -> MethodEffects:
    """Every method's effect, difference from the reference and place among the random directions, at equal cost.

    Args:
        tried: the variants in the order of the table. Those of no emotion are compared for each.
        measures: (judge, emotion) -> (measure, 1, or -1 where the emotion lowers it); the pairs that are wanted.
        reference: the method that all others are compared with.
        nulls: the methods that are random directions.

    Raises:
        ValueError: a reference or null that was not tried, scores that lack a variant, a ratio not above 1.
    """
    check_resampling(level, resamples)
    methods = list(dict.fromkeys(one.method for one in tried))
    for name in (reference, *nulls):
        if name not in methods:
            raise ValueError(f"the method {name!r} was not tried (valid: {', '.join(methods)})")
    scores, draw = _without_empty_doses(scores), Resampling(level, resamples, seed)
    empty = {one.variant for one in tried} - {row.variant for row in scores.rows}
    if empty:
        logger.warning("left out, as all of their texts are empty: %s", ", ".join(sorted(empty)))
    rows, compared = [], []
    for judge, emotion in measures:
        measure, sign = measures[judge, emotion]
        curves: dict[str, list[DoseCurve]] = {}
        plain: dict[str, list[DoseCurve]] = {}
        loops: dict[str, list[DoseCurve]] = {}
        for one in tried:
            if one.emotion in (None, emotion) and one.variant not in empty:
                for into, masked in ((curves, True), (plain, False)):
                    curve = scores.curve(one.variant, judge, measure, masked=masked, sign=sign)
                    into.setdefault(one.method, []).append(curve)
                loops.setdefault(one.method, []).append(_degeneration(scores, one.variant, judge, measure))
        for ratio in map(float, perplexity_ratios):
            for method in curves:
                where = (emotion, judge, measure, method, ratio)
                rows.append(_effect(where, curves[method], plain[method], loops[method], curves.get(reference), draw))
                for null in nulls:
                    if method not in nulls and null in curves:
                        here = (emotion, judge, method, null, ratio)
                        compared.append(_against(here, curves[method][0], curves[null], draw))
    own = {
        "reference": reference,
        "nulls": list(nulls),
        "perplexity_ratios": [float(ratio) for ratio in perplexity_ratios],
        "level": level,
        "resamples": resamples,
        "seed": seed,
    }
    rows = _corrected(_corrected(rows, "p", "p_holm"), "difference_p", "difference_p_holm")
    compared = _corrected(compared, "difference_p", "difference_p_holm")
    return MethodEffects({**(meta or {}), **own}, tuple(rows), tuple(compared))


def _degeneration(scores: SweepScores, variant: str, judge: str, measure: str) -> DoseCurve:
    """How much more often a dose's texts are degenerate than unsteered ones, as a curve; it has no cost."""
    rows = [row for row in scores.of(variant, judge, measure) if row.dose > 0]
    points = [
        DosePoint(row.dose, float(row.degenerate) - float(row.baseline_degenerate), 1.0, row.prompt, row.seed)
        for row in rows
    ]
    return DoseCurve(variant, tuple(points))


def _effect(
    where: tuple[str, str, str, str, float],
    curves: Sequence[DoseCurve],
    plain: Sequence[DoseCurve],
    loops: Sequence[DoseCurve],
    reference: Sequence[DoseCurve] | None,
    draw: Resampling,
) -> MethodEffect:
    at_cost, area = effect_at(where[-1]), best_effect_up_to(where[-1])
    effect, n_reached = group_estimate(curves, None, at_cost, draw)
    attainable, _ = group_estimate(curves, None, area, draw)
    difference = area_difference = CurveEstimate()
    # A reference of one variant; compared with itself it is no comparison.
    if reference is not None and reference is not curves:
        difference, _ = group_estimate(curves, reference[0], at_cost, draw)
        area_difference, _ = group_estimate(curves, reference[0], area, draw)
    unmasked, _ = group_estimate(plain, None, at_cost, replace(draw, resamples=0))
    found = [(curve, loop, cost_weights(curve, at_cost)) for curve, loop in zip(curves, loops, strict=True)]
    reached = [(curve, loop, weights) for curve, loop, weights in found if weights is not None]
    of_prompts = np.concatenate([prompt_effects(curve, weights) for curve, _, weights in reached] or [np.zeros(0)])
    places = {(point.prompt, point.seed) for curve in curves for point in curve.points}
    return MethodEffect(
        *where,
        n_variants=len(curves),
        n_reached=n_reached,
        n_prompts=len({prompt for prompt, _ in places}),
        n_seeds=len({seed for _, seed in places}),
        effect=effect.value,
        low=effect.low,
        high=effect.high,
        p=effect.p,
        p_holm=None,
        difference=difference.value,
        difference_low=difference.low,
        difference_high=difference.high,
        difference_p=difference.p,
        difference_p_holm=None,
        area=attainable.value,
        area_low=attainable.low,
        area_high=attainable.high,
        area_difference=area_difference.value,
        area_difference_low=area_difference.low,
        area_difference_high=area_difference.high,
        plain=unmasked.value,
        wrong_way=float((of_prompts < 0).mean()) if len(of_prompts) else None,
        quantiles=tuple(np.quantile(of_prompts, QUANTILES).tolist()) if len(of_prompts) else None,
        degenerate_excess=mean_of_known(float(_dose_means(loop) @ weights) for _, loop, weights in reached),
        dose=mean_of_known(float(np.array(curve.doses) @ weights) for curve, _, weights in reached),
        reach=max(reach(curve) for curve in curves),
        left_out=sum(curve.left_out for curve in curves),
    )


def _against(
    where: tuple[str, str, str, str, float], curve: DoseCurve, null: Sequence[DoseCurve], draw: Resampling
) -> NullComparison:
    """The method's curve against each random direction, on the prompts and seeds that both have."""
    ours, theirs = shared_points([curve], null)
    prompts = prompts_of(theirs)
    statistic = effect_at(where[-1])
    (own,) = curve_values(ours, prompts, statistic)
    effects = curve_values(theirs, prompts, statistic)
    known = effects[~np.isnan(effects)]
    n, both = len(known), len(known) > 0 and not math.isnan(own)
    minus = over = CurveEstimate()
    better = int((known >= own).sum()) if both else None
    if both:
        minus, _ = group_estimate(theirs, ours[0], statistic, draw)
        over, _ = group_estimate([theirs[int(np.nanargmax(effects))]], ours[0], statistic, draw)
    minus, over = turned(minus), turned(over)
    return NullComparison(
        *where,
        n=n,
        n_prompts=len(prompts),
        effect=None if math.isnan(own) else float(own),
        null_mean=float(known.mean()) if n else None,
        null_sd=float(known.std(ddof=1)) if n > 1 else None,
        null_quantile=float(np.quantile(known, 0.95)) if n else None,
        null_best=float(known.max()) if n else None,
        better=better,
        share_better=None if better is None else better / n,
        p=None if better is None else (1 + better) / (1 + n),
        difference=minus.value,
        low=minus.low,
        high=minus.high,
        difference_p=minus.p,
        difference_p_holm=None,
        over_best=over.value,
        over_best_low=over.low,
        over_best_high=over.high,
    )


def _dose_means(curve: DoseCurve) -> np.ndarray:
    return dose_means(prompt_means(curve, prompts_of([curve]))[0][None])[0]


def _without_empty_doses(scores: SweepScores) -> SweepScores:
    """Without the doses of a variant at which every text is empty: they have no cost."""
    known = {(row.variant, row.dose) for row in scores.rows if row.log_perplexity_ratio is not None}
    return SweepScores(scores.meta, tuple(row for row in scores.rows if (row.variant, row.dose) in known))


def _corrected(rows: Sequence[Any], p: str, p_holm: str) -> list[Any]:
    """The rows with Holm's correction of a p over the emotions that share all else; unknown ones count for nothing."""
    families: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows):
        if getattr(row, p) is not None:
            family = (row.judge, row.method, getattr(row, "null", None), row.perplexity_ratio)
            families.setdefault(family, []).append(place)
    corrected = list(rows)
    for places in families.values():
        adjusted = holm(np.array([getattr(rows[place], p) for place in places]))
        for place, value in zip(places, adjusted.tolist(), strict=True):
            corrected[place] = replace(rows[place], **{p_holm: value})
    return corrected
