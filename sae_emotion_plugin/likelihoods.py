"""How likely a model finds given continuations, in batches that fit the memory."""

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, model_device

logger = logging.getLogger(__name__)

LOGIT_ENTRIES = 64 * 1024 * 1024  # of one batch: 256 MiB in float32


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
