"""What is watched while a dictionary trains: reconstruction, sparsity, and how alike its directions are."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

COSINES_AT_ONCE = 16 * 1024 * 1024
"""Cosines that exist at a time, 64 MiB in float32, and a few times that with what is made of them."""
QUANTILE = 0.99


@dataclass(frozen=True)
class DecoderCosines:
    """|cos| between the decoder's rows, of each row with all others."""

    mean: float
    """Over all pairs: the `off_diag_mean` of the blog."""
    quantiles: Float[Tensor, " feature"]
    """The 99th percentile of each row, over the others."""
    maxima: Float[Tensor, " feature"]
    """The nearest other row of each."""
    random: float
    """The mean for random directions of that dimension, sqrt(2 / (pi d))."""

    def summary(self) -> dict[str, float]:
        """The numbers of a log: means over features, and the largest cosine of all."""
        return {
            "cosine_mean": self.mean,
            "cosine_p99": float(self.quantiles.mean()),
            "cosine_max": float(self.maxima.mean()),
            "cosine_largest": float(self.maxima.max()),
            "cosine_random": self.random,
        }


@torch.no_grad()
def decoder_cosines(rows: Float[Tensor, "feature d_in"]) -> DecoderCosines:
    """|cos| between all pairs of rows, in blocks: exact, without a matrix of all pairs. A row of zeros has cosine 0.

    Raises:
        ValueError: fewer than two rows.
    """
    n, d = rows.shape
    if n < 2:
        raise ValueError(f"{n} rows have no pairs to take a cosine of")
    # Divided by the largest entry first, so that a tiny row's norm does not vanish.
    largest = rows.abs().amax(dim=-1, keepdim=True)
    units = torch.nn.functional.normalize(rows.float() / largest.clamp(min=torch.finfo(torch.float32).tiny), dim=-1)
    place = QUANTILE * (n - 2)
    tail = n - 1 - math.floor(place)
    total, quantiles, maxima = 0.0, torch.empty(n), torch.empty(n)
    for first in range(0, n, max(1, COSINES_AT_ONCE // n)):
        block = slice(first, min(first + max(1, COSINES_AT_ONCE // n), n))
        cosines = (units[block] @ units.T).abs_()
        own = torch.arange(block.start, block.stop, device=rows.device)
        cosines[own - first, own] = 0.0
        total += float(cosines.sum(dim=-1).double().sum())
        # Below every |cos|, so that a row is not among its own others.
        cosines[own - first, own] = -1.0
        top = cosines.topk(tail, dim=-1).values.clamp(0.0, 1.0)
        maxima[block] = top[:, 0].cpu()
        upper = top[:, -2] if tail > 1 else top[:, -1]
        quantiles[block] = torch.lerp(top[:, -1], upper, place - math.floor(place)).cpu()
    return DecoderCosines(total / (n * (n - 1)), quantiles, maxima, math.sqrt(2 / (math.pi * d)))


@dataclass(frozen=True)
class BatchFigures:
    """Of one batch of a training."""

    fvu: float
    """Squared error over squared deviation from the batch's mean."""
    shrinkage: float
    """How much too small the reconstruction is: E|r|^2 / E[r x] with both centred (the relative reconstruction bias of
    Rajamanoharan et al., arXiv 2404.16014); 1 is none, and an L1 penalty makes it less."""
    l0: float
    """Features that fire on a token."""


@torch.no_grad()
def batch_figures(
    sae_in: Float[Tensor, "token d_in"], sae_out: Float[Tensor, "token d_in"], counts: Int[Tensor, " feature"]
) -> BatchFigures:
    """The figures of a batch, given how often each feature fired; NaN where they are not defined."""
    mean = sae_in.mean(0)
    x, r = sae_in - mean, sae_out - mean
    variance, along = float(x.square().sum()), float((r * x).sum())
    return BatchFigures(
        fvu=float((sae_out - sae_in).square().sum()) / variance if variance else math.nan,
        shrinkage=float(r.square().sum()) / along if along else math.nan,
        l0=float(counts.sum()) / max(1, len(sae_in)),
    )
