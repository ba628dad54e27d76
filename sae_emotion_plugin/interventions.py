"""The hook that carries out a `SteeringPlan` on a model."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_emotion_plugin.activations import HookedModel, canonical_hook
from sae_emotion_plugin.sparse_codes import CHUNK_ENTRIES, checked_hook, flat_heads, token_settings
from sae_emotion_plugin.steering_plans import SteeringPlan, check_plan

Where = Callable[[Float[Tensor, "row position d_in"]], Bool[Tensor, "row position"] | None]


@contextmanager
def steering(
    model: HookedModel, sae: Any, plan: SteeringPlan, *, mask: Bool[Tensor, "row position"] | None = None
) -> Iterator[None]:
    """A context in which every call of the model is steered by the plan; leaving it restores the model exactly.

    BOS is never steered, as its activation is of another kind (an order of magnitude longer). Without a `mask` that is
    decided by position: when the SAE's metadata say that texts begin with BOS, the first position of every call is
    left alone, except in calls with a single position, which are the steps of a generation with a cache. So
    `model(tokens)`, `model(text)` and `model.generate` work, and padding on the right does no harm. For calls padded
    on the left give the mask.

    Added directions are summed; clamped features are read off the activation as it was before any of them.

    Args:
        mask: True where a position is steered, for every row and position of the calls made in this context; calls
            with a single position are steered there, as above.

    Raises:
        ValueError: the plan names a feature that the SAE lacks or was made for another hook; the SAE does not fit.
    """
    checked_hook(model, sae)
    skip_first = token_settings(sae)["prepend_bos"]

    def where(vectors: Float[Tensor, "row position d_in"]) -> Bool[Tensor, "row position"] | None:
        if mask is not None or not skip_first or vectors.shape[1] == 1:
            return _at(mask, vectors)
        steered = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        steered[:, 0] = False
        return steered

    with _hooked(model, sae, [plan], where):
        yield


@contextmanager
def row_steering(
    model: HookedModel,
    sae: Any,
    plans: Sequence[SteeringPlan | None],
    mask: Bool[Tensor, "row position"] | None = None,
) -> Iterator[None]:
    """A context in which row `i` of every batch is steered by `plans[i]`, or not at all where that is None.

    Args:
        mask: True where a position is steered: not on BOS and padding. Calls with a single position, the steps of a
            generation with a cache, are steered there whatever the mask; without a mask every position is steered.

    Raises:
        ValueError: as `steering`, save that the SAE's width is not checked; another number of rows than plans.
    """
    with _hooked(model, sae, plans, lambda vectors: _at(mask, vectors)):
        yield


@contextmanager
def _hooked(model: HookedModel, sae: Any, plans: Sequence[SteeringPlan | None], where: Where) -> Iterator[None]:
    for plan in dict.fromkeys(plans):
        if plan is not None:
            check_plan(plan, sae)
    active = [plan for plan in plans if plan is not None]
    if not active:
        yield
        return
    added = _added(sae, plans)
    clamped = _Clamps.of(sae, plans)

    def steer(tensor: Tensor, hook: Any) -> Tensor:
        vectors = tensor.flatten(start_dim=2)
        if len(plans) not in (1, len(vectors)):
            raise ValueError(f"{len(plans)} plans for a batch of {len(vectors)} rows")
        changed = vectors + added.to(vectors)[:, None]
        if clamped is not None:
            changed = changed + clamped.change(vectors.detach()).to(vectors)
        steered = where(vectors)
        if steered is not None:
            changed = torch.where(steered.to(vectors.device)[..., None], changed, vectors)
        return changed.view_as(tensor)

    with model.hooks(fwd_hooks=[(canonical_hook(model, active[0].hook_name), steer)]):
        yield


@torch.no_grad()
def _added(sae: Any, plans: Sequence[SteeringPlan | None]) -> Float[Tensor, "row d_in"]:
    """What the `add` interventions add to each row's activations."""
    rows = torch.zeros(len(plans), sae.cfg.d_in)
    known: dict[SteeringPlan, Tensor] = {}
    for row, plan in enumerate(plans):
        if plan is None:
            continue
        if plan not in known:
            adds = [one for one in plan.interventions if one.mode == "add"]
            weights = torch.tensor([one.amount * (_norm(plan) or 1.0) for one in adds])
            known[plan] = weights @ _unit_directions(sae, [one.feature for one in adds])
        rows[row] = known[plan]
    return rows.to(sae.device)


