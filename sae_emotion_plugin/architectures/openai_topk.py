"""OpenAI's TopK recipe (arXiv 2406.04093) as a SAELens training SAE: layer-normed inputs, AuxK, Multi-TopK.

Losses are means over tokens and dimensions of the layer-normed input, divided by its variance: the loss of predicting
the mean is 1, whatever the model. A saved dictionary is a `topk` SAE of plain SAELens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import Tensor

from sae_emotion_plugin.architectures import active_entries
from sae_emotion_plugin.architectures.sparse_step import SparseStep, UnitRows

MEDIAN_POINTS = 32_768
"""Inputs that the geometric median is taken of, as in OpenAI's code."""


@dataclass
class OpenAITopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """Settings of `OpenAITopKTrainingSAE`; the defaults are the paper's."""

    normalize_activations: Any = "layer_norm"
    rescale_acts_by_decoder_norm: bool = False
    decoder_init_norm: float | None = 1.0
    aux_loss_coefficient: float = 1 / 32
    """Weight of AuxK: what the dead features rebuild of the residual, as a share of its variance."""
    k_aux: int | None = None
    """Dead features that rebuild the residual; a power of two near d_in / 2 when absent."""
    multi_topk: int = 4
    """Multi-TopK also rebuilds from this many times k features."""
    multi_topk_weight: float = 1 / 8
    """Weight of Multi-TopK; 0 turns it off."""
    tied_init: bool = True
    """Start the encoder as the decoder's transpose; at random directions of its own, as long, otherwise."""
    input_variance: float = 1.0
    """Mean square deviation of the normalised inputs; `initialize_from` measures it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale_acts_by_decoder_norm or not self.apply_b_dec_to_input:
            raise ValueError("openai-topk keeps decoder rows at unit norm and takes b_dec off its inputs")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k {self.k} is not between 1 and d_sae {self.d_sae}")
        for name in ("aux_loss_coefficient", "multi_topk_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative")
        for name in ("multi_topk", "k_aux"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")

    @classmethod
    def architecture(cls) -> str:
        return "openai-topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class OpenAITopKTrainingSAE(UnitRows, TopKTrainingSAE):
    """TopK on layer-normed inputs with AuxK, Multi-TopK and decoder rows of unit norm, through active entries alone.

    The encoder starts as the decoder's transpose, unless `tied_init` is off; `initialize_from` sets what depends on
    data. Rows are brought back to unit norm before each step, and their gradient has lost its parallel part, so any
    trainer does it right.
    """

    cfg: OpenAITopKTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: OpenAITopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        if not cfg.tied_init:
            self.W_enc.data = active_entries.elsewhere(self.W_dec.data).T
        active_entries.keep_as_rows_(self.W_enc)

    @torch.no_grad()
    def initialize_from(self, sample: Float[Tensor, "token d_in"], seed: int = 0) -> None:
        """Set the pre-bias to the geometric median of normalised inputs, and scales by them, as OpenAI's code does.

        The encoder is divided by the mean norm of what it rebuilds from unit vectors.
        """
        inputs = self._normalised(sample.to(self.device))
        del self.ln_mu, self.ln_std
        self.cfg.input_variance = max(float((inputs - inputs.mean(0)).square().mean()), 1e-12)
        self.b_dec.data = geometric_median(inputs[:MEDIAN_POINTS]).to(self.b_dec)
        units = torch.randn(256, self.cfg.d_in, generator=torch.Generator().manual_seed(seed)).to(self.b_dec)
        units /= units.norm(dim=-1, keepdim=True)
        select = active_entries.largest(self.cfg.k)
        values, active = active_entries.encode(units, torch.zeros_like(self.b_dec), self.W_enc, self.b_enc, select)
        norm = active_entries.decode(values.relu(), active, self.W_dec).norm(dim=-1).mean()
        if norm > 0:
            self.W_enc.data /= norm

    def sparse_step(self, step_input: TrainStepInput) -> SparseStep:
        self.constrain()
        x = self._normalised(step_input.sae_in)
        rows = active_entries.unit_rows(self.W_dec)
        many = min(self.cfg.k * self.cfg.multi_topk, self.cfg.d_sae) if self.cfg.multi_topk_weight else self.cfg.k
        select = active_entries.largest(many)
        values, active = active_entries.encode(x, self.b_dec, self.W_enc, self.b_enc, select)
        values = values.relu()
        losses: dict[str, Tensor] = {}
        if self.cfg.multi_topk_weight:
            rebuilt = active_entries.decode(values, active, rows) + self.b_dec
            losses["multi_topk_loss"] = self.cfg.multi_topk_weight * self._error(rebuilt, x)
            values, active = active_entries.strongest(values, active, self.cfg.k)
        rebuilt = active_entries.decode(values, active, rows) + self.b_dec
        losses = {"mse_loss": self._error(rebuilt, x), **losses}
        losses["auxiliary_reconstruction_loss"] = self._aux_loss(step_input.dead_neuron_mask, x, rebuilt, rows)
        return SparseStep(
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            sae_out=self.run_time_activation_norm_fn_out(rebuilt),
            values=values,
            active=active,
        )

    def _normalised(self, sae_in: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x)

    def _error(self, rebuilt: Float[Tensor, "token d_in"], x: Float[Tensor, "token d_in"]) -> Float[Tensor, ""]:
        return self.mse_loss_fn(rebuilt, x).mean() / self.cfg.input_variance

    def _aux_loss(
        self,
        dead_mask: Bool[Tensor, " feature"] | None,
        x: Float[Tensor, "token d_in"],
        rebuilt: Float[Tensor, "token d_in"],
        rows: Float[Tensor, "feature d_in"],
    ) -> Float[Tensor, ""]:
        """What the strongest dead features fail to rebuild of the residual, as a share of its variance.

        The residual holds the pre-bias already, so none is added. A residual without variance gives 0, not NaN.
        """
        dead = dead_mask.nonzero()[:, 0] if dead_mask is not None and self.cfg.aux_loss_coefficient else None
        if dead is None or len(dead) == 0:
            return rebuilt.new_tensor(0.0)
        residual = (x - rebuilt).detach()
        variance = (residual - residual.mean(0)).square().mean()
        select = active_entries.largest(min(self.cfg.k_aux or usual_k_aux(self.cfg.d_in), len(dead)))
        values, active = active_entries.encode(x, self.b_dec, self.W_enc.T[dead].T, self.b_enc[dead], select)
        error = (active_entries.decode(values.relu(), active, rows[dead]) - residual).square().mean()
        share = torch.where(variance > 1e-12, error / variance.clamp(min=1e-12), torch.zeros_like(error))
        return self.cfg.aux_loss_coefficient * share.nan_to_num(0.0, 0.0, 0.0)


def usual_k_aux(d_in: int) -> int:
    """The power of two that is nearest to half the width of the input, on a logarithmic scale."""
    return 2 ** max(0, round(math.log2(d_in / 2)))


def geometric_median(
    points: Float[Tensor, "point d_in"], steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d_in"]:
    """The point with the smallest sum of distances to all points (Weiszfeld's algorithm).

    Raises:
        ValueError: no points.
    """
    if len(points) == 0:
        raise ValueError("no points to take a geometric median of")
    points = points.double()
    median = points.mean(0)
    spread = (points - median).norm(dim=-1).mean()
    for _ in range(steps):
        # A point that the median has reached would weigh infinitely much: it weighs as one very near.
        weights = 1 / (points - median).norm(dim=-1).clamp(min=float(spread) * 1e-9 + 1e-300)
        moved = (weights[:, None] * points).sum(0) / weights.sum()
        done = (moved - median).norm() <= tolerance * spread
        median = moved
        if done:
            break
    return median.float()
