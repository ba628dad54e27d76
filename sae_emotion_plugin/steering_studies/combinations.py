"""Several features together: every set of them at equal length of what is added, at equal cost, and interactions.

Effects are changes of a judge's measure, steered minus unsteered text of the same prompt and seed, in the direction
that is wanted; intervals are over prompts (`evidence.resampling.hierarchical_interval`). With e(S, n) the masked effect
of the set S at length n, where the *summed* vector of the set is n long whatever the angles between its directions:

- `over_mean` = e(S, n) - mean of e({i}, n): is a set better than one of its features at the same length, on average?
- `over_linear` = e(S, n) - sum of s_i e({i}, n), with s_i the share of n that feature i is given: is it more than the
  effects of its parts, were effects proportional to amounts? Orthogonal features in equal amounts have s_i = 1/sqrt(k)
  each, so that without any interaction `over_mean` is above 0 (the vector points less into each, but into all).
- `interaction`, at fixed amounts of every feature instead of a fixed length: the Moebius term, sum over the subsets T
  of S of (-1)^(|S| - |T|) e(T), with e of nothing 0. For a pair it is the effect of both minus the sum of each alone;
  for three what is left beyond all pairs. It is 0 wherever effects add up.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.activations import HookedModel, mean_norm
from sae_emotion_plugin.emotion_texts import openings
from sae_emotion_plugin.evidence.equal_cost import CostEstimate, compare_at_cost, effect_at_cost
from sae_emotion_plugin.evidence.resampling import Comparison, Interval
from sae_emotion_plugin.interventions.contributions import unit_directions
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.judges.judge import VALENCE, Judge
from sae_emotion_plugin.judges.names import judges_for
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering_studies.paired_changes import (
    RESAMPLES,
    Changes,
    changes_of,
    contrast,
    measures_of,
    ratio_of,
    shown_interval,
    unsteered_level,
)
from sae_emotion_plugin.steering_studies.sweep import Variant, score_texts, write_texts
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore, SweepScores
from sae_emotion_plugin.tables import text_table

FeatureSet = tuple[int, ...]
DOSES = (0.06, 0.09, 0.12)


@dataclass(frozen=True)
class CombinationEffect:
    """What one set of features did at one length, decoded in one way, by one judge."""

    features: FeatureSet
    temperature: float
    judge: str
    measure: str
    norm: float
    """Length of the summed vector, as a fraction of the residual norm."""
    amounts: tuple[float, ...]
    """What each feature is given of it."""
    unsteered: float | None
    """The judge's mean on the unsteered texts, not masked; None where all are empty."""
    plain: Interval | None
    """Change of the measure; None where fewer than two prompts have texts to judge. So are the next ones."""
    masked: Interval | None
    perplexity_ratio: float | None
    degenerate_share: float
    baseline_degenerate_share: float
    over_mean: Interval | None
    """The three comparisons are explained above; None for one feature, and for lengths where they do not apply."""
    over_linear: Interval | None
    interaction: Interval | None


@dataclass(frozen=True)
class CombinationAtCost:
    """A set's masked effect at one perplexity ratio, and how much more it is than its best feature's alone.

    The best feature is chosen on the same texts, which favours it.
    """

    features: FeatureSet
    temperature: float
    judge: str
    measure: str
    effect: CostEstimate
    best_alone: int | None
    over_best: Comparison | None
    reason: str | None
    """Why there is no comparison."""


