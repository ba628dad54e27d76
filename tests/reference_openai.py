"""OpenAI's published equations, plainly and in float64, and what its reader demands: independent of the package."""

from typing import Any

import torch
from torch import Tensor


def encode_and_reconstruct(state: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    enc, dec, pre, latent = (
        state[key].double() for key in ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")
    )
    x, mu, std = x.double(), torch.zeros(1), torch.ones(1)
    if topk := state["activation"] == "TopK":
        mu, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        x = (x - mu) / (std + 1e-5)
    before = (x - pre) @ enc.T + latent
    if topk:
        threshold = before.sort(-1, descending=True).values[..., state["activation_state_dict"]["k"] - 1]
        before = torch.where(before >= threshold[..., None], before, torch.zeros(()).double())
    codes = before.clamp(min=0)
    return codes, (codes @ dec.T + pre) * std + mu


class StrictReader(torch.nn.Module):
    """Takes a state dict as `Autoencoder.from_state_dict(state, strict=True)` does: no key too few, none too many."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        state = dict(state)
        d_sae, d_in = state["encoder.weight"].shape
        self.activation = state.pop("activation", "ReLU")
        options = state.pop("activation_state_dict", {})
        self.k = options["k"] if self.activation == "TopK" else None
        assert self.activation == "ReLU" or options["postact_fn"] == "ReLU"
        self.pre_bias = torch.nn.Parameter(torch.zeros(d_in))
        self.latent_bias = torch.nn.Parameter(torch.zeros(d_sae))
        self.encoder = torch.nn.Linear(d_in, d_sae, bias=False)
        self.decoder = torch.nn.Linear(d_sae, d_in, bias=False)
        self.register_buffer("stats_last_nonzero", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("latents_activation_frequency", torch.ones(d_sae))
        self.register_buffer("latents_mean_square", torch.zeros(d_sae))
        self.load_state_dict(state, strict=True)
