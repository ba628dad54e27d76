"""Prompts and steering plans -> continuations, in batches whose rows differ; and what steering did and cost."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, model_device
from sae_emotion_plugin.evidence import is_degenerate
from sae_emotion_plugin.judges import Generation, Generations, Part, Summary, perplexity_ratio, summary, valence
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering import SteeringPlan, check_plan, row_steering

logger = logging.getLogger(__name__)

__all__ = [
    "Continuation",
    "Generation",
    "Generations",
    "Part",
    "Request",
    "Summary",
    "complete",
    "continuation_nll",
    "generate",
    "judge_rows",
    "perplexity_ratio",
    "summary",
]

Forward = Callable[[Int[Tensor, "row step"]], Float[Tensor, "row vocab"]]
Item = TypeVar("Item")
Result = TypeVar("Result")
BATCH_ROWS = 64
# Logits of one batch when likelihoods are measured: 256 MiB in float32.
LOGIT_ENTRIES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """One continuation to be made."""

    prompt: str
    plan: SteeringPlan | None = None
    """None: unsteered."""
    temperature: float | int = 0.0
    """0: greedy."""
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

    Raises:
        ValueError: no prompts, an empty one, one too long for the model, or a plan that does not fit the SAE.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    steered = [Request(prompt, plan, temperature, seed) for prompt in prompts]
    done = complete(
        model,
        sae,
        [*steered, *(replace(request, plan=None) for request in steered)],
        max_new_tokens=max_new_tokens,
        progress=False,
    )
    rows = judge_rows(done[: len(steered)], done[len(steered) :], emotion=emotion, part=part)
    meta = {"model": model_identity(model), "max_new_tokens": max_new_tokens, "plan": plan.to_dict()}
    return Generations({**meta, "recommended": {}}, rows)


def judge_rows(
    steered: Sequence[Continuation], baselines: Sequence[Continuation], *, emotion: str = "", part: Part = "demo"
) -> tuple[Generation, ...]:
    """A judged row for each steered continuation, beside the baseline with its prompt, temperature and seed.

    Args:
        baselines: unsteered continuations, in any order; more than needed do no harm.

    Raises:
        ValueError: a continuation without a plan among the steered ones, or without its baseline.
    """
    of_request = {_decoding(baseline.request): baseline for baseline in baselines}
    rows = []
    for one in steered:
        request, plan = one.request, one.request.plan
        if plan is None:
            raise ValueError(f"the continuation of {request.prompt!r} is not steered, so there is nothing to compare")
        baseline = of_request.get(replace(_decoding(request), plan=None))
        if baseline is None:
            raise ValueError(
                f"no unsteered continuation of {request.prompt!r} at temperature {request.temperature:g} "
                f"with seed {request.seed}"
            )
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
    batch_rows: int = BATCH_ROWS,
    progress: bool = True,
    use_cache: bool = True,
) -> tuple[Continuation, ...]:
    """The continuation of every request, in their order.

    Requests with different prompts, plans, temperatures and seeds share batches; a row's text depends on its own
    request alone (up to the rounding of a batched matrix product). There is no repetition penalty, and a row has
    `max_new_tokens` tokens unless the model ends the text before. Requests that must give the same text are
    generated once. A batch that does not fit the device's memory is halved.

    A HookedTransformer is run without a KV cache: TransformerLens 3.9 computes wrong learned positions with one.

    Raises:
        ValueError: no requests, a plan that does not fit the SAE, an SAE that does not fit the model, a prompt that
            leaves no room in the model's context, or logits that are no numbers (the amount is named).
    """
    if not requests:
        raise ValueError("no prompts to continue: the list is empty")
    if max_new_tokens < 1 or batch_rows < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_rows ({batch_rows}) must be at least 1")
    checked_hook(model, sae)
    for plan in {request.plan for request in requests}:
        if plan is not None:
            check_plan(plan, sae)
    prompts = {request.prompt: _prompt_tokens(model, sae, request.prompt, max_new_tokens) for request in requests}
    distinct = dict.fromkeys(_decoding(request) for request in requests)
    ordered = sorted(distinct, key=lambda request: len(prompts[request.prompt]))
    ends = _end_tokens(model)
    with tqdm(total=len(ordered) * max_new_tokens, unit="token", desc="generating", disable=not progress) as bar:

        def run(batch: Sequence[Request]) -> list[tuple[int, ...]]:
            plans, tokens = [one.plan for one in batch], [prompts[one.prompt] for one in batch]
            with torch.inference_mode():
                forward = _forward(model, sae, plans, tokens, use_cache)
                written = _write(forward, batch, max_new_tokens, ends, model_device(model))
            bar.update(len(batch) * max_new_tokens)
            return written

        written = dict(zip(ordered, _backing_off(run, ordered, batch_rows), strict=True))
    pairs = dict.fromkeys((prompts[request.prompt], ids) for request, ids in written.items() if ids)
    likelihoods = dict(zip(pairs, continuation_nll(model, list(pairs), progress=progress), strict=True))
    continuations = {
        request: (_text(model, prompts[request.prompt], ids), ids, likelihoods.get((prompts[request.prompt], ids)))
        for request, ids in written.items()
    }
    return tuple(Continuation(request, *continuations[_decoding(request)]) for request in requests)


def continuation_nll(
    model: HookedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, progress: bool = False
) -> list[float]:
    """The mean negative log-likelihood, in nats a token, of each pair's continuation given its prompt (both token ids).

    The prompt's own tokens do not count. Call it outside any steering context. Logits exist for one batch of
    continuation positions at a time (256 MiB).

    Raises:
        ValueError: an empty prompt or continuation.
    """
    step = max(1, LOGIT_ENTRIES // int(model.cfg.d_vocab))
    pieces = []
    for index, (prompt, continuation) in enumerate(pairs):
        if not prompt or not continuation:
            raise ValueError(f"pair {index} has an empty {'continuation' if prompt else 'prompt'}")
        for start in range(0, len(continuation), step):
            context = (*prompt, *continuation[:start])
            pieces.append((index, context, tuple(continuation[start : start + step])))
    if not pieces:
        return []
    pieces.sort(key=lambda piece: (len(piece[2]), len(piece[1])))
    kept = max(len(target) if _keeps_logits(model) else len(context) + len(target) for _, context, target in pieces)
    with tqdm(total=len(pieces), unit="text", desc="measuring likelihoods", disable=not progress) as bar:

        def run(batch: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> list[float]:
            with torch.inference_mode():
                sums = _nll_sums(model, [piece[1] for piece in batch], [piece[2] for piece in batch])
            bar.update(len(batch))
            return sums

        sums = _backing_off(run, pieces, max(1, step // kept))
    totals = [0.0] * len(pairs)
    for (index, _, _), total in zip(pieces, sums, strict=True):
        totals[index] += total
    return [total / len(pair[1]) for total, pair in zip(totals, pairs, strict=True)]


def _decoding(request: Request) -> Request:
    """The request without what cannot change its text: the seed of a greedy one."""
    return request if request.temperature else replace(request, seed=0)


def _prompt_tokens(model: HookedModel, sae: Any, prompt: str, max_new_tokens: int) -> tuple[int, ...]:
    tokenizer = model.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    bos = _bos(model, sae)
    room = int(model.cfg.n_ctx) - max_new_tokens - len(bos)
    if len(ids) > room:
        raise ValueError(
            f"the prompt {prompt[:40]!r}... has {len(ids)} tokens; {room} fit the model's context of "
            f"{model.cfg.n_ctx} with {max_new_tokens} new ones"
        )
    return (*bos, *ids)


def _bos(model: HookedModel, sae: Any) -> list[int]:
    bos = model.tokenizer.bos_token_id
    return [bos] if token_settings(sae)["prepend_bos"] and bos is not None else []


def _end_tokens(model: HookedModel) -> set[int]:
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return {int(token) for token in (*ends, model.tokenizer.eos_token_id) if token is not None}


def _text(model: HookedModel, prompt: Sequence[int], ids: Sequence[int]) -> str:
    def decode(tokens: Sequence[int]) -> str:
        return model.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # Decoded alone, a continuation loses its leading space with some tokenizers.
    before, whole = decode(prompt), decode([*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else decode(ids)


def _keeps_logits(model: HookedModel) -> bool:
    """Whether the model computes the last positions' logits alone and has a KV cache: a bridge to `transformers`."""
    inner = getattr(model, "original_model", None)
    known = inspect.signature(inner.forward).parameters if inner is not None else {}
    return {"logits_to_keep", "past_key_values", "attention_mask"} <= set(known)


