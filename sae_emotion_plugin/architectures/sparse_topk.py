"""SAELens's TopK training SAE with the same loss and gradients, computed through the k active features of each token
instead of through dense `[token, d_sae]` products; one of its sides may stay frozen.
"""

from typing import Literal

import torch
from jaxtyping import Float
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_emotion_plugin.architectures import active_entries
from sae_emotion_plugin.architectures.sparse_step import SparseStep, StepsSparsely

FrozenPart = Literal["decoder", "encoder"]


class SparseStepTopKTrainingSAE(StepsSparsely, TopKTrainingSAE):
    """SAELens's `TopKTrainingSAE` (decoder-norm rescaling on, plain inputs) with a sparse training step.

    Only the encoder's product is dense; its gradient, the decoder and the decoder's gradient touch active features
    alone. AuxK (arXiv 2406.04093, A.2) is SAELens's too, computed over dead features alone.

    With `frozen`, the matrix of that side keeps its random start while the other side and both biases learn: the
    reference dictionaries of Korznikov et al. (arXiv 2602.14111). The norms of the decoder's rows scale the codes, here
    as in every such SAE, so a frozen encoder keeps its directions and can learn a factor for each.
    """

    def __init__(
        self, cfg: TopKTrainingSAEConfig, use_error_term: bool = False, *, frozen: FrozenPart | None = None
    ) -> None:
        super().__init__(cfg, use_error_term)
        if frozen is not None:
            (self.W_dec if frozen == "decoder" else self.W_enc).requires_grad_(False)
        active_entries.keep_as_rows_(self.W_enc)

    def sparse_step(self, step_input: TrainStepInput) -> SparseStep:
        if not self.cfg.rescale_acts_by_decoder_norm or self.cfg.normalize_activations != "none":
            raise ValueError("the sparse step needs rescale_acts_by_decoder_norm and normalize_activations='none'")
        x = self.hook_sae_input(self.reshape_fn_in(step_input.sae_in.to(self.dtype)))
        pre_bias = self.b_dec if self.cfg.apply_b_dec_to_input else torch.zeros_like(self.b_dec)
        norms = self.W_dec.norm(dim=-1)
        rows = self.W_dec / norms[:, None]
        encoder, bias = self.W_enc * norms, self.b_enc * norms
        values, active = active_entries.encode(x, pre_bias, encoder, bias, active_entries.largest(self.cfg.k))
        values = values.relu()
        sae_out = active_entries.decode(values, active, rows) + self.b_dec
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        aux_loss = self._dead_feature_loss(step_input, x - pre_bias, sae_out, encoder, bias, rows)
        losses = {"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss}
        return SparseStep(mse_loss + aux_loss, losses, sae_out, values, active)

    def _dead_feature_loss(
        self,
        step_input: TrainStepInput,
        x: Float[Tensor, "token d_in"],
        sae_out: Float[Tensor, "token d_in"],
        encoder: Float[Tensor, "d_in d_sae"],
        bias: Float[Tensor, " d_sae"],
        rows: Float[Tensor, "d_sae d_in"],
    ) -> Float[Tensor, ""]:
        """How badly the strongest dead features rebuild what the living ones leave, weighted as SAELens weights it."""
        mask = step_input.dead_neuron_mask
        dead = mask.nonzero()[:, 0] if mask is not None else torch.zeros(0, dtype=torch.int64)
        if len(dead) == 0:
            return sae_out.new_tensor(0.0)
        residual = (step_input.sae_in - sae_out).detach()
        usual = x.shape[-1] // 2
        k = min(usual, len(dead))
        pre = x @ encoder[:, dead] + bias[dead]
        strongest = pre.topk(k, sorted=False)
        codes = torch.zeros_like(pre).scatter(1, strongest.indices, strongest.values)
        loss = (codes @ rows[dead] - residual).square().sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / usual, 1.0) * loss
