import logging
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK, VOCABULARY, WORDS

from sae_emotion_plugin import activations
from sae_emotion_plugin.activations import (
    ActivationBatch,
    activation_batches,
    canonical_hook,
    hook_capture,
    hook_captures,
    hook_layer,
    mean_norm,
    tokenize,
)

BOS, PAD = VOCABULARY["<bos>"], VOCABULARY["<pad>"]
TEXTS = ["he is joy", "a", "", "sad fear anger w1 w2 w3 w4 w5", "he is such a w9", "w7 w7"]


@pytest.fixture(params=["bridge", "hooked_transformer"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def long_text(n: int) -> str:
    return " ".join(WORDS[14 + index % 50] for index in range(n))


def by_position(batches: list[ActivationBatch]) -> dict[tuple[int, int], tuple[int, torch.Tensor]]:
    """(text, position) -> (token id, vector); fails on a token that comes twice."""
    found = {}
    for batch in batches:
        for text, position, token, vector in zip(
            batch.text_index, batch.position, batch.token_ids, batch.vectors, strict=True
        ):
            assert (text, position) not in found
            found[int(text), int(position)] = (int(token), vector)
    return found


def one_at_a_time(
    model: Any, texts: list[str], hook_name: str, bos: bool = True
) -> dict[tuple[int, int], tuple[int, torch.Tensor]]:
    """The same through `run_with_cache`, one whole text a call, no padding, all layers."""
    found = {}
    for index, text in enumerate(texts):
        ids = [VOCABULARY[word] for word in text.split()]
        if ids:
            with torch.inference_mode():
                _, cache = model.run_with_cache(torch.tensor([[BOS] * bos + ids]))
            vectors = cache[canonical_hook(model, hook_name)][0].flatten(start_dim=1)[int(bos) :]
            found |= {(index, n): (ids[n], vectors[n]) for n in range(len(ids))}
    return found


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, (token, vector) in expected.items():
        assert found[key][0] == token
        torch.testing.assert_close(found[key][1], vector, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"])
@pytest.mark.parametrize("batch_tokens", [1, 12, 2048])
def test_batches_equal_one_text_at_a_time(model: Any, hook_name: str, batch_tokens: int) -> None:
    batches = list(activation_batches(model, TEXTS, hook_name, batch_tokens=batch_tokens, progress=False))
    assert all(batch.vectors.shape[1] == D_MODEL for batch in batches)
    assert_same(by_position(batches), one_at_a_time(model, TEXTS, hook_name))


def test_without_bos_the_first_token_is_the_texts_own(model: Any) -> None:
    batches = list(activation_batches(model, TEXTS, HOOK, prepend_bos=False, progress=False))
    expected = one_at_a_time(model, TEXTS, HOOK, bos=False)
    assert_same(by_position(batches), expected)
    with_bos = one_at_a_time(model, TEXTS, HOOK)
    assert not torch.allclose(expected[0, 0][1], with_bos[0, 0][1], atol=1e-2)


def test_padding_and_bos_never_appear(model: Any) -> None:
    (batch,) = activation_batches(model, TEXTS, HOOK, progress=False)
    assert not {BOS, PAD} & set(batch.token_ids.tolist())
    assert len(batch.token_ids) == sum(len(text.split()) for text in TEXTS) == len(batch.vectors)


def test_attention_heads_arrive_as_one_vector_a_token(model: Any) -> None:
    (batch,) = activation_batches(model, TEXTS, "blocks.0.attn.hook_z", progress=False)
    assert batch.vectors.shape == (len(batch.token_ids), 32)


def test_a_long_text_is_split_into_windows_with_their_own_bos(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = long_text(23)
    with caplog.at_level(logging.INFO):
        windows = tokenize(model, ["a", text], context_size=8)
    assert "1 of 2 texts are longer than 7 tokens" in caplog.text
    ours = [window for window in windows if window.text_index == 1]
    assert [window.start for window in ours] == [0, 7, 14, 21]
    assert all(window.token_ids[0] == BOS and window.bos and len(window.token_ids) <= 8 for window in ours)
    ids = [token for window in ours for token in window.token_ids[1:]]
    assert ids == [VOCABULARY[word] for word in text.split()]


def test_every_token_of_a_long_text_appears_exactly_once_and_as_in_its_window(model: Any) -> None:
    text = long_text(23)
    found = by_position(
        list(activation_batches(model, ["a", text], HOOK, context_size=8, batch_tokens=20, progress=False))
    )
    pieces = [" ".join(text.split()[start : start + 7]) for start in range(0, 23, 7)]
    expected = one_at_a_time(model, ["a", *pieces], HOOK)
    moved = {(min(piece, 1), n + 7 * max(piece - 1, 0)): value for (piece, n), value in expected.items()}
    assert_same(found, moved)


def test_the_models_own_context_limits_the_windows(model: Any) -> None:
    windows = tokenize(model, [long_text(130)], context_size=512)
    assert [len(window.token_ids) for window in windows] == [64, 64, 5]
    assert mean_norm(model, [long_text(130)], HOOK, context_size=512) > 0


def test_a_context_without_room_for_a_token_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"context_size 1 leaves no room for a token \(at least 2\)"):
        tokenize(model, ["a"], context_size=1)
    assert len(tokenize(model, ["a he"], context_size=1, prepend_bos=False)) == 2


def test_no_texts_give_no_windows_and_no_batches(model: Any) -> None:
    assert tokenize(model, []) == []
    assert list(activation_batches(model, [], HOOK, progress=False)) == []


def test_a_classic_hook_name_resolves_to_what_a_bridge_keeps(bridge: Any, hooked_transformer: Any) -> None:
    name = canonical_hook(bridge, HOOK)
    assert name != HOOK and name in bridge.hook_dict
    assert canonical_hook(bridge, name) == name
    assert canonical_hook(hooked_transformer, HOOK) == HOOK


@pytest.mark.parametrize("hook_name", ["blocks.2.hook_resid_post", "hook_resid", ""])
def test_an_unknown_hook_is_refused_with_valid_ones(model: Any, hook_name: str) -> None:
    message = f"no hook '{hook_name}' .valid: blocks.0.hook_resid_post to blocks.1.hook_resid_post"
    for use in (canonical_hook, hook_capture):
        with pytest.raises(ValueError, match=message) as error:
            use(model, hook_name)
        assert "\n" not in str(error.value)


def test_the_layer_of_a_hook_is_read_off_its_name() -> None:
    assert hook_layer("blocks.11.hook_resid_post") == 11
    assert hook_layer("ln_final.hook_normalized") is None


def test_the_forward_pass_stops_behind_the_hooks_block(model: Any) -> None:
    seen: list[str] = []
    later = canonical_hook(model, "blocks.1.hook_resid_post")
    with model.hooks(fwd_hooks=[(later, lambda tensor, hook: seen.append(later))]):
        hook_capture(model, HOOK)(torch.tensor([[BOS, 5]]))
        assert seen == []
        hook_capture(model, "blocks.1.hook_resid_post")(torch.tensor([[BOS, 5]]))
        assert seen == [later]


def test_logits_are_not_computed_for_the_last_blocks_activations(model: Any) -> None:
    positions: list[int] = []
    handle = model.unembed.register_forward_hook(lambda module, inputs, output: positions.append(output.shape[1]))
    try:
        hook_captures(model, ["blocks.1.hook_resid_post", HOOK])(torch.tensor([[BOS, 5, 9, 7]]))
    finally:
        handle.remove()
    assert positions in ([], [1])


def test_a_hook_behind_the_blocks_is_read_too(model: Any) -> None:
    tokens = torch.tensor([[BOS, 5, 9]])
    ours = hook_captures(model, ["ln_final.hook_normalized", HOOK])(tokens)[0]
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(ours, cache["ln_final.hook_normalized"], atol=0, rtol=0)


def test_several_hooks_are_read_in_one_pass_in_the_order_asked(model: Any) -> None:
    names = ["blocks.1.hook_resid_post", HOOK, "blocks.0.attn.hook_z", HOOK]
    tokens = torch.tensor([[BOS, 5, 9]])
    together = hook_captures(model, names)(tokens)
    alone = [hook_capture(model, name)(tokens) for name in names]
    assert len(together) == len(names)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=0, rtol=0)
    assert not torch.allclose(together[0], together[1])


def test_reading_at_no_hook_is_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match="no hook to read activations at"):
        hook_captures(bridge, [])


def test_reading_activations_leaves_the_model_without_hooks(model: Any) -> None:
    tokens = torch.tensor([[BOS, 4, 5]])
    with torch.inference_mode():
        before = model(tokens)
        list(activation_batches(model, TEXTS, HOOK, progress=False))
        assert torch.equal(model(tokens), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []
    real = activations.hook_capture

    def capture_of(model: Any, hook_name: str) -> Any:
        capture = real(model, hook_name)

        def scarce(tokens: torch.Tensor) -> torch.Tensor:
            sizes.append(len(tokens))
            if len(tokens) > 2:
                raise torch.OutOfMemoryError("simulated")
            return capture(tokens)

        return scarce

    expected = one_at_a_time(model, TEXTS, HOOK)
    monkeypatch.setattr(activations, "hook_capture", capture_of)
    assert_same(by_position(list(activation_batches(model, TEXTS, HOOK, progress=False))), expected)
    assert sizes == [5, 2, 3, 1, 2]
    assert "halving" in caplog.text


def test_a_single_row_that_does_not_fit_is_an_error(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(tokens: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(activations, "hook_capture", lambda model, hook_name: scarce)
    with pytest.raises(torch.OutOfMemoryError):
        list(activation_batches(bridge, TEXTS, HOOK, progress=False))


def test_the_mean_norm_is_over_tokens_without_bos(model: Any) -> None:
    norms = [float(vector.norm()) for _, vector in one_at_a_time(model, TEXTS, HOOK).values()]
    assert mean_norm(model, TEXTS, HOOK) == pytest.approx(np.mean(norms), rel=1e-5)
    norms = [float(vector.norm()) for _, vector in one_at_a_time(model, TEXTS, HOOK, bos=False).values()]
    assert mean_norm(model, TEXTS, HOOK, prepend_bos=False) == pytest.approx(np.mean(norms), rel=1e-5)


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_a_mean_norm_of_no_tokens_is_refused(bridge: Any, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="no tokens to measure a norm on"):
        mean_norm(bridge, texts, HOOK)


def test_a_bridge_is_read_as_before_after_sae_lens_spliced_a_dictionary_in(bridge: Any, planted_sae: Any) -> None:
    tokens = torch.arange(12).view(2, 6)
    before = hook_capture(bridge, planted_sae.cfg.metadata.hook_name)(tokens)
    with bridge.saes(saes=[planted_sae]):
        bridge(tokens)
    assert torch.equal(hook_capture(bridge, planted_sae.cfg.metadata.hook_name)(tokens), before)
