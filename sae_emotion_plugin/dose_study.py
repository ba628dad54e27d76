"""Features of each emotion -> texts at many doses, judged, the dose to take, a file and a page, in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_emotion_plugin.activations import HookedModel, mean_norm
from sae_emotion_plugin.emotion_texts import study_openings
from sae_emotion_plugin.judges.judge import Judge
from sae_emotion_plugin.pages.dose import write_dose_page
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering_studies.amounts import DoseBounds, shared_amounts
from sae_emotion_plugin.steering_studies.dose_response import BOUNDS, DoseResponse, dose_response
from sae_emotion_plugin.steering_studies.sweep import SweepText, Variant, score_texts, write_texts
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScores

DOSES = (-0.3, -0.15, -0.06, 0.04, 0.08, 0.12, 0.16, 0.2, 0.3)
"""Fractions of the mean residual norm."""


@dataclass(frozen=True, repr=False)
class SweepStudy:
    """The texts of a sweep, their scores, and what is found in them."""

    texts: tuple[SweepText, ...]
    scores: SweepScores
    response: DoseResponse

    def __repr__(self) -> str:
        return repr(self.response)

    def _repr_html_(self) -> str:
        return self.response._repr_html_()


def sweep_study(
    model: HookedModel,
    sae: Any,
    features_by_emotion: Mapping[str, Sequence[int]],
    *,
    doses: Sequence[float] = DOSES,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    temperature: float | int = 0.7,
    max_new_tokens: int = 20,
    language: str = "en",
    judges: Sequence[Judge] | None = None,
    bounds: DoseBounds = BOUNDS,
    residual_norm: float | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SweepStudy:
    """Steering towards each emotion with its features at every dose: texts, scores, and the dose-response.

    Args:
        features_by_emotion: the features share a dose equally.
        doses: of both signs, fractions of the mean residual norm that are added.
        prompts: by default `study_openings`.
        judges: by default all of the language.
        bounds: what a dose may cost to be recommended.
        residual_norm: by default measured on the prompts.
        folder: is made, and gets the texts cell by cell while they are written (`cells/`; an interrupted study goes on
            there), and in the end `sweep.json` and `sweep.html`.
        seed: of the split of the openings and of the resampling.

    Raises:
        ValueError: as `write_texts`, `score_texts` and `dose_response`; an emotion without features.
    """
    for emotion, features in features_by_emotion.items():
        if not features:
            raise ValueError(f"no features to steer {emotion!r} with")
    hook_name = checked_hook(model, sae)
    texts = study_openings(language) if prompts is None else prompts
    norm = residual_norm or mean_norm(model, texts, hook_name, **token_settings(sae))
    variants = [
        Variant(emotion, sae, shared_amounts(sae, features, doses, norm), emotion)
        for emotion, features in features_by_emotion.items()
    ]
    cells = None if folder is None else Path(folder) / "cells"
    decoding = {"seeds": seeds, "temperature": temperature, "max_new_tokens": max_new_tokens}
    written = write_texts(model, variants, texts, **decoding, folder=cells, progress=progress)
    scores = score_texts(model, variants, written, judges=judges, language=language)
    plans = {"hook_name": hook_name, "unit": "residual_norm", "residual_norm": norm}
    named = {emotion: list(features) for emotion, features in features_by_emotion.items()}
    found = {**plans, "features": named, "temperature": float(temperature), "max_new_tokens": max_new_tokens}
    scores = SweepScores({**scores.meta, **found}, scores.rows)
    response = dose_response(scores, bounds=bounds, seed=seed)
    if folder is not None:
        response.save(Path(folder) / "sweep.json")
        write_dose_page(Path(folder) / "sweep.html", response)
    return SweepStudy(written, scores, response)
