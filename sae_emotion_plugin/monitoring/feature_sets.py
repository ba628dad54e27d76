"""Named sets of features that stand for something to watch for: an emotion, hostility, a persona. Plain data."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.messages import first_line

FEATURES_PER_EMOTION = 10
"""With the shipped dictionary, 12,000 training texts and 12 emotions of GoEmotions, the mean AUROC of sets of 1, 3, 5
and 10 features was 0.811, 0.859, 0.879 and 0.897 (max over tokens) and 0.810, 0.858, 0.874 and 0.887 (mean); weights by
the features' own AUROC changed at most 0.003."""


@dataclass(frozen=True)
class FeatureSet:
    """Features that together stand for something to watch for: an emotion, hostility, a persona."""

    name: str
    features: tuple[int, ...]
    weights: tuple[float | int, ...] | None = None
    """One for each feature; None: 1 each. A negative one speaks against the set."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(map(int, self.features)))
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        if not self.name.strip():
            raise ValueError("a feature set needs a name")
        if not self.features:
            raise ValueError(f"the feature set {self.name!r} has no features")
        for feature in self.features:
            if feature < 0 or self.features.count(feature) > 1:
                what = "is negative (features count from 0)" if feature < 0 else "stands twice"
                raise ValueError(f"feature {feature} of the set {self.name!r} {what}")
        if len(self.each_weight) != len(self.features):
            raise ValueError(f"{self.name!r} has {len(self.features)} features, but {len(self.each_weight)} weights")
        if not (all(map(math.isfinite, self.each_weight)) and any(self.each_weight)):
            raise ValueError(f"the weights of {self.name!r} must be finite and not all 0, got {self.each_weight}")

    @property
    def each_weight(self) -> tuple[float, ...]:
        return (1.0,) * len(self.features) if self.weights is None else tuple(map(float, self.weights))


def emotion_sets(
    scores: FeatureScores, *, emotions: Sequence[str] | None = None, top: int = FEATURES_PER_EMOTION
) -> tuple[FeatureSet, ...]:
    """Returns a set for each emotion (by default all of the scores): its `top` features, weighted alike."""
    chosen = scores.emotions if emotions is None else emotions
    return tuple(FeatureSet(name, tuple(row.feature for row in scores.top(name, top))) for name in chosen)


def union(name: str, sets: Sequence[FeatureSet]) -> FeatureSet:
    """Returns one set of all features of `sets`, a feature of several with the largest of its weights."""
    weights: dict[int, float] = {}
    for one in sets:
        for feature, weight in zip(one.features, one.each_weight, strict=True):
            weights[feature] = max(weight, weights.get(feature, weight))
    return FeatureSet(name, tuple(weights), tuple(weights.values()))


def read_feature_sets(path: str | Path) -> tuple[FeatureSet, ...]:
    """Returns the sets of a JSON file: `{"name": [12, 34], "other": {"12": 1.0, "56": 0.5}}`, the latter with weights.

    FileNotFoundError for a missing file, ValueError for one that holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content:
            raise ValueError("an object of sets by name is needed")
        return tuple(_set_from_json(name, value) for name, value in content.items())
    except ValueError as error:
        raise ValueError(f"{path} holds no feature sets: {first_line(error)}") from None


def _set_from_json(name: str, value: object) -> FeatureSet:
    features = [int(key) for key in value] if isinstance(value, dict) else value
    weights = list(value.values()) if isinstance(value, dict) else None
    if not isinstance(features, list) or not all(type(one) is int for one in features):
        raise ValueError(f"{name!r} must be a list of features or an object of weights by feature, got {value!r:.80}")
    if weights is not None and not all(type(one) in (int, float) for one in weights):
        raise ValueError(f"{name!r} has a weight that is no number: {value!r:.80}")
    return FeatureSet(name, tuple(features), None if weights is None else tuple(weights))