def _forward(
    model: HookedModel,
    sae: Any,
    plans: Sequence[SteeringPlan | None],
    prompts: Sequence[tuple[int, ...]],
    use_cache: bool,
) -> Forward:
    """A function from the tokens written so far to the logits of each row's next token."""
    device, n_bos = model_device(model), len(_bos(model, sae))
    rows = torch.arange(len(prompts), device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)

    def recomputed(written: Int[Tensor, "row step"]) -> Float[Tensor, "row vocab"]:
        grown = [(*prompt, *new) for prompt, new in zip(prompts, written.tolist(), strict=True)]
        tokens, real = _padded(grown, "right")
        real[:, :n_bos] = False
        with row_steering(model, sae, plans, real):
            return model(tokens.to(device))[rows, lengths + written.shape[1] - 1]

    if not _keeps_logits(model):
        return recomputed
    tokens, real = (tensor.to(device) for tensor in _padded(prompts, "left"))
    steered = real.clone()
    if n_bos:
        steered[rows, tokens.shape[1] - lengths] = False
    cache: Any = None

    def left_padded(written: Int[Tensor, "row step"]) -> Float[Tensor, "row vocab"]:
        nonlocal cache
        new = torch.ones_like(written, dtype=torch.bool)
        step = {"use_cache": False} if not use_cache else {"use_cache": True, "past_key_values": cache}
        last_only = cache is not None
        with row_steering(model, sae, plans, None if last_only else torch.cat([steered, new], 1)):
            logits, cache_now = model(
                written[:, -1:] if last_only else torch.cat([tokens, written], 1),
                return_type="logits_and_cache",
                # The bridge derives the positions from the mask.
                attention_mask=torch.cat([real, new], 1).long(),
                logits_to_keep=1,
                **step,
            )
        cache = cache_now if use_cache else None
        return logits[:, -1]

    return left_padded


