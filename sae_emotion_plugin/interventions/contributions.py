"""What a feature contributes to an activation, and the change that makes it contribute something else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_emotion_plugin.interventions.plans import NEEDS_CODES, Intervention, SteeringPlan
from sae_emotion_plugin.sparse_codes import CHUNK_ENTRIES, flat_heads

OF_ACTIVATIONS = ("activation", "max_activation")
"""Units in which a feature's contribution is stretched as the SAE stretches a token's reconstruction."""


def amount_of(plan: SteeringPlan, one: Intervention) -> float:
    """The amount in lengths of the model's own, or in activations, as the unit has it."""
    if plan.unit == "residual_norm":
        return one.amount * (plan.residual_norm or 1.0)
    return one.amount * (one.max_activation or 1.0) if plan.unit == "max_activation" else one.amount


def added_lengths(plan: SteeringPlan, sae: Any) -> Float[Tensor, " add"]:
    """How far each `add` of the plan moves an activation along its unit direction, before a token's own scale."""
    adds = [one for one in plan.interventions if one.mode == "add"]
    amounts = torch.tensor([amount_of(plan, one) for one in adds])
    return amounts * unit_lengths(sae, [one.feature for one in adds]).cpu() if plan.unit in OF_ACTIVATIONS else amounts


@dataclass(frozen=True)
class Contributions:
    """The interventions of a batch that set features' contributions; rows with fewer than `k` have the rest unwanted.

    A contribution's length becomes `length` + `activation` x the length of one unit of activation + `share` x itself.
    """

    sae: Any
    features: Int[Tensor, "row k"]
    wanted: Bool[Tensor, "row k"]
    length: Float[Tensor, "row k"]
    activation: Float[Tensor, "row k"]
    share: Float[Tensor, "row k"]
    directions: Float[Tensor, "row k d_in"]
    unit_lengths: Float[Tensor, "row k"]
    """The length of one unit of activation in the SAE's own space."""

    @classmethod
    def of(cls, sae: Any, plans: Sequence[SteeringPlan | None]) -> "Contributions | None":
        found = [
            [(plan, one) for one in plan.interventions if one.mode in NEEDS_CODES] if plan else [] for plan in plans
        ]
        k = max(len(row) for row in found)
        if k == 0:
            return None
        features = torch.zeros(len(plans), k, dtype=torch.int64)
        wanted = torch.zeros(len(plans), k, dtype=torch.bool)
        length, activation, share = torch.zeros(3, len(plans), k)
        for row, column, plan, one in (
            (row, column, *pair) for row, pairs in enumerate(found) for column, pair in enumerate(pairs)
        ):
            features[row, column], wanted[row, column] = one.feature, True
            if one.mode == "clamp":
                (length if plan.unit == "residual_norm" else activation)[row, column] = amount_of(plan, one)
            else:
                share[row, column] = one.amount if one.mode == "scale" else 1 - one.amount
        directions = unit_directions(sae, features.flatten().tolist()).view(len(plans), k, -1)
        lengths = unit_lengths(sae, features.flatten().tolist()).view(len(plans), k)
        parts = (features, wanted, length, activation, share, directions, lengths)
        return cls(sae, *(part.to(sae.device) for part in parts))

    @torch.no_grad()
    def change(self, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position d_in"]:
        """What has to be added so that each feature contributes what is wanted."""
        now = codes_of(self.sae, vectors, self.features)
        one_unit = self.unit_lengths[:, None] * token_scale(self.sae, vectors)
        target = self.length[:, None] + (self.activation[:, None] + self.share[:, None] * now) * one_unit
        missing = (target - now * one_unit) * self.wanted[:, None]
        return torch.einsum("rpk,rkd->rpd", missing, self.directions.expand(len(vectors), -1, -1))


@dataclass(frozen=True)
class Projections:
    """What the `project-out` interventions of a batch take away: a share of what lies in the span of directions."""

    bases: Float[Tensor, "row k d_in"]
    """Orthonormal; rows with fewer than `k` directions have zeros."""
    shares: Float[Tensor, " row"]

    @classmethod
    def of(cls, sae: Any, plans: Sequence[SteeringPlan | None]) -> "Projections | None":
        found = [[one for one in plan.interventions if one.mode == "project-out"] if plan else [] for plan in plans]
        k = max(len(row) for row in found)
        if k == 0:
            return None
        bases = torch.zeros(len(plans), k, sae.cfg.d_in)
        for row, ones in enumerate(found):
            if ones:
                directions = unit_directions(sae, [one.feature for one in ones]).double()
                bases[row, : len(ones)] = torch.linalg.qr(directions.T).Q.T.float()
        shares = torch.tensor([ones[0].amount if ones else 0.0 for ones in found])
        return cls(bases.to(sae.device), shares.to(sae.device))

    @torch.no_grad()
    def change(self, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position d_in"]:
        bases = self.bases.to(vectors.dtype).expand(len(vectors), -1, -1)
        return -self.shares[:, None, None] * torch.einsum("rpd,rkd,rke->rpe", vectors, bases, bases)


def unit_lengths(sae: Any, features: Sequence[int]) -> Float[Tensor, " feature"]:
    """The length of one unit of each feature's activation in the SAE's own space."""
    norms = sae.W_dec.detach()[list(features)].float().norm(dim=-1)
    # Some SAEs count activations in lengths of the contribution and divide by the row's norm when decoding.
    return torch.ones_like(norms) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else norms


def unit_directions(sae: Any, features: Sequence[int]) -> Float[Tensor, "feature d_in"]:
    return torch.nn.functional.normalize(sae.W_dec.detach()[list(features)].float().cpu(), dim=-1)


def codes_of(
    sae: Any, vectors: Float[Tensor, "row position d_in"], features: Int[Tensor, "#row k"]
) -> Float[Tensor, "row position k"]:
    """The activations of the features that each row asks for, by the SAE's own `encode`."""
    rows, positions = vectors.shape[:2]
    wanted = features.expand(rows, -1)[:, None].expand(-1, positions, -1).flatten(0, 1)
    step = max(1, CHUNK_ENTRIES // sae.cfg.d_sae)
    parts = []
    with flat_heads(sae):
        for chunk, asked in zip(vectors.flatten(0, 1).split(step), wanted.split(step), strict=True):
            codes = sae.encode(chunk)
            parts.append((codes.to_dense() if codes.is_sparse else codes).gather(1, asked).float())
    return torch.cat(parts).view(rows, positions, -1)


def token_scale(sae: Any, vectors: Float[Tensor, "row position d_in"]) -> Float[Tensor, "row position 1"] | float:
    """By how much the SAE stretches each token's reconstruction, to undo its normalisation of the input.

    `decode` is no way to find out: a layer-normed SAE forgets the mean and deviation after one call.
    """
    if sae.cfg.normalize_activations == "layer_norm":
        return vectors.float().std(dim=-1, keepdim=True)  # unbiased, as SAELens and the published code have it
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        return vectors.float().norm(dim=-1, keepdim=True) / math.sqrt(sae.cfg.d_in)
    return 1.0
