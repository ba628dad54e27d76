from typing import Any

import pytest
import torch
from conftest import JOY

from sae_emotion_plugin.generation.continuations import complete
from sae_emotion_plugin.generation.decoding import Request
from sae_emotion_plugin.generation.streaming import StreamedToken, stream
from sae_emotion_plugin.interventions.plans import SteeringPlan


def plan_of(sae: Any, amounts: dict[int, float], **where: Any) -> SteeringPlan:
    return SteeringPlan.of(amounts, sae, residual_norm=5.0, **where)


@pytest.fixture(params=["bridge", "hooked_transformer"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("where", [None, {}, {"positions": "generated", "decay": 0.7}])
def test_the_streamed_text_is_that_of_the_batched_generator(
    model: Any, planted_sae: Any, temperature: float, where: dict[str, Any] | None
) -> None:
    plan = None if where is None else plan_of(planted_sae, {JOY: 1.0, 3: 0.5}, **where)
    request = Request("he is such a", plan, temperature, 5)
    (whole,) = complete(model, planted_sae, [request], max_new_tokens=8, progress=False)
    tokens = list(stream(model, planted_sae, request, max_new_tokens=8))
    assert tuple(token.token_id for token in tokens) == whole.token_ids
    assert "".join(token.text for token in tokens) == whole.text
    assert [token.step for token in tokens] == list(range(1, 9))
    assert tokens[-1].token_ids[-8:] == whole.token_ids
    assert not torch.is_inference_mode_enabled()


def test_the_text_is_held_back_before_a_stop_string(bridge: Any, planted_sae: Any) -> None:
    request = Request("he is", None, 1.0, 3)
    (whole,) = complete(bridge, planted_sae, [request], max_new_tokens=8, progress=False)
    words = whole.text.split()
    stop = [" ".join(words[3:5])]
    shown = "".join(token.text for token in stream(bridge, planted_sae, request, max_new_tokens=8, stop=stop))
    (cut,) = complete(bridge, planted_sae, [request], max_new_tokens=8, stop=stop, progress=False)
    assert shown == cut.text == whole.text[: whole.text.index(stop[0])]
    never = [whole.text[-1] + "no more"]
    told = "".join(token.text for token in stream(bridge, planted_sae, request, max_new_tokens=8, stop=never))
    assert told == whole.text


def test_a_callback_ends_the_text(bridge: Any, planted_sae: Any) -> None:
    seen: list[StreamedToken] = []

    def watch(token: StreamedToken) -> Any:
        seen.append(token)
        return "stop" if token.step == 3 else None

    tokens = list(stream(bridge, planted_sae, Request("he is"), max_new_tokens=8, on_token=watch))
    assert tokens == seen and len(tokens) == 3


def test_a_callback_steers_from_the_next_token_on(bridge: Any, planted_sae: Any) -> None:
    plan = plan_of(planted_sae, {JOY: 6.0})
    request = Request("he is", None, 0.8, 1)
    plain = list(stream(bridge, planted_sae, request, max_new_tokens=10))
    changed = list(
        stream(
            bridge, planted_sae, request, max_new_tokens=10, on_token=lambda token: plan if token.step == 4 else None
        )
    )
    assert [token.token_id for token in changed[:4]] == [token.token_id for token in plain[:4]]
    assert [token.token_id for token in changed[4:]] != [token.token_id for token in plain[4:]]
    late = plan_of(planted_sae, {JOY: 6.0}, positions="6:")
    (expected,) = complete(bridge, planted_sae, [Request("he is", late, 0.8, 1)], max_new_tokens=10, progress=False)
    # "he is" are the positions 0 and 1, the first four tokens 2 to 5; the fifth is chosen where the fourth is read.
    by_position = plan_of(planted_sae, {JOY: 6.0}, positions="5:")
    (same,) = complete(bridge, planted_sae, [Request("he is", by_position, 0.8, 1)], max_new_tokens=10, progress=False)
    assert tuple(token.token_id for token in changed) == same.token_ids
    assert expected.token_ids[:5] == tuple(token.token_id for token in plain[:5])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 100}, "leaves no room|fit the model's context"),
        ({"stop": "x"}, "stop must be a list"),
    ],
)
def test_what_cannot_be_streamed_is_refused(bridge: Any, planted_sae: Any, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        list(stream(bridge, planted_sae, Request("he is"), **given))


def test_an_amount_that_the_model_does_not_survive_is_named(bridge: Any, planted_sae: Any) -> None:
    plan = SteeringPlan.of({JOY: 1e38}, planted_sae, residual_norm=1e3)
    with pytest.raises(ValueError, match="not finite; steered by SteeringPlan"):
        list(stream(bridge, planted_sae, Request("he is", plan)))
