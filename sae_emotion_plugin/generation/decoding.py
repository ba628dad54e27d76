"""Requests for continuations, and the steps that write them: tokens, caches, plans by row, ends."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_emotion_plugin.activations import HookedModel, model_device
from sae_emotion_plugin.generation.likelihoods import keeps_logits, padded
from sae_emotion_plugin.generation.sampling import Sampling, choose
from sae_emotion_plugin.interventions.hooks import row_steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.sparse_codes import token_settings

Forward: TypeAlias = Callable[..., Float[Tensor, "row vocab"]]
"""(tokens written so far [row step], plans from here on) -> logits of each row's next token."""
Plans: TypeAlias = Sequence[SteeringPlan | None]
Stopped: TypeAlias = Callable[[int, list[int]], bool]


@dataclass(frozen=True)
class Request:
    """One continuation to be made: unsteered without a plan, greedy at temperature 0."""

    prompt: str
    plan: SteeringPlan | None = None
    temperature: float | int = 0.0
    seed: int = 0
    top_k: int = 0
    """Of how many likeliest tokens one is drawn; 0 for all."""
    top_p: float | int = 1.0
    """Of the likeliest tokens that together have this probability one is drawn."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_p", float(self.top_p))
        if not self.prompt.strip():
            raise ValueError(f"the prompt {self.prompt!r} is empty")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be finite, and 0 (greedy) or above")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Written:
    """The new tokens of a row, and their mean negative log-likelihood where the row is unsteered and not empty."""

    ids: tuple[int, ...]
    nll: float | None


def prompt_tokens(model: HookedModel, sae: Any, prompt: str, max_new_tokens: int) -> tuple[int, ...]:
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    bos = bos_tokens(model, sae)
    room = int(model.cfg.n_ctx) - max_new_tokens - len(bos)
    if len(ids) > room:
        limit = f"{room} fit the model's context of {model.cfg.n_ctx} with {max_new_tokens} new ones"
        raise ValueError(f"the prompt {prompt[:40]!r}... has {len(ids)} tokens; {limit}")
    return (*bos, *ids)


def bos_tokens(model: HookedModel, sae: Any) -> list[int]:
    bos = model.tokenizer.bos_token_id
    return [bos] if token_settings(sae)["prepend_bos"] and bos is not None else []


def end_tokens(model: HookedModel) -> set[int]:
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return {*(ends if isinstance(ends, list) else [ends]), model.tokenizer.eos_token_id} - {None}


def continuation_text(model: HookedModel, prompt: Sequence[int], ids: Sequence[int]) -> str:
    # Decoded alone, a continuation loses its leading space with some tokenizers.
    before, whole, alone = model.tokenizer.batch_decode(
        [prompt, (*prompt, *ids), ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return whole[len(before) :] if whole.startswith(before) else alone


@contextmanager
def stepping(
    model: HookedModel,
    sae: Any,
    plans: Sequence[SteeringPlan | None],
    prompts: Sequence[tuple[int, ...]],
    use_cache: bool = True,
) -> Iterator[Forward]:
    """A function from the tokens written so far to the logits of each row's next token, in its steering context.

    The function takes other plans too, for the tokens from there on: what the cache holds stays as it was steered.
    Without a cache the whole text is steered anew.
    """
    device, n_bos = model_device(model), len(bos_tokens(model, sae))
    rows = torch.arange(len(prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    has_cache = keeps_logits(model)

    def recomputed(written: Int[Tensor, "row step"], plans: Plans = plans) -> Float[Tensor, "row vocab"]:
        grown = [(*prompt, *new) for prompt, new in zip(prompts, written.tolist(), strict=True)]
        tokens, steered = padded(grown, "right")
        steered[:, :n_bos] = False
        last = lengths + written.shape[1] - 1
        kept, place = last.unique(return_inverse=True) if has_cache else (None, last)
        keep = {} if kept is None else {"logits_to_keep": kept.to(device), "use_cache": False}
        with row_steering(model, sae, plans, steered, lengths - n_bos):
            return model(tokens.to(device), **keep)[rows.to(device), place.to(device)]

    if not (use_cache and has_cache):
        yield recomputed
        return
    tokens, real = padded(prompts, "left")
    steered = real.clone()
    if n_bos:
        steered[rows, tokens.shape[1] - lengths] = False
    cache: Any = None
    current: Plans | None = None

    def cached(written: Int[Tensor, "row step"], plans: Plans = plans) -> Float[Tensor, "row vocab"]:
        nonlocal cache, current
        if plans is not current:
            context.close()
            # The hooks count the generated tokens; whoever comes later is told how many there were.
            mask, n_before = (steered, 0) if cache is None else (None, written.shape[1] - 1)
            context.enter_context(row_steering(model, sae, plans, mask, lengths - n_bos, n_before))
            current = plans
        logits, cache = model(
            (torch.cat([tokens, written], 1) if cache is None else written[:, -1:]).to(device),
            return_type="logits_and_cache",
            # The bridge derives the positions from the mask.
            attention_mask=torch.cat([real, torch.ones_like(written, dtype=torch.bool)], 1).long().to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return logits[:, -1]

    with ExitStack() as context:
        yield cached


def write(
    forward: Forward,
    batch: Sequence[Request],
    n: int,
    ends: set[int],
    stopped: Stopped | None,
    with_nll: bool = True,
) -> list[Written]:
    """The new tokens of each row: `n` of them, fewer where the text ends before.

    Args:
        with_nll: measure the likelihood of unsteered rows, whose logits are at hand.
        stopped: whether row `i` ends with the tokens that it has; asked after every token of a row that goes on.
    """
    sampling = sampling_of(batch)
    draws = torch.stack([draws_of(request, n) for request in batch])
    written = torch.zeros(len(batch), 0, dtype=torch.int64)
    measured = [index for index, request in enumerate(batch) if with_nll and request.plan is None]
    unsteered = torch.tensor(measured, dtype=torch.int64)
    losses = torch.zeros(len(batch), n, dtype=torch.float64)
    ended = torch.zeros(len(batch), dtype=torch.bool)
    lengths = [n] * len(batch)
    while written.shape[1] < n and not ended.all():
        logits = forward(written)
        check_finite(logits, batch)
        chosen = choose(logits, sampling, draws[:, written.shape[1]]).cpu()
        if measured:
            own = logits[unsteered.to(logits.device)].float()
            targets = chosen[unsteered].to(logits.device)
            losses[unsteered, written.shape[1]] = cross_entropy(own, targets, reduction="none").double().cpu()
        written = torch.cat([written, chosen[:, None]], 1)
        ended |= torch.isin(chosen, torch.tensor(sorted(ends), dtype=torch.int64))
        if stopped is not None:
            for row in (~ended).nonzero()[:, 0].tolist():
                if stopped(row, written[row].tolist()):
                    ended[row], lengths[row] = True, written.shape[1]
    rows = [
        tuple(itertools.takewhile(lambda token: token not in ends, row[:length]))
        for row, length in zip(written.tolist(), lengths, strict=True)
    ]
    return [
        Written(ids, float(loss[: len(ids)].mean()) if ids and row in measured else None)
        for row, (ids, loss) in enumerate(zip(rows, losses, strict=True))
    ]


def check_finite(logits: Float[Tensor, "row vocab"], batch: Sequence[Request]) -> None:
    """ValueError for logits that are no numbers: it names the plan, with its amounts and hook."""
    if broken := (~logits.amax(dim=-1).isfinite()).nonzero().tolist():
        request = batch[broken[0][0]]
        raise ValueError(f"the logits after {request.prompt!r} are not finite; steered by {request.plan}")


def sampling_of(batch: Sequence[Request]) -> Sampling:
    """How each of the requests draws its tokens."""
    return Sampling(
        torch.tensor([request.temperature for request in batch]),
        torch.tensor([request.top_k for request in batch]),
        torch.tensor([request.top_p for request in batch]),
    )


def draws_of(request: Request, n: int) -> Float[Tensor, " step"]:
    """A request's own random numbers: the same whatever else is in the batch, and however long the text becomes."""
    return torch.rand(n, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)
