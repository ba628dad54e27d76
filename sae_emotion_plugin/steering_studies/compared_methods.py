"""The ways to steer that are compared, and what they steer with: features, directions from data, random ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_emotion_plugin.activations import HookedModel, hook_layer, mean_norm
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.feature_roles.output_scores import steering_order
from sae_emotion_plugin.interventions.plans import Mode, SteeringPlan
from sae_emotion_plugin.pooled_activations import pooled_activations
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering_studies.directions import (
    covariance_matched_directions,
    difference_of_means,
    direction_dictionary,
    probe_direction,
    random_decoder_rows,
)
from sae_emotion_plugin.steering_studies.sweep import Variant

METHODS = {
    "features": "the emotion's features that raise its words most (causal score), an equal share of the amount each",
    "best-feature": "the first of those alone",
    "unranked-features": "as many features in the order given, by how well they tell the emotion's texts, say",
    "unranked-feature": "the first of those alone",
    "clamp": "as features, but their contributions are set instead of added to",
    "difference-of-means": "mean activation of the emotion's texts minus that of all others (CAA, arXiv 2312.06681)",
    "standardised-difference": "the same of standardised dimensions",
    "probe": "the weights of a logistic probe on standardised dimensions",
    "wrong-layer": "the direction of features, added at another layer",
    "few-shot": "no steering: sentences of the emotion before the opening",
    "random-rows": "decoder rows of other features, drawn at random",
    "matched-directions": "random directions with the covariance of the activations",
}
"""The ways to steer that are compared, in the order of the table."""
NULLS = ("random-rows", "matched-directions")
RANKING_PROMPTS = 20
NORM_TEXTS = 512
"""A mean norm needs no more."""


@dataclass(frozen=True)
class ComparisonDesign:
    """How much is written, and how: 100 openings x 3 seeds x 5 doses where it counts, a reduced design elsewhere."""

    full: tuple[str, ...] = ("features", "difference-of-means")
    """Methods that get all prompts and seeds; the first is the reference that all are compared with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    reduced_prompts: int = 30
    """Evenly spaced among the prompts; with the first `reduced_seeds` seeds, for all other methods."""
    reduced_seeds: int = 1
    doses: tuple[float, ...] = (0.5, 0.75, 1.0, 1.35, 1.8)
    """Multiples of the amount that a pilot finds to cost the largest of the perplexity ratios, method by method."""
    pilot_amounts: tuple[float, ...] = (0.06, 0.12, 0.25)
    """Fractions of the mean residual norm."""
    pilot_prompts: int = 10
    examples: tuple[int, ...] = (1, 2, 4, 8, 16)
    """The doses of `few-shot`: sentences before the opening."""
    several: int = 3
    """Features of an emotion that are steered together."""
    random: int = 20
    """Directions of each random kind."""
    temperature: float = 0.7
    max_new_tokens: int = 20

    def __post_init__(self) -> None:
        for name in ("full", "seeds", "doses", "pilot_amounts", "examples"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different values, at least one, got {values}")
        for name in ("doses", "pilot_amounts", "examples"):
            values = getattr(self, name)
            if not all(math.isfinite(value) and value > 0 for value in values) or list(values) != sorted(values):
                raise ValueError(f"{name} must be above 0 and ascending, got {values}")
        for name in ("reduced_prompts", "reduced_seeds", "pilot_prompts", "several", "random", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def used_seeds(self) -> tuple[int, ...]:
        """The seeds; the first one alone where nothing is drawn."""
        return self.seeds if self.temperature else self.seeds[:1]

    def n_texts(self, n_emotions: int, n_prompts: int, methods: Sequence[str] = tuple(METHODS)) -> int:
        """How many continuations a comparison writes, the pilot and the unsteered ones included."""
        reduced = min(self.reduced_prompts, n_prompts) * len(self.used_seeds[: self.reduced_seeds])
        pilot, whole = min(self.pilot_prompts, n_prompts), n_prompts * len(self.used_seeds)
        total = pilot + reduced + whole
        for method in methods:
            n = self.random if method in NULLS else n_emotions
            if method == "few-shot":
                total += n * len(self.examples) * reduced
            else:
                a_dose = whole if method in self.full else reduced
                total += n * (len(self.doses) * a_dose + len(self.pilot_amounts) * pilot)
        return total


@dataclass(frozen=True)
class Setting:
    """What all steps share."""

    model: HookedModel
    sae: Any
    texts: LabelledTexts
    seed: int
    folder: Path | None
    progress: bool


@dataclass(frozen=True)
class Steering:
    """One direction, or several at once, without an amount."""

    method: str
    emotion: str | None
    dictionary: Any = field(repr=False)
    shares: Mapping[int, float]
    """Each feature's share of the amount."""
    residual_norm: float
    mode: Mode = "add"
    number: int | None = None

    @property
    def name(self) -> str:
        return f"{self.method}/{self.emotion if self.number is None else self.number}"

    def variant(self, amounts: Sequence[float]) -> Variant:
        plans = (
            SteeringPlan.of(
                {feature: amount * share for feature, share in self.shares.items()},
                self.dictionary,
                residual_norm=self.residual_norm,
                mode=self.mode,
            )
            for amount in amounts
        )
        return Variant(self.name, self.dictionary, tuple(plans), self.emotion)


def steerings(
    where: Setting,
    given: Mapping[str, Sequence[int]],
    ranked: Mapping[str, Sequence[int]],
    methods: Sequence[str],
    design: ComparisonDesign,
    wrong_hook: str | None,
) -> Iterator[Steering]:
    """Every direction to steer with, in the order of `METHODS`."""
    sae, settings = where.sae, token_settings(where.sae)
    hook_name, n = sae.cfg.metadata.hook_name, design.several
    norm = mean_norm(where.model, where.texts.texts[:NORM_TEXTS], hook_name, **settings)
    from_features: dict[str, tuple[Mapping[str, Sequence[int]], int, Mode]] = {
        "features": (ranked, n, "add"),
        "best-feature": (ranked, 1, "add"),
        "unranked-features": (given, n, "add"),
        "unranked-feature": (given, 1, "add"),
        "clamp": (ranked, n, "clamp"),
    }
    for method, (features, most, mode) in from_features.items():
        for emotion in given if method in methods else ():
            chosen = features[emotion][:most]
            yield Steering(method, emotion, sae, dict.fromkeys(chosen, 1 / len(chosen)), norm, mode)
    # A dictionary a method, so that texts that are kept stay good when other methods are added.
    for method, vectors in _vectors(where, tuple(given), methods, design).items():
        dictionary = direction_dictionary({str(which): row for which, row in vectors.items()}, sae)
        for place, which in enumerate(vectors):
            emotion, number = (None, which) if isinstance(which, int) else (which, None)
            yield Steering(method, emotion, dictionary, {place: 1.0}, norm, number=number)
    if "wrong-layer" in methods and wrong_hook is not None:
        rows = sae.W_dec.detach().float().cpu()
        rows = rows / rows.norm(dim=1, keepdim=True)
        sums = {emotion: rows[list(features[:n])].sum(dim=0) for emotion, features in ranked.items()}
        dictionary = direction_dictionary(sums, sae, hook_name=wrong_hook)
        checked_hook(where.model, dictionary)
        there = mean_norm(where.model, where.texts.texts[:NORM_TEXTS], wrong_hook, **settings)
        for place, emotion in enumerate(sums):
            yield Steering("wrong-layer", emotion, dictionary, {place: 1.0}, there)
    if "random-rows" in methods:
        taken = {feature for features in given.values() for feature in features}
        for number, feature in enumerate(random_decoder_rows(sae, design.random, where.seed, taken)):
            yield Steering("random-rows", None, sae, {feature: 1.0}, norm, number=number)


def _vectors(
    where: Setting, emotions: Sequence[str], methods: Sequence[str], design: ComparisonDesign
) -> dict[str, dict[str | int, Float[np.ndarray, " d_in"]]]:
    """The directions made of activations, by method, and emotion or number."""
    wanted = [
        one
        for one in ("difference-of-means", "standardised-difference", "probe", "matched-directions")
        if one in methods
    ]
    if not wanted:
        return {}
    hook_name = where.sae.cfg.metadata.hook_name
    pooled = pooled_activations(
        where.model,
        where.texts,
        [hook_name],
        poolings=("mean",),
        **token_settings(where.sae),
        cache=None if where.folder is None else where.folder / "activations",
        progress=where.progress,
    )[hook_name]["mean"]
    labels = dict(zip(emotions, where.texts.label_matrix(emotions).T, strict=True))
    found: dict[str, dict[str | int, np.ndarray]] = {}
    for method in wanted:
        if method == "matched-directions":
            rows = covariance_matched_directions(pooled, design.random, where.seed)
            found[method] = dict(enumerate(rows))
        elif method == "probe":
            found[method] = {emotion: probe_direction(pooled, own)[0] for emotion, own in labels.items()}
        else:
            flag = method == "standardised-difference"
            found[method] = {one: difference_of_means(pooled, own, standardise=flag) for one, own in labels.items()}
    return found


def ranked_features(where: Setting, emotion: str, features: Sequence[int]) -> tuple[int, ...]:
    """The features by their causal score, on beginnings of the labelled texts."""
    order = np.random.default_rng(where.seed).permutation(len(where.texts))[:RANKING_PROMPTS]
    words = [where.texts.texts[place].split() for place in order]
    beginnings = list(dict.fromkeys(" ".join(some[: max(1, len(some) // 2)]) for some in words))
    return steering_order(where.model, where.sae, emotion, features, prompts=beginnings, progress=where.progress)


def other_layer(hook_name: str) -> str:
    """The same hook at half the depth; for the first layer the second."""
    layer = hook_layer(hook_name)
    if layer is None:
        raise ValueError(f"{hook_name} is in no layer; name another hook for wrong-layer: wrong_hook")
    return hook_name.replace(f"blocks.{layer}.", f"blocks.{layer // 2 if layer else 1}.", 1)
