"""`SparseStep`: what a training step found, as entries; the seam between the classes here and `training`'s loop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_emotion_plugin.architectures import active_entries
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


class StepsSparsely(ABC):
    """Of a training SAE of SAELens, before its class: a sparse step, which SAELens's own trainer can take too."""

    @abstractmethod
    def sparse_step(self, step_input: TrainStepInput) -> SparseStep: ...

    def constrain(self) -> None:
        """Bring the weights back to where the architecture wants them."""
        return  # anywhere will do

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return self.sparse_step(step_input).as_output(step_input.sae_in)

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()


class UnitRows(StepsSparsely):
    """Of one whose decoder rows are kept at unit norm."""

    W_dec: torch.nn.Parameter

    def constrain(self) -> None:
        active_entries.make_unit_rows_(self.W_dec.data)
