"""`SparseStep`: what a training step found, as entries; the seam between the classes here and a loop of our own."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_emotion_plugin.architectures.active_entries import Active


@dataclass(frozen=True)
class SparseStep:
    """Loss and reconstruction of a batch, and the codes' entries (a value may be 0: it did not fire)."""

    loss: Float[Tensor, ""]
    losses: dict[str, Float[Tensor, ""]]
    sae_out: Float[Tensor, "token d_in"]
    values: Float[Tensor, " entry"]
    active: Active

    def firing_counts(self) -> Int[Tensor, " feature"]:
        """On how many tokens of the batch each feature fired."""
        return torch.bincount(self.active.features[self.values > 0], minlength=self.active.n_features)

    def as_output(self, sae_in: Float[Tensor, "token d_in"]) -> TrainStepOutput:
        """The same as SAELens's trainer wants it, with dense codes that nothing is kept for."""
        codes = self.values.new_zeros(self.active.n_tokens, self.active.n_features)
        codes[self.active.tokens, self.active.features] = self.values.detach()
        return TrainStepOutput(
            sae_in=sae_in,
            sae_out=self.sae_out,
            feature_acts=codes,
            hidden_pre=codes,
            loss=self.loss,
            losses=self.losses,
        )


@runtime_checkable
class StepsSparsely(Protocol):
    """A training SAE with a sparse step and decoder rows that are kept at unit norm."""

    def sparse_step(self, step_input: TrainStepInput) -> SparseStep: ...

    def constrain(self) -> None: ...
