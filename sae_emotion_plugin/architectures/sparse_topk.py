"""SAELens's TopK training SAE with the same loss and gradients, computed through the k active features of each token
instead of through dense `[token, d_sae]` products; one of its sides may stay frozen.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

FrozenPart = Literal["decoder", "encoder"]


class SparseStepTopKTrainingSAE(TopKTrainingSAE):
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

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self.cfg.rescale_acts_by_decoder_norm or self.cfg.normalize_activations != "none":
            raise ValueError("the sparse step needs rescale_acts_by_decoder_norm and normalize_activations='none'")
        x = self.process_sae_in(step_input.sae_in)
        norms = self.W_dec.norm(dim=-1)
        rows = self.W_dec / norms[:, None]
        encoder, bias = self.W_enc * norms, self.b_enc * norms
        rebuilt, values, features = _SparseAutoencode.apply(x, encoder, bias, rows, self.cfg.k)
        sae_out = rebuilt + self.b_dec
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        aux_loss = self._dead_feature_loss(step_input, x, sae_out, encoder, bias, rows)
        with torch.no_grad():
            codes = torch.zeros(len(x), self.cfg.d_sae, dtype=x.dtype, device=x.device)
            codes.scatter_(1, features, values)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=codes,
            hidden_pre=codes,
            loss=mse_loss + aux_loss,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss},
        )

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


class _SparseAutoencode(torch.autograd.Function):
    """relu(topk(x @ encoder + bias)) @ rows, with gradients through the k selected features of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "token d_in"],
        encoder: Float[Tensor, "d_in d_sae"],
        bias: Float[Tensor, " d_sae"],
        rows: Float[Tensor, "d_sae d_in"],
        k: int,
    ) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        top = torch.addmm(bias, x, encoder).topk(k, sorted=False)
        values = top.values.relu()
        ctx.save_for_backward(x, encoder, rows, values, top.indices)
        ctx.mark_non_differentiable(values, top.indices)
        rebuilt = torch.nn.functional.embedding_bag(top.indices, rows, per_sample_weights=values, mode="sum")
        return rebuilt, values, top.indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, encoder, rows, values, features = ctx.saved_tensors
        grad = grads[0]
        value_grads = torch.bmm(rows[features], grad[:, :, None])[:, :, 0] * (values > 0)
        by_feature = _by_feature(features, rows.shape[0])
        rows_grad = _weighted_sums(by_feature, values, grad, rows.shape[0]) if ctx.needs_input_grad[3] else None
        encoder_grad = _weighted_sums(by_feature, value_grads, x, rows.shape[0]).T
        bias_grad = torch.zeros_like(encoder[0]).index_add_(0, features.flatten(), value_grads.flatten())
        x_grad = torch.nn.functional.embedding_bag(
            features, encoder.T.contiguous(), per_sample_weights=value_grads, mode="sum"
        )
        return x_grad, encoder_grad, bias_grad, rows_grad, None


def _by_feature(features: Int[Tensor, "token k"], d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The active entries sorted by feature: their order, their tokens, and where each feature's begin."""
    flat = features.flatten()
    order = flat.argsort(stable=True)
    starts = torch.zeros(d_sae + 1, dtype=torch.int64, device=flat.device)
    starts[1:] = torch.bincount(flat, minlength=d_sae).cumsum(0)
    return order, order // features.shape[1], starts


def _weighted_sums(
    by_feature: tuple[Tensor, Tensor, Tensor],
    weights: Float[Tensor, "token k"],
    vectors: Float[Tensor, "token d_in"],
    d_sae: int,
) -> Float[Tensor, "d_sae d_in"]:
    """For each feature the sum of the vectors of the tokens on which it is active, weighted."""
    order, tokens, starts = by_feature
    return torch.nn.functional.embedding_bag(
        tokens, vectors, starts[:d_sae], per_sample_weights=weights.flatten()[order], mode="sum"
    )
