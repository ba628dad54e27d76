"""One continuation as it is written, token by token; whoever watches may stop it or change the steering."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.generation.decoding import (
    Request,
    check_finite,
    continuation_text,
    draws_of,
    end_tokens,
    prompt_tokens,
    sampling_of,
    stepping,
)
from sae_emotion_plugin.generation.sampling import choose
from sae_emotion_plugin.interventions.plans import SteeringPlan, check_plan
from sae_emotion_plugin.sparse_codes import checked_hook


@dataclass(frozen=True)
class StreamedToken:
    """One token as it was written."""

    token_id: int
    text: str
    """What it adds to the continuation; empty while a character is not complete."""
    step: int
    """From 1."""
    token_ids: tuple[int, ...]
    """All tokens so far, the prompt's (with BOS) included."""


OnToken: TypeAlias = Callable[[StreamedToken], SteeringPlan | Literal["stop"] | None]


def stream(
    model: HookedModel,
    sae: Any,
    request: Request,
    *,
    max_new_tokens: int = 20,
    stop: Sequence[str] = (),
    on_token: OnToken | None = None,
) -> Iterator[StreamedToken]:
    """The tokens of one continuation, each as soon as it is known; together the text that `generation.complete` gives.

    Args:
        stop: the text ends before the first of these strings; what may become one is held back until it is known.
        on_token: called with each token before it is yielded. `"stop"` ends the text after it, a plan steers from the
            next token on (what the cache holds stays as it was; without a cache, in a HookedTransformer, the whole
            text is steered anew), None changes nothing.

    Raises:
        ValueError: as `generation.complete`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop must be a list of strings that are not empty, not {stop!r}")
    checked_hook(model, sae)
    if request.plan:
        check_plan(request.plan, sae, model)
    prompt = prompt_tokens(model, sae, request.prompt, max_new_tokens)
    draws, sampling, ends = draws_of(request, max_new_tokens), sampling_of([request]), end_tokens(model)
    plans, shown = [request.plan], ""
    written = torch.zeros(1, 0, dtype=torch.int64)
    with stepping(model, sae, plans, [prompt]) as forward:
        for step in range(1, max_new_tokens + 1):
            # Not around the yield: whoever consumes the stream is not to be left in inference mode.
            with torch.inference_mode():
                logits = forward(written, plans)
                check_finite(logits, [request])
                written = torch.cat([written, choose(logits, sampling, draws[step - 1 : step])[:, None].cpu()], 1)
            ids = written[0].tolist()
            if ids[-1] in ends:
                ids.pop()
            text = continuation_text(model, prompt, ids)
            at = min((text.index(one) for one in stop if one in text), default=None)
            last = at is not None or len(ids) < step or step == max_new_tokens
            safe = text[:at] if last else _settled(text, stop)
            token = StreamedToken(int(written[0, -1]), safe[len(shown) :], step, (*prompt, *ids))
            shown = safe
            answer = on_token(token) if on_token else None
            if isinstance(answer, SteeringPlan):
                check_plan(answer, sae, model)
                plans = [answer]
            if len(ids) == step or token.text:
                yield token
            if last or answer == "stop":
                return


def _settled(text: str, stop: Sequence[str]) -> str:
    """The text without an end that may still change: half a character, or the beginning of a stop string."""
    text = text.rstrip("\ufffd")
    longest = max((len(one) for one in stop), default=1) - 1
    held = next((n for n in range(min(longest, len(text)), 0, -1) if any(one.startswith(text[-n:]) for one in stop)), 0)
    return text[: len(text) - held]
