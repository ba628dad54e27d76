"""Prompts and steering plans -> continuations, in batches whose rows differ; and what steering did and cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.generation.decoding import (
    Request,
    Written,
    continuation_text,
    end_tokens,
    prompt_tokens,
    stepping,
    write,
)
from sae_emotion_plugin.generation.likelihoods import backing_off, continuation_nll
from sae_emotion_plugin.generation.records import Generation, Generations, Part
from sae_emotion_plugin.interventions.plans import SteeringPlan, check_plan
from sae_emotion_plugin.judges.judge import valence
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.sparse_codes import checked_hook
from sae_emotion_plugin.text_costs import is_degenerate


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
    top_k: int = 0,
    top_p: float | int = 1.0,
    stop: Sequence[str] = (),
    emotion: str = "",
    part: Part = "demo",
) -> Generations:
    """Each prompt's continuation with and without the plan, judged: valence, likelihood, degeneration.

    ValueError for no prompts, an empty one, one too long for the model, or a plan that does not fit the SAE.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    steered = [Request(prompt, plan, temperature, seed, top_k, top_p) for prompt in prompts]
    both = [*steered, *(replace(request, plan=None) for request in steered)]
    done = complete(model, sae, both, max_new_tokens=max_new_tokens, stop=stop, progress=False)
    rows = judge_rows(done[: len(steered)], done[len(steered) :], emotion=emotion, part=part)
    meta = {"model": model_identity(model), "max_new_tokens": max_new_tokens, "plan": plan.to_dict()}
    meta |= {"top_k": top_k, "top_p": float(top_p), "stop": list(stop)}
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
    stop: Sequence[str] = (),
) -> tuple[Continuation, ...]:
    """The continuation of every request, in their order.

    Requests with different prompts, plans, temperatures and seeds share batches; a row's text depends on its own
    request alone (up to the rounding of a batched matrix product). There is no repetition penalty, and a row has
    `max_new_tokens` tokens unless the model ends the text before. Requests that must give the same text are
    generated once. A batch too large for the device is halved. A HookedTransformer runs without a KV cache, with which
    TransformerLens 3.9 computes wrong learned positions. Likelihoods, `with_nll`, of steered texts take as long as the
    texts; an unsteered one's is known from writing it. A row ends before the first of the `stop` strings; the tokens
    that wrote it remain among the row's.

    Raises:
        ValueError: no requests, a plan that does not fit the SAE, an SAE that does not fit the model, a prompt that
            leaves no room in the model's context, or logits that are no numbers (the amount is named).
    """
    if not requests:
        raise ValueError("no prompts to continue: the list is empty")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop must be a list of strings that are not empty, not {stop!r}")
    if max_new_tokens < 1 or batch_rows < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_rows ({batch_rows}) must be at least 1")
    checked_hook(model, sae)
    for plan in {request.plan for request in requests if request.plan}:
        check_plan(plan, sae, model)
    prompts = {request.prompt: prompt_tokens(model, sae, request.prompt, max_new_tokens) for request in requests}
    ordered = sorted(dict.fromkeys(map(_decoding, requests)), key=lambda request: len(prompts[request.prompt]))
    with tqdm(total=len(ordered) * max_new_tokens, unit="token", desc="generating", disable=not progress) as bar:

        def run(batch: Sequence[Request]) -> list[Written]:
            plans, tokens = [request.plan for request in batch], [prompts[request.prompt] for request in batch]

            def stopped(row: int, ids: list[int]) -> bool:
                text = continuation_text(model, tokens[row], ids)
                return any(one in text for one in stop)

            with torch.inference_mode(), stepping(model, sae, plans, tokens, use_cache) as forward:
                written = write(forward, batch, max_new_tokens, end_tokens(model), stopped if stop else None, with_nll)
            bar.update(len(batch) * max_new_tokens)
            return written

        written = dict(zip(ordered, backing_off(run, ordered, batch_rows), strict=True))
    pairs = {request: (prompts[request.prompt], made.ids) for request, made in written.items()}
    nlls: dict[Any, float | None] = {}
    if with_nll:
        nlls = {pairs[request]: made.nll for request, made in written.items() if request.plan is None}
        unknown = sorted({pair for pair in pairs.values() if pair[1]} - nlls.keys())
        nlls |= zip(unknown, continuation_nll(model, unknown, progress=progress), strict=True)
    done = {
        request: (_before_stop(continuation_text(model, *pair), stop), pair[1], nlls.get(pair))
        for request, pair in pairs.items()
    }
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
    prompts = [prompt_tokens(model, sae, request.prompt, 1) for request in requests]
    order = sorted(range(len(requests)), key=lambda place: len(prompts[place]))
    means = [0.0] * len(requests)
    with tqdm(total=len(requests), unit="row", desc="next tokens", disable=not progress) as bar:

        def run(places: Sequence[int]) -> list[float]:
            batch, tokens = [requests[place] for place in places], [prompts[place] for place in places]
            plans = [request.plan for request in batch]
            with torch.inference_mode(), stepping(model, sae, plans, tokens) as forward:
                logits = forward(torch.zeros(len(batch), 0, dtype=torch.int64))
                found = [float(row.float().softmax(-1) @ values.to(row.device)) for row in logits]
            bar.update(len(batch))
            return found

        for place, mean in zip(order, backing_off(run, order, batch_rows), strict=True):
            means[place] = mean
    return means


def _before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.index(one) for one in stop if one in text), default=len(text))]


def _decoding(request: Request) -> Request:
    """The request without what cannot change its text: the seed and the limits of a greedy one."""
    return request if request.temperature else replace(request, seed=0, top_k=0, top_p=1.0)
