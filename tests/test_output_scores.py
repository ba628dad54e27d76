import itertools
import json
import math
from typing import Any

import pytest
import torch
from conftest import D_SAE, JOY, VOCABULARY, WORDS, make_sae

from sae_emotion_plugin.activations import TokenWindow
from sae_emotion_plugin.feature_roles import output_scores as module
from sae_emotion_plugin.feature_roles.output_scores import (
    CAUSAL_AMOUNT,
    EMOTION_WORDS,
    emotion_words,
    output_scores,
    prompt_windows,
    read_next_tokens,
    steering_order,
)
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.models import logit_lens

NORM = 4.0
PROMPTS = ("he is such a", "w3 w4", "w9 is w7 w6")
LISTS = {"joy": ("joy", "happy"), "anger": ("Anger",)}
WORD = 30
"""Feature whose decoder direction is the unembedding of WORDS[WORD], less that of all words."""
SILENT = 31
"""Feature whose direction the unembedding does not see."""


@pytest.fixture
def sae(hooked_transformer: Any) -> Any:
    """The planted dictionary at the last layer, so that nothing stands between a direction and the unembedding."""
    planted = make_sae(hook_name="blocks.1.hook_resid_post")
    unembedding = hooked_transformer.unembed.W_U.detach()  # [d_model, vocab]
    with torch.no_grad():
        planted.W_dec[WORD] = unembedding[:, WORD] - unembedding.mean(dim=1)
        # The layer norm takes the mean away, so that a constant direction says nothing at all.
        planted.W_dec[SILENT] = torch.ones(unembedding.shape[0])
    return planted


def distributions(model: Any, sae: Any, feature: int | None, amount: float, mode: Any = "add") -> torch.Tensor:
    """The next-token log-probabilities [prompt, vocab], one prompt at a time."""
    found = []
    for window in prompt_windows(model, sae, PROMPTS):
        tokens = torch.tensor([window.token_ids])
        with torch.no_grad():
            if feature is None:
                logits = model(tokens)
            else:
                with steering(model, sae, SteeringPlan.of({feature: amount}, sae, residual_norm=NORM, mode=mode)):
                    logits = model(tokens)
        found.append(logits[0, -1].double().log_softmax(-1))
    return torch.stack(found)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(("mode", "k"), [("add", 1), ("clamp", 3)])
def test_scores_match_their_definitions(model: Any, planted_sae: Any, mode: Any, k: int) -> None:
    found = output_scores(
        model, planted_sae, [3, JOY], prompts=PROMPTS, amount=0.5, causal_amount=0.1, mode=mode, residual_norm=NORM,
        top=4, confidence_tokens=k, words=LISTS, progress=False,
    )  # fmt: skip
    before = distributions(model, planted_sae, None, 0.0)
    for row in found.rows:
        after = distributions(model, planted_sae, row.feature, 0.5, mode)
        small = distributions(model, planted_sae, row.feature, 0.1, mode)
        promoted = logit_lens(model, planted_sae.W_dec[[row.feature]].detach())[0].argsort(descending=True)[:4].tolist()
        scores, deltas, divergences = [], [], []
        for p, q in zip(before.tolist(), after.tolist(), strict=True):
            ranked = sorted(range(len(q)), key=lambda token: -q[token])
            least = min(ranked.index(token) for token in promoted)
            scores.append((1 - least / len(q)) * math.exp(max(q[token] for token in promoted)))
            deltas.append(-sum(sorted(q)[-k:]) / k + sum(sorted(p)[-k:]) / k)
            divergences.append(sum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True)))
        expected = [sum(one) / len(PROMPTS) for one in (scores, deltas, divergences)]
        assert [row.output_score, row.delta_confidence, row.kl] == pytest.approx(expected, abs=2e-6)
        for name, words in LISTS.items():
            tokens = [VOCABULARY[word.lower()] for word in words]
            changes = [
                logit(sum(math.exp(q[token]) for token in tokens)) - logit(sum(math.exp(p[token]) for token in tokens))
                for p, q in zip(before.tolist(), small.tolist(), strict=True)
            ]
            assert row.causal[name] == pytest.approx(sum(changes) / len(changes), abs=1e-4)
    assert found.meta["tokens_per_list"] == {"joy": 2, "anger": 1}


