"""The hook that carries out a `SteeringPlan` on a model: what, where and when."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_emotion_plugin.activations import HookedModel, canonical_hook
from sae_emotion_plugin.interventions.contributions import (
    OF_ACTIVATIONS,
    Contributions,
    Projections,
    added_lengths,
    token_scale,
    unit_directions,
)
from sae_emotion_plugin.interventions.places import Schedule, Where, tracked
from sae_emotion_plugin.interventions.plans import SteeringPlan, check_plan
from sae_emotion_plugin.sparse_codes import Pooling, checked_hook, encode_texts, flat_heads, token_settings


@contextmanager
def steering(
    model: HookedModel, sae: Any, plan: SteeringPlan, *, mask: Bool[Tensor, "row position"] | None = None
) -> Iterator[None]:
    """A context in which every call of the model is steered by the plan; leaving it restores the model exactly.

    BOS is never steered, as its activation is of another kind (an order of magnitude longer). Without a `mask` that is
    decided by position: when the SAE's metadata say that texts begin with BOS, the first position of every call is
    left alone, except in calls with a single position, which are the steps of a generation with a cache. So
    `model(tokens)`, `model(text)` and `model.generate` work, and padding on the right does no harm. For calls padded
    on the left give the mask. A call with several positions is a prompt, one with a single position the next generated
    token: that is what the plan's positions and schedule go by.

    Added directions are summed; contributions that are clamped, scaled or ablated, and directions that are projected
    out, are read off the activation as it was before any of them.

    Args:
        mask: True where a position is steered, for every row and position of the calls made in this context; calls
            with a single position are steered there, as above.

    Raises:
        ValueError: the plan names a feature that the SAE lacks or was made for another hook, dictionary or model; the
            SAE does not fit; the model lacks a hook of the plan.
    """
    checked_hook(model, sae)
    check_plan(plan, sae, model)
    with _hooked(model, sae, [plan], tracked(mask, skip_first=token_settings(sae)["prepend_bos"])):
        yield


@contextmanager
def row_steering(
    model: HookedModel,
    sae: Any,
    plans: Sequence[SteeringPlan | None],
    mask: Bool[Tensor, "row position"] | None = None,
    prompt_lengths: Int[Tensor, " row"] | None = None,
    n_written: int = 0,
) -> Iterator[None]:
    """A context in which row `i` of every batch is steered by `plans[i]`, or not at all where that is None.

    Args:
        mask: True where a position is steered: not on BOS and padding. Calls with a single position, the steps of a
            generation with a cache, are steered there whatever the mask; without a mask every position is steered.
        prompt_lengths: how many of each row's steered positions are the prompt's; what follows was generated. Without
            it all are.
        n_written: how many tokens were generated before the context was entered, when it begins with a single one.

    Raises:
        ValueError: as `steering`, save that neither the SAE's width nor the model's hash is checked; another number of
            rows than plans.
    """
    with _hooked(model, sae, plans, tracked(mask, prompt_lengths, n_written=n_written)):
        yield


def actual_plan(
    model: HookedModel,
    sae: Any,
    features: Sequence[int],
    text: str,
    *,
    pooling: Pooling = "max",
    times: float | int = 1.0,
) -> SteeringPlan:
    """The plan that adds each feature with the activation that it has on a reference text, times `times`.

    Args:
        pooling: over the text's tokens.

    Raises:
        ValueError: a feature that the SAE lacks, or one that is silent on the text.
    """
    found = activations_on(model, sae, features, [text], pooling=pooling)
    amounts = {feature: times * value for feature, value in found.items()}
    return SteeringPlan.of(amounts, sae, unit="activation", model=model)


def activations_on(
    model: HookedModel, sae: Any, features: Sequence[int], texts: Sequence[str], *, pooling: Pooling = "max"
) -> dict[int, float]:
    """Each feature's activation on each text, pooled over the text's tokens; the largest over the texts.

    ValueError for a feature that the SAE lacks, or one that is silent on the texts.
    """
    if wrong := [feature for feature in features if not 0 <= feature < sae.cfg.d_sae]:
        raise ValueError(f"the SAE has no feature {wrong[0]} (valid: 0 to {sae.cfg.d_sae - 1})")
    codes = encode_texts(model, sae, texts, progress=False)
    pooled = codes.pooled(pooling)[:, list(features)].toarray().max(axis=0)
    if silent := [feature for feature, value in zip(features, pooled, strict=True) if value <= 0]:
        where = repr(texts[0][:60]) if len(texts) == 1 else f"the {len(texts)} texts"
        raise ValueError(f"feature {silent[0]} does not fire on {where}: there is no activation to steer with")
    return {feature: float(value) for feature, value in zip(features, pooled, strict=True)}


@contextmanager
def _hooked(model: HookedModel, sae: Any, plans: Sequence[SteeringPlan | None], where: Where) -> Iterator[None]:
    for plan in dict.fromkeys(plans):
        if plan is not None:
            check_plan(plan, sae)
    hooks = dict.fromkeys(hook for plan in plans if plan is not None for hook in plan.hooks)
    changes = []
    for hook_name in hooks:
        own = [plan if plan is not None and hook_name in plan.hooks else None for plan in plans]
        changes.append((canonical_hook(model, hook_name), _Change.of(sae, own).hook(where, hook_name)))
    if not changes:
        yield
        return
    with model.hooks(fwd_hooks=changes):
        yield


@dataclass(frozen=True)
class _Change:
    """What a batch's plans do at one hook."""

    sae: Any
    n_rows: int
    fixed: Float[Tensor, "row d_in"]
    """Added as it is."""
    stretched: Float[Tensor, "row d_in"] | None
    """Added as the SAE stretches its reconstruction of each token."""
    contributions: "Contributions | None"
    projections: "Projections | None"
    schedule: "Schedule | None"
    without_error: Bool[Tensor, " row"] | None

    @classmethod
    @torch.no_grad()
    def of(cls, sae: Any, plans: Sequence[SteeringPlan | None]) -> "_Change":
        fixed, stretched = torch.zeros(2, len(plans), sae.cfg.d_in)
        known: dict[SteeringPlan, tuple[Tensor, Tensor]] = {}
        for row, plan in enumerate(plans):
            if plan is not None:
                if plan not in known:
                    known[plan] = _added(sae, plan)
                fixed[row], stretched[row] = known[plan]
        dropped = torch.tensor([plan is not None and not plan.keep_error for plan in plans], device=sae.device)
        return cls(
            sae=sae,
            n_rows=len(plans),
            fixed=fixed.to(sae.device),
            stretched=stretched.to(sae.device) if stretched.any() else None,
            contributions=Contributions.of(sae, plans),
            projections=Projections.of(sae, plans),
            schedule=Schedule.of(sae, plans),
            without_error=dropped if dropped.any() else None,
        )

    def hook(self, where: Where, hook_name: str) -> Callable[[Tensor, Any], Tensor]:
        def steer(tensor: Tensor, hook: Any) -> Tensor:
            vectors = tensor.flatten(start_dim=2)
            if self.n_rows not in (1, len(vectors)):
                raise ValueError(f"{self.n_rows} plans for a batch of {len(vectors)} rows")
            places = where(vectors, hook_name)
            steered = (places.index >= 0).to(vectors.device)
            change = self._change(vectors)
            if self.schedule is not None:
                strength = self.schedule.strength(vectors, places).to(change)[..., None]
                changed = vectors + strength * change
                steered &= strength[..., 0] != 0
            else:
                changed = vectors + change
            if not steered.all():
                changed = torch.where(steered[..., None], changed, vectors)
            return changed.view_as(tensor)

        return steer

    def _change(self, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "#row #position d_in"]:
        change = self.fixed.to(vectors)[:, None]
        own = vectors.detach().to(self.sae.device, self.sae.dtype)
        if self.stretched is not None:
            change = change + (self.stretched[:, None] * token_scale(self.sae, own)).to(vectors)
        if self.contributions is not None:
            change = change + self.contributions.change(own).to(vectors)
        if self.projections is not None:
            change = change + self.projections.change(own).to(vectors)
        if self.without_error is not None:
            with torch.no_grad(), flat_heads(self.sae):
                rebuilt = self.sae.decode(self.sae.encode(own.flatten(0, 1))).view_as(own)
            change = change + ((rebuilt - own) * self.without_error[:, None, None]).to(vectors)
        return change


def _added(sae: Any, plan: SteeringPlan) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_in"]]:
    """What the `add` interventions add: as it is, and what each token's own scale has to stretch."""
    directions = unit_directions(sae, [one.feature for one in plan.interventions if one.mode == "add"])
    added, nothing = added_lengths(plan, sae) @ directions, torch.zeros(sae.cfg.d_in)
    return (nothing, added) if plan.unit in OF_ACTIVATIONS else (added, nothing)
