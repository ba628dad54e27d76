from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS

from sae_emotion_plugin import likelihoods
from sae_emotion_plugin.evaluation import token_losses
from sae_emotion_plugin.likelihoods import continuation_nll

BOS = 1


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
