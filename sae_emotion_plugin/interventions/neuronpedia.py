"""A `SteeringPlan` for Neuronpedia: the body of a steer request, and vectors for its client. Nothing is sent."""

import re
from typing import Any

from sae_emotion_plugin.interventions.constant_vectors import constant_lengths, plan_vectors
from sae_emotion_plugin.interventions.plans import SteeringPlan

LONGEST_PROMPT = 2048
"""Characters that Neuronpedia takes."""
_LIMITS = {"temperature": (0, 2), "n_tokens": (1, 256), "freq_penalty": (-2, 2), "strength_multiplier": (0, 10)}
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(hook_resid_(?:pre|post))")


def neuronpedia_request(
    plan: SteeringPlan,
    sae: Any,
    prompt: str,
    *,
    temperature: float | int = 0.0,
    n_tokens: int = 20,
    freq_penalty: float | int = 0.0,
    seed: int = 16,
    strength_multiplier: float | int = 1.0,
) -> dict[str, Any]:
    """The body of POST https://www.neuronpedia.org/api/steer that steers as the plan does, ready for JSON.

    Neuronpedia adds `strength_multiplier` x `strength` x the decoder row, at every token, BOS too. Its server folds the
    rows' norms into the encoder where SAELens can; the strengths take that into account. Of several features, its code
    as published (the TransformerLens branch of `endpoints/steer/completion.py`) adds the whole sum once for each: with
    n features give `strength_multiplier=1 / n`, or upload the plan's one vector (`neuronpedia_vectors`).

    Raises:
        ValueError: the SAE is not on Neuronpedia (its metadata's `neuronpedia_id`), a plan that adds no constant vector
            or acts elsewhere than at the SAE's hook, an empty or too long prompt, a number out of Neuronpedia's range.
    """
    found = sae.cfg.metadata.neuronpedia_id
    if not isinstance(found, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", found):
        raise ValueError(
            f"the SAE's neuronpedia_id is {found!r}, so its features are not on Neuronpedia; send the vector"
        )
    if not prompt.strip() or len(prompt) > LONGEST_PROMPT:
        raise ValueError(
            f"the prompt has {len(prompt)} characters (Neuronpedia takes 1 to {LONGEST_PROMPT}, not all blank)"
        )
    numbers = {
        "temperature": temperature,
        "n_tokens": n_tokens,
        "freq_penalty": freq_penalty,
        "strength_multiplier": strength_multiplier,
    }
    for name, (least, most) in _LIMITS.items():
        if not least <= numbers[name] <= most:
            raise ValueError(f"{name} is {numbers[name]} (Neuronpedia takes {least} to {most})")
    plan_vectors(plan, sae)
    if elsewhere := [hook for hook in plan.hooks if hook != plan.hook_name]:
        raise ValueError(f"a feature of Neuronpedia acts at its own hook, {plan.hook_name}, not at {elsewhere[0]}")
    model_id, source = found.split("/")
    strengths = constant_lengths(plan, sae)
    if not _folds(sae):
        strengths = strengths / sae.W_dec.detach()[list(plan.features)].float().cpu().norm(dim=-1)
    features = [
        {"modelId": model_id, "layer": source, "index": feature, "strength": strength}
        for feature, strength in zip(plan.features, strengths.tolist(), strict=True)
    ]
    return {
        "modelId": model_id,
        "prompt": prompt,
        "features": features,
        **numbers,
        "seed": seed,
        "steer_method": "SIMPLE_ADDITIVE",
    }


def neuronpedia_vectors(
    plan: SteeringPlan, sae: Any, *, label: str | None = None, model_id: str | None = None
) -> tuple[dict[str, Any], ...]:
    """The arguments of `NPVector.new` of the client `neuronpedia`, for each hook of the plan.

    A vector is what the plan adds, and its default strength is 1: steer with `strength_multiplier=1` (the client's
    default is 4).

    Args:
        label: what Neuronpedia calls the vector; by default the plan's features and amounts.
        model_id: Neuronpedia's name of the model; by default the one in the SAE's metadata, without its owner.

    Raises:
        ValueError: a plan that adds no constant vector, or a hook that is not a block's residual input or output.
    """
    metadata = sae.cfg.metadata
    name = str(metadata.neuronpedia_id or "").partition("/")[0] or str(metadata.model_name or "").rpartition("/")[2]
    if not (model_id or name):
        raise ValueError("the SAE's metadata name no model: give model_id, Neuronpedia's name of it")
    amounts = ", ".join(f"{one.amount:+g} x feature {one.feature}" for one in plan.interventions)
    calls = []
    for hook, vector in plan_vectors(plan, sae).items():
        match = _RESIDUAL.fullmatch(hook)
        if match is None:
            valid = "blocks.N.hook_resid_pre, blocks.N.hook_resid_post"
            raise ValueError(f"a vector of Neuronpedia cannot act at {hook} (valid: {valid})")
        calls.append(
            {
                "label": label or f"{amounts} ({plan.unit})",
                "model_id": model_id or name,
                "layer_num": int(match[1]),
                "hook_type": match[2],
                "vector": vector.tolist(),
                "default_steer_strength": 1.0,
            }
        )
    return tuple(calls)


def _folds(sae: Any) -> bool:
    """Whether SAELens can give the decoder rows unit length without changing what fires: Neuronpedia does it then."""
    if sae.cfg.architecture() in ("temporal", "matching_pursuit"):
        return False
    return getattr(sae.cfg, "rescale_acts_by_decoder_norm", True)
