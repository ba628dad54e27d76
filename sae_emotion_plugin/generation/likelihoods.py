"""How likely a model finds given continuations, and how far steering moves its predictions; in bounded memory."""

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, TokenWindow, length_batches, model_device

logger = logging.getLogger(__name__)

LOGIT_ENTRIES = 64 * 1024 * 1024  # of one batch: 256 MiB in float32
_COMPARED_ENTRIES = 1024 * 1024  # distributions compared at once: a few copies of 4 MiB


def continuation_nll(
    model: HookedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, progress: bool = False
) -> list[float]:
    """The mean negative log-likelihood, in nats a token, of each pair's continuation given its prompt (both token ids).

    Call it outside any steering context. Logits exist for one batch of continuation positions at a time (256 MiB).
    ValueError for an empty prompt or continuation.
    """
    step = max(1, LOGIT_ENTRIES // int(model.cfg.d_vocab))
    pieces = []
    for index, (prompt, continuation) in enumerate(pairs):
        if not prompt or not continuation:
            raise ValueError(f"pair {index} has an empty {'continuation' if prompt else 'prompt'}")
        for start in range(0, len(continuation), step):
            context = (*prompt, *continuation[:start])
            pieces.append(_Piece(index, context, tuple(continuation[start : start + step])))
    totals = [0.0] * len(pairs)
    pieces.sort(key=lambda piece: (len(piece.context), len(piece.target)))
    with torch.inference_mode(), tqdm(total=len(pieces), desc="likelihoods", disable=not progress) as bar:
        for length, group in itertools.groupby(pieces, key=lambda piece: len(piece.context)):
            alike = list(group)
            longest = len(alike[-1].target) if keeps_logits(model) else length + len(alike[-1].target)
            sums = backing_off(lambda batch: _nll_sums(model, batch), alike, max(1, step // longest))
            for piece, total in zip(alike, sums, strict=True):
                totals[piece.pair] += total
            bar.update(len(alike))
    return [total / len(pair[1]) for total, pair in zip(totals, pairs, strict=True)]


@dataclass(frozen=True)
class _Piece:
    """Some of a continuation's tokens with all that stands before them."""

    pair: int
    context: tuple[int, ...]
    target: tuple[int, ...]


def _nll_sums(model: HookedModel, pieces: Sequence[_Piece]) -> list[float]:
    """The summed negative log-likelihood of each target; all contexts have one length."""
    # The last token predicts nothing that is asked for.
    tokens, _ = padded([piece.context + piece.target[:-1] for piece in pieces], "right")
    n = tokens.shape[1] - len(pieces[0].context) + 1
    keep = {"logits_to_keep": n, "use_cache": False} if keeps_logits(model) else {}
    logits = model(tokens.to(model_device(model)), **keep)[:, -n:]
    sums = []
    for row, piece in zip(logits, pieces, strict=True):
        target = torch.tensor(piece.target, device=row.device)
        sums.append(float(torch.nn.functional.cross_entropy(row[: len(target)].float(), target, reduction="sum")))
    return sums


def mean_kl(
    model: HookedModel,
    windows: Sequence[TokenWindow],
    contexts: Sequence[Callable[[], AbstractContextManager[Any]]],
    *,
    progress: bool = False,
) -> list[float]:
    """For each context, the mean KL(steered || unsteered) of the next-token distributions, in nats a token.

    The distributions stand after every token of the windows (`activations.tokenize`) but BOS, which is not steered;
    they are compared over the whole vocabulary in float32, with which a mean below about 1e-6 is rounding. The
    unsteered ones are computed once for all contexts. Logits exist for one batch of positions, steered and unsteered,
    at a time (256 MiB); a model that cannot leave out logits takes more for a window longer than that.

    Args:
        contexts: functions that each make a context in which the model is steered, for example
            `lambda: steering(model, sae, plan)`. Call `mean_kl` outside any.

    Raises:
        ValueError: the windows have no tokens besides BOS, or logits are not finite.
    """
    n_tokens = sum(len(window.token_ids) - window.bos for window in windows)
    if n_tokens == 0:
        raise ValueError(f"no tokens to compare distributions on: {len(windows)} windows, none with a token but BOS")
    step = max(1, LOGIT_ENTRIES // 2 // int(model.cfg.d_vocab))
    totals = [0.0] * len(contexts)
    with torch.inference_mode(), tqdm(total=n_tokens, unit="token", desc="divergences", disable=not progress) as bar:
        for batch in length_batches(sorted(windows, key=lambda window: len(window.token_ids)), step):
            sums = backing_off(lambda some: _kl_sums(model, some, contexts, step), batch, len(batch))
            totals = [total + sum(column) for total, column in zip(totals, zip(*sums, strict=True), strict=True)]
            bar.update(sum(len(window.token_ids) - window.bos for window in batch))
    return [total / n_tokens for total in totals]


def _kl_sums(
    model: HookedModel,
    windows: Sequence[TokenWindow],
    contexts: Sequence[Callable[[], AbstractContextManager[Any]]],
    step: int,
) -> list[list[float]]:
    """The divergences of each window by context, summed over its positions."""
    tokens, _ = padded([window.token_ids for window in windows], "right")
    width = tokens.shape[1]
    tokens = tokens.to(model_device(model))
    parts = keeps_logits(model)
    span = max(1, step // len(windows)) if parts else width
    sums = [[0.0] * len(contexts) for _ in windows]
    for start in range(0, width, span):
        places = slice(start, min(start + span, width))
        keep = {"logits_to_keep": torch.arange(width)[places].to(tokens.device), "use_cache": False} if parts else {}
        unsteered = model(tokens, **keep)
        for index, context in enumerate(contexts):
            with context():
                steered = model(tokens, **keep)
            for row, window in enumerate(windows):
                here = slice(max(window.bos - start, 0), max(len(window.token_ids) - start, 0))
                divergence = _kl_sum(steered[row, here], unsteered[row, here])
                if not math.isfinite(divergence):
                    raise ValueError(f"the logits after {window.token_ids[:8]}... are not finite in context {index}")
                sums[row][index] += divergence
            del steered  # or two contexts' logits exist at a time
    return sums


def _kl_sum(steered: Float[Tensor, "position vocab"], unsteered: Float[Tensor, "position vocab"]) -> float:
    """The summed KL(steered || unsteered) of all positions; a few at a time, so that copies stay small."""
    total = 0.0
    rows = max(1, _COMPARED_ENTRIES // steered.shape[-1])
    for mine, other in zip(steered.split(rows), unsteered.split(rows), strict=True):
        log_p, log_q = (torch.log_softmax(logits.float(), dim=-1) for logits in (mine, other))
        # A token that is ruled out adds nothing, and 0 times infinity is no number.
        terms = (log_p.exp() * (log_p - log_q)).masked_fill_(log_p.isneginf(), 0.0)
        # A divergence is never negative, but its rounding error can be.
        total += float(terms.sum(dim=-1).clamp(min=0).double().sum())
    return total


def keeps_logits(model: HookedModel) -> bool:
    """Whether the model computes the last positions' logits alone and has a KV cache: a bridge to `transformers`."""
    inner = getattr(model, "original_model", None)
    known = inspect.signature(inner.forward).parameters if inner is not None else {}
    return {"logits_to_keep", "past_key_values", "attention_mask"} <= set(known)


def padded(
    rows: Sequence[Sequence[int]], side: Literal["left", "right"]
) -> tuple[Int[Tensor, "row position"], Bool[Tensor, "row position"]]:
    """The rows as one tensor, zeros where they are short, and where the real tokens are."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[index, where] = torch.tensor(row, dtype=torch.int64)
        real[index, where] = True
    return tokens, real


def backing_off(run: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any], size: int) -> list[Any]:
    """The results of all items, run in batches of `size`, which is halved whenever memory runs out."""
    results: list[Any] = []
    while len(results) < len(items):
        batch = items[len(results) : len(results) + size]
        try:
            results += run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
            logger.warning("out of memory with %d rows: going on with %d", len(batch), size)
    return results
