"""ReLU + L1 with decoder rows of unit norm as a SAELens training SAE; it saves a `standard` SAE.

Without the constraint, small codes and long rows would buy the penalty off. Dead features are resampled by the loop
around it (`training.resampling`).
"""

from dataclasses import dataclass

import torch
from sae_lens import StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput

from sae_emotion_plugin.architectures import active_entries
from sae_emotion_plugin.architectures.sparse_step import SparseStep, UnitRows


@dataclass
class ReluL1TrainingSAEConfig(StandardTrainingSAEConfig):
    """Settings of `ReluL1TrainingSAE`: those of SAELens's standard one."""

    decoder_init_norm: float | None = 1.0
    encoder_init_norm: float = 0.1
    """The encoder starts as the decoder's transpose times this: as its transpose, a wide one would rebuild each input
    several times over."""
    tied_init: bool = True
    """Without it the encoder starts at random directions of its own, as long, as the layers of a plain module do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lp_norm != 1 or self.normalize_activations == "layer_norm" or not self.apply_b_dec_to_input:
            raise ValueError("relu-l1 needs lp_norm 1, inputs without layer norm, and b_dec taken off them")
        if self.l1_coefficient < 0:
            raise ValueError(f"l1_coefficient {self.l1_coefficient} is negative")

    @classmethod
    def architecture(cls) -> str:
        return "relu-l1"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class ReluL1TrainingSAE(UnitRows, StandardTrainingSAE):
    """ReLU codes, their sum as penalty, and decoder rows of unit norm, through active entries alone."""

    cfg: ReluL1TrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: ReluL1TrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.constrain()
        start = self.W_dec.data if cfg.tied_init else active_entries.elsewhere(self.W_dec.data)
        self.W_enc.data = (start * cfg.encoder_init_norm).T

    def sparse_step(self, step_input: TrainStepInput) -> SparseStep:
        self.constrain()
        x = self.hook_sae_input(self.reshape_fn_in(step_input.sae_in.to(self.dtype)))
        select = active_entries.positive
        values, active = active_entries.encode(x, self.b_dec, self.W_enc, self.b_enc, select)
        rebuilt = active_entries.decode(values, active, active_entries.unit_rows(self.W_dec)) + self.b_dec
        losses = {
            "mse_loss": self.mse_loss_fn(rebuilt, x).sum(dim=-1).mean(),
            "l1_loss": step_input.coefficients["l1"] * values.sum() / max(1, len(x)),
        }
        loss = torch.stack(list(losses.values())).sum()
        return SparseStep(loss, losses, rebuilt, values, active)
