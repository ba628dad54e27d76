"""Decoder rows -> what they do to the logits, and the neurons they are aligned with; no corpus takes part.

The effect on a token is what SAEDashboard takes from a model whose final norm is folded and whose unembedding is
centred: decoder row, times the norm's weights, times the unembedding, less the mean over the vocabulary. The norm's
division by the size of the whole residual is left out: it is the same for all tokens.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import hook_layer

LOGIT_ENTRIES = 16 * 1024 * 1024
"""Logits that are in memory at a time: 64 MiB."""
COUNTED_ENTRIES = 1024 * 1024
"""Logits that are counted at a time: few, so that they stay in the processor's cache."""
_BLOCK = 128


def logit_arrays(
    model: Any,
    rows: Float[Tensor, "d_sae d_in"],
    hook_name: str,
    *,
    n_bins: int,
    n_tokens: int,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """The arrays of `Dashboards` on logits, by name: histogram over the vocabulary, and the first and last tokens.

    Raises:
        ValueError: how the hook's activations reach the residual stream is not known.
    """
    vocabulary = int(model.cfg.d_vocab)
    d_sae, n_tokens = len(rows), min(n_tokens, vocabulary)
    ends, counts = np.zeros((d_sae, 2), np.float32), np.zeros((d_sae, n_bins), np.int64)
    ids, effects = np.zeros((2, d_sae, n_tokens), np.int64), np.zeros((2, d_sae, n_tokens), np.float32)
    rows_at_once, rows_counted = (max(1, entries // vocabulary) for entries in (LOGIT_ENTRIES, COUNTED_ENTRIES))
    with torch.inference_mode(), tqdm(total=d_sae, unit="feature", desc="logits", disable=not progress) as bar:
        probes = _normed(model, _residual(model, rows, hook_name))
        constant = model.unembed(torch.zeros_like(probes[None, :1]))[0]
        for start in range(0, d_sae, rows_at_once):
            whole = model.unembed(probes[None, start : start + rows_at_once])[0].float()
            if constant.any():
                whole -= constant
            for logits in whole.split(rows_counted):
                chunk = slice(start, start + len(logits))
                # A shift of all logits changes no probability: what is shown is taken from their mean.
                mean = logits.mean(dim=1, keepdim=True)
                low, high = logits.amin(dim=1, keepdim=True), logits.amax(dim=1, keepdim=True)
                counts[chunk] = _histogram(logits, low, high, n_bins).cpu().numpy()
                ends[chunk] = (torch.cat([low, high], dim=1) - mean).cpu().numpy()
                for side, largest in enumerate((True, False)):
                    values, which = _extremes(logits, n_tokens, largest)
                    ids[side, chunk], effects[side, chunk] = which.cpu().numpy(), (values - mean).cpu().numpy()
                start += len(logits)
            bar.update(len(whole))
    flat = ends[:, 0] == ends[:, 1]
    ends[flat] += np.array([-0.5, 0.5], np.float32)  # a row of zeros: one bin holds all, and bins need a width
    return {
        "logit_ends": ends,
        "logit_counts": counts,
        "promoted_ids": ids[0],
        "promoted_effects": effects[0],
        "suppressed_ids": ids[1],
        "suppressed_effects": effects[1],
    }


def alignment_arrays(rows: Float[Tensor, "d_sae d_in"], n_neurons: int) -> dict[str, np.ndarray]:
    """The arrays of `Dashboards` on the largest entries of the decoder rows, and their share of the L1 norm."""
    dense = rows.detach().float().cpu().numpy()
    best = np.concatenate([np.argsort(-part, axis=1, kind="stable")[:, :n_neurons] for part in _slices(dense)])
    values = np.take_along_axis(dense, best, axis=1)
    norms = np.concatenate([np.abs(part).sum(axis=1, keepdims=True) for part in _slices(dense)])
    shares = np.divide(np.abs(values), norms, out=np.zeros_like(values), where=norms > 0)
    return {"aligned_neurons": best, "aligned_values": values, "aligned_shares": shares}


def _slices(rows: Float[np.ndarray, "d_sae d_in"]) -> Iterator[Float[np.ndarray, "part d_in"]]:
    step = max(1, COUNTED_ENTRIES // rows.shape[1])
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _residual(model: Any, rows: Float[Tensor, "d_sae d_in"], hook_name: str) -> Float[Tensor, "d_sae d_model"]:
    """The rows as they reach the residual stream: from attention heads and MLP neurons through their output weights."""
    weight = next(iter(model.unembed.parameters()))
    rows = rows.detach().to(device=weight.device, dtype=weight.dtype)
    layer = hook_layer(hook_name)
    if hook_name.endswith("hook_z"):
        return rows @ model.blocks[layer].attn.W_O.flatten(end_dim=-2).to(rows)
    if hook_name.endswith(("mlp.hook_pre", "mlp.hook_post")):
        return rows @ model.blocks[layer].mlp.W_out.to(rows)
    if rows.shape[1] != int(model.cfg.d_model):
        raise ValueError(
            f"how {hook_name} with {rows.shape[1]} dimensions reaches a residual stream of {model.cfg.d_model} is not "
            "known (valid: hooks on the residual stream, hook_z, mlp.hook_pre, mlp.hook_post)"
        )
    return rows


def _normed(model: Any, rows: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, "d_sae d_model"]:
    """The rows times the final norm's weights; centred first where the norm centres. Its division is left out."""
    norm = getattr(model, "ln_final", torch.nn.Identity())

    def weights(signs: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        probe = 1000 * signs[None, None]  # so long that the norm's epsilon does not show
        return (norm(probe) - norm(-probe))[0, 0] / 2 * signs

    signs = torch.ones_like(rows[0])
    found = weights(signs)
    if found.abs().max() > 1e-3:
        return rows * found if not isinstance(norm, torch.nn.Identity) else rows
    signs[1::2] = -1  # a layer norm makes nothing of a constant, and leaves alone what has mean 0 and variance 1
    return (rows - rows.mean(dim=1, keepdim=True)) * weights(signs)


def _histogram(
    logits: Float[Tensor, "feature vocab"],
    low: Float[Tensor, "feature 1"],
    high: Float[Tensor, "feature 1"],
    n_bins: int,
) -> Int[Tensor, "feature bin"]:
    place = ((logits - low) * (n_bins / (high - low).clamp(min=1e-30))).to(torch.int32).clamp_(max=n_bins - 1)
    place += n_bins * torch.arange(len(logits), dtype=torch.int32, device=logits.device)[:, None]
    return torch.bincount(place.flatten(), minlength=len(logits) * n_bins).view(-1, n_bins)


def _extremes(
    logits: Float[Tensor, "feature vocab"], n_tokens: int, largest: bool
) -> tuple[Float[Tensor, "feature row"], Int[Tensor, "feature row"]]:
    """The most extreme logits in order, and their tokens; they lie in the blocks with the most extreme entries."""
    n_rows, vocabulary = logits.shape
    n_blocks = vocabulary // _BLOCK
    ids = torch.arange(vocabulary, device=logits.device).expand(n_rows, -1)
    if n_blocks > n_tokens:
        whole = n_blocks * _BLOCK
        blocks = logits[:, :whole].unflatten(1, (n_blocks, _BLOCK))
        extreme = blocks.amax(dim=2) if largest else blocks.amin(dim=2)
        best = extreme.topk(n_tokens, largest=largest).indices.sort(dim=1).values
        inside = (best[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(start_dim=1)
        ids = torch.cat([inside, ids[:, whole:]], dim=1)
        logits = logits.gather(1, ids)
    values, place = logits.topk(n_tokens, largest=largest)
    place, order = place.sort(dim=1)  # of equal ones the smaller id first
    values, order = values.gather(1, order).sort(dim=1, descending=largest, stable=True)
    return values, ids.gather(1, place.gather(1, order))
