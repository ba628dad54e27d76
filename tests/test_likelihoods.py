import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HOOK, JOY, WORDS

from sae_emotion_plugin.activations import TokenWindow, canonical_hook, tokenize
from sae_emotion_plugin.evaluation import token_losses
from sae_emotion_plugin.generation import likelihoods
from sae_emotion_plugin.generation.likelihoods import continuation_nll, mean_kl
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import Intervention, SteeringPlan

BOS = 1
TEXTS = ("he is such a joy", "w3", "w9 w8 w7 w6 w5 w4 w3 w2 w1", "sad fear", "", "w20 w21 w22 w23")


def test_the_likelihood_is_that_of_the_continuation_alone(model: Any) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        ((BOS, *rng.integers(4, 60, size=before).tolist()), tuple(rng.integers(4, 60, size=after).tolist()))
        for before, after in ((1, 1), (4, 6), (4, 3), (9, 6), (1, 8), (4, 6), (9, 1))
    ]
    with torch.inference_mode():
        losses = [token_losses(model, torch.tensor([before + after]))[0] for before, after in pairs]
    expected = [float(loss[len(before) - 1 :].mean()) for loss, (before, _) in zip(losses, pairs, strict=True)]
    assert continuation_nll(model, pairs) == pytest.approx(expected, abs=1e-5)
    assert continuation_nll(model, []) == []


def test_likelihoods_do_not_depend_on_the_memory_they_may_take(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [((BOS, 5, 6, word), tuple(range(10, 10 + n))) for word, n in ((7, 9), (8, 3), (9, 9))]
    at_once = continuation_nll(bridge, pairs)
    monkeypatch.setattr(likelihoods, "LOGIT_ENTRIES", 4 * len(WORDS))
    shapes: list[int] = []
    unembed = bridge.original_model.lm_head.register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape[0] * output.shape[1])
    )
    try:
        assert continuation_nll(bridge, pairs) == pytest.approx(at_once, abs=1e-6)
    finally:
        unembed.remove()
    assert max(shapes) <= 4


@pytest.mark.parametrize(("pair", "named"), [(((), (5,)), "empty prompt"), (((5,), ()), "empty continuation")])
def test_a_likelihood_of_nothing_is_refused(bridge: Any, pair: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"pair 1 has an {named}"):
        continuation_nll(bridge, [((5,), (6,)), pair])


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost() -> None:
    sizes: list[int] = []

    def limited(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("too much")
        return [item * item for item in batch]

    assert likelihoods.backing_off(limited, list(range(17)), 12) == [item * item for item in range(17)]
    assert sizes == [12, 6, 3, 3, 3, 3, 3, 2]


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    def full(batch: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        likelihoods.backing_off(full, [1, 2, 3], 2)


def joy_plan(amount: float, mode: Any = "add") -> SteeringPlan:
    return SteeringPlan(HOOK, (Intervention(JOY, amount, mode),), residual_norm=5.0)


def contexts_of(model: Any, sae: Any, *plans: SteeringPlan) -> list[Callable[[], Any]]:
    return [partial(steering, model, sae, plan) for plan in plans]


def dense_mean_kl(model: Any, windows: Sequence[TokenWindow], context: Callable[[], Any]) -> float:
    """One window at a time, all logits at once, in double precision."""
    divergences: list[float] = []
    for window in windows:
        tokens = torch.tensor([window.token_ids])
        with torch.no_grad():
            q = torch.softmax(model(tokens)[0].double(), dim=-1).numpy()
            with context():
                p = torch.softmax(model(tokens)[0].double(), dim=-1).numpy()
        divergences += (p * np.log(p / q)).sum(axis=1)[int(window.bos) :].tolist()
    return float(np.mean(divergences))


def test_the_mean_divergence_is_that_of_the_plain_dense_computation(model: Any, planted_sae: Any) -> None:
    windows = tokenize(model, TEXTS)
    assert len(windows) == 5 and all(window.bos for window in windows)
    plans = (joy_plan(0.8), joy_plan(0.5, "clamp"), joy_plan(-0.4))
    contexts = contexts_of(model, planted_sae, *plans)
    expected = [dense_mean_kl(model, windows, context) for context in contexts]
    assert min(expected) > 1e-3 and len(set(expected)) == 3
    assert mean_kl(model, windows, contexts) == pytest.approx(expected, abs=1e-6, rel=1e-4)
    assert mean_kl(model, windows, []) == []


def test_a_divergence_is_zero_for_a_zero_amount_and_grows_fourfold_with_twice_a_small_one(
    model: Any, planted_sae: Any
) -> None:
    plans = [joy_plan(amount) for amount in (0.0, 0.05, 0.1, 0.2)]
    nothing, *small = mean_kl(model, tokenize(model, TEXTS), contexts_of(model, planted_sae, *plans))
    assert nothing == 0
    assert all(3 < more / less < 5 for less, more in itertools.pairwise(small))


def test_bos_is_left_out_of_the_mean_divergence(bridge: Any, planted_sae: Any) -> None:
    (window,) = tokenize(bridge, ["he is such a joy"])
    (context,) = contexts_of(bridge, planted_sae, joy_plan(0.8))
    (got,) = mean_kl(bridge, [window], [context])
    # The same tokens, counted with BOS, whose distribution is not steered.
    diluted = TokenWindow(0, 0, window.token_ids, bos=False)
    assert mean_kl(bridge, [diluted], [context]) == pytest.approx([got * 5 / 6], rel=1e-5)


def test_divergences_do_not_depend_on_the_memory_they_may_take(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = tokenize(bridge, TEXTS)
    contexts = contexts_of(bridge, planted_sae, joy_plan(0.8), joy_plan(0.3))
    at_once = mean_kl(bridge, windows, contexts)
    monkeypatch.setattr(likelihoods, "LOGIT_ENTRIES", 2 * 4 * len(WORDS))
    monkeypatch.setattr(likelihoods, "_COMPARED_ENTRIES", 2 * len(WORDS))
    shapes: list[int] = []
    unembed = bridge.original_model.lm_head.register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape[0] * output.shape[1])
    )
    try:
        assert mean_kl(bridge, windows, contexts) == pytest.approx(at_once, rel=1e-4)
    finally:
        unembed.remove()
    # The longest window has 10 positions: 4, 4 and 2 of them.
    assert max(shapes) == 4 and len(shapes) > 3 * len(windows)


@pytest.mark.parametrize("windows", [[], [TokenWindow(0, 0, (BOS,), True)]])
def test_a_divergence_on_nothing_is_refused(bridge: Any, windows: list[TokenWindow]) -> None:
    with pytest.raises(ValueError, match=f"no tokens to compare distributions on: {len(windows)} windows"):
        mean_kl(bridge, windows, [])


def test_logits_that_are_no_numbers_are_refused(bridge: Any) -> None:
    name = canonical_hook(bridge, HOOK)
    broken = partial(bridge.hooks, fwd_hooks=[(name, lambda tensor, hook: tensor * float("nan"))])
    with pytest.raises(ValueError, match="are not finite in context 0"):
        mean_kl(bridge, tokenize(bridge, TEXTS), [broken])


def test_a_token_that_both_rule_out_adds_no_divergence() -> None:
    p, q = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.0, 0.5, -torch.inf]])
    expected = likelihoods._kl_sum(p[:, :2], q[:, :2])
    assert likelihoods._kl_sum(p, q) == pytest.approx(expected) and expected > 0
    assert likelihoods._kl_sum(p, p) == 0
