"""A `SteeringPlan` as the constant vector that it adds at each hook, where it is one."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from sae_emotion_plugin.interventions.contributions import OF_ACTIVATIONS, added_lengths, unit_directions
from sae_emotion_plugin.interventions.plans import SteeringPlan, check_plan

PER_TOKEN = ("layer_norm", "constant_norm_rescale")
"""Normalisations with which an SAE stretches its reconstruction of each token differently."""


def plan_vectors(plan: SteeringPlan, sae: Any) -> dict[str, Float[Tensor, " d_in"]]:
    """What the plan adds at each of its hooks, to every token but BOS alike: float32, in the model's own units.

    Raises:
        ValueError: the plan does something else than adding a constant vector (the message names it), is not for this
            SAE, or the vector is not finite.
    """
    check_plan(plan, sae)
    for one in plan.interventions:
        if one.mode != "add":
            raise ValueError(f"a constant vector cannot {one.mode} feature {one.feature}, only add")
    settings = [
        (plan.positions != "all", f"positions {plan.positions!r}"),
        (plan.first_tokens is not None, f"first_tokens {plan.first_tokens}"),
        (plan.decay != 1, f"decay {plan.decay:g}"),
        (plan.gate is not None, f"the gate on feature {plan.gate.feature if plan.gate else None}"),
        (not plan.keep_error, "keep_error=False"),
    ]
    for present, name in settings:
        if present:
            raise ValueError(f"a constant vector cannot carry {name}: it is added to every token alike")
    vector = constant_lengths(plan, sae) @ unit_directions(sae, plan.features)
    if not vector.isfinite().all():
        raise ValueError(f"the vector of {plan} is not finite")
    return {hook: vector.clone() for hook in plan.hooks}


def constant_lengths(plan: SteeringPlan, sae: Any) -> Float[Tensor, " feature"]:
    """How far each `add` of the plan moves an activation along the feature's unit direction, in the model's units.

    Raises:
        ValueError: in this unit that depends on the token, as the SAE normalises its input.
    """
    normalisation = sae.cfg.normalize_activations
    if plan.unit in OF_ACTIVATIONS and normalisation in PER_TOKEN:
        how = f"with normalize_activations {normalisation!r} its length depends on the token"
        raise ValueError(f"a constant vector cannot carry unit {plan.unit!r}: {how} (valid: residual_norm, raw)")
    return added_lengths(plan, sae)
