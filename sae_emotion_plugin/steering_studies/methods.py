"""SAE steering beside other ways to steer, compared at equal cost: directions from data, random ones, a prompt."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.emotion_texts import LabelledTexts, study_openings
from sae_emotion_plugin.evidence.dose_curves import monotone_costs
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.judges.judge import VALENCE, Judge
from sae_emotion_plugin.judges.names import judges_for
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.sparse_codes import checked_hook
from sae_emotion_plugin.steering_studies.compared_methods import (
    METHODS,
    NULLS,
    ComparisonDesign,
    Setting,
    Steering,
    other_layer,
    ranked_features,
    steerings,
)
from sae_emotion_plugin.steering_studies.few_shot import few_shot_texts
from sae_emotion_plugin.steering_studies.method_effects import MethodEffects
from sae_emotion_plugin.steering_studies.methods_at_cost import Tried, method_effects
from sae_emotion_plugin.steering_studies.success import measure_of
from sae_emotion_plugin.steering_studies.sweep import SweepText, Variant, score_texts, write_texts
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScores

logger = logging.getLogger(__name__)


def compare_steering(
    model: HookedModel,
    sae: Any,
    features_by_emotion: Mapping[str, Sequence[int]],
    texts: LabelledTexts,
    prompts: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    design: ComparisonDesign | None = None,
    judges: Sequence[Judge] | None = None,
    language: str = "en",
    wrong_hook: str | None = None,
    perplexity_ratios: Sequence[float] = (1.5,),
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> MethodEffects:
    """What each method does for each emotion at the same perplexity ratio, against SAE features and random directions.

    Every method has doses of its own, around the amount at which a pilot finds it to cost the largest ratio. Random
    directions are written once and judged for every emotion. Nothing that chooses a direction sees the prompts.

    Args:
        features_by_emotion: candidates, the best first; ranked again by their causal score (`steering_order`).
        texts: labelled with at least these emotions; directions and examples come from them.
        prompts: by default the bundled openings of the language, but for the unpleasant ones (English: 100).
        methods: of `METHODS`; the first of `design.full` must be among them.
        judges: by default those for the language. Each is asked for what it can tell of the emotion
            (`steering_success.measure_of`).
        wrong_hook: where `wrong-layer` steers; by default the residual stream at half the depth of the right one.
        seed: of the random directions, the examples and the resampling.
        folder: keeps activations and texts, so that an interrupted run goes on where it was.

    Raises:
        ValueError: an unknown method or emotion, no features, judges that cannot tell an emotion, and what plans,
            dictionaries and prompts are refused for.
    """
    design, methods = design or ComparisonDesign(), tuple(methods)
    _check(features_by_emotion, texts, methods, design)
    emotions = tuple(features_by_emotion)
    judges = judges_for(language) if judges is None else tuple(judges)
    measures = {(judge.name, emotion): measure_of(judge, emotion) for emotion in emotions for judge in judges}
    prompts = study_openings(language) if prompts is None else tuple(prompts)
    hook_name = checked_hook(model, sae)
    where = Setting(model, sae, texts, seed, Path(folder) if folder is not None else None, progress)
    ranked = {
        emotion: ranked_features(where, emotion, features)
        if {"features", "best-feature", "clamp", "wrong-layer"} & {*methods}
        else tuple(features)
        for emotion, features in features_by_emotion.items()
    }
    if "wrong-layer" in methods:
        wrong_hook = wrong_hook or other_layer(hook_name)
    steered = list(steerings(where, features_by_emotion, ranked, methods, design, wrong_hook))
    doses = _doses(where, steered, _spread(prompts, design.pilot_prompts), design, max(perplexity_ratios))
    tried, scores = [], []
    asked = sorted({measure for measure, _ in measures.values()} - {VALENCE})
    few, few_seeds = _spread(prompts, design.reduced_prompts), design.used_seeds[: design.reduced_seeds]
    for full, some, seeds in ((True, prompts, design.used_seeds), (False, few, few_seeds)):
        chosen = [one for one in steered if (one.method in design.full) == full]
        if not chosen:
            continue
        variants = [one.variant(doses[one.name]) for one in chosen]
        written = list(_write(where, variants, some, seeds, design))
        tried += [Tried(one.name, one.method, one.emotion) for one in chosen]
        # The unsteered texts of the full design include those of the few prompts that examples stand before.
        for emotion in emotions if full and "few-shot" in methods else ():
            variant, made = _few_shot(where, emotion, few, few_seeds, design)
            variants.append(variant)
            written += made
            tried.append(Tried(variant.name, "few-shot", emotion))
        scores += score_texts(model, variants, written, judges=judges, emotions=asked).rows
    order = {method: place for place, method in enumerate(METHODS)}
    meta = {
        "model": model_identity(model),
        "hook_name": hook_name,
        "wrong_hook": wrong_hook,
        "emotions": list(emotions),
        "features": {emotion: list(ranked[emotion][: design.several]) for emotion in emotions},
        "n_prompts": len(prompts),
        "n_texts": len(texts),
        "judges": [judge.name for judge in judges],
        "doses": {name: list(amounts) for name, amounts in doses.items()},
        "design": asdict(design),
    }
    return method_effects(
        SweepScores({}, tuple(scores)),
        sorted(tried, key=lambda one: order[one.method]),
        measures,
        reference=design.full[0],
        nulls=[method for method in NULLS if method in methods],
        perplexity_ratios=perplexity_ratios,
        resamples=resamples,
        seed=seed,
        meta=meta,
    )


def _doses(
    where: Setting, steerings: Sequence[Steering], prompts: Sequence[str], design: ComparisonDesign, ratio: float
) -> dict[str, tuple[float, ...]]:
    """The amounts to try of each: multiples of the one at which a small pilot reaches the perplexity ratio."""
    texts = _write(
        where, [one.variant(design.pilot_amounts) for one in steerings], prompts, design.used_seeds[:1], design
    )
    before = {one.prompt: one.nll for one in texts if one.variant == ""}
    logs: dict[tuple[str, float], list[float]] = {}
    for one in texts:
        base = before[one.prompt]
        if one.variant and one.nll is not None and base is not None:
            logs.setdefault((one.variant, one.dose), []).append(one.nll - base)
    found = {}
    for one in steerings:
        amounts, costs = [0.0], [0.0]
        for amount, dose in zip(design.pilot_amounts, one.variant(design.pilot_amounts).doses, strict=True):
            if known := logs.get((one.name, dose)):
                amounts.append(amount)
                costs.append(math.fsum(known) / len(known))
        centre = _amount_at(math.log(ratio), amounts, costs)
        if centre is None:
            centre = design.pilot_amounts[-1]
            logger.warning("%s costs less than x%g even at %g; doses go around that", one.name, ratio, centre)
        found[one.name] = tuple(float(f"{centre * dose:.3g}") for dose in design.doses)
    return found


def _amount_at(target: float, amounts: Sequence[float], costs: Sequence[float]) -> float | None:
    """The amount at which the costs, made monotone, reach the target; None where they do not."""
    monotone = monotone_costs(np.array([costs]))[0][0]
    reached = np.flatnonzero(monotone >= target)
    if not len(reached):
        return None
    after = max(1, int(reached[0]))
    share = (target - monotone[after - 1]) / (monotone[after] - monotone[after - 1])
    return amounts[after - 1] + float(min(1.0, share)) * (amounts[after] - amounts[after - 1])


def _write(
    where: Setting, variants: Sequence[Variant], prompts: Sequence[str], seeds: Sequence[int], design: ComparisonDesign
) -> tuple[SweepText, ...]:
    return write_texts(
        where.model,
        variants,
        prompts,
        seeds=seeds,
        temperature=design.temperature,
        max_new_tokens=design.max_new_tokens,
        folder=None if where.folder is None else where.folder / "texts",
        progress=where.progress,
    )


def _few_shot(
    where: Setting, emotion: str, prompts: Sequence[str], seeds: Sequence[int], design: ComparisonDesign
) -> tuple[Variant, tuple[SweepText, ...]]:
    """Texts written after sentences of the emotion, and a variant to score them as."""
    alone = _alone(where.texts, emotion)
    order = np.random.default_rng(where.seed).permutation(alone)
    examples = [" ".join(where.texts.texts[place].split()) for place in order[: max(design.examples)]]
    name = f"few-shot/{emotion}"
    made = few_shot_texts(
        *(where.model, where.sae, name, examples, prompts),
        counts=design.examples,
        seeds=seeds,
        temperature=design.temperature,
        max_new_tokens=design.max_new_tokens,
        folder=None if where.folder is None else where.folder / "texts",
        progress=where.progress,
    )
    # Scores ask a variant for its doses and for what to blank, emotion words alone; these plans are never carried out.
    plans = tuple(SteeringPlan.of({0: count}, where.sae, unit="raw") for count in design.examples)
    return Variant(name, where.sae, plans, emotion, blanked=()), made


def _alone(texts: LabelledTexts, emotion: str) -> list[int]:
    """The places of the texts that have the emotion and no other label."""
    return [place for place, labels in enumerate(texts.emotions) if labels == (emotion,)]


def _spread(prompts: Sequence[str], n: int) -> tuple[str, ...]:
    """`n` of the prompts, evenly spaced; all where there are fewer."""
    return tuple(prompts[place * len(prompts) // min(n, len(prompts))] for place in range(min(n, len(prompts))))


def _check(
    features: Mapping[str, Sequence[int]], texts: LabelledTexts, methods: Sequence[str], design: ComparisonDesign
) -> None:
    if not features:
        raise ValueError("no emotions to steer towards")
    for emotion, own in features.items():
        if not own:
            raise ValueError(f"no features of {emotion!r} to steer with")
        if len(set(own)) < len(own):
            raise ValueError(f"a feature of {emotion!r} stands twice: {', '.join(map(str, own))}")
        if emotion not in texts.labels:
            raise ValueError(f"the texts have no label {emotion!r} (valid: {', '.join(texts.labels)})")
        most, there_are = max(design.examples), len(_alone(texts, emotion))
        if "few-shot" in methods and there_are < most:
            raise ValueError(f"{most} examples of {emotion!r} alone are wanted, the texts have {there_are}")
    for method in (*methods, *design.full):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r} (valid: {', '.join(METHODS)})")
    if twice := [method for method in methods if list(methods).count(method) > 1]:
        raise ValueError(f"the method {twice[0]!r} stands twice in the list")
    if design.full[0] not in methods or design.full[0] in NULLS:
        raise ValueError(f"the reference {design.full[0]!r} must be one of the methods, and no random one")
    if {*design.full} & {"few-shot", *NULLS}:
        raise ValueError(f"few-shot, {' and '.join(NULLS)} have the reduced design only")
