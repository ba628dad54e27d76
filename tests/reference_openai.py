"""OpenAI's published equations, plainly and in float64, independent of the package and of SAELens."""

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
