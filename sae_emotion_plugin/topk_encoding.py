"""The codes of TopK SAEs without a dense row: one matrix product into a kept buffer, and a search of few entries.

SAELens's `encode` selects among all features of a token and writes a dense row that is zero but for k entries. Here
the features are cut into blocks; every one of a token's k largest pre-activations lies in one of the k blocks with the
largest maxima, so that only those are searched. Values are those of the float32 product; where two pre-activations at
rank k differ by less than its rounding, either may be chosen, as in any other order of summation.

On a CPU that multiplies in bfloat16 the search is made there, and what it finds is proven and computed again in
float64 (`bfloat16_screen`); tokens without a proof take the way above.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_emotion_plugin.bfloat16_screen import (
    CHUNK_FEATURES,
    block_size,
    can_screen,
    kept_screen,
    native_bfloat16,
    screen_of,
    screened_topk,
)

EncodingPath = Literal["auto", "float32", "bfloat16"]

BUFFER_ENTRIES = 32 * 1024 * 1024
"""Pre-activations that exist at a time: 128 MiB in float32, whatever the SAE's width."""
SCREEN_ENTRIES = 16 * 1024 * 1024
"""The same of the screen: 32 MiB in bfloat16, beside a bfloat16 copy of the encoder."""
FALLBACK_ENTRIES = 4 * 1024 * 1024
SCREEN_TOKENS = 64
"""Tokens of one call from which on it pays to make the screen, which costs about as much as some tens of them."""
SCREEN_FEATURES_PER_K = 512
"""How wide an SAE has to be, for each of its k codes, for the product that is saved to outweigh the re-scoring: an
estimate from the float32 product and the re-scoring on one machine, to be on the safe side."""


@dataclass
class PathCounts:
    """How many tokens took which path; functions that are given one add to it."""

    float32: int = 0
    bfloat16: int = 0
    """Found by the screen, and proven."""
    fallen_back: int = 0
    """Screened, not proven, and encoded in float32."""
    candidates: int = 0
    """Pre-activations of screened tokens that were computed again in float64."""


def is_plain_topk(sae: Any) -> bool:
    """Whether `topk_codes` gives what the SAE's own `encode` does: a TopK SAE of SAELens that nobody hooks into."""
    from sae_lens.saes.topk_sae import TopK, TopKSAE

    from sae_emotion_plugin.openai_saes import OpenAITopKSAE

    hooks = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post")
    return (
        type(sae) in (TopKSAE, OpenAITopKSAE)
        and type(sae.activation_fn) is TopK
        and not any(getattr(sae, name).has_hooks() for name in hooks)
    )


def topk_codes(
    sae: Any,
    vectors: Float[Tensor, "token d_in"],
    *,
    path: EncodingPath = "auto",
    counts: PathCounts | None = None,
) -> Iterator[tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]]:
    """Yields each few tokens' k largest codes, after the ReLU, and their features, which ascend.

    A code may be 0 where a token has fewer than k positive pre-activations.

    Args:
        path: `bfloat16` screens on any CPU, `float32` never does, `auto` decides by CPU, width and number of tokens.
        counts: what is added to: tokens by the path that their codes took.

    Raises:
        ValueError: an unknown path, or `bfloat16` for an SAE that is not in float32 on a CPU.
    """
    if path not in get_args(EncodingPath):
        raise ValueError(f"unknown path {path!r} (valid: {', '.join(get_args(EncodingPath))})")
    counts = PathCounts() if counts is None else counts
    if not len(vectors) or not _screens(sae, len(vectors), path):
        counts.float32 += len(vectors)
        yield from _float32_codes(sae, vectors, BUFFER_ENTRIES)
        return
    screen = screen_of(sae)
    for part in vectors.to(device=sae.device, dtype=sae.dtype).split(max(1, SCREEN_ENTRIES // int(sae.cfg.d_sae))):
        values, features, proven, n_candidates = screened_topk(screen, sae.process_sae_in(part))
        if not proven.all():
            left = [
                torch.cat(parts) for parts in zip(*_float32_codes(sae, part[~proven], FALLBACK_ENTRIES), strict=True)
            ]
            values[~proven], features[~proven] = left
        counts.bfloat16 += int(proven.sum())
        counts.fallen_back += int((~proven).sum())
        counts.candidates += n_candidates
        yield values.relu(), features


def _screens(sae: Any, n_tokens: int, path: EncodingPath) -> bool:
    if path == "bfloat16":
        if not can_screen(sae):
            raise ValueError(f"the bfloat16 screen needs an SAE in float32 on a CPU, not {sae.dtype} on {sae.device}")
        return True
    return (
        path == "auto"
        and native_bfloat16()
        and can_screen(sae)
        and sae.cfg.d_sae >= SCREEN_FEATURES_PER_K * sae.activation_fn.k
        and (n_tokens >= SCREEN_TOKENS or kept_screen(sae) is not None)
    )


def _float32_codes(
    sae: Any, vectors: Float[Tensor, "token d_in"], buffer_entries: int
) -> Iterator[tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]]:
    """The codes by a product in the SAE's own type, which is float32 as a rule."""
    d_sae, k = int(sae.cfg.d_sae), int(sae.activation_fn.k)
    block = block_size(d_sae, k)
    n_blocks = -(-d_sae // block)
    rows = max(1, buffer_entries // (n_blocks * block))
    step = -(-CHUNK_FEATURES // block)
    scale = sae.W_dec.norm(dim=-1)[:, None] if sae.cfg.rescale_acts_by_decoder_norm else None
    memory = torch.full((n_blocks * block * min(rows, len(vectors)),), -math.inf, dtype=sae.dtype, device=sae.device)
    for part in vectors.to(device=sae.device, dtype=sae.dtype).split(rows):
        inputs = sae.process_sae_in(part).T.contiguous()
        # Written over for each part: a fresh buffer would cost as much as a tenth of the product.
        pre = memory[: n_blocks * block * len(part)].view(n_blocks, block, len(part))
        pre[-1] = -math.inf  # the last block may be longer than what is left of the features
        maxima = pre.new_empty(n_blocks, len(part))
        for first in range(0, n_blocks, step):
            blocks = slice(first, min(first + step, n_blocks))
            own = slice(first * block, min(blocks.stop * block, d_sae))
            chunk = pre.flatten(end_dim=1)[own]
            torch.addmm(sae.b_enc[own, None], sae.W_enc.T[own], inputs, out=chunk)
            if scale is not None:
                chunk *= scale[own]
            torch.amax(pre[blocks], dim=1, out=maxima[blocks])
        yield _largest(pre, maxima.T.contiguous(), k)


def _largest(
    pre: Float[Tensor, "block entry token"], maxima: Float[Tensor, "token block"], k: int
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    n_tokens, n_blocks = maxima.shape
    block = pre.shape[1]
    best = maxima.topk(min(k, n_blocks), dim=-1, sorted=False).indices
    token = torch.arange(n_tokens, device=pre.device)[:, None]
    candidates = pre[best, :, token].flatten(start_dim=1)
    values, place = candidates.topk(k, dim=-1, sorted=False)
    features = best.gather(1, place // block) * block + place % block
    features, order = features.sort(dim=-1)
    return values.gather(1, order).relu(), features
