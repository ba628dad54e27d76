"""Continuations after example sentences instead of steering: what a prompt can do, scored as if it were not there."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.feature_roles.output_scores import prompt_windows
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.generation.likelihoods import continuation_nll
from sae_emotion_plugin.interventions.plans import model_sha256
from sae_emotion_plugin.sparse_codes import token_settings
from sae_emotion_plugin.steering_studies.kept_texts import read_texts, save_texts
from sae_emotion_plugin.steering_studies.sweep import SweepText
from sae_emotion_plugin.text_costs import is_degenerate


def few_shot_texts(
    model: HookedModel,
    sae: Any,
    name: str,
    examples: Sequence[str],
    prompts: Sequence[str],
    *,
    counts: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
    temperature: float | int = 0.7,
    max_new_tokens: int = 20,
    folder: str | Path | None = None,
    progress: bool = True,
) -> tuple[SweepText, ...]:
    """The continuation of each prompt and seed after the first n examples, a line each, for each n of `counts`.

    Nothing is steered, and the SAE only says how texts begin. A text is kept under its bare prompt with n as its dose,
    and its likelihood is that of the continuation right after the bare prompt: what a reader sees who does not know
    the examples. So it goes through `score_texts` like steered texts.

    Args:
        name: the variant in the result.
        folder: keeps the texts under a hash of all that they depend on.

    Raises:
        ValueError: counts that are not different numbers from 1 to that of the examples, and what `complete` refuses.
    """
    if not counts or len(set(counts)) < len(counts) or min(counts) < 1 or max(counts) > len(examples):
        raise ValueError(f"counts are {list(counts)} (valid: different numbers from 1 to {len(examples)} examples)")
    settings = {
        "model": model_sha256(model),
        "prepend_bos": token_settings(sae)["prepend_bos"],
        "examples": list(examples[: max(counts)]),
        "prompts": list(prompts),
        "counts": list(counts),
        "seeds": list(seeds),
        "temperature": float(temperature),
        "max_new_tokens": max_new_tokens,
    }
    places = [(count, prompt, seed) for count in counts for prompt in prompts for seed in seeds]
    path = None
    if folder is not None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"few-shot-{key}.json"
    rows = None if path is None else read_texts(path, settings, len(places))
    if rows is None:
        requests = [
            Request("\n".join([*examples[:count], prompt]), None, temperature, seed) for count, prompt, seed in places
        ]
        made = complete(model, sae, requests, max_new_tokens=max_new_tokens, with_nll=False, progress=progress)
        bare = dict(zip(prompts, (one.token_ids for one in prompt_windows(model, sae, prompts)), strict=True))
        pairs = [(bare[prompt], one.token_ids) for (_, prompt, _), one in zip(places, made, strict=True)]
        nlls = iter(continuation_nll(model, [pair for pair in pairs if pair[1]]))
        rows = [(one.text, next(nlls) if one.token_ids else None, is_degenerate(one.token_ids)) for one in made]
        if path is not None:
            save_texts(path, settings, rows)
    return tuple(
        SweepText(name, float(count), prompt, seed, *row)
        for (count, prompt, seed), row in zip(places, rows, strict=True)
    )
