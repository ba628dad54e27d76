"""Dose-response of steering: features and amounts tried on one half of the openings, judged on the other.

The recommended amount is chosen on the choosing half alone; whatever is reported comes from openings that had no
part in any choice.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.generation.continuations import Request, complete, expected_next_token, judge_rows
from sae_emotion_plugin.generation.records import Generation, Part, Summary, summary
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.judges.judge import emotion_lexicon

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DoseBounds:
    """What an amount may cost to be recommended. Stricter than what is promised, since a choice flatters itself."""

    perplexity_ratio: float = 1.7
    degenerate_excess: float = 0.05
    """Share of degenerate continuations above the baseline's."""


@dataclass(frozen=True)
class Cell:
    """Continuations to be made: every plan on every opening, greedy or with every seed."""

    emotion: str
    plans: tuple[SteeringPlan, ...]
    prompts: tuple[str, ...]
    part: Part
    temperature: float | int
    seeds: tuple[int, ...] = (0,)


def run_cells(
    model: HookedModel,
    sae: Any,
    cells: Sequence[Cell],
    *,
    max_new_tokens: int = 20,
    with_nll: bool = True,
    progress: bool = True,
) -> tuple[Generation, ...]:
    """A judged row for every continuation of every cell, with the unsteered one beside it; all share batches."""
    steered = [
        (cell, Request(prompt, plan, cell.temperature, seed))
        for cell in cells
        for plan in cell.plans
        for prompt in cell.prompts
        for seed in cell.seeds
    ]
    requests = [request for _, request in steered]
    done = complete(
        model,
        sae,
        [*requests, *(replace(request, plan=None) for request in requests)],
        max_new_tokens=max_new_tokens,
        with_nll=with_nll,
        progress=progress,
    )
    baselines = done[len(steered) :]
    rows: list[Generation] = []
    for (cell, _), continuation, baseline in zip(steered, done, baselines, strict=False):
        rows += judge_rows([continuation], [baseline], emotion=cell.emotion, part=cell.part)
    return tuple(rows)


def dose_response(rows: Iterable[Generation], *, sampled: bool = True) -> dict[tuple[str, str, float], Summary]:
    """Effect and cost by (emotion, part, amount), of the sampled rows or of the greedy ones."""
    groups: dict[tuple[str, str, float], list[Generation]] = {}
    for row in rows:
        if (row.temperature > 0) == sampled:
            groups.setdefault((row.emotion, row.part, row.amount), []).append(row)
    return {key: summary(group) for key, group in sorted(groups.items())}


def recommend(
    rows: Iterable[Generation], signs: Mapping[str, int], bounds: DoseBounds | None = None
) -> dict[str, float | None]:
    """For each emotion the amount with the largest valence change in its direction, within the bounds.

    Only sampled rows of the choosing half are looked at.

    Args:
        signs: the direction in which each emotion should move valence, +1 or -1.

    Returns:
        The amount, or None where no amount moves valence the right way within the bounds.
    """
    bounds = bounds or DoseBounds()
    best: dict[str, tuple[float, float]] = {}
    for (emotion, part, amount), cell in dose_response(rows).items():
        if part != "choose" or emotion not in signs or not within(cell, bounds):
            continue
        effect = cell.valence_change * signs[emotion]
        if effect > 0 and effect > best.get(emotion, (0.0, 0.0))[0]:
            best[emotion] = (effect, amount)
    return {emotion: best[emotion][1] if emotion in best else None for emotion in signs}


def within(cell: Summary, bounds: DoseBounds) -> bool:
    """Whether the cost of a cell keeps the bounds."""
    return (
        cell.perplexity_ratio is not None
        and cell.perplexity_ratio <= bounds.perplexity_ratio
        and cell.degenerate_share <= cell.baseline_degenerate_share + bounds.degenerate_excess
    )


def shared_amounts(
    sae: Any, features: Sequence[int], amounts: Sequence[float], residual_norm: float
) -> tuple[SteeringPlan, ...]:
    """One `add` plan an amount, the amount shared equally among the features."""
    return tuple(
        SteeringPlan.of({feature: amount / len(features) for feature in features}, sae, residual_norm=residual_norm)
        for amount in amounts
    )


@dataclass(frozen=True)
class ScreenedFeature:
    """What one feature alone did on the choosing half."""

    emotion: str
    feature: int
    valence_change: float
    degenerate_share: float


def promising_features(
    model: HookedModel,
    sae: Any,
    cells: Sequence[Cell],
    signs: Mapping[str, int],
    keep: int,
    *,
    progress: bool = True,
) -> dict[str, list[int]]:
    """For each emotion the `keep` features that turn the next token's valence most its way, each steered alone.

    A cheap look at many candidates before `screen_features` has the few best ones write: the expected valence of the
    token after each prompt, tokens that are words of VADER's lexicon having its valence and all others 0. It compares
    features alone, so the unsteered expectation need not be known.

    Args:
        cells: as in `screen_features`; their decoding does not matter.
    """
    rated = emotion_lexicon()
    pieces = model.tokenizer.convert_ids_to_tokens(range(int(model.cfg.d_vocab)))
    values = torch.tensor([rated.get((piece or "").lstrip("▁Ġ").lower(), 0.0) for piece in pieces])
    requests = [Request(prompt, plan) for cell in cells for plan in cell.plans for prompt in cell.prompts]
    means = iter(expected_next_token(model, sae, requests, values, progress=progress))
    kept = {}
    for cell in cells:
        moved = [(signs[cell.emotion] * sum(next(means) for _ in cell.prompts), plan.features) for plan in cell.plans]
        kept[cell.emotion] = [feature for _, (feature,) in sorted(moved, reverse=True)[:keep]]
    return kept


def screen_features(
    model: HookedModel,
    sae: Any,
    cells: Sequence[Cell],
    signs: Mapping[str, int],
    keep: int,
    *,
    max_new_tokens: int = 20,
    progress: bool = True,
) -> tuple[dict[str, list[int]], tuple[ScreenedFeature, ...]]:
    """For each emotion the `keep` features that move valence most in its direction, each steered alone; and the table.

    A feature that tells an emotion's texts from others need not make the model write them (Arad et al. 2025, arXiv
    2505.20063), so features are also chosen by what they do. Cost is no criterion here: a feature shares its amount
    with others later, and the dose is bounded then.

    Args:
        cells: for each emotion one cell with a plan for each candidate feature, on openings of the choosing half.
    """
    rows = run_cells(model, sae, cells, max_new_tokens=max_new_tokens, with_nll=False, progress=progress)
    table: list[ScreenedFeature] = []
    for cell in cells:
        for plan in cell.plans:
            (feature,) = plan.features
            done = summary([row for row in rows if row.emotion == cell.emotion and row.features == plan.features])
            table.append(ScreenedFeature(cell.emotion, feature, done.valence_change, done.degenerate_share))
    kept = {}
    for cell in cells:
        sign = signs[cell.emotion]
        tried = [one for one in table if one.emotion == cell.emotion]
        kept[cell.emotion] = [
            one.feature for one in sorted(tried, key=lambda one: one.valence_change * sign, reverse=True)[:keep]
        ]
    return kept, tuple(table)
