import json
import math

import numpy as np
import pytest

from sae_emotion_plugin.evidence.dose_curves import DoseCurve, DosePoint
from sae_emotion_plugin.evidence.equal_cost import compare_at_cost, compare_frontiers, effect_at_cost, frontier_area

DOSES = (0.5, 1.0, 1.5, 2.0)


def planted(
    rng: np.random.Generator,
    name: str = "add",
    effect: float = 0.4,
    cost: float = 0.2,
    *,
    n_prompts: int = 20,
    n_seeds: int = 2,
    noise: float = 0.3,
    shared: np.ndarray | None = None,
) -> DoseCurve:
    """Effect and log cost grow with the dose, each prompt at its own pace; `shared` is the prompts' part of it."""
    pace = rng.normal(size=(2, n_prompts)) if shared is None else shared
    points = []
    for p in range(n_prompts):
        for s in range(n_seeds):
            for dose in DOSES:
                value = dose * (effect + noise * pace[0, p]) + noise * rng.normal()
                log_ratio = dose * (cost + 0.3 * cost * pace[1, p]) + 0.05 * rng.normal()
                points.append(DosePoint(dose, float(value), math.exp(log_ratio), f"prompt {p}", s))
    return DoseCurve(name, tuple(points))


def test_the_effect_at_a_cost_is_read_off_the_mean_curve() -> None:
    curve = planted(np.random.default_rng(0), noise=0.0, shared=np.zeros((2, 20)))
    found = effect_at_cost(curve, math.exp(0.3), resamples=100, seed=0)
    assert found.estimate == pytest.approx(0.6, abs=0.03)
    costs = [math.log(row.perplexity_ratio) for row in curve.means()]
    expected = np.interp(0.3, [0, *costs], [0, *(row.effect for row in curve.means())])
    assert found.estimate == pytest.approx(expected)
    assert found.interval is not None
    assert found.interval.n_groups == 20


def test_a_cost_that_is_not_reached_has_no_effect_and_says_why() -> None:
    curve = planted(np.random.default_rng(1))
    found = effect_at_cost(curve, 3.0, resamples=50, seed=0)
    assert (found.estimate, found.interval) == (None, None)
    assert found.reason is not None
    assert found.reason.startswith("add reaches a perplexity ratio of 1.")
    assert "none, add reaches" in repr(found)
    other = planted(np.random.default_rng(2), "clamp", cost=1.0)
    for one, two in ((curve, other), (other, curve)):
        both = compare_at_cost(one, two, 3.0, margin=0.1, resamples=50, seed=0)
        assert both.comparison is None
        assert both.reason == found.reason
        assert "no comparison, add reaches" in repr(both)


def test_a_cost_at_the_very_end_of_the_curve_has_an_effect_but_no_interval() -> None:
    curve = planted(np.random.default_rng(3))
    last = curve.means()[-1]
    found = effect_at_cost(curve, last.perplexity_ratio, resamples=200, seed=0)
    assert found.estimate == pytest.approx(last.effect)
    assert found.interval is None
    assert found.reason is not None
    assert "of the resampled curves miss the cost" in found.reason
    frontier = frontier_area(curve, last.perplexity_ratio, resamples=200, seed=0)
    assert frontier.interval is not None  # the best effect at lower costs needs no end


def test_one_prompt_gives_an_effect_without_an_interval() -> None:
    curve = planted(np.random.default_rng(4), n_prompts=1, noise=0.0)
    found = effect_at_cost(curve, 1.1, seed=0)
    assert found.estimate is not None
    assert (found.interval, found.reason) == (None, "an interval needs at least 2 prompts")
    pair = compare_at_cost(curve, curve, 1.1, margin=0.0, seed=0)
    assert (pair.comparison, pair.reason) == (None, "an interval needs at least 2 prompts")


def test_the_cheaper_method_wins_at_equal_cost_though_it_loses_at_equal_dose() -> None:
    rng = np.random.default_rng(5)
    pace = rng.normal(size=(2, 20))
    strong = planted(rng, "strong", effect=0.5, cost=0.4, shared=pace)
    cheap = planted(rng, "cheap", effect=0.4, cost=0.2, shared=pace)
    assert strong.means()[1].effect > cheap.means()[1].effect
    found = compare_at_cost(cheap, strong, 1.3, margin=0.05, resamples=500, seed=0)
    assert found.comparison is not None
    assert found.comparison.verdict == "superior"
    assert found.first.estimate is not None and found.second.estimate is not None
    assert found.comparison.difference == pytest.approx(found.first.estimate - found.second.estimate)
    assert json.loads(json.dumps(found.to_dict()))["comparison"]["verdict"] == "superior"
    assert "cheap against strong: superior (margin 0.05)" in repr(found)
    back = compare_at_cost(strong, cheap, 1.3, margin=0.05, resamples=500, seed=0)
    assert back.comparison is not None
    assert back.comparison.low == pytest.approx(-found.comparison.high)
    frontiers = compare_frontiers(cheap, strong, 1.3, margin=0.05, resamples=500, seed=0)
    assert frontiers.comparison is not None
    assert frontiers.comparison.verdict == "superior"


