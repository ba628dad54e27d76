"""Steering with each of many features alone, judged with words blanked: how much the texts carry its emotion.

Every feature gets the same dose on the same openings. Its own promoted tokens and all emotion words are blanked out
before judging, so that saying the words is no success.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, mean_norm
from sae_emotion_plugin.discovery.tokens import promoted_tokens
from sae_emotion_plugin.emotion_texts import openings
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.judges.judge import VALENCE, Judge
from sae_emotion_plugin.judges.masking import emotion_mask
from sae_emotion_plugin.judges.names import load_judge
from sae_emotion_plugin.judges.sentence import has_encoder
from sae_emotion_plugin.models import weights_identity
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.text_costs import is_degenerate

Written = list[tuple[str, bool]]
"""A feature's continuations by prompt, and whether each is degenerate."""
AMOUNT = 0.1
BATCH_ROWS = 128
PROMOTED = 50
"""Promoted tokens of a feature that are blanked."""
EKMAN = {
    "anger": "anger annoyance disapproval",
    "disgust": "disgust",
    "fear": "fear nervousness",
    "joy": "joy admiration amusement approval caring desire excitement gratitude love optimism pride relief",
    "sadness": "sadness disappointment embarrassment grief remorse",
    "surprise": "surprise confusion curiosity realization",
}
"""The basic emotion of each label of GoEmotions, after its authors (Demszky et al., arXiv 2005.00547)."""
SIGNS = {"anger": -1, "disgust": -1, "fear": -1, "joy": 1, "sadness": -1}


@dataclass(frozen=True)
class SteeringSuccess:
    """What steering with one feature did to one emotion."""

    emotion: str
    feature: int
    measure: str
    """Of the judge: the emotion, its basic emotion, or "valence"."""
    success: float
    """Mean change of the measure, steered minus unsteered, masked; in the emotion's direction where it is valence."""
    plain: float
    """The same of the texts as they are."""
    changes: tuple[float | None, ...]
    """The masked change by prompt; None where a continuation is empty."""
    degenerate_share: float


