import math

import numpy as np
import pytest

from sae_emotion_plugin.evidence.curve_groups import (
    CurveEstimate,
    Resampling,
    cost_weights,
    curve_values,
    group_estimate,
    prompt_effects,
    prompts_of,
    reach,
    shared_points,
    turned,
)
from sae_emotion_plugin.evidence.dose_curves import DoseCurve, DosePoint, best_effect_up_to, effect_at
from sae_emotion_plugin.evidence.equal_cost import compare_at_cost, effect_at_cost, frontier_area

DRAW = Resampling(resamples=300, seed=4)


def curve(name: str, seed: int, *, steep: float = 0.4, n_prompts: int = 12, empty: float = 0.0) -> DoseCurve:
    """Costs that rise with the dose and noisy effects."""
    rng = np.random.default_rng(seed)
    points = []
    for prompt in range(n_prompts):
        for own_seed in range(2):
            for dose in (1.0, 2.0, 3.0):
                ratio = math.exp(steep * dose + 0.1 * rng.standard_normal())
                known = None if rng.random() < empty else ratio
                points.append(DosePoint(dose, dose + rng.standard_normal(), known, f"p{prompt}", own_seed))
    return DoseCurve(name, tuple(points))


def assert_same(found: CurveEstimate, value: float | None, interval: object) -> None:
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))  # type: ignore[attr-defined]


@pytest.mark.parametrize("empty", [0.0, 0.2])
def test_one_curve_gives_what_effects_and_areas_at_equal_cost_give(empty: float) -> None:
    own = curve("own", 0, empty=empty)
    effect, area = (
        group_estimate([own], None, statistic, DRAW)[0] for statistic in (effect_at(1.8), best_effect_up_to(1.8))
    )
    for found, expected in (
        (effect, effect_at_cost(own, 1.8, resamples=300, seed=4)),
        (area, frontier_area(own, 1.8, resamples=300, seed=4)),
    ):
        assert_same(found, expected.estimate, expected.interval)


def test_one_curve_less_a_reference_gives_the_paired_comparison() -> None:
    own, other = curve("own", 0), curve("other", 1)
    expected = compare_at_cost(own, other, 1.8, margin=0.0, resamples=300, seed=4).comparison
    assert expected is not None
    found, n_reached = group_estimate([own], other, effect_at(1.8), DRAW)
    assert n_reached == 1
    assert_same(found, expected.difference, expected)
    again, _ = group_estimate([other], own, effect_at(1.8), DRAW)
    back = turned(again)
    assert (back.value, back.low, back.high, back.p) == pytest.approx((found.value, found.low, found.high, found.p))


def test_a_group_is_the_mean_of_its_curves_and_leaves_out_those_that_do_not_reach_the_cost() -> None:
    curves = [curve("a", 0), curve("b", 1), curve("cheap", 2, steep=0.05)]
    alone = [effect_at_cost(one, 1.8, resamples=300, seed=4).estimate for one in curves[:2]]
    found, n_reached = group_estimate(curves, None, effect_at(1.8), DRAW)
    assert n_reached == 2
    assert found.value == pytest.approx(np.mean(alone))  # type: ignore[arg-type]
    assert reach(curves[2]) < 1.3
    nothing, n_reached = group_estimate(curves[2:], None, effect_at(1.8), DRAW)
    assert (nothing, n_reached) == (CurveEstimate(), 0)


def test_the_p_value_and_the_interval_agree_about_zero() -> None:
    for seed in range(12):
        own, other = curve("own", seed), curve("other", seed + 100)
        found, _ = group_estimate([own], other, effect_at(1.8), DRAW)
        assert found.low is not None and found.high is not None and found.p is not None
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_a_curve_that_seldom_reaches_the_cost_has_no_interval() -> None:
    own = curve("own", 0, steep=0.2)
    top = reach(own) * 0.999
    found, _ = group_estimate([own], None, effect_at(top), DRAW)
    assert found.value is not None and found.low is None and found.p is None


def test_the_weights_of_the_doses_give_the_effect_and_each_prompts_share_of_it() -> None:
    own = curve("own", 3)
    weights = cost_weights(own, effect_at(1.7))
    assert weights is not None
    (effect,) = curve_values([own], prompts_of([own]), effect_at(1.7))
    means = np.array([row.effect for row in own.means()])
    assert means @ weights == pytest.approx(effect)
    of_prompts = prompt_effects(own, weights)
    assert of_prompts.shape == (12,)
    assert of_prompts.mean() == pytest.approx(effect)
    assert cost_weights(own, effect_at(50.0)) is None


def test_curves_share_the_prompts_and_seeds_that_all_have() -> None:
    own, few = curve("own", 0), curve("few", 1, n_prompts=3)
    few = DoseCurve("few", tuple(point for point in few.points if point.seed == 0))
    (kept,), (other,) = shared_points([own], [few])
    assert {(point.prompt, point.seed) for point in kept.points} == {("p0", 0), ("p1", 0), ("p2", 0)}
    assert other == few
    strangers = DoseCurve("strange", (DosePoint(1.0, 0.0, 1.0, "elsewhere"),))
    with pytest.raises(ValueError, match="own and strange have no prompt and seed in common"):
        shared_points([own], [strangers])
