"""Prompts and steering plans -> continuations, in batches whose rows differ; and what steering did and cost."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, model_device
from sae_emotion_plugin.generations import Generation, Generations, Part
from sae_emotion_plugin.interventions import row_steering
from sae_emotion_plugin.judges.judge import valence
from sae_emotion_plugin.likelihoods import backing_off, continuation_nll, keeps_logits, padded
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering_plans import SteeringPlan, check_plan
from sae_emotion_plugin.text_costs import is_degenerate

Forward = Callable[[Int[Tensor, "row step"]], Float[Tensor, "row vocab"]]
SAMPLED_ENTRIES = 1024 * 1024


@dataclass(frozen=True)
class Request:
    """One continuation to be made: unsteered without a plan, greedy at temperature 0."""

    prompt: str
    plan: SteeringPlan | None = None
    temperature: float | int = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        if not self.prompt.strip():
            raise ValueError(f"the prompt {self.prompt!r} is empty")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be finite, and 0 (greedy) or above")


@dataclass(frozen=True)
class Continuation:
    """What the model wrote, without the prompt and without the end-of-text token."""

    request: Request
    text: str
    token_ids: tuple[int, ...]
    nll: float | None
    """Mean negative log-likelihood, in nats a token, under the unsteered model; None for an empty continuation."""


def generate(
    model: HookedModel,
    sae: Any,
    plan: SteeringPlan,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    temperature: float | int = 0.0,
    seed: int = 0,
    emotion: str = "",
    part: Part = "demo",
) -> Generations:
    """Each prompt's continuation with and without the plan, judged: valence, likelihood, degeneration.

    ValueError for no prompts, an empty one, one too long for the model, or a plan that does not fit the SAE.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    steered = [Request(prompt, plan, temperature, seed) for prompt in prompts]
    both = [*steered, *(replace(request, plan=None) for request in steered)]
    done = complete(model, sae, both, max_new_tokens=max_new_tokens, progress=False)
    rows = judge_rows(done[: len(steered)], done[len(steered) :], emotion=emotion, part=part)
    meta = {"model": model_identity(model), "max_new_tokens": max_new_tokens, "plan": plan.to_dict()}
    return Generations({**meta, "recommended": {}}, rows)


def judge_rows(
    steered: Sequence[Continuation], baselines: Sequence[Continuation], *, emotion: str = "", part: Part = "demo"
) -> tuple[Generation, ...]:
    """A judged row for each steered continuation, beside the baseline with its prompt, temperature and seed.

    The baselines come in any order, and more than needed do no harm. ValueError for a continuation that is not
    steered, or has no baseline.
    """
    of_request = {_decoding(baseline.request): baseline for baseline in baselines}
    rows = []
    for one in steered:
        request, plan = one.request, one.request.plan
        if plan is None:
            raise ValueError(f"the continuation of {request.prompt!r} is not steered, so there is nothing to compare")
        baseline = of_request.get(replace(_decoding(request), plan=None))
        if baseline is None:
            how = f"at temperature {request.temperature:g} with seed {request.seed}"
            raise ValueError(f"no unsteered continuation of {request.prompt!r} {how}")
        row = Generation(
            prompt=request.prompt,
            emotion=emotion,
            features=plan.features,
            mode=plan.mode,
            amount=plan.amount,
            unit=plan.unit,
            temperature=float(request.temperature),
            seed=request.seed,
            part=part,
            baseline_text=baseline.text,
            text=one.text,
            baseline_valence=valence(baseline.text),
            valence=valence(one.text),
            baseline_nll=baseline.nll,
            nll=one.nll,
            degenerate=is_degenerate(one.token_ids),
            baseline_degenerate=is_degenerate(baseline.token_ids),
        )
        rows.append(row)
    return tuple(rows)