@dataclass(frozen=True, repr=False)
class CombinationStudy(ResultTable):
    """The effects of all sets, a row for each judge, temperature and length; `at_cost` has them at equal cost."""

    row_type = CombinationEffect
    head = (
        *("features", "T", "judge", "length", "unsteered", "change", "masked", "perplexity", "degenerate"),
        *("over mean", "over linear", "interaction"),
    )

    meta: dict[str, Any]
    rows: tuple[CombinationEffect, ...]
    at_cost: tuple[CombinationAtCost, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: `meta`, `rows` and `at_cost`."""
        return {**super().to_dict(), "at_cost": [asdict(row) for row in self.at_cost]}

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        caption = (
            f"CombinationStudy: {self.meta.get('emotion')}, {self.meta.get('n_prompts')} prompts; lengths in residual "
            f"norms, changes with 95 % intervals over prompts"
        )
        return caption, [_effect_cells(row) for row in self.rows]

    def __repr__(self) -> str:
        head = ("features", "T", "judge", "masked effect", "more than its best alone")
        table = text_table(head, [_cost_cells(row) for row in self.at_cost])
        return f"{super().__repr__()}\n\nAt equal cost (perplexity x{self.meta.get('perplexity_ratio')})\n{table}"


def study_combinations(
    model: HookedModel,
    sae: Any,
    features: Sequence[int] | Mapping[int, float | int],
    emotion: str,
    *,
    prompts: Sequence[str] | None = None,
    doses: Sequence[float | int] = DOSES,
    each: float | int | None = None,
    largest: int | None = None,
    temperatures: Sequence[float | int] = (0.0, 0.7),
    seeds: Sequence[int] = (0, 1, 2),
    max_new_tokens: int = 20,
    perplexity_ratio: float | int = 1.5,
    residual_norm: float | int | None = None,
    judges: Sequence[Judge] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CombinationStudy:
    """Every set of the features, steered at equal lengths and compared with its parts; see the module for what is what.

    k features make 2^k - 1 sets.

    Args:
        features: a list, or the features' amounts relative to each other (below 0: suppressed beside the others).
        emotion: what they are meant to move; each judge is asked for it, its basic emotion or the valence.
        prompts: by default the bundled neutral openings.
        doses: lengths of the summed vector, as fractions of the residual norm.
        each: every feature's fixed amount (times its relative one), for the interactions; by default the least dose.
        largest: most features of a set; by default all.
        perplexity_ratio: the cost at which sets are compared.
        residual_norm: by default measured on the prompts.
        judges: by default those of English; those that cannot tell the emotion are left out.
        folder: keeps the texts (`steering_sweep.write_texts`). `seed` is the intervals'.

    Raises:
        ValueError: no features, one twice, directions that cancel out, doses not above 0, fewer than two prompts, an
            emotion that no judge can tell.
    """
    weights = _checked_weights(features, int(sae.cfg.d_sae))
    doses = sorted(set(map(float, doses)))
    fixed = float(each or min(doses, default=0.0))
    if not all(math.isfinite(dose) and dose > 0 for dose in (fixed, *doses)):
        raise ValueError(f"doses {doses} and the amount of each feature, {fixed:g}, must be finite and above 0")
    texts = openings("neutral") if prompts is None else tuple(prompts)
    if isinstance(prompts, str) or len(texts) < 2:
        raise ValueError(f"a combination study needs a list of at least 2 prompts, got {prompts!r:.60}")
    measures = measures_of(judges_for("en") if judges is None else judges, emotion)
    hook_name = checked_hook(model, sae)
    norm = float(residual_norm or mean_norm(model, texts, hook_name, **token_settings(sae)))
    plans = {
        subset: set_plans(sae, {one: weights[one] for one in subset}, doses, fixed, norm)
        for subset in feature_sets(tuple(weights), largest)
    }
    variants = [Variant(_name(subset), sae, tuple(own.values()), emotion) for subset, own in plans.items()]
    rows: list[CombinationEffect] = []
    at_cost: list[CombinationAtCost] = []
    for temperature in temperatures:
        written = write_texts(
            *(model, variants, texts),
            seeds=seeds,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            folder=folder,
            progress=progress,
        )
        asked = sorted({measure for _, measure, _ in measures} - {VALENCE})
        scores = score_texts(model, variants, written, judges=[judge for judge, _, _ in measures], emotions=asked)
        for judge, measure, sign in measures:
            setting = _Setting(scores, plans, weights, fixed, judge.name, measure, sign, float(temperature), seed)
            level = unsteered_level(judge, measure, written)
            rows += setting.effects(None if level is None else sign * level)
            at_cost += setting.at_cost(float(perplexity_ratio))
    meta = {
        "model": model_identity(model),
        "hook_name": hook_name,
        "emotion": emotion,
        "relative_amounts": {str(feature): weight for feature, weight in weights.items()},
        "cosines": _cosines(sae, tuple(weights)),
        "doses": doses,
        "each": fixed,
        "residual_norm": norm,
        "n_prompts": len(texts),
        "seeds": list(seeds),
        "temperatures": [float(one) for one in temperatures],
        "max_new_tokens": max_new_tokens,
        "perplexity_ratio": float(perplexity_ratio),
        "resamples": RESAMPLES,
        "seed": seed,
    }
    return CombinationStudy(meta, tuple(rows), tuple(at_cost))


def feature_sets(features: Sequence[int], largest: int | None = None) -> Iterator[FeatureSet]:
    """Every set of one up to `largest` of the features, small ones first. ValueError for a `largest` out of range."""
    most = len(features) if largest is None else largest
    if not 1 <= most <= len(features):
        raise ValueError(f"largest is {largest}; valid: 1 to {len(features)}")
    for size in range(1, most + 1):
        yield from itertools.combinations(features, size)


def set_plans(
    sae: Any, weights: Mapping[int, float], norms: Sequence[float], fixed: float, residual_norm: float
) -> dict[float, SteeringPlan]:
    """The plans of one set by the length of their summed vectors: the lengths given, and that of fixed amounts.

    Lengths are fractions of the residual norm. ValueError where the directions cancel out.
    """
    length = summed_length(sae, weights)
    own = fixed * length
    lengths = [*norms, *([] if any(math.isclose(own, norm, rel_tol=1e-6) for norm in norms) else [own])]
    return {
        norm: SteeringPlan.of(
            {feature: weight * norm / length for feature, weight in weights.items()}, sae, residual_norm=residual_norm
        )
        for norm in sorted(lengths)
    }


def summed_length(sae: Any, weights: Mapping[int, float]) -> float:
    """The length of the weighted sum of unit decoder directions. ValueError where they cancel out."""
    directions = unit_directions(sae, list(weights)).double().numpy()
    length = float(np.linalg.norm(np.array(list(weights.values())) @ directions))
    if length < 1e-3 * sum(map(abs, weights.values())):
        raise ValueError(f"the directions of features {_name(tuple(weights))} cancel each other out")
    return length


@dataclass(frozen=True)
class _Setting:
    """The scores of all sets by one judge at one temperature."""

    scores: SweepScores
    plans: Mapping[FeatureSet, Mapping[float, SteeringPlan]]
    weights: Mapping[int, float]
    fixed: float
    judge: str
    measure: str
    sign: int
    temperature: float
    seed: int

    def effects(self, unsteered: float | None) -> Iterator[CombinationEffect]:
        masked = {
            (subset, norm): changes_of(self._rows(subset), plan.amount, self.sign, masked=True)
            for subset, own in self.plans.items()
            for norm, plan in own.items()
        }
        for subset, own in self.plans.items():
            for norm, plan in own.items():
                rows = [row for row in self._rows(subset) if row.dose == plan.amount]
                plain = {subset: changes_of(rows, plan.amount, self.sign, masked=False)}
                yield CombinationEffect(
                    features=subset,
                    temperature=self.temperature,
                    judge=self.judge,
                    measure=self.measure,
                    norm=norm,
                    amounts=tuple(one.amount for one in plan.interventions),
                    unsteered=unsteered,
                    plain=contrast(plain, {subset: 1.0}, self.seed),
                    masked=contrast(masked, {(subset, norm): 1.0}, self.seed),
                    perplexity_ratio=ratio_of(rows),
                    degenerate_share=sum(row.degenerate for row in rows) / len(rows),
                    baseline_degenerate_share=sum(row.baseline_degenerate for row in rows) / len(rows),
                    **self._comparisons(masked, subset, norm),
                )

    def _comparisons(
        self, masked: Mapping[tuple[FeatureSet, float], Changes], subset: FeatureSet, norm: float
    ) -> dict[str, Interval | None]:
        """A set against its parts: at this length where the parts have it too, and at fixed amounts."""
        found: dict[str, Interval | None] = {"over_mean": None, "over_linear": None, "interaction": None}
        if len(subset) == 1:
            return found
        plan = self.plans[subset][norm]
        alone = {one.feature: ((one.feature,), norm) for one in plan.interventions}
        if all(key in masked for key in alone.values()):
            mean = {alone[feature]: -1 / len(subset) for feature in subset}
            # How much of the length each feature is given.
            linear = {alone[one.feature]: -abs(one.amount) / norm for one in plan.interventions}
            found["over_mean"] = contrast(masked, {**mean, (subset, norm): 1.0}, self.seed)
            found["over_linear"] = contrast(masked, {**linear, (subset, norm): 1.0}, self.seed)
        if norm == self._fixed_norm(subset):
            parts = feature_sets(subset)
            signs = {(part, self._fixed_norm(part)): (-1.0) ** (len(subset) - len(part)) for part in parts}
            found["interaction"] = contrast(masked, signs, self.seed)
        return found

    def _fixed_norm(self, subset: FeatureSet) -> float:
        """The length at which every feature has its fixed amount."""
        wanted = self.fixed * self.weights[subset[0]]
        return min(self.plans[subset], key=lambda norm: abs(self.plans[subset][norm].interventions[0].amount - wanted))

    def _rows(self, subset: FeatureSet) -> tuple[SweepScore, ...]:
        return self.scores.of(_name(subset), self.judge, self.measure)

    def at_cost(self, ratio: float) -> Iterator[CombinationAtCost]:
        curves = {
            subset: self.scores.curve(
                *(_name(subset), self.judge, self.measure),
                sign=self.sign,
                negative=next(iter(own.values())).amount < 0,
            )
            for subset, own in self.plans.items()
        }
        found = {subset: effect_at_cost(curve, ratio, seed=self.seed) for subset, curve in curves.items()}
        for subset, effect in found.items():
            alone = {(one,): found[one,].estimate for one in subset} if len(subset) > 1 else {}
            known = {key: estimate for key, estimate in alone.items() if estimate is not None}
            comparison, reason = None, "no feature reaches the cost alone" if alone else "one feature alone"
            if (best := max(known, key=lambda key: known[key], default=None)) is not None:
                compared = compare_at_cost(curves[subset], curves[best], ratio, margin=0.0, seed=self.seed)
                comparison, reason = compared.comparison, compared.reason
            yield CombinationAtCost(
                *(subset, self.temperature, self.judge, self.measure, effect),
                best_alone=None if best is None else best[0],
                over_best=comparison,
                reason=reason,
            )


def _checked_weights(features: Sequence[int] | Mapping[int, float | int], d_sae: int) -> dict[int, float]:
    given = dict(features) if isinstance(features, Mapping) else dict.fromkeys(features, 1.0)
    weights = {feature: float(weight) for feature, weight in given.items()}
    if not weights:
        raise ValueError("no features to combine")
    if len(weights) < len(features):
        twice = next(one for one in features if list(features).count(one) > 1)
        raise ValueError(f"feature {twice} stands twice in the list")
    for feature, weight in weights.items():
        if not 0 <= feature < d_sae:
            raise ValueError(f"the SAE has no feature {feature} (valid: 0 to {d_sae - 1})")
        if not (math.isfinite(weight) and weight):
            raise ValueError(f"the relative amount of feature {feature} is {weight}; it must be finite and not 0")
    return weights


def _name(subset: FeatureSet) -> str:
    return "+".join(map(str, subset))


def _cosines(sae: Any, features: FeatureSet) -> dict[str, float]:
    directions = unit_directions(sae, features).double()
    pairs = itertools.combinations(range(len(features)), 2)
    return {_name((features[i], features[j])): float(directions[i] @ directions[j]) for i, j in pairs}


def _effect_cells(row: CombinationEffect) -> tuple[str, ...]:
    return (
        _name(row.features),
        f"{row.temperature:g}",
        f"{row.judge} {row.measure}",
        f"{row.norm:.3g}",
        "-" if row.unsteered is None else f"{row.unsteered:+.3f}",
        *map(shown_interval, (row.plain, row.masked)),
        "-" if row.perplexity_ratio is None else f"x{row.perplexity_ratio:.2f}",
        f"{row.degenerate_share:.1%} ({row.baseline_degenerate_share:.1%})",
        *map(shown_interval, (row.over_mean, row.over_linear, row.interaction)),
    )


def _cost_cells(row: CombinationAtCost) -> tuple[str, ...]:
    found = row.effect
    effect = f"none: {found.reason}" if found.estimate is None else f"{found.estimate:+.3f} ({found.reason})"
    effect = shown_interval(found.interval) if found.interval else effect
    over = row.over_best
    more = f"{over.difference:+.3f} [{over.low:+.3f}, {over.high:+.3f}] than {row.best_alone}" if over else row.reason
    return _name(row.features), f"{row.temperature:g}", f"{row.judge} {row.measure}", effect, str(more)