def _write(
    forward: Forward, batch: Sequence[Request], max_new_tokens: int, ends: set[int], device: torch.device
) -> list[tuple[int, ...]]:
    temperatures = torch.tensor([request.temperature for request in batch])
    draws = torch.stack([_draws(request.seed, max_new_tokens) for request in batch])
    written = torch.zeros(len(batch), 0, dtype=torch.int64)
    ended = torch.zeros(len(batch), dtype=torch.bool)
    while written.shape[1] < max_new_tokens and not ended.all():
        logits = forward(written.to(device))
        _check_logits(logits, batch)
        chosen = _choose(logits, temperatures, draws[:, written.shape[1]])
        written = torch.cat([written, chosen[:, None].cpu()], 1)
        ended |= torch.isin(written[:, -1], torch.tensor(sorted(ends), dtype=torch.int64))
    return [_until_end(row, ends) for row in written.tolist()]


def _draws(seed: int, n: int) -> Float[Tensor, " step"]:
    """A row's own random numbers: the same whatever else is in the batch, and a prefix of those of a longer text."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _choose(
    logits: Float[Tensor, "row vocab"], temperatures: Float[Tensor, " row"], draws: Float[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """Each row's next token: the likeliest at temperature 0, otherwise the one in which the draw falls.

    The cumulative distribution is searched in two steps, blocks and tokens within a block: a sum over a quarter of a
    million tokens in float32 would be inexact, and one in float64 slow.
    """
    chosen = logits.argmax(dim=-1)
    sampled = temperatures.nonzero()[:, 0].to(logits.device)
    if len(sampled) == 0:
        return chosen
    heat = temperatures.to(logits.device, torch.float32)[sampled, None]
    probabilities = torch.softmax(logits[sampled].float() / heat, dim=-1)
    width = math.isqrt(logits.shape[-1]) + 1
    blocks = torch.nn.functional.pad(probabilities, (0, width * width - logits.shape[-1]))
    blocks = blocks.view(len(sampled), width, width)
    sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = draws.to(logits.device)[sampled, None] * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp(max=width - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = blocks[torch.arange(len(sampled), device=logits.device), block[:, 0]].double().cumsum(dim=-1)
    # The draw stays below the block's own sum, so that a rounding error cannot choose a token of no probability.
    inside = torch.minimum(target - before, torch.nextafter(within[:, -1:], torch.zeros_like(before)))
    token = torch.searchsorted(within, inside, right=True).clamp(max=width - 1)
    chosen[sampled] = (block * width + token)[:, 0]
    return chosen


def _check_logits(logits: Float[Tensor, "row vocab"], batch: Sequence[Request]) -> None:
    broken = (~torch.isfinite(logits.amax(dim=-1))).nonzero()[:, 0].tolist()
    if broken:
        request = batch[broken[0]]
        raise ValueError(
            f"the model's logits are no finite numbers after {request.prompt!r}"
            + (f" steered by {request.plan}" if request.plan else "")
        )


def _until_end(tokens: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    return tuple(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])


def _padded(
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


def _nll_sums(
    model: HookedModel, contexts: Sequence[tuple[int, ...]], targets: Sequence[tuple[int, ...]]
) -> list[float]:
    """The summed negative log-likelihood of each target after its context."""
    device = model_device(model)
    if _keeps_logits(model):
        # Contexts are padded on the left and targets on the right: all targets begin in one column.
        before, real = _padded(contexts, "left")
        after, _ = _padded([target[:-1] for target in targets], "right")
        mask = torch.cat([real, torch.ones_like(after, dtype=torch.bool)], 1).long()
        logits = model(
            torch.cat([before, after], 1).to(device),
            attention_mask=mask.to(device),
            logits_to_keep=after.shape[1] + 1,
            use_cache=False,
        )
        starts = [0] * len(contexts)
    else:
        tokens, _ = _padded([context + target for context, target in zip(contexts, targets, strict=True)], "right")
        logits = model(tokens.to(device))
        starts = [len(context) - 1 for context in contexts]
    return [
        float(
            torch.nn.functional.cross_entropy(
                row[start : start + len(target)].float(), torch.tensor(target, device=row.device), reduction="sum"
            )
        )
        for row, start, target in zip(logits, starts, targets, strict=True)
    ]


def _backing_off(run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], size: int) -> list[Result]:
    """The results of all items, run in batches of `size`, which is halved whenever memory runs out."""
    results: list[Result] = []
    while len(results) < len(items):
        batch = items[len(results) : len(results) + size]
        try:
            results += run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
            torch.cuda.empty_cache()
            logger.warning("out of memory with %d rows: going on with %d", len(batch), size)
    return results
