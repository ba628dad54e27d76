import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_SAE, HOOK, JOY, JOY_TOKEN, make_sae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import Tensor

from sae_emotion_plugin.activations import canonical_hook
from sae_emotion_plugin.interventions.hooks import row_steering, steering
from sae_emotion_plugin.interventions.plans import Intervention, SteeringPlan

TOKENS = torch.tensor([[1, 4, 5, 6, 7], [1, 20, 21, 22, 23], [1, 30, 8, 31, 40]])
NORM = 3.0


@pytest.fixture(params=["bridge", "hooked_transformer"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["planted_sae", "layer_norm_sae"])
def sae(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """What a user runs, who sees our own messages and not those of the checks in tests."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def activations(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """The activations at the hook as the rest of the model sees them, steered or not."""
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=[(canonical_hook(model, HOOK), lambda x, hook: seen.append(x.clone()))]),
    ):
        model(tokens)
    return seen[0]


def steered_by_hand(sae: Any, plan: SteeringPlan, vectors: Tensor, skip: int = 1) -> Tensor:
    """The published definition, one position and one feature at a time."""
    result = vectors.clone()
    norm = plan.residual_norm if plan.unit == "residual_norm" else None
    for row in range(len(vectors)):
        for position in range(skip, vectors.shape[1]):
            x = vectors[row, position]
            layer_norm = sae.cfg.normalize_activations == "layer_norm"
            spread = math.sqrt(sum((v - x.mean().item()) ** 2 for v in x.tolist()) / (len(x) - 1)) if layer_norm else 1
            code = sae.encode(x[None])[0]
            for one in plan.interventions:
                row_of_decoder = sae.W_dec[one.feature].detach()
                length = math.sqrt(sum(w * w for w in row_of_decoder.tolist()))
                if one.mode == "add":
                    result[row, position] += one.amount * (norm or 1.0) / length * row_of_decoder
                else:
                    target = one.amount if norm is None else one.amount * norm / (length * spread)
                    result[row, position] += (target - code[one.feature].item()) * spread * row_of_decoder
    return result


def plan_of(sae: Any, amounts: dict[int, float], **kwargs: Any) -> SteeringPlan:
    return SteeringPlan.of(amounts, sae, residual_norm=NORM, **kwargs)


@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("unit", ["residual_norm", "raw"])
def test_steering_matches_the_definition_at_every_position_but_bos(model: Any, sae: Any, mode: str, unit: str) -> None:
    plan = plan_of(sae, {JOY: 0.5, 3: -0.25, 50: 2.0}, mode=mode, unit=unit)
    before = activations(model)
    with steering(model, sae, plan):
        after = activations(model)
    torch.testing.assert_close(after, steered_by_hand(sae, plan, before), atol=1e-5, rtol=1e-5)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.equal(after[:, 1:], before[:, 1:])


def test_a_plan_may_add_and_clamp_and_reads_every_code_before_any_change(bridge: Any, sae: Any) -> None:
    mixed = (Intervention(JOY, 0.7), Intervention(8, 0.3, "clamp"), Intervention(9, -0.2, "clamp"))
    plan = SteeringPlan(HOOK, mixed, residual_norm=NORM)
    before = activations(bridge)
    with steering(bridge, sae, plan):
        after = activations(bridge)
    torch.testing.assert_close(after, steered_by_hand(sae, plan, before), atol=1e-5, rtol=1e-5)


def test_clamping_a_feature_to_zero_equals_ablating_it(bridge: Any, planted_sae: Any) -> None:
    before = activations(bridge)
    codes = planted_sae.encode(before)
    feature = int(codes[:, 1:].sum((0, 1)).argmax())
    without = codes.clone()
    without[..., feature] = 0
    ablated = before + planted_sae.decode(without) - planted_sae.decode(codes)
    with steering(bridge, planted_sae, plan_of(planted_sae, {feature: 0.0}, mode="clamp")):
        after = activations(bridge)
    assert codes[:, 1:, feature].max() > 0
    torch.testing.assert_close(after[:, 1:], ablated[:, 1:], atol=1e-5, rtol=1e-5)


def test_clamping_a_layer_normed_feature_equals_decoding_the_changed_code_plus_the_error(layer_norm_sae: Any) -> None:
    model_vectors = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1)) * 40 + 3
    codes = layer_norm_sae.encode(model_vectors)
    rebuilt = layer_norm_sae.decode(codes)
    changed = layer_norm_sae.encode(model_vectors)  # decode forgets the deviation, so encode again
    changed[..., JOY] = 2.5
    expected = model_vectors - rebuilt + layer_norm_sae.decode(changed)
    plan = plan_of(layer_norm_sae, {JOY: 2.5}, mode="clamp", unit="raw")
    torch.testing.assert_close(
        steered_by_hand(layer_norm_sae, plan, model_vectors, skip=0), expected, atol=2e-4, rtol=1e-4
    )


def test_a_clamped_feature_contributes_its_amount_whatever_it_did_before(bridge: Any, sae: Any) -> None:
    direction = torch.nn.functional.normalize(sae.W_dec[JOY].detach(), dim=0)
    before = activations(bridge)
    with steering(bridge, sae, plan_of(sae, {JOY: 0.0}, mode="clamp")):
        silent = activations(bridge)
    with steering(bridge, sae, plan_of(sae, {JOY: 0.4}, mode="clamp")):
        after = activations(bridge)
    expected = (0.4 * NORM * direction).expand_as(after[:, 1:])
    torch.testing.assert_close(after[:, 1:] - silent[:, 1:], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(before[:, 0], after[:, 0])


def test_leaving_the_context_restores_the_logits_exactly(model: Any, sae: Any) -> None:
    with torch.no_grad():
        before = model(TOKENS)
        with steering(model, sae, plan_of(sae, {JOY: 1.0, 3: 1.0})):
            during = model(TOKENS)
        after = model(TOKENS)
    assert torch.equal(before, after)
    assert not torch.allclose(before, during)


def test_an_exception_inside_the_context_restores_the_model_too(model: Any, planted_sae: Any) -> None:
    with torch.no_grad():
        before = model(TOKENS)
        with (
            pytest.raises(RuntimeError, match="halfway"),
            steering(model, planted_sae, plan_of(planted_sae, {JOY: 1.0})),
        ):
            raise RuntimeError("halfway")
        assert torch.equal(before, model(TOKENS))


def test_a_hook_that_the_user_has_set_survives(bridge: Any, planted_sae: Any) -> None:
    calls: list[int] = []
    with bridge.hooks(fwd_hooks=[(canonical_hook(bridge, HOOK), lambda x, hook: calls.append(1))]):
        with steering(bridge, planted_sae, plan_of(planted_sae, {JOY: 1.0})):
            pass
        calls.clear()
        bridge(TOKENS)
    assert calls == [1]


def test_contexts_add_up(bridge: Any, planted_sae: Any) -> None:
    with steering(bridge, planted_sae, plan_of(planted_sae, {JOY: 0.2, 4: 0.1})):
        at_once = activations(bridge)
    with (
        steering(bridge, planted_sae, plan_of(planted_sae, {JOY: 0.2})),
        steering(bridge, planted_sae, plan_of(planted_sae, {4: 0.1})),
    ):
        nested = activations(bridge)
    torch.testing.assert_close(at_once, nested)


def test_steering_towards_a_feature_raises_the_token_that_it_writes(hooked_transformer: Any) -> None:
    planted = make_sae()
    with torch.no_grad():
        planted.W_dec[JOY] = torch.nn.functional.normalize(hooked_transformer.W_U[:, JOY_TOKEN], dim=0)
        before = hooked_transformer(TOKENS)[:, -1].log_softmax(-1)
        with steering(hooked_transformer, planted, plan_of(planted, {JOY: 2.0})):
            after = hooked_transformer(TOKENS)[:, -1].log_softmax(-1)
    assert (after[:, JOY_TOKEN] > before[:, JOY_TOKEN]).all()
    assert ((after - before).argmax(-1) == JOY_TOKEN).all()


def test_every_row_follows_its_own_plan(model: Any, sae: Any) -> None:
    plans = [plan_of(sae, {JOY: 0.5}), None, plan_of(sae, {JOY: 0.1, 3: -0.4}, mode="clamp")]
    mask = torch.ones(TOKENS.shape, dtype=torch.bool)
    mask[:, 0] = False
    before = activations(model)
    with row_steering(model, sae, plans, mask):
        together = activations(model)
    for row, plan in enumerate(plans):
        expected = before[row : row + 1] if plan is None else steered_by_hand(sae, plan, before[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(together[1], before[1])


def test_no_position_outside_the_mask_is_touched(bridge: Any, planted_sae: Any) -> None:
    mask = torch.zeros(TOKENS.shape, dtype=torch.bool)
    mask[0, 2] = mask[2, 4] = True
    before = activations(bridge)
    with steering(bridge, planted_sae, plan_of(planted_sae, {JOY: 1.0}), mask=mask):
        after = activations(bridge)
    assert torch.equal((before != after).any(-1), mask)


def test_a_single_position_and_a_dictionary_without_bos_are_steered_everywhere(bridge: Any) -> None:
    with_bos, without_bos = make_sae(), make_sae()
    without_bos.cfg.metadata.prepend_bos = False
    single, whole = activations(bridge, TOKENS[:, 1:2]), activations(bridge)
    with steering(bridge, with_bos, plan_of(with_bos, {JOY: 1.0})):
        assert (activations(bridge, TOKENS[:, 1:2]) != single).any(-1).all()
    with steering(bridge, without_bos, plan_of(without_bos, {JOY: 1.0})):
        assert (activations(bridge) != whole).any(-1).all()


def test_gradients_pass_through_the_steered_activations(hooked_transformer: Any, sae: Any) -> None:
    plan = SteeringPlan(HOOK, (Intervention(JOY, 0.5), Intervention(3, 0.5, "clamp")), residual_norm=NORM)
    with steering(hooked_transformer, sae, plan):
        loss = hooked_transformer(TOKENS, return_type="loss")
    (gradient,) = torch.autograd.grad(loss, [hooked_transformer.embed.W_E])
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amount=st.floats(-3, 3), factor=st.floats(-2, 2))
def test_an_added_change_is_linear_in_the_amount(planted_sae: Any, bridge: Any, amount: float, factor: float) -> None:
    plan = plan_of(planted_sae, {JOY: amount})
    before = activations(bridge)
    with steering(bridge, planted_sae, plan):
        once = activations(bridge) - before
    with steering(bridge, planted_sae, plan.scaled(factor)):
        scaled = activations(bridge) - before
    torch.testing.assert_close(scaled, once * factor, atol=1e-4, rtol=1e-4)
    assert once[:, 1:].norm(dim=-1).max() == pytest.approx(abs(amount) * NORM, abs=1e-4)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mode": "multiply"}, "'multiply'.*add, clamp"),
        ({"amount": math.nan}, "feature 3 is nan"),
        ({"amount": -math.inf}, "feature 3 is -inf"),
        ({"feature": -1}, "-1"),
    ],
)
def test_a_wrong_intervention_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Intervention(**{"feature": 3, "amount": 1.0, "mode": "add", **wrong})


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"unit": "metre"}, "'metre'.*residual_norm, max_activation, activation, raw"),
        ({"interventions": ()}, "at least one"),
        ({"interventions": (Intervention(5, 1.0), Intervention(5, 2.0))}, "feature 5 stands twice"),
        ({"residual_norm": None}, "needs the norm"),
        ({"residual_norm": 0.0}, "residual_norm is 0.0"),
        ({"residual_norm": math.inf}, "residual_norm is inf"),
    ],
)
def test_a_wrong_plan_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    right = {"hook_name": HOOK, "interventions": (Intervention(5, 1.0),), "residual_norm": 1.0}
    SteeringPlan(**right)
    with pytest.raises(ValueError, match=named):
        SteeringPlan(**{**right, **wrong})


def test_a_feature_out_of_range_names_the_valid_ones(bridge: Any, planted_sae: Any) -> None:
    with pytest.raises(ValueError, match=f"no feature {D_SAE} .valid: 0 to {D_SAE - 1}"):
        plan_of(planted_sae, {D_SAE: 1.0})
    plan = SteeringPlan(HOOK, (Intervention(999, 1.0),), "raw")
    with pytest.raises(ValueError, match="no feature 999"), steering(bridge, planted_sae, plan):
        pass


def test_a_plan_for_another_hook_is_refused_with_both_names(bridge: Any, planted_sae: Any) -> None:
    plan = plan_of(make_sae(hook_name="blocks.1.hook_resid_post"), {JOY: 1.0})
    expected = "blocks.1.hook_resid_post, the SAE reads blocks.0.hook_resid_post"
    with pytest.raises(ValueError, match=expected), steering(bridge, planted_sae, plan):
        pass


def test_a_dictionary_of_another_width_or_an_unknown_hook_is_refused(bridge: Any) -> None:
    wide, elsewhere = make_sae(d_in=48), make_sae(hook_name="blocks.9.hook_resid_post")
    with (
        pytest.raises(ValueError, match="48 dimensions, the model has 32"),
        steering(bridge, wide, plan_of(wide, {1: 1})),
    ):
        pass
    plan = plan_of(elsewhere, {1: 1.0})
    with pytest.raises(ValueError, match=r"no hook 'blocks\.9\.hook_resid_post'"), steering(bridge, elsewhere, plan):
        pass


def test_another_number_of_rows_or_positions_is_refused(bridge: Any, planted_sae: Any) -> None:
    plans = [plan_of(planted_sae, {JOY: 1.0}), None]
    with pytest.raises(ValueError, match="2 plans for a batch of 3"), row_steering(bridge, planted_sae, plans):
        bridge(TOKENS)
    mask = torch.ones(3, 4, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match="mask is"),
        steering(bridge, planted_sae, plan_of(planted_sae, {1: 1}), mask=mask),
    ):
        bridge(TOKENS)


def test_a_plan_survives_its_file_and_its_dictionary(tmp_path: Path) -> None:
    plan = SteeringPlan(HOOK, (Intervention(7, 0.1), Intervention(9, -0.25, "clamp")), residual_norm=6400.5)
    assert SteeringPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert SteeringPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan.save(tmp_path / "nowhere" / "plan.json")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "no JSON"),
        ("[]", "list"),
        ("{}", "'hook_name'"),
        ('{"hook_name": "h", "interventions": [], "colour": 1}', "'colour'.*valid"),
        ('{"hook_name": "h", "interventions": [{"feature": 1}]}', "'amount'"),
        ('{"hook_name": "h", "interventions": [{"feature": 1, "amount": 1, "side": 2}]}', "'side'"),
    ],
)
def test_a_broken_plan_file_is_refused_by_name(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        SteeringPlan.load(path)


def test_a_plan_states_its_total_amount_and_mode() -> None:
    def plan(*amounts: float, modes: str = "aaa") -> SteeringPlan:
        names = {"a": "add", "c": "clamp"}
        ones = (Intervention(i, amount, names[modes[i]]) for i, amount in enumerate(amounts))  # type: ignore[arg-type]
        return SteeringPlan(HOOK, tuple(ones), "raw")

    assert plan(0.25, 0.5).amount == 0.75
    assert plan(-0.25, -0.5).amount == -0.75
    assert plan(0.25, -0.5).amount == 0.75
    assert plan(0.0).amount == 0
    assert (plan(1, 1).mode, plan(1, 1, modes="cc").mode, plan(1, 1, modes="ac").mode) == ("add", "clamp", "mixed")
    assert plan(0.25, -0.5).scaled(2).to_pandas()["amount"].tolist() == [0.5, -1.0]


def test_a_plan_shows_itself_with_html_escaped() -> None:
    plan = SteeringPlan("<hook>", (Intervention(7, 0.1),), residual_norm=6400.0)
    assert repr(plan) == "SteeringPlan(add +0.1 x feature 7; residual_norm of 6400 at <hook>)"
    assert "&lt;hook&gt;" in plan._repr_html_() and "<hook>" not in plan._repr_html_()