def complete(
    model: HookedModel,
    sae: Any,
    requests: Sequence[Request],
    *,
    max_new_tokens: int = 20,
    batch_rows: int = 128,
    progress: bool = True,
    use_cache: bool = True,
    with_nll: bool = True,
) -> tuple[Continuation, ...]:
    """The continuation of every request, in their order.

    Requests with different prompts, plans, temperatures and seeds share batches; a row's text depends on its own
    request alone (up to the rounding of a batched matrix product). There is no repetition penalty, and a row has
    `max_new_tokens` tokens unless the model ends the text before. Requests that must give the same text are
    generated once. A batch too large for the device is halved. A HookedTransformer runs without a KV cache, with which
    TransformerLens 3.9 computes wrong learned positions. Likelihoods, `with_nll`, of steered texts take as long as the
    texts; an unsteered one's is known from writing it.

    Raises:
        ValueError: no requests, a plan that does not fit the SAE, an SAE that does not fit the model, a prompt that
            leaves no room in the model's context, or logits that are no numbers (the amount is named).
    """
    if not requests:
        raise ValueError("no prompts to continue: the list is empty")
    if max_new_tokens < 1 or batch_rows < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_rows ({batch_rows}) must be at least 1")
    checked_hook(model, sae)
    for plan in {request.plan for request in requests if request.plan}:
        check_plan(plan, sae, model)
    prompts = {request.prompt: _prompt_tokens(model, sae, request.prompt, max_new_tokens) for request in requests}
    ordered = sorted(dict.fromkeys(map(_decoding, requests)), key=lambda request: len(prompts[request.prompt]))
    with tqdm(total=len(ordered) * max_new_tokens, unit="token", desc="generating", disable=not progress) as bar:

        def run(batch: Sequence[Request]) -> list[_Written]:
            tokens = [prompts[request.prompt] for request in batch]
            with torch.inference_mode(), _stepping(model, sae, batch, tokens, use_cache) as forward:
                written = _write(forward, batch, max_new_tokens, _end_tokens(model))
            bar.update(len(batch) * max_new_tokens)
            return written

        written = dict(zip(ordered, backing_off(run, ordered, batch_rows), strict=True))
    pairs = {request: (prompts[request.prompt], made.ids) for request, made in written.items()}
    nlls: dict[Any, float | None] = {}
    if with_nll:
        nlls = {pairs[request]: made.nll for request, made in written.items() if request.plan is None}
        unknown = sorted({pair for pair in pairs.values() if pair[1]} - nlls.keys())
        nlls |= zip(unknown, continuation_nll(model, unknown, progress=progress), strict=True)
    done = {request: (_text(model, *pair), pair[1], nlls.get(pair)) for request, pair in pairs.items()}
    return tuple(Continuation(request, *done[_decoding(request)]) for request in requests)


def expected_next_token(
    model: HookedModel,
    sae: Any,
    requests: Sequence[Request],
    values: Float[Tensor, " vocab"],
    *,
    batch_rows: int = 128,
    progress: bool = True,
) -> list[float]:
    """The mean of `values` over the distribution (temperature 1) of the token that follows each request's prompt.

    One step instead of a continuation, and no sampling noise. Errors as in `complete`.
    """
    for plan in {request.plan for request in requests if request.plan}:
        check_plan(plan, sae, model)
    prompts = [_prompt_tokens(model, sae, request.prompt, 1) for request in requests]
    order = sorted(range(len(requests)), key=lambda place: len(prompts[place]))
    means = [0.0] * len(requests)
    with tqdm(total=len(requests), unit="row", desc="next tokens", disable=not progress) as bar:

        def run(places: Sequence[int]) -> list[float]:
            batch, tokens = [requests[place] for place in places], [prompts[place] for place in places]
            with torch.inference_mode(), _stepping(model, sae, batch, tokens, True) as forward:
                logits = forward(torch.zeros(len(batch), 0, dtype=torch.int64))
                found = [float(row.float().softmax(-1) @ values.to(row.device)) for row in logits]
            bar.update(len(batch))
            return found

        for place, mean in zip(order, backing_off(run, order, batch_rows), strict=True):
            means[place] = mean
    return means


@dataclass(frozen=True)
class _Written:
    """The new tokens of a row, and their mean negative log-likelihood where the row is unsteered and not empty."""

    ids: tuple[int, ...]
    nll: float | None


def _decoding(request: Request) -> Request:
    """The request without what cannot change its text: the seed of a greedy one."""
    return request if request.temperature else replace(request, seed=0)


