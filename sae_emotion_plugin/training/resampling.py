"""New directions for features that hardly fire.

`plain` draws random ones. `anthropic` follows "Towards Monosemanticity" (Bricken et al. 2023, appendix on resampling):
inputs are drawn with probability proportional to their squared loss (the error alone, without a penalty); such an
input becomes the decoder row, and a fifth of the living encoder rows' mean norm long, the encoder row. Either way the
bias becomes 0 and Adam forgets what it knew of the feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

INPUTS = 16_384
"""Inputs whose loss is measured, in `anthropic`: as many as there are, if fewer."""
ENCODER_SHARE = 0.2


@dataclass(frozen=True)
class Resampling:
    """When and how features are resampled."""

    kind: Literal["plain", "anthropic"]
    every: int
    """Steps from one to the next; none within as many of the end, since a new feature needs that long."""
    below: float = 1e-5
    """A feature counts that fired on a smaller share of the tokens since the last time."""

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to resample after so many steps of `steps`."""
        return step > 0 and step % self.every == 0 and step <= steps - self.every


@torch.no_grad()
def resample(
    sae: Any, rare: Bool[Tensor, " feature"], kind: str, inputs: Float[Tensor, "token d_in"], rng: np.random.Generator
) -> Int[Tensor, " resampled"]:
    """The features that were given new directions, in place; Adam's moments are the caller's (`forget`).

    Args:
        inputs: what `anthropic` draws from, in the space that the SAE trains in.
    """
    features = rare.nonzero()[:, 0]
    if len(features) == 0:
        return features
    norms = sae.W_enc[:, ~rare].norm(dim=0)
    length = float(norms.mean()) if len(norms) else 1.0
    if kind == "anthropic":
        directions = _badly_rebuilt(sae, inputs, len(features), rng)
        length *= ENCODER_SHARE
    else:
        drawn = rng.standard_normal((len(features), sae.cfg.d_in), dtype=np.float32)
        directions = torch.from_numpy(drawn).to(sae.W_dec)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    sae.W_dec[features] = directions
    sae.W_enc[:, features] = length * directions.T
    sae.b_enc[features] = 0.0
    return features


def forget(moments: Mapping[str, Mapping[str, Tensor]], features: Int[Tensor, " resampled"]) -> None:
    """Set Adam's moments of some features to 0; `moments` by parameter, a row for each feature."""
    for name in ("W_enc", "W_dec", "b_enc"):
        for key in ("exp_avg", "exp_avg_sq"):
            if key in moments.get(name, {}):
                moments[name][key][features] = 0.0


def _badly_rebuilt(
    sae: Any, inputs: Float[Tensor, "token d_in"], n: int, rng: np.random.Generator
) -> Float[Tensor, "resampled d_in"]:
    losses = torch.cat([(sae(part) - part).square().sum(dim=-1) for part in inputs.split(1024)])
    weights = losses.double().square().cpu().numpy()
    total = weights.sum()
    if not np.isfinite(total) or total <= 0:
        weights, total = np.ones(len(inputs)), float(len(inputs))
    chosen = rng.choice(len(inputs), size=n, replace=bool(n > np.count_nonzero(weights)), p=weights / total)
    return inputs[torch.from_numpy(chosen).to(inputs.device)] - sae.b_dec
