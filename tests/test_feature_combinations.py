import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import JOY, make_sae
from test_steering_success import counting_judge

from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.steering_studies import combinations as feature_combinations
from sae_emotion_plugin.steering_studies.combinations import (
    CombinationEffect,
    CombinationStudy,
    feature_sets,
    set_plans,
    study_combinations,
    summed_length,
)
from sae_emotion_plugin.steering_studies.sweep import SweepText, Variant
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore, SweepScores

PROMPTS = ("he is such a", "w3 w4", "w9 is w7", "w1", "w2 w5", "w8")
NORM = 4.0
Effect = Callable[[SteeringPlan, Any], float]


@pytest.fixture(scope="module")
def orthogonal_sae() -> Any:
    """Features 0, 1 and 2 write orthogonal directions, 3 the diagonal of the first two, 4 against 0."""
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[:5] = 0
        for feature in range(3):
            sae.W_dec[feature, feature] = 1.0 + feature  # rows of unequal length
        sae.W_dec[3, :2] = 1.0
        sae.W_dec[4, 0] = -2.0
    return sae


def added(plan: SteeringPlan, sae: Any) -> np.ndarray:
    """What the plan adds, in residual norms, by hand."""
    rows = sae.W_dec.detach().double().numpy()
    parts = [one.amount * rows[one.feature] / np.linalg.norm(rows[one.feature]) for one in plan.interventions]
    return np.sum(parts, axis=0)


def planted(monkeypatch: pytest.MonkeyPatch, effect: Effect, noise: float = 0.0) -> None:
    """Texts of which the judge's masked change is exactly `effect` of the plan (and noise a prompt shares)."""

    def write(model: Any, variants: Sequence[Variant], prompts: Sequence[str], **kwargs: Any) -> tuple[SweepText, ...]:
        seeds = kwargs["seeds"] if kwargs["temperature"] else kwargs["seeds"][:1]
        plans = [("", 0.0), *((one.name, plan.amount) for one in variants for plan in one.plans)]
        return tuple(SweepText(*plan, p, s, "w1 w2 w3", 2.0, False) for plan in plans for p in prompts for s in seeds)

    def score(model: Any, variants: Sequence[Variant], texts: Sequence[SweepText], **kwargs: Any) -> SweepScores:
        found = {(one.name, plan.amount): effect(plan, one.dictionary) for one in variants for plan in one.plans}
        rows = []
        for judge in kwargs["judges"]:
            for text in texts:
                if text.variant:
                    value = found[text.variant, text.dose]
                    shared = noise * (PROMPTS.index(text.prompt) - 2.5)
                    rows.append(
                        SweepScore(
                            *(text.variant, text.dose, text.prompt, text.seed, judge.name, "joy"),
                            *(2 * value + shared, value + shared, abs(text.dose), False, False),
                        )
                    )
        return SweepScores({}, tuple(rows))

    monkeypatch.setattr(feature_combinations, "write_texts", write)
    monkeypatch.setattr(feature_combinations, "score_texts", score)


def studied(bridge: Any, sae: Any, features: Any, **changes: Any) -> CombinationStudy:
    given: dict[str, Any] = {
        "prompts": PROMPTS, "doses": (0.1, 0.2), "judges": [counting_judge(("joy",))], "residual_norm": NORM,
        "progress": False, **changes,
    }  # fmt: skip
    return study_combinations(bridge, sae, features, "joy", **given)


def row_of(study: CombinationStudy, features: tuple[int, ...], norm: float, temperature: float = 0.7) -> Any:
    (row,) = (
        row
        for row in study.rows
        if row.features == features and math.isclose(row.norm, norm) and row.temperature == temperature
    )
    return row


def exactly(interval: Any, value: float) -> None:
    assert (interval.mean, interval.low, interval.high) == pytest.approx((value, value, value), abs=1e-7)


def test_every_set_up_to_a_size_is_tried() -> None:
    assert list(feature_sets([5, 3, 9])) == [(5,), (3,), (9,), (5, 3), (5, 9), (3, 9), (5, 3, 9)]
    assert len(list(feature_sets(range(4)))) == 15
    assert list(feature_sets([5, 3, 9], 1)) == [(5,), (3,), (9,)]
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="valid: 1 to 3"):
            list(feature_sets([5, 3, 9], wrong))