def _prompt_tokens(model: HookedModel, sae: Any, prompt: str, max_new_tokens: int) -> tuple[int, ...]:
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    bos = _bos(model, sae)
    room = int(model.cfg.n_ctx) - max_new_tokens - len(bos)
    if len(ids) > room:
        limit = f"{room} fit the model's context of {model.cfg.n_ctx} with {max_new_tokens} new ones"
        raise ValueError(f"the prompt {prompt[:40]!r}... has {len(ids)} tokens; {limit}")
    return (*bos, *ids)


def _bos(model: HookedModel, sae: Any) -> list[int]:
    bos = model.tokenizer.bos_token_id
    return [bos] if token_settings(sae)["prepend_bos"] and bos is not None else []


def _end_tokens(model: HookedModel) -> set[int]:
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return {*(ends if isinstance(ends, list) else [ends]), model.tokenizer.eos_token_id} - {None}


def _text(model: HookedModel, prompt: Sequence[int], ids: Sequence[int]) -> str:
    # Decoded alone, a continuation loses its leading space with some tokenizers.
    before, whole, alone = model.tokenizer.batch_decode(
        [prompt, (*prompt, *ids), ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return whole[len(before) :] if whole.startswith(before) else alone


@contextmanager
def _stepping(
    model: HookedModel, sae: Any, batch: Sequence[Request], prompts: Sequence[tuple[int, ...]], use_cache: bool
) -> Iterator[Forward]:
    """A function from the tokens written so far to the logits of each row's next token, in its steering context."""
    device, n_bos = model_device(model), len(_bos(model, sae))
    rows, plans = torch.arange(len(batch)), [request.plan for request in batch]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    has_cache = keeps_logits(model)

    def recomputed(written: Int[Tensor, "row step"]) -> Float[Tensor, "row vocab"]:
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

    def cached(written: Int[Tensor, "row step"]) -> Float[Tensor, "row vocab"]:
        nonlocal cache
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

    with row_steering(model, sae, plans, steered):
        yield cached


def _write(forward: Forward, batch: Sequence[Request], n: int, ends: set[int]) -> list[_Written]:
    """The new tokens of each row: `n` of them, fewer where the text ends before."""
    temperatures = torch.tensor([request.temperature for request in batch])
    # A row draws its own random numbers: the same whatever else is in the batch, and however long the text becomes.
    generators = [torch.Generator().manual_seed(request.seed) for request in batch]
    draws = torch.stack([torch.rand(n, generator=one, dtype=torch.float64) for one in generators])
    written = torch.zeros(len(batch), 0, dtype=torch.int64)
    unsteered = torch.tensor([index for index, request in enumerate(batch) if request.plan is None], dtype=torch.int64)
    losses = torch.zeros(len(batch), n, dtype=torch.float64)
    ended = torch.zeros(len(batch), dtype=torch.bool)
    while written.shape[1] < n and not ended.all():
        logits = forward(written)
        if broken := (~logits.amax(dim=-1).isfinite()).nonzero().tolist():
            request = batch[broken[0][0]]
            raise ValueError(f"the logits after {request.prompt!r} are not finite; steered by {request.plan}")
        chosen = _choose(logits, temperatures, draws[:, written.shape[1]]).cpu()
        own = logits[unsteered.to(logits.device)].float()
        targets = chosen[unsteered].to(logits.device)
        losses[unsteered, written.shape[1]] = cross_entropy(own, targets, reduction="none").double().cpu()
        written = torch.cat([written, chosen[:, None]], 1)
        ended |= torch.isin(chosen, torch.tensor(sorted(ends), dtype=torch.int64))
    rows = [tuple(itertools.takewhile(lambda token: token not in ends, row)) for row in written.tolist()]
    return [
        _Written(ids, float(loss[: len(ids)].mean()) if ids and request.plan is None else None)
        for request, ids, loss in zip(batch, rows, losses, strict=True)
    ]


def _choose(
    logits: Float[Tensor, "row vocab"], temperatures: Float[Tensor, " row"], draws: Float[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """Each row's next token: the likeliest at temperature 0, otherwise the one in which the draw falls."""
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