def test_pairing_by_prompt_narrows_the_difference() -> None:
    rng = np.random.default_rng(6)
    pace = rng.normal(size=(2, 20))
    one, other = (planted(rng, name, shared=pace, noise=0.4) for name in ("a", "b"))
    found = compare_at_cost(one, other, 1.2, margin=0.0, resamples=400, seed=0)
    assert found.comparison is not None and found.first.interval is not None
    width = found.comparison.high - found.comparison.low
    assert width < 0.8 * (found.first.interval.high - found.first.interval.low)
    same = compare_at_cost(one, one, 1.2, margin=0.0, resamples=100, seed=0)
    assert same.comparison is not None
    assert (same.comparison.difference, same.comparison.low, same.comparison.high) == (0, 0, 0)


def test_methods_on_other_prompts_or_seeds_are_not_compared() -> None:
    rng = np.random.default_rng(7)
    with pytest.raises(ValueError, match=r"only one has \('prompt 4', 0\)"):
        compare_at_cost(planted(rng, n_prompts=4), planted(rng, "b", n_prompts=5), 1.2, margin=0.0, seed=0)
    with pytest.raises(ValueError, match=r"only one has \('prompt 0', 1\)"):
        compare_frontiers(planted(rng), planted(rng, "b", n_seeds=1), 1.2, margin=0.0, seed=0)
    with pytest.raises(ValueError, match="margin must be 0 or more"):
        compare_at_cost(planted(rng), planted(rng, "b"), 1.2, margin=-1.0, resamples=20, seed=0)
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        effect_at_cost(planted(rng), 1.2, resamples=0, seed=0)


def test_empty_continuations_are_left_out_and_counted() -> None:
    curve = planted(np.random.default_rng(8))
    empty = DosePoint(1.0, 99.0, None, "prompt 3", 0)
    points = tuple(empty if (p.dose, p.prompt, p.seed) == (1.0, "prompt 3", 0) else p for p in curve.points)
    found = effect_at_cost(DoseCurve("add", points), 1.25, resamples=200, seed=0)
    whole = effect_at_cost(curve, 1.25, resamples=200, seed=0)
    assert found.left_out == 1
    assert found.estimate == pytest.approx(whole.estimate, abs=0.05)
    assert "1 points left out" in repr(found)


def test_small_chunks_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = planted(np.random.default_rng(9))
    whole = effect_at_cost(curve, 1.25, resamples=100, seed=0)
    monkeypatch.setattr("sae_emotion_plugin.evidence.equal_cost.CELLS_PER_CHUNK", 400)
    assert effect_at_cost(curve, 1.25, resamples=100, seed=0) == whole


def test_a_loop_makes_no_effect_cheaper_than_doing_nothing() -> None:
    """A ratio below 1 (repetition) is pooled with dose 0, and a harmful method's frontier stays at 0."""
    points = [DosePoint(d, -0.5 * d, r, f"p{p}") for p in range(6) for d, r in ((1.0, 0.5), (2.0, 2.0))]
    harmful = DoseCurve("loop", tuple(points))
    frontier = frontier_area(harmful, 1.8, resamples=50, seed=0)
    assert frontier.estimate == 0
    assert frontier.interval is not None
    assert (frontier.interval.low, frontier.interval.high) == (0, 0)
    found = effect_at_cost(harmful, 1.5, resamples=50, seed=0)
    pooled = -math.log(2) / 2
    share = (math.log(1.5) - pooled) / (math.log(2) - pooled)
    assert found.estimate == pytest.approx((1 - share) * -0.25 + share * -1.0)


def coverage(statistic: str, n_data_sets: int, n_prompts: int) -> float:
    rng = np.random.default_rng(10)
    covered = 0
    # Expected effect and log cost are both proportional to the dose, so that the truth is a straight line.
    truths = {"effect": 0.36, "difference": 0.0, "frontier": 0.18}
    for data_set in range(n_data_sets):
        pace = rng.normal(size=(2, n_prompts))
        curve = planted(rng, n_prompts=n_prompts, shared=pace)
        options = {"resamples": 299, "seed": data_set}
        if statistic == "effect":
            interval = effect_at_cost(curve, math.exp(0.18), **options).interval
        elif statistic == "frontier":
            interval = frontier_area(curve, math.exp(0.18), **options).interval
        else:
            other = planted(rng, "b", n_prompts=n_prompts, shared=pace)
            interval = compare_at_cost(curve, other, math.exp(0.18), margin=0.0, **options).comparison
        assert interval is not None
        covered += interval.low <= truths[statistic] <= interval.high
    return covered / n_data_sets


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["effect", "difference", "frontier"])
@pytest.mark.parametrize("n_prompts", [10, 30])
def test_intervals_at_equal_cost_cover_the_truth_as_often_as_they_say(statistic: str, n_prompts: int) -> None:
    assert 0.93 <= coverage(statistic, 1000, n_prompts) <= 0.97
