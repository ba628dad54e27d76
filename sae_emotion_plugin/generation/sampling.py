"""Logits -> the next token of every row, each with its own decoding."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SAMPLED_ENTRIES = 1024 * 1024


@dataclass(frozen=True)
class Sampling:
    """How the rows of a batch draw their tokens."""

    temperatures: Float[Tensor, " row"]
    """0 is greedy."""
    top_k: Int[Tensor, " row"]
    """Of how many likeliest tokens one is drawn; 0 for all."""
    top_p: Float[Tensor, " row"]
    """Of the likeliest tokens that together have this probability one is drawn; 1 for all."""


def choose(logits: Float[Tensor, "row vocab"], sampling: Sampling, draws: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """Each row's next token: the likeliest at temperature 0, otherwise the one in which the draw falls.

    As usual, the temperature comes first, then top-k, then top-p among what is left (Holtzman et al. 2020, arXiv
    1904.09751: the fewest tokens that reach the probability, so at least one).

    Args:
        draws: one number in [0, 1) for each row.
    """
    cut = (sampling.temperatures > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1))
    if cut.any():
        logits = logits.clone()
        for row in cut.nonzero()[:, 0].tolist():
            limits = float(sampling.temperatures[row]), int(sampling.top_k[row]), float(sampling.top_p[row])
            logits[row] = _truncated(logits[row], *limits)
    temperatures = sampling.temperatures
    rows = max(1, SAMPLED_ENTRIES // logits.shape[-1])
    chosen = []
    # A few rows at a time, as views: on a CPU copies of all logits would take as long as the unembedding.
    for scores, temperature, draw in zip(
        logits.split(rows), temperatures.to(logits.device).split(rows), draws.to(logits.device).split(rows), strict=True
    ):
        sampled = temperature > 0
        likeliest = torch.zeros_like(sampled, dtype=torch.int64) if sampled.all() else scores.argmax(dim=-1)
        drawn = _drawn(scores, temperature.where(sampled, 1.0), draw) if sampled.any() else likeliest
        chosen.append(torch.where(sampled, drawn, likeliest))
    return torch.cat(chosen)


def _truncated(
    scores: Float[Tensor, " vocab"], temperature: float, top_k: int, top_p: float
) -> Float[Tensor, " vocab"]:
    """The scores, minus infinity for the tokens that top-k and top-p leave out."""
    order = scores.argsort(descending=True, stable=True)
    kept = order[: top_k or len(order)]
    shares = (scores[kept].double() / temperature).softmax(dim=0)
    # A token stays when those before it do not reach the probability yet.
    kept = kept[: int((shares.cumsum(dim=0) - shares < top_p).sum().clamp(min=1))]
    return torch.full_like(scores, -math.inf).index_copy(0, kept, scores[kept])


def _drawn(
    scores: Float[Tensor, "row vocab"], temperatures: Float[Tensor, " row"], draws: Float[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """The tokens in which the draws fall: blocks of tokens are searched first, then the tokens of one block.

    A running sum over a quarter of a million tokens would be inexact in float32 and slow in float64.
    """
    weights = scores.float() - scores.amax(dim=-1, keepdim=True)
    weights.div_(temperatures[:, None]).exp_()
    width = math.isqrt(scores.shape[-1] - 1) + 1
    if missing := width**2 - scores.shape[-1]:
        weights = torch.nn.functional.pad(weights, (0, missing))
    blocks = weights.view(len(scores), width, width)
    bounds = blocks.sum(dim=-1).double().cumsum(dim=-1)
    draw = draws[:, None] * bounds[:, -1:]
    block = _first_above(bounds, draw)
    draw = draw - torch.where(block > 0, bounds.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = blocks.take_along_dim(block[..., None], dim=1)[:, 0].double().cumsum(dim=-1)
    return (block * width + _first_above(within, draw))[:, 0]


def _first_above(sums: Float[Tensor, "row n"], draw: Float[Tensor, "row 1"]) -> Int[Tensor, "row 1"]:
    """Where the running sum first exceeds the draw; a draw at the total, by a rounding error, counts as below it."""
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(draw))
    return torch.searchsorted(sums, torch.minimum(draw, below), right=True)
