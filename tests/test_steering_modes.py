"""All modes, units, places and schedules against the definition, one position at a time."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HOOK, JOY, WORDS, make_sae
from test_interventions import NORM, TOKENS, activations, plan_of
from torch import Tensor

from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.hooks import actual_plan, row_steering, steering
from sae_emotion_plugin.interventions.plans import Gate, Intervention, SteeringPlan, dictionary_sha256
from sae_emotion_plugin.sparse_codes import encode_texts

OTHER_HOOK = "blocks.1.hook_resid_post"
MASK = torch.tensor([[False, True, True, True, True]] * 3)


@pytest.fixture(params=["planted_sae", "layer_norm_sae"])
def sae(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def by_definition(sae: Any, plan: SteeringPlan, x: Tensor) -> Tensor:
    """What one activation becomes where the plan acts, in float64 and one feature after the other."""
    code = sae.encode(x[None])[0].double()
    spread = x.double().std() if sae.cfg.normalize_activations == "layer_norm" else torch.tensor(1.0).double()
    rows = sae.W_dec.detach().double()
    result = x.double()
    if not plan.keep_error:
        result = sae.decode(sae.encode(x[None]))[0].double()
    for one in plan.interventions:
        row, amount = rows[one.feature], one.amount
        length = row.norm()
        activation = amount * (one.max_activation or 1) if plan.unit == "max_activation" else amount
        if one.mode == "add":
            of_unit = {"residual_norm": amount * NORM / length, "raw": amount / length}
            result = result + of_unit.get(plan.unit, activation * spread) * row
        elif one.mode == "project-out":
            continue
        else:
            wanted = {"scale": amount * code[one.feature], "ablate": (1 - amount) * code[one.feature]}
            clamped = amount * NORM / (length * spread) if plan.unit == "residual_norm" else activation
            result = result + (wanted.get(one.mode, clamped) - code[one.feature]) * spread * row
    if out := [one for one in plan.interventions if one.mode == "project-out"]:
        span = rows[[one.feature for one in out]].T
        inside = span @ torch.linalg.lstsq(span, x.double()[:, None]).solution[:, 0]
        result = result - out[0].amount * inside
    return result.float()


def check(model: Any, sae: Any, plan: SteeringPlan, strength: Any = 1.0) -> None:
    """The activations under the plan are `strength` (of row and position) of the way to those of the definition."""
    before = activations(model)
    with steering(model, sae, plan):
        after = activations(model)
    strengths = torch.as_tensor(strength, dtype=torch.float32).expand(TOKENS.shape)
    for row, position in np.ndindex(*TOKENS.shape):
        x = before[row, position]
        share = 0.0 if position == 0 else strengths[row, position]
        expected = x + share * (by_definition(sae, plan, x) - x)
        torch.testing.assert_close(after[row, position], expected, atol=2e-5, rtol=2e-5)
        if share == 0:
            assert torch.equal(after[row, position], x)


@pytest.mark.parametrize("unit", ["residual_norm", "raw", "activation", "max_activation"])
@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_units_mean_what_the_plan_says(bridge: Any, sae: Any, mode: Any, unit: Any) -> None:
    interventions = (Intervention(JOY, 0.5, mode, 2.5), Intervention(3, -0.25, mode, 0.5))
    check(bridge, sae, SteeringPlan(HOOK, interventions, unit, NORM))


@pytest.mark.parametrize(("mode", "amount"), [("scale", 3.0), ("scale", 0.0), ("ablate", 1.0), ("ablate", 0.5)])
def test_contributions_are_scaled_and_ablated(bridge: Any, sae: Any, mode: Any, amount: float) -> None:
    features = encode_texts(bridge, sae, [" ".join(WORDS[4:8])], progress=False).features[:3]
    check(bridge, sae, plan_of(sae, dict.fromkeys(map(int, features), amount), mode=mode))


def test_ablating_is_clamping_to_zero_and_scaling_by_zero(bridge: Any, sae: Any) -> None:
    found = []
    for mode, amount in (("ablate", 1.0), ("clamp", 0.0), ("scale", 0.0)):
        with steering(bridge, sae, plan_of(sae, {JOY: amount, 9: amount}, mode=mode)):
            found.append(activations(bridge))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("amount", [1.0, 0.4])
def test_what_lies_in_the_span_of_directions_is_projected_out(bridge: Any, sae: Any, amount: float) -> None:
    plan = plan_of(sae, dict.fromkeys([JOY, 3, 12], amount), mode="project-out")
    check(bridge, sae, plan)
    if amount == 1:
        with steering(bridge, sae, plan):
            left = activations(bridge)[:, 1:] @ sae.W_dec[[JOY, 3, 12]].T
        assert left.abs().max() < 1e-4


def test_features_are_amplified_and_suppressed_in_one_plan(bridge: Any, sae: Any) -> None:
    mixed = (Intervention(JOY, 0.5), Intervention(3, 1.0, "ablate"), Intervention(5, 2.0, "scale"))
    check(bridge, sae, SteeringPlan(HOOK, (*mixed, Intervention(11, -0.2, "clamp")), residual_norm=NORM))


def test_without_the_error_term_the_activation_is_the_reconstruction(bridge: Any, sae: Any) -> None:
    plan = plan_of(sae, {JOY: 0.5}, keep_error=False)
    check(bridge, sae, plan)
    with steering(bridge, sae, plan):
        apart = activations(bridge)
    with steering(bridge, sae, replace(plan, keep_error=True)):
        assert (activations(bridge) - apart)[:, 1:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("where", "strength"),
    [
        ({"positions": "prompt"}, 1.0),
        ({"positions": "generated"}, 0.0),
        ({"positions": "last"}, [0.0, 0.0, 0.0, 0.0, 1.0]),
        ({"positions": "1:3"}, [0.0, 0.0, 1.0, 1.0, 0.0]),
        ({"positions": "2:"}, [0.0, 0.0, 0.0, 1.0, 1.0]),
        ({"positions": ":1"}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ({"decay": 0.5, "first_tokens": 1}, 1.0),
    ],
)
def test_only_the_positions_of_the_plan_are_steered_in_a_prompt(
    bridge: Any, sae: Any, where: dict[str, Any], strength: Any
) -> None:
    check(bridge, sae, plan_of(sae, {JOY: 0.5, 3: 0.2}, **where), strength)


def test_a_gate_opens_where_its_feature_is_active(bridge: Any, sae: Any) -> None:
    before = activations(bridge)
    with torch.no_grad():
        codes = torch.stack([sae.encode(row) for row in before])
    feature = int((codes[:, 1:] > 0).sum(dim=(0, 1)).sub(6).abs().argmin())
    active = codes[..., feature]
    above = float(active[active > 0].median()) - 1e-6
    assert 0 < (active[:, 1:] > above).sum() < 12
    check(bridge, sae, plan_of(sae, {JOY: 0.5}, gate=Gate(feature, above)), (active > above).float())


@pytest.mark.parametrize("mode", ["add", "project-out"])
def test_a_plan_acts_at_several_hooks(bridge: Any, planted_sae: Any, mode: Any) -> None:
    plan = plan_of(planted_sae, {JOY: 0.5}, mode=mode, at=(HOOK, OTHER_HOOK))
    with steering(bridge, planted_sae, replace(plan, at=())):
        before = activations_at(bridge, OTHER_HOOK)
    with steering(bridge, planted_sae, plan):
        after = activations_at(bridge, OTHER_HOOK)
    expected = torch.stack([torch.stack([by_definition(planted_sae, plan, x) for x in row]) for row in before[:, 1:]])
    torch.testing.assert_close(after[:, 1:], expected, atol=2e-5, rtol=2e-5)
    assert (after - before)[:, 1:].abs().max() > 0.01 and torch.equal(after[:, 0], before[:, 0])


def activations_at(model: Any, hook: str) -> Tensor:
    seen: list[Tensor] = []
    kept = (canonical_hook(model, hook), lambda x, hook: seen.append(x.clone()))
    with torch.no_grad(), model.hooks(fwd_hooks=[kept]):
        model(TOKENS)
    return seen[0]


@pytest.mark.parametrize(
    "where",
    [
        {"positions": "generated"},
        {"positions": "last"},
        {"positions": "prompt"},
        {"positions": "1:4"},
        {"first_tokens": 2},
        {"decay": 0.6},
        {"positions": "generated", "first_tokens": 1},
        {"gate": Gate(JOY, 0.05)},
    ],
)
def test_a_schedule_means_the_same_with_and_without_a_cache(
    bridge: Any, planted_sae: Any, where: dict[str, Any]
) -> None:
    plans = [plan_of(planted_sae, {JOY: 3.0, 3: 1.5}, **where), None, plan_of(planted_sae, {5: 2.0})]
    requests = [Request(prompt, plan, 0.8, 3) for prompt in ("he is such a", "w3 w9") for plan in plans]
    with_cache, without = (
        complete(bridge, planted_sae, requests, max_new_tokens=6, progress=False, use_cache=use)
        for use in (True, False)
    )
    assert [one.token_ids for one in with_cache] == [one.token_ids for one in without]
    assert with_cache[0].token_ids != with_cache[1].token_ids or with_cache[3].token_ids != with_cache[4].token_ids


def strengths_of_steps(model: Any, sae: Any, plan: SteeringPlan, n_steps: int) -> list[float]:
    """How much of its change each of some single-position calls gets after a prompt."""
    found = []
    once = activations(model, TOKENS[:1, 1:2])
    with row_steering(model, sae, [plan], MASK[:1]):
        activations(model, TOKENS[:1])
        for _ in range(n_steps):
            change = activations(model, TOKENS[:1, 1:2]) - once
            found.append(float(change.norm()) / (plan.amount * NORM))
    return found


def test_generated_tokens_are_steered_by_the_schedule(bridge: Any, planted_sae: Any) -> None:
    plan = plan_of(planted_sae, {JOY: 0.5})
    for where, expected in (
        ({}, [1.0, 1.0, 1.0]),
        ({"positions": "prompt"}, [0.0, 0.0, 0.0]),
        ({"positions": "generated"}, [1.0, 1.0, 1.0]),
        ({"positions": "4:6"}, [1.0, 1.0, 0.0]),
        ({"first_tokens": 2}, [1.0, 1.0, 0.0]),
        ({"decay": 0.5}, [0.5, 0.25, 0.125]),
    ):
        found = strengths_of_steps(bridge, planted_sae, replace(plan, **where), 3)
        assert found == pytest.approx(expected, abs=1e-4), where


def test_the_actual_activation_is_added(bridge: Any, sae: Any) -> None:
    text = "he is such a joy"
    codes = encode_texts(bridge, sae, [text], progress=False)
    largest = codes.pooled("max").toarray()[0]
    features = [int(feature) for feature in largest.argsort()[-2:]]
    plan = actual_plan(bridge, sae, features, text, times=2)
    assert [one.amount for one in plan.interventions] == pytest.approx([2 * largest[feature] for feature in features])
    assert plan.unit == "activation"
    check(bridge, sae, plan)
    silent = int(np.flatnonzero(largest == 0)[0])
    with pytest.raises(ValueError, match=f"feature {silent} does not fire on 'he is such a joy'"):
        actual_plan(bridge, sae, [silent], text)
    with pytest.raises(ValueError, match="no feature 999"):
        actual_plan(bridge, sae, [999], text)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"positions": "first"}, "'first'.*all, prompt, generated, last, or a range"),
        ({"positions": "5:2"}, "'5:2'"),
        ({"first_tokens": 0}, "first_tokens is 0"),
        ({"decay": 0.0}, "decay is 0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"at": (HOOK, HOOK)}, "stands twice"),
        ({"at": (OTHER_HOOK,), "interventions": (Intervention(3, 1, "clamp"),)}, "clamp reads.*cannot act at"),
        ({"at": (OTHER_HOOK,), "keep_error": False}, "keep_error=False reads"),
        ({"at": (OTHER_HOOK,), "gate": Gate(1)}, "a gate is read at"),
        ({"unit": "max_activation"}, "max_activation of feature 3"),
        ({"interventions": (Intervention(3, 1, "project-out"), Intervention(4, 0.5, "project-out"))}, "one amount"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    fields: dict[str, Any] = {"interventions": (Intervention(3, 1.0),), "residual_norm": NORM, **given}
    with pytest.raises(ValueError, match=named):
        SteeringPlan(HOOK, **fields)


def test_a_plan_of_another_dictionary_or_model_is_refused_unless_unbound(
    bridge: Any, hooked_transformer: Any, planted_sae: Any
) -> None:
    other = make_sae()
    assert dictionary_sha256(other) == dictionary_sha256(planted_sae)
    plan = SteeringPlan.of({JOY: 1.0}, planted_sae, residual_norm=NORM, model=bridge)
    with steering(bridge, other, plan):
        pass
    with torch.no_grad():
        other.W_dec[0, 0] += 1
    with pytest.raises(ValueError, match="made for the dictionary"), steering(bridge, other, plan):
        pass
    with pytest.raises(ValueError, match="made for the model"), steering(hooked_transformer, planted_sae, plan):
        pass
    with steering(hooked_transformer, other, plan.unbound()):
        pass


def test_a_plan_with_everything_survives_its_file(tmp_path: Any, planted_sae: Any) -> None:
    interventions = (Intervention(3, 0.5, "add", 2.0), Intervention(9, 1, "add", 4.0))
    bound: dict[str, Any] = {"dictionary": dictionary_sha256(planted_sae), "model": "m"}
    where: dict[str, Any] = {"at": (HOOK,), "positions": "2:", "first_tokens": 4, "decay": 0.9, "gate": Gate(7, 0.5)}
    plan = SteeringPlan(HOOK, interventions, "max_activation", **where, **bound)
    assert SteeringPlan.load(plan.save(tmp_path / "plan.json")) == plan
    old = {"hook_name": HOOK, "interventions": [{"feature": 3, "amount": 1}], "unit": "raw"}
    assert SteeringPlan.from_dict(old) == SteeringPlan(HOOK, (Intervention(3, 1),), "raw")
    shown = repr(plan)
    assert "positions 2:, first 4 tokens, decay 0.9, where feature 7 > 0.5" in shown


def test_an_amount_that_the_model_does_not_survive_is_named(bridge: Any, planted_sae: Any) -> None:
    plan = SteeringPlan.of({JOY: 1e38}, planted_sae, residual_norm=1e3)
    with pytest.raises(ValueError, match=r"not finite; steered by SteeringPlan\(add \+1e\+38 x feature 7; .*blocks\.0"):
        complete(bridge, planted_sae, [Request("he is", plan)], max_new_tokens=2, progress=False)
    assert math.isinf(torch.tensor(1e38).mul(1e3).item())