def test_the_summed_vector_has_the_length_asked_for(orthogonal_sae: Any) -> None:
    weights = {0: 1.0, 2: 1.0, 3: 1.0, 20: -0.5}
    for size in range(1, 5):
        for subset in itertools.combinations(weights, size):
            own = {one: weights[one] for one in subset}
            for norm, plan in set_plans(orthogonal_sae, own, [0.1, 0.3], 0.1, NORM).items():
                assert np.linalg.norm(added(plan, orthogonal_sae)) == pytest.approx(norm, rel=1e-5)
                ratios = {one.amount / weights[one.feature] for one in plan.interventions}
                assert max(ratios) == pytest.approx(min(ratios))
                assert plan.residual_norm == NORM


def test_one_more_length_has_the_fixed_amounts(orthogonal_sae: Any) -> None:
    pair = set_plans(orthogonal_sae, {0: 1.0, 1: 1.0}, [0.1, 0.2], 0.1, NORM)
    assert list(pair) == pytest.approx([0.1, 0.1 * math.sqrt(2), 0.2])
    assert [one.amount for one in list(pair.values())[1].interventions] == pytest.approx([0.1, 0.1])
    assert list(set_plans(orthogonal_sae, {2: 1.0}, [0.1, 0.2], 0.1, NORM)) == [0.1, 0.2]


def test_directions_that_cancel_out_are_refused(orthogonal_sae: Any) -> None:
    assert summed_length(orthogonal_sae, {0: 1.0, 4: -1.0}) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"features 0\+4 cancel"):
        summed_length(orthogonal_sae, {0: 1.0, 4: 1.0})