def test_a_feature_that_writes_a_words_unembedding_has_a_high_output_score(hooked_transformer: Any, sae: Any) -> None:
    found = output_scores(
        hooked_transformer, sae, list(range(D_SAE)), prompts=PROMPTS, amount=5, residual_norm=NORM, top=1,
        words={"word": [WORDS[WORD]], "joy": ["joy"]}, progress=False,
    )  # fmt: skip
    others = [row for row in found.rows if row.feature not in (WORD, SILENT)]
    planted, silent = found.of(WORD), found.of(SILENT)
    assert planted.output_score > 0.5 > 0.4 > sorted(row.output_score for row in others)[len(others) // 2]
    assert planted.causal["word"] == max(row.causal["word"] for row in found.rows)
    assert planted.causal["word"] > 0.1 > abs(planted.causal["joy"])
    assert planted.delta_confidence < 0  # its distribution is more peaked
    assert (silent.kl, silent.delta_confidence) == pytest.approx((0, 0), abs=1e-5)
    assert list(silent.causal.values()) == pytest.approx([0, 0], abs=1e-4)


def test_the_causal_score_is_the_slope_times_the_dose(hooked_transformer: Any, sae: Any) -> None:
    doses = (0.005, 0.01)
    small, twice = (
        output_scores(
            hooked_transformer, sae, [WORD], prompts=PROMPTS, causal_amount=dose, residual_norm=NORM,
            words={"word": [WORDS[WORD]]}, progress=False,
        ).rows[0].causal["word"]
        for dose in doses
    )  # fmt: skip
    assert small > 0
    assert twice / small == pytest.approx(2, rel=0.05)


def test_a_feature_asked_for_twice_is_scored_once_and_stands_twice(bridge: Any, planted_sae: Any) -> None:
    found = output_scores(bridge, planted_sae, [3, JOY, 3], prompts=PROMPTS, words=LISTS, progress=False)
    assert [row.feature for row in found.rows] == [3, JOY, 3]
    assert found.rows[0] == found.rows[2] != found.rows[1]


def test_the_residual_norm_is_measured_on_the_prompts(bridge: Any, planted_sae: Any) -> None:
    measured = output_scores(bridge, planted_sae, [JOY], prompts=PROMPTS, words=LISTS, progress=False)
    norm = measured.meta["residual_norm"]
    given = output_scores(bridge, planted_sae, [JOY], prompts=PROMPTS, words=LISTS, residual_norm=norm, progress=False)
    assert norm > 0 and given.rows == measured.rows


def test_small_batches_give_the_same_scores(bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores() -> list[float]:
        row = output_scores(bridge, planted_sae, [3, JOY], prompts=PROMPTS, words=LISTS, progress=False).rows[1]
        return [row.output_score, row.delta_confidence, row.kl, *row.causal.values()]

    whole = scores()
    monkeypatch.setattr(module, "LOGIT_ENTRIES", 1)
    assert scores() == pytest.approx(whole, abs=1e-5)


def test_rows_of_all_lengths_and_plans_come_back_in_their_order(model: Any, planted_sae: Any) -> None:
    windows = prompt_windows(model, planted_sae, PROMPTS)
    plans = [None, *(SteeringPlan.of({one: 1.0}, planted_sae, residual_norm=NORM) for one in (3, JOY))]
    rows = list(itertools.product(windows, plans))
    found = read_next_tokens(
        model, planted_sae, rows, lambda places, log_p: list(zip(places, log_p, strict=True)), progress=False
    )
    by_hand = torch.stack([distributions(model, planted_sae, one, 1.0) for one in (None, 3, JOY)], dim=1).flatten(0, 1)
    assert [place for place, _ in found] == list(range(len(rows)))
    torch.testing.assert_close(torch.stack([log_p for _, log_p in found]).double(), by_hand, atol=1e-5, rtol=1e-5)


def test_every_emotion_has_eight_words_of_its_own() -> None:
    assert {len(set(words.split())) for words in EMOTION_WORDS.values()} == {8}
    words = emotion_words()
    assert "hate" in words["negative"] and "love" in words["positive"]
    assert not set(words["negative"]) & set(words["positive"])


def test_default_lists_without_a_token_are_left_out(bridge: Any, planted_sae: Any) -> None:
    row = output_scores(bridge, planted_sae, [JOY], prompts=PROMPTS, progress=False).rows[0]
    assert {"joy", "anger", "sadness", "fear"} <= set(row.causal)
    assert "gratitude" not in row.causal  # none of its words is in the tiny vocabulary


def test_scores_are_shown_and_saved(bridge: Any, planted_sae: Any, tmp_path: Any) -> None:
    found = output_scores(bridge, planted_sae, [3, JOY], prompts=PROMPTS, words=LISTS, progress=False)
    assert json.loads(found.save(tmp_path / "scores.json").read_text())["rows"][1]["feature"] == JOY
    assert list(found.to_pandas().columns[-2:]) == ["causal:joy", "causal:anger"]
    assert "output score" in repr(found) and "<table>" in found._repr_html_()
    with pytest.raises(ValueError, match="feature 5 was not scored"):
        found.of(5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features": []}, "no features"),
        ({"features": [D_SAE]}, f"no feature {D_SAE}"),
        ({"prompts": "he is"}, "not one string"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [""]}, "has no tokens"),
        ({"prompts": ["w1 " * 40]}, "longer than 32 tokens"),
        ({"top": 0}, "top is 0"),
        ({"confidence_tokens": 1000}, "confidence_tokens is 1000"),
        ({"words": {"awe": ["sublime"]}}, "no word of 'awe' is a single token"),
        ({"words": {"awe": "joy"}}, "list of strings"),
        ({"amount": float("nan")}, "finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(bridge: Any, planted_sae: Any, change: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"features": [JOY], "prompts": PROMPTS, "words": LISTS, "progress": False, **change}
    with pytest.raises(ValueError, match=named):
        output_scores(bridge, planted_sae, given.pop("features"), **given)


def test_an_sae_off_the_residual_stream_is_refused(bridge: Any) -> None:
    sae = make_sae(hook_name="blocks.0.mlp.hook_post", d_in=64)
    with pytest.raises(ValueError, match="the SAE writes 64 dimensions, the residual stream has 32"):
        output_scores(bridge, sae, [JOY], prompts=PROMPTS, words=LISTS, progress=False)


def test_logits_that_are_no_numbers_name_the_plan(bridge: Any, planted_sae: Any) -> None:
    plan = SteeringPlan.of({JOY: 1e38}, planted_sae, residual_norm=1e3)
    with pytest.raises(ValueError, match="not finite; steered by SteeringPlan"):
        read_next_tokens(
            bridge, planted_sae, [(TokenWindow(0, 0, (1, 4), True), plan)], lambda _, log_p: list(log_p), progress=False
        )


def test_candidates_are_ordered_by_what_they_do_to_their_emotions_words(hooked_transformer: Any, sae: Any) -> None:
    ordered = steering_order(hooked_transformer, sae, "joy", range(12), prompts=PROMPTS, progress=False)
    words = {"joy": tuple(EMOTION_WORDS["joy"].split())}
    found = output_scores(
        hooked_transformer, sae, range(12), prompts=PROMPTS, words=words, amount=CAUSAL_AMOUNT, progress=False
    )
    causal = {row.feature: row.causal["joy"] for row in found.rows}
    assert list(ordered) == sorted(causal, key=lambda feature: -causal[feature])
    assert causal[ordered[0]] > causal[ordered[-1]]


def test_an_emotion_without_words_is_refused(bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match=r"no causal score for envy \(valid: one of admiration"):
        steering_order(bridge, planted_sae, "envy", [1])