def steering_success(
    model: HookedModel,
    sae: Any,
    features_with_emotions: Sequence[tuple[str, int]],
    *,
    amount: float | int = AMOUNT,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 16,
    temperature: float | int = 0.7,
    seed: int = 0,
    residual_norm: float | None = None,
    judge: Judge | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> tuple[SteeringSuccess, ...]:
    """How much steering with each feature alone moves its emotion in what the model writes, judged with words blanked.

    A feature and the unsteered model draw the same random numbers for the same prompt. Blanked are, in both texts, the
    feature's 50 most promoted tokens and all emotion words (`judges.masking`).

    Args:
        features_with_emotions: (emotion, feature) pairs; a feature may stand in several.
        amount: fraction of the mean residual norm that is added.
        prompts: by default the bundled neutral openings.
        residual_norm: by default measured on the prompts.
        judge: by default the sentence judge where its extra is installed, else the n-gram judge. It is asked for the
            emotion, for its basic emotion (`EKMAN`), or for the valence in the emotion's direction.
        folder: keeps the texts, batch by batch, so that an interrupted run goes on where it was.

    Raises:
        ValueError: no features, an emotion that the judge cannot tell, a feature whose continuations are all empty, a
            dose that the model does not survive, or a folder with damaged files.
    """
    if not features_with_emotions:
        raise ValueError("no features to steer with")
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    judge = judge or load_judge("xed-sentences" if has_encoder() else "xed-words")
    measures = {emotion: measure_of(judge, emotion) for emotion, _ in features_with_emotions}
    texts = openings("neutral") if prompts is None else tuple(prompts)
    if not texts:
        raise ValueError("no prompts to continue: the list is empty")
    hook_name = checked_hook(model, sae)
    norm = residual_norm or mean_norm(model, texts, hook_name, **token_settings(sae))
    features = sorted({feature for _, feature in features_with_emotions})
    plans = {feature: SteeringPlan.of({feature: amount}, sae, residual_norm=norm) for feature in features}
    # A seed of its own for every prompt: noise that all prompts shared would not average out.
    seeds = [seed + place for place in range(len(texts))]
    requests: dict[int | None, list[Request]] = {
        feature: [Request(prompt, plan, temperature, own) for prompt, own in zip(texts, seeds, strict=True)]
        for feature, plan in [(None, None), *plans.items()]
    }
    if folder is not None:
        folder = Path(folder) / _key(model, sae, [texts, float(amount), norm, max_new_tokens, float(temperature), seed])
    written = _continuations(model, sae, requests, max_new_tokens, folder, progress)
    promoted = promoted_tokens(model, sae, features, PROMOTED)
    return _judged(judge, measures, features_with_emotions, written, promoted)


def basic_emotion(emotion: str) -> str:
    """The basic emotion that an emotion of GoEmotions belongs to (`EKMAN`); others are their own."""
    return next((basic for basic, labels in EKMAN.items() if emotion in labels.split()), emotion)


def measure_of(judge: Judge, emotion: str) -> tuple[str, int]:
    """The judge's measure for an emotion, and its direction (-1 where the emotion lowers it). ValueError if none."""
    basic = basic_emotion(emotion)
    for measure in (emotion, basic):
        if measure in judge.emotions:
            return measure, 1
    if judge.has_valence and basic in SIGNS:
        return VALENCE, SIGNS[basic]
    raise ValueError(f"the judge {judge.name!r} cannot tell {emotion!r} (it knows {', '.join(judge.measures)})")


def _key(model: HookedModel, sae: Any, settings: list[Any]) -> str:
    """A hash of everything that the texts depend on but the feature."""
    digest = hashlib.sha256(json.dumps([weights_identity(model), sae.cfg.to_dict(), settings], default=str).encode())
    digest.update(sae.W_dec.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _continuations(
    model: HookedModel,
    sae: Any,
    requests: Mapping[int | None, Sequence[Request]],
    max_new_tokens: int,
    folder: Path | None,
    progress: bool,
) -> dict[int | None, Written]:
    """Each feature's continuations and whether they are degenerate, the unsteered ones under None."""
    done: dict[int | None, Written] = {}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.json")):
            done |= _read_part(path)
    left = [feature for feature in requests if feature not in done]
    n_prompts = len(requests[None])
    step = max(1, BATCH_ROWS // n_prompts)
    for first in tqdm(range(0, len(left), step), desc="steering", unit="batch", disable=not progress):
        some = left[first : first + step]
        wanted = [request for feature in some for request in requests[feature]]
        made = complete(
            model, sae, wanted, max_new_tokens=max_new_tokens, batch_rows=BATCH_ROWS, with_nll=False, progress=False
        )
        part: dict[int | None, Written] = {}
        for place, feature in enumerate(some):
            own = made[place * n_prompts : (place + 1) * n_prompts]
            part[feature] = [(one.text, is_degenerate(one.token_ids)) for one in own]
        if folder is not None:
            lines = [{"feature": feature, "continuations": rows} for feature, rows in part.items()]
            write_whole(folder / f"from-{some[0]}.json", json.dumps(lines, ensure_ascii=False, indent=1) + "\n")
        done |= part
    return done


def _read_part(path: Path) -> dict[int | None, Written]:
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        return {line["feature"]: [(str(text), bool(loops)) for text, loops in line["continuations"]] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no continuations: {error!r}; delete it to make them again") from error


def _judged(
    judge: Judge,
    measures: Mapping[str, tuple[str, int]],
    pairs: Sequence[tuple[str, int]],
    written: Mapping[int | None, Sequence[tuple[str, bool]]],
    promoted: Mapping[int, Sequence[str]],
) -> tuple[SteeringSuccess, ...]:
    """The success of each pair; every different text is judged once."""
    both: dict[int, list[tuple[str, str, str, str] | None]] = {}
    for feature in {feature: None for _, feature in pairs}:
        mask = emotion_mask(promoted.get(feature, ()))
        both[feature] = [
            (steered, before, mask(steered), mask(before)) if steered.strip() and before.strip() else None
            for (steered, _), (before, _) in zip(written[feature], written[None], strict=True)
        ]
        if not any(both[feature]):
            raise ValueError(f"the continuations of feature {feature} are all empty: nothing to judge")
    place_of = {text: None for rows in both.values() for row in rows if row for text in row}
    texts = list(place_of)
    judgements = judge(texts)
    found = []
    for emotion, feature in pairs:
        measure, sign = measures[emotion]
        score = dict(zip(texts, (sign * judgements.of(measure)).tolist(), strict=True))
        rows = both[feature]
        changes = tuple(score[row[2]] - score[row[3]] if row else None for row in rows)
        found.append(
            SteeringSuccess(
                emotion=emotion,
                feature=feature,
                measure=measure,
                success=_mean(changes),
                plain=_mean([score[row[0]] - score[row[1]] if row else None for row in rows]),
                changes=changes,
                degenerate_share=sum(loops for _, loops in written[feature]) / len(written[feature]),
            )
        )
    return tuple(found)


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))