def test_orthogonal_features_whose_effects_add_up_have_no_interaction(
    bridge: Any, orthogonal_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = np.zeros(32)
    slopes[:3] = 1.0, 3.0, 5.0
    planted(monkeypatch, lambda plan, sae: float(added(plan, sae) @ slopes))
    study = studied(bridge, orthogonal_sae, [0, 1, 2])
    assert len(study.rows) == 2 * (3 * 2 + 4 * 3)  # temperatures x (features alone, sets with one more length)
    for dose, temperature in itertools.product((0.1, 0.2), (0.0, 0.7)):
        row = row_of(study, (0, 1), dose, temperature)
        exactly(row.masked, dose * 4 / math.sqrt(2))
        exactly(row.plain, 2 * dose * 4 / math.sqrt(2))
        exactly(row.over_mean, dose * (4 / math.sqrt(2) - 2))
        exactly(row.over_linear, 0)
        assert row.interaction is None
        exactly(row_of(study, (0, 1, 2), dose, temperature).over_linear, 0)
        alone = row_of(study, (1,), dose, temperature)
        exactly(alone.masked, 3 * dose)
        assert alone.over_mean is alone.over_linear is alone.interaction is None
    for subset in ((0, 1), (0, 2), (1, 2), (0, 1, 2)):
        row = row_of(study, subset, 0.1 * math.sqrt(len(subset)))
        exactly(row.interaction, 0)
        assert row.over_mean is None
    assert study.meta["cosines"] == pytest.approx({"0+1": 0, "0+2": 0, "1+2": 0})


def test_planted_interactions_are_found_and_told_apart(
    bridge: Any, orthogonal_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def effect(plan: SteeringPlan, sae: Any) -> float:
        a, b, c = added(plan, sae)[:3]
        return float(a + b + 70 * a * b + 900 * a * b * c)

    planted(monkeypatch, effect)
    study = studied(bridge, orthogonal_sae, [0, 1, 2], each=0.15)
    assert row_of(study, (0, 1), 0.15 * math.sqrt(2)).amounts == pytest.approx((0.15, 0.15))
    exactly(row_of(study, (0, 1), 0.15 * math.sqrt(2)).interaction, 70 * 0.15**2)
    exactly(row_of(study, (0, 2), 0.15 * math.sqrt(2)).interaction, 0)
    exactly(row_of(study, (0, 1, 2), 0.15 * math.sqrt(3)).interaction, 900 * 0.15**3)
    exactly(row_of(study, (0, 1), 0.2).over_linear, 70 * 0.2**2 / 2)


def test_an_effect_of_length_alone_favours_no_set(
    bridge: Any, orthogonal_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, lambda plan, sae: float(np.linalg.norm(added(plan, sae))))
    study = studied(bridge, orthogonal_sae, {0: 1, 3: 0.5, 1: -2})
    for row in study.rows:
        exactly(row.masked, row.norm)
        if row.over_mean is not None:
            exactly(row.over_mean, 0)
    assert any(row.over_mean is not None for row in study.rows)


def test_noise_that_all_of_a_prompts_texts_share_cancels_in_the_comparisons(
    bridge: Any, orthogonal_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, lambda plan, sae: float(np.linalg.norm(added(plan, sae))), noise=0.3)
    row = row_of(studied(bridge, orthogonal_sae, [0, 1]), (0, 1), 0.2)
    assert row.masked.high - row.masked.low > 0.5
    exactly(row.over_mean, 0)


def test_sets_are_compared_with_their_best_feature_at_equal_cost(
    bridge: Any, orthogonal_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = np.zeros(32)
    slopes[:2] = 1.0, 3.0
    planted(monkeypatch, lambda plan, sae: float(added(plan, sae) @ slopes))  # the log ratio is the sum of amounts
    ratio = math.exp(0.15)
    study = studied(bridge, orthogonal_sae, [0, 1], perplexity_ratio=ratio)
    found = {(row.features, row.temperature): row for row in study.at_cost}
    assert len(found) == 2 * 3
    alone, pair = found[(1,), 0.0], found[(0, 1), 0.0]
    assert alone.effect.estimate == pytest.approx(3 * 0.15) and alone.over_best is None
    # Each gets half of what the cost allows.
    assert pair.effect.estimate == pytest.approx(0.075 + 3 * 0.075)
    assert pair.best_alone == 1 and pair.over_best is not None
    assert pair.over_best.difference == pytest.approx(0.3 - 0.45)
    assert "-0.150 [-0.150, -0.150] than 1" in repr(study)
    study = studied(bridge, orthogonal_sae, [0, 1], perplexity_ratio=2.0)
    assert "none: 0 reaches a perplexity ratio of 1.22 only" in repr(study)
    far = study.at_cost[-1]
    assert far.effect.estimate is None and far.over_best is None and far.reason == "no feature reaches the cost alone"


def test_suppressed_features_alone_have_curves_too(
    bridge: Any, orthogonal_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, lambda plan, sae: float(-added(plan, sae)[1]))
    study = studied(bridge, orthogonal_sae, {0: 1, 1: -1}, perplexity_ratio=math.exp(0.15))
    assert {row.features: row.effect.estimate for row in study.at_cost}[1,] == pytest.approx(0.15)
    exactly(row_of(study, (0, 1), 0.2).over_linear, 0)


def test_the_measure_may_have_to_fall(bridge: Any, orthogonal_sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda plan, sae: -plan.amount)
    judge = counting_judge(("joy",))
    monkeypatch.setattr(feature_combinations, "measures_of", lambda judges, emotion: [(judge, "joy", -1)])
    study = studied(bridge, orthogonal_sae, [0])
    exactly(study.rows[0].masked, study.rows[0].norm)
    assert study.rows[0].unsteered == pytest.approx(-2 / 3)
    assert study.at_cost[0].effect.estimate is None  # the cost is not reached; the curve is made all the same


def test_a_study_with_the_model_is_kept_and_shown(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"doses": (0.5, 1.0), "seeds": (0, 1), "max_new_tokens": 6, "folder": tmp_path / "texts"}
    study = studied(bridge, planted_sae, [JOY, 3], **given)
    assert [row.features for row in study.rows[::3]][:1] == [(JOY,)]
    assert {row.temperature for row in study.rows} == {0.0, 0.7}
    assert any(row.plain is not None and row.plain.mean != 0 for row in study.rows)
    assert all(isinstance(row, CombinationEffect) and 0 <= row.degenerate_share <= 1 for row in study.rows)
    assert study.to_dict() == studied(bridge, planted_sae, [JOY, 3], **given).to_dict()  # read from the folder
    kept = json.loads(study.save(tmp_path / "study.json").read_text())
    assert len(kept["rows"]) == len(study.rows) == len(study.to_pandas()) and len(kept["at_cost"]) == 6
    for text in ("over linear", f"{JOY}+3", "At equal cost", "6 prompts"):
        assert text in repr(study)
    assert "<table>" in study._repr_html_()


@pytest.mark.parametrize(
    ("features", "change", "named"),
    [
        ([], {}, "no features"),
        ([3, 3], {}, "feature 3 stands twice"),
        ({3: 0.0}, {}, "relative amount of feature 3"),
        ({3: math.nan}, {}, "relative amount of feature 3"),
        ([64], {}, "no feature 64"),
        ([3], {"doses": ()}, "above 0"),
        ([3], {"doses": (0.1, -0.1)}, "above 0"),
        ([3], {"each": math.inf}, "above 0"),
        ([3, 4], {"largest": 3}, "valid: 1 to 2"),
        ([3], {"prompts": ["w1"]}, "at least 2 prompts"),
        ([3], {"prompts": "w1 w2"}, "at least 2 prompts"),
        ([3], {"judges": [counting_judge(("fear",))]}, "no judge can tell 'joy'"),
    ],
)
def test_what_cannot_be_studied_is_refused(
    bridge: Any, planted_sae: Any, features: Any, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        studied(bridge, planted_sae, features, **change)
