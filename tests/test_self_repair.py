import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, HOOK, JOY, VOCABULARY, make_sae

from sae_emotion_plugin import steering
from sae_emotion_plugin.activations import canonical_hook, hook_captures
from sae_emotion_plugin.steering_studies.necessity import removal_plan
from sae_emotion_plugin.steering_studies.self_repair import propagation, word_direction

TEXTS = {"he is": ["he is such a joy w3", "he is w9 happy"], "w3": ["w3 w4 w5 w6"], "a": ["a smile w1 w2 w8"]}
LAST = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def idle(hooked_transformer: Any) -> Any:
    """The model with a second block that does nothing: what the first one writes arrives as it is."""
    model = copy.deepcopy(hooked_transformer)
    with torch.no_grad():
        for parameter in (model.blocks[1].attn.W_O, model.blocks[1].mlp.W_out):
            parameter.zero_()
        for bias in (model.blocks[1].attn.b_O, model.blocks[1].mlp.b_out):
            bias.zero_()
    return model


def always_firing(hook_name: str = HOOK) -> Any:
    """An SAE of which features 5, 7 and 9 are among the four that fire on every token, whatever it is."""
    sae = make_sae(hook_name=hook_name)
    with torch.no_grad():
        sae.b_enc[[5, JOY, 9]] += 50
    return sae


def plans_of(sae: Any, *features: int) -> list[Any]:
    return [removal_plan(sae, [feature], None, 4.0) for feature in features]


def test_without_later_layers_nothing_is_put_back(idle: Any) -> None:
    sae = always_firing()
    repair, logits = propagation(idle, sae, plans_of(sae, 5, JOY, 9), TEXTS, ["joy", "happy"], progress=False)
    assert [row.hook_name for row in repair] == [HOOK, LAST]
    for row in repair:
        for interval in (row.features, row.controls):
            assert interval is not None and interval.n_groups == 3
            assert (interval.mean, interval.low, interval.high) == pytest.approx((1, 1, 1), abs=1e-5)
    assert [row.what for row in logits] == ["features", "controls"]
    for row in logits:
        assert row.direct is not None and row.total is not None and row.put_back is not None
        assert abs(row.direct.mean) > 1e-3
        assert row.total.mean == pytest.approx(row.direct.mean, abs=1e-5)
        assert row.put_back.mean == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_planted_repair_is_found(idle: Any, share: float) -> None:
    sae = always_firing()
    direction = torch.nn.functional.normalize(sae.W_dec[JOY].detach(), dim=0)

    def forgets(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        """Whatever is missing along the feature's direction, a share of it comes back."""
        return tensor - share * (tensor @ direction)[..., None] * direction

    with idle.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", forgets)]):
        repair, logits = propagation(idle, sae, plans_of(sae, JOY), TEXTS, ["joy"], progress=False)
    kept = [row.features.mean for row in repair if row.features is not None]
    assert kept == pytest.approx([1, 1 - share], abs=1e-5)
    assert all(row.controls is None for row in repair)
    (effect, _) = logits
    assert effect.direct is not None and effect.total is not None
    if share == 1:
        assert effect.total.mean == pytest.approx(0, abs=1e-5) and abs(effect.direct.mean) > 1e-3


def test_it_equals_a_loop_over_texts_and_plans(bridge: Any) -> None:
    """Whole forward passes, one text and plan at a time, the logits from the model itself."""
    sae, words = always_firing(), ("joy", "sad", "w7")
    plans = plans_of(sae, 5, JOY)
    repair, logits = propagation(bridge, sae, plans, TEXTS, words, progress=False)
    tokens_of_words = [VOCABULARY[word] for word in words]
    shares: list[float] = []
    totals: list[float] = []
    for own in TEXTS.values():
        above = below = effect = n = 0.0
        for text in own:
            tokens = torch.tensor([[1, *(VOCABULARY[word] for word in text.split())]])
            capture = hook_captures(bridge, [HOOK, LAST])
            with torch.inference_mode():
                before, plain = capture(tokens), bridge(tokens)[0, 1:].double()
                with steering(bridge, sae, plans[0]):
                    after, steered = capture(tokens), bridge(tokens)[0, 1:].double()
            d, later = ((b - a)[0].double() for a, b in zip(before, after, strict=True))
            above, below = above + float((d * later).sum()), below + float((d * d).sum())
            for logits_now, sign in ((steered, 1), (plain, -1)):
                centred = logits_now[:, tokens_of_words].mean(1) - logits_now.mean(1)
                effect += sign * float(centred.sum())
            n += len(tokens[0]) - 1
        shares.append(above / below)
        totals.append(effect / n)
    assert repair[1].features is not None and logits[0].total is not None
    assert repair[1].features.mean == pytest.approx(np.mean(shares), abs=1e-4)
    assert logits[0].total.mean == pytest.approx(np.mean(totals), abs=1e-4)
    assert abs(repair[1].features.mean - 1) > 1e-3


def test_at_the_last_layer_all_effect_is_direct(model: Any) -> None:
    sae = always_firing(LAST)
    repair, logits = propagation(model, sae, plans_of(sae, JOY), TEXTS, ["joy"], progress=False)
    assert [row.hook_name for row in repair] == [LAST]
    assert logits[0].direct is not None and logits[0].total is not None
    assert logits[0].total.mean == pytest.approx(logits[0].direct.mean, abs=1e-5)


def test_ablation_takes_exactly_the_contribution_away(bridge: Any) -> None:
    sae, tokens = always_firing(), torch.tensor([[1, 4, 5, 8, 20]])
    capture = hook_captures(bridge, [canonical_hook(bridge, HOOK)])
    (before,) = capture(tokens)
    with steering(bridge, sae, removal_plan(sae, [JOY, 9], None, 4.0)):
        (after,) = capture(tokens)
    with torch.no_grad():
        gone = sae.encode(before[0])[:, [JOY, 9]] @ sae.W_dec[[JOY, 9]]
    gone[0] = 0  # BOS is left alone
    assert float(gone.norm()) > 1
    torch.testing.assert_close(before[0] - after[0], gone, atol=1e-4, rtol=1e-4)


def test_the_words_direction_gives_their_centred_logits(model: Any) -> None:
    column = word_direction(model, ["JOY ", "w3", "nowhere"])
    x = torch.randn(1, 5, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = (model.unembed(x) - model.unembed(0 * x))[0]
    wanted = logits[:, [VOCABULARY["joy"], VOCABULARY["w3"]]].mean(1) - logits.mean(1)
    torch.testing.assert_close(x[0] @ column, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="none of the words"):
        word_direction(model, ["nowhere"])


def test_prompts_where_nothing_fires_are_left_out(idle: Any) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[JOY] = -1e3
    repair, logits = propagation(idle, sae, plans_of(sae, JOY), TEXTS, ["joy"], progress=False)
    assert all(row.features is None for row in repair) and logits[0].direct is None


def test_a_dictionary_of_another_width_has_no_self_repair(
    hooked_transformer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sae = make_sae(hook_name="blocks.0.mlp.hook_post", d_in=64)
    assert propagation(hooked_transformer, sae, plans_of(sae, JOY), TEXTS, ["joy"], progress=False) == ((), ())
    assert "no self-repair" in caplog.text