@dataclass(frozen=True)
class _Clamps:
    """The `clamp` interventions of a batch; a row with fewer than `k` has the rest at `wanted` False."""

    sae: Any
    features: Int[Tensor, "row k"]
    wanted: Bool[Tensor, "row k"]
    amounts: Float[Tensor, "row k"]
    """The contribution's length, or the activation itself in unit raw."""
    raw: Bool[Tensor, "row k"]
    directions: Float[Tensor, "row k d_in"]
    lengths: Float[Tensor, "row k"]
    """The length of one unit of activation in the SAE's own space."""

    @classmethod
    @torch.no_grad()
    def of(cls, sae: Any, plans: Sequence[SteeringPlan | None]) -> "_Clamps | None":
        clamps = [[(plan, one) for one in plan.interventions if one.mode == "clamp"] if plan else [] for plan in plans]
        k = max(len(row) for row in clamps)
        if k == 0:
            return None
        features = torch.zeros(len(plans), k, dtype=torch.int64)
        wanted, raw = torch.zeros(len(plans), k, dtype=torch.bool), torch.zeros(len(plans), k, dtype=torch.bool)
        amounts = torch.zeros(len(plans), k)
        for row, column, plan, one in (
            (row, column, *pair) for row, pairs in enumerate(clamps) for column, pair in enumerate(pairs)
        ):
            features[row, column], wanted[row, column] = one.feature, True
            raw[row, column] = plan.unit == "raw"
            amounts[row, column] = one.amount * (_norm(plan) or 1.0)
        norms = sae.W_dec.detach()[features.to(sae.device)].float().norm(dim=-1)
        # Some SAEs count activations in lengths of the contribution and divide by the row's norm when decoding.
        lengths = torch.ones_like(norms) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else norms
        directions = _unit_directions(sae, features.flatten().tolist()).view(len(plans), k, -1)
        moved = (tensor.to(sae.device) for tensor in (features, wanted, amounts, raw, directions, lengths))
        return cls(sae, *moved)

    @torch.no_grad()
    def change(self, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position d_in"]:
        """What has to be added so that each clamped feature contributes its amount."""
        rows, positions = vectors.shape[:2]
        vectors = vectors.to(self.sae.device, self.sae.dtype)
        features = self.features.expand(rows, -1)[:, None].expand(-1, positions, -1)
        codes = _codes_of(self.sae, vectors.flatten(0, 1), features.flatten(0, 1)).view(rows, positions, -1)
        one_unit = self.lengths[:, None] * _token_scale(self.sae, vectors)
        target = torch.where(self.raw[:, None], self.amounts[:, None] * one_unit, self.amounts[:, None])
        missing = (target - codes * one_unit) * self.wanted[:, None]
        return torch.einsum("rpk,rkd->rpd", missing, self.directions.expand(rows, -1, -1))


def _at(
    mask: Bool[Tensor, "masked_row masked"] | None, vectors: Float[Tensor, "row position d_in"]
) -> Bool[Tensor, "row position"] | None:
    """The mask of a call: none for the steps of a generation with a cache, which see new tokens alone."""
    if mask is None or vectors.shape[1] == 1 != mask.shape[1]:
        return None
    if mask.shape != vectors.shape[:2]:
        raise ValueError(f"the mask is {tuple(mask.shape)}, the activations {tuple(vectors.shape[:2])}")
    return mask


def _norm(plan: SteeringPlan) -> float | None:
    return plan.residual_norm if plan.unit == "residual_norm" else None


def _unit_directions(sae: Any, features: Sequence[int]) -> Float[Tensor, "feature d_in"]:
    return torch.nn.functional.normalize(sae.W_dec.detach()[list(features)].float().cpu(), dim=-1)


def _codes_of(
    sae: Any, vectors: Float[Tensor, "token d_in"], features: Int[Tensor, "token k"]
) -> Float[Tensor, "token k"]:
    """The activations of the given features of each token, by the SAE's own `encode`."""
    step = max(1, CHUNK_ENTRIES // sae.cfg.d_sae)
    parts = []
    with flat_heads(sae):
        for chunk, wanted in zip(vectors.split(step), features.split(step), strict=True):
            codes = sae.encode(chunk)
            parts.append((codes.to_dense() if codes.is_sparse else codes).gather(1, wanted).float())
    return torch.cat(parts)


def _token_scale(sae: Any, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position 1"] | float:
    """By how much the SAE stretches each token's reconstruction, to undo its normalisation of the input.

    `decode` is no way to find out: a layer-normed SAE forgets the mean and deviation after one call.
    """
    if sae.cfg.normalize_activations == "layer_norm":
        return vectors.float().std(dim=-1, keepdim=True)  # unbiased, as SAELens and the published code have it
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        return vectors.float().norm(dim=-1, keepdim=True) / math.sqrt(sae.cfg.d_in)
    return 1.0
