from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, D_SAE, JOY, JOY_TOKEN, WORDS, make_sae

from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.discovery.tokens import (
    FEATURES_PER_LOGIT_CHUNK,
    FeatureTokens,
    PromptFeatures,
    extreme_tokens,
    promoted_tokens,
    prompt_features,
    with_promoted_tokens,
)
from sae_emotion_plugin.sparse_codes import encode_texts

PROMPT = "he is such a joy"


@pytest.fixture
def joyful_sae(bridge: Any) -> Any:
    """Its feature 7 writes in the direction that the unembedding reads as "joy"."""
    sae = make_sae()
    unembedding = next(iter(bridge.unembed.parameters())).detach()
    gain = 1 + next(iter(bridge.ln_final.parameters())).detach()
    with torch.no_grad():
        sae.W_dec[JOY] = (unembedding[JOY_TOKEN] - unembedding.mean(0)) / gain
    return sae


def scored(*features: int) -> FeatureScores:
    return FeatureScores({"seed": 0}, tuple(FeatureScore("joy", f, 0.9, 0.8, 0.01, 0.02, 0.5, 0.1) for f in features))


def words_by_hand(bridge: Any, direction: torch.Tensor, top: int, sign: int) -> tuple[str, ...]:
    """Through the final norm (an RMS norm, so that scale does not matter) and the unembedding."""
    unembedding = next(iter(bridge.unembed.parameters())).detach()
    gain = 1 + next(iter(bridge.ln_final.parameters())).detach()
    logits = unembedding @ (direction.detach() * gain)
    return tuple(WORDS[index] for index in (sign * logits).argsort(descending=True)[:top])


def test_a_planted_feature_promotes_its_word(bridge: Any, joyful_sae: Any) -> None:
    assert promoted_tokens(bridge, joyful_sae, [JOY], 3)[JOY][0] == "joy"
    with torch.no_grad():
        joyful_sae.W_dec[JOY] *= -1
    (row,) = with_promoted_tokens(scored(JOY), bridge, joyful_sae, 3).rows
    assert row.suppresses[0] == "joy" and "joy" not in row.promotes


def test_promoted_and_suppressed_words_equal_a_computation_by_hand(bridge: Any, planted_sae: Any) -> None:
    scores = with_promoted_tokens(scored(*range(0, D_SAE, 5)), bridge, planted_sae, 5)
    for row in scores.rows:
        direction = planted_sae.W_dec[row.feature]
        assert row.promotes == words_by_hand(bridge, direction, 5, 1)
        assert row.suppresses == words_by_hand(bridge, direction, 5, -1)
    assert (scores.meta, [row.auroc for row in scores.rows]) == ({"seed": 0}, [0.9] * 13)


def test_promoted_tokens_do_not_depend_on_a_rows_length(bridge: Any) -> None:
    sae = make_sae()
    before = promoted_tokens(bridge, sae, [3, 4], 5)
    with torch.no_grad():
        sae.W_dec.mul_(100)
    assert promoted_tokens(bridge, sae, [3, 4], 5) == before


def test_no_features_promote_nothing(bridge: Any, planted_sae: Any) -> None:
    assert promoted_tokens(bridge, planted_sae, [], 5) == {}


def test_tokens_of_a_feature_are_the_extremes_of_its_logits() -> None:
    n_features, vocab = 2 * FEATURES_PER_LOGIT_CHUNK + 5, 50
    table = np.random.default_rng(0).normal(size=(n_features, vocab)).astype(np.float32)
    asked: list[list[int]] = []

    def logits_of(features: list[int]) -> np.ndarray:
        asked.append(features)
        return table[features]

    found = extreme_tokens(range(n_features), logits_of, lambda token: f"<{token}>", top=3)
    for feature in range(n_features):
        order = [f"<{token}>" for token in np.argsort(table[feature])]
        assert found[feature] == FeatureTokens(tuple(order[::-1][:3]), tuple(order[:3]))
    assert [len(each) for each in asked] == [FEATURES_PER_LOGIT_CHUNK, FEATURES_PER_LOGIT_CHUNK, 5]


def test_equal_logits_give_the_earlier_tokens() -> None:
    flat = np.zeros((1, 6), dtype=np.float32)
    flat[0, 4] = 1
    assert extreme_tokens([7], lambda features: flat, str, top=3) == {
        7: FeatureTokens(("4", "0", "1"), ("0", "1", "2"))
    }


