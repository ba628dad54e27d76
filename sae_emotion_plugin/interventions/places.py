"""Where and when a plan acts: which token of its text each position of a call is, and how much it is steered."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_emotion_plugin.interventions.contributions import codes_of
from sae_emotion_plugin.interventions.plans import SteeringPlan

NO_END = 2**31 - 1


@dataclass(frozen=True)
class Places:
    """Which tokens of their texts a call of the model sees."""

    index: Int[Tensor, "row position"]
    """Counted from the text's first token; -1 is never steered: BOS, padding."""
    step: Int[Tensor, "row position"]
    """0 in the prompt, n for the n-th generated token."""
    n_prompt: Int[Tensor, " row"]


Where = Callable[[Float[Tensor, "row position d_in"], str], Places]


def tracked(
    mask: Bool[Tensor, "masked_row masked"] | None,
    prompt_lengths: Int[Tensor, " row"] | None = None,
    *,
    skip_first: bool = False,
    n_written: int = 0,
) -> Where:
    """Tells each call's places, from its shape and the calls before it at the same hook (`hooks`)."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def places(vectors: Float[Tensor, "row position d_in"], hook: str) -> Places:
        rows, positions = vectors.shape[:2]
        if positions == 1 and (mask is None or mask.shape[1] != 1 or hook in seen):
            nothing = torch.zeros(rows, dtype=torch.int64)
            n_prompt, step = seen.get(hook, (nothing if prompt_lengths is None else prompt_lengths, n_written))
            n_prompt = n_prompt if len(n_prompt) == rows else nothing
            seen[hook] = n_prompt, step + 1
            return Places((n_prompt + step)[:, None], torch.full((rows, 1), step + 1), n_prompt)
        steered = mask
        if steered is None:
            steered = torch.ones(rows, positions, dtype=torch.bool)
            steered[:, 0] = not skip_first
        elif steered.shape != vectors.shape[:2]:
            raise ValueError(f"the mask is {tuple(steered.shape)}, the activations {tuple(vectors.shape[:2])}")
        steered = steered.cpu()
        n_prompt = steered.sum(dim=1) if prompt_lengths is None else prompt_lengths.cpu()
        index = torch.where(steered, steered.cumsum(dim=1) - 1, -1)
        seen[hook] = n_prompt, 0
        return Places(index, (index - n_prompt[:, None] + 1).clamp(min=0), n_prompt)

    return places


@dataclass(frozen=True)
class Schedule:
    """Where and when each row is steered, and how much of its change it gets there."""

    sae: Any
    begin: Int[Tensor, " row"]
    end: Int[Tensor, " row"]
    prompt: Bool[Tensor, " row"]
    """Whether the prompt is steered."""
    only_last: Bool[Tensor, " row"]
    """Whether of the prompt only its last token is."""
    first_tokens: Int[Tensor, " row"]
    """How many generated tokens are steered; 0 for none."""
    decay: Float[Tensor, " row"]
    gates: Int[Tensor, "row 1"] | None
    above: Float[Tensor, " row"]
    """What the gate's feature has to exceed; minus infinity without a gate."""

    @classmethod
    def of(cls, sae: Any, plans: Sequence[SteeringPlan | None]) -> "Schedule | None":
        if all(plan is None or plan.everywhere for plan in plans):
            return None
        spans = [(plan.span if plan else None) or (0, None) for plan in plans]
        positions = [plan.positions if plan else "all" for plan in plans]
        firsts = [plan.first_tokens if plan else None for plan in plans]
        gates = [plan.gate if plan else None for plan in plans]
        return cls(
            sae=sae,
            begin=torch.tensor([begin for begin, _ in spans]),
            end=torch.tensor([NO_END if end is None else end for _, end in spans]),
            prompt=torch.tensor([where != "generated" for where in positions]),
            only_last=torch.tensor([where == "last" for where in positions]),
            first_tokens=torch.tensor(
                [
                    0 if where == "prompt" else NO_END if first is None else first
                    for where, first in zip(positions, firsts, strict=True)
                ]
            ),
            decay=torch.tensor([plan.decay if plan else 1.0 for plan in plans]),
            gates=torch.tensor([[gate.feature if gate else 0] for gate in gates]) if any(gates) else None,
            above=torch.tensor([gate.above if gate else -math.inf for gate in gates]),
        )

    @torch.no_grad()
    def strength(self, vectors: Float[Tensor, "row position d_in"], places: Places) -> Float[Tensor, "row position"]:
        """What each token's change is multiplied by."""
        index, step = places.index, places.step
        in_prompt = self.prompt[:, None] & (~self.only_last[:, None] | (index == places.n_prompt[:, None] - 1))
        steered = torch.where(step == 0, in_prompt, step <= self.first_tokens[:, None])
        steered &= (index >= self.begin[:, None]) & (index < self.end[:, None])
        strength = (steered * self.decay[:, None] ** step).to(vectors.device)
        if self.gates is not None:
            own = vectors.detach().to(self.sae.device, self.sae.dtype)
            codes = codes_of(self.sae, own, self.gates.to(self.sae.device))[..., 0]
            strength = strength * (codes.to(vectors.device) > self.above[:, None].to(vectors.device))
        return strength