@pytest.mark.parametrize(
    ("logits", "top", "message"),
    [
        (np.zeros((1, 9)), 10, "top is 10, the vocabulary has 9 tokens"),
        (np.zeros((1, 9)), 0, "top must be at least 1, got 0"),
        (np.full((1, 9), np.nan), 3, "the logits of feature 7 are not finite"),
    ],
)
def test_bad_logits_are_refused(logits: np.ndarray, top: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extreme_tokens([7], lambda features: logits, str, top=top)


@pytest.mark.parametrize(("top", "message"), [(0, "top must be at least 1"), (65, "the vocabulary has 64 tokens")])
def test_a_number_of_tokens_that_cannot_be_shown_is_refused(
    top: int, message: str, bridge: Any, planted_sae: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        promoted_tokens(bridge, planted_sae, [1], top)


def test_a_dictionary_off_the_residual_stream_promotes_no_tokens_and_says_so(
    bridge: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sae = make_sae(d_in=24)
    assert with_promoted_tokens(scored(1, 2), bridge, sae) == scored(1, 2)
    assert promoted_tokens(bridge, sae, [1], 5) == {1: ()}
    assert "the SAE writes 24 dimensions, not the residual stream" in caplog.text


@pytest.mark.parametrize("name", ["bridge", "hooked_transformer"])
def test_the_features_of_the_last_token_are_its_strongest_codes(
    name: str, planted_sae: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    found = prompt_features(model, planted_sae, PROMPT, top=3, promoted=4)
    codes = encode_texts(model, planted_sae, [PROMPT], progress=False).matrix().toarray()
    expected = np.argsort(-codes[-1])[:3].tolist()
    assert [row.feature for row in found.rows] == expected
    assert [row.activation for row in found.rows] == pytest.approx(codes[-1, expected].tolist())
    assert {(row.position, row.token) for row in found.rows} == {(4, "joy")}
    assert all(row.promotes == promoted_tokens(model, planted_sae, [row.feature], 4)[row.feature] for row in found.rows)


def test_every_token_shows_its_own_features_in_order(bridge: Any, planted_sae: Any) -> None:
    found = prompt_features(bridge, planted_sae, PROMPT, top=2, every_token=True)
    assert [row.position for row in found.rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [row.token for row in found.rows][::2] == PROMPT.split()
    assert all(first.activation >= second.activation for first, second in zip(found.rows[::2], found.rows[1::2]))  # noqa: B905
    assert found.rows[-2:] == prompt_features(bridge, planted_sae, PROMPT, top=2).rows


def test_no_more_features_are_shown_than_fire(bridge: Any, planted_sae: Any) -> None:
    assert len(prompt_features(bridge, planted_sae, PROMPT, top=50).rows) == 4


def test_a_prompt_on_which_nothing_fires_has_no_rows(bridge: Any) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    found = prompt_features(bridge, sae, PROMPT, every_token=True)
    assert found.rows == () and repr(found) == f"PromptFeatures({PROMPT!r})"
    assert list(found.to_pandas().columns) == ["position", "token", "feature", "activation", "promotes"]
    assert "<table" in found._repr_html_()


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt: str, bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt .* is empty"):
        prompt_features(bridge, planted_sae, prompt)


def test_a_number_of_features_below_one_is_refused(bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match="top is 0; at least 1 feature"):
        prompt_features(bridge, planted_sae, PROMPT, top=0)


def test_an_sae_that_does_not_fit_is_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match=f"the SAE reads 24 dimensions, the model has {D_MODEL}"):
        prompt_features(bridge, make_sae(d_in=24), PROMPT)


def test_the_table_shows_what_the_rows_hold(bridge: Any, planted_sae: Any) -> None:
    found: PromptFeatures = prompt_features(bridge, planted_sae, PROMPT, top=2, promoted=2)
    frame = found.to_pandas()
    assert frame["feature"].tolist() == [row.feature for row in found.rows]
    lines = repr(found).splitlines()
    assert lines[0] == f"PromptFeatures({PROMPT!r})" and len(lines) == 3
    first = found.rows[0]
    assert f"feature {first.feature:>6}" in lines[1] and repr(first.promotes[0]) in lines[1]
    assert "<table" in found._repr_html_() and f"{first.activation:.2f}" in found._repr_html_()
