import math

import numpy as np
import pytest

from sae_emotion_plugin.evidence.dose_curves import (
    DoseCurve,
    DosePoint,
    best_effect_up_to,
    curve_value,
    dose_means,
    effect_at,
    monotone_costs,
    prompt_means,
)


def pooled_by_a_loop(costs: list[float], effects: list[float]) -> tuple[list[float], list[float]]:
    """Pool adjacent violators, as in any textbook; equal costs are one block too."""
    blocks: list[tuple[list[float], list[float]]] = []
    for cost, effect in zip(costs, effects, strict=True):
        blocks.append(([cost], [effect]))
        while len(blocks) > 1 and np.mean(blocks[-2][0]) >= np.mean(blocks[-1][0]) - 1e-9:
            last = blocks.pop()
            blocks[-1] = (blocks[-1][0] + last[0], blocks[-1][1] + last[1])
    return [float(np.mean(block[0])) for block in blocks], [float(np.mean(block[1])) for block in blocks]


def random_curves(rng: np.random.Generator, n: int = 200, n_doses: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Mean effects and log costs with dose 0 in front; crossing, with ties and violations."""
    costs = np.round(np.cumsum(rng.normal(0.15, 0.3, size=(n, n_doses)), axis=1), 1)
    effects = rng.normal(0.3, 0.5, size=(n, n_doses))
    start = np.zeros((n, 1))
    return np.hstack([start, effects]), np.hstack([start, costs])


def test_costs_are_made_monotone_as_by_pooling_adjacent_violators() -> None:
    effects, costs = random_curves(np.random.default_rng(0))
    monotone, pooling = monotone_costs(costs)
    assert (np.diff(costs, axis=1) < 0).any()
    for row in range(len(costs)):
        expected_costs, expected_effects = pooled_by_a_loop(costs[row].tolist(), effects[row].tolist())
        _, first = np.unique(np.round(monotone[row], 7), return_index=True)
        np.testing.assert_allclose(monotone[row][first], expected_costs, atol=1e-9)
        np.testing.assert_allclose((pooling[row] @ effects[row])[first], expected_effects, atol=1e-9)


@pytest.mark.parametrize("ratio", [1.05, 1.3, 2.0])
def test_the_effect_at_a_cost_is_interpolated_linearly_in_log_cost(ratio: float) -> None:
    effects, costs = random_curves(np.random.default_rng(1))
    found = effect_at(ratio)(effects, costs)
    reached = 0
    for row in range(len(costs)):
        own_costs, own_effects = pooled_by_a_loop(costs[row].tolist(), effects[row].tolist())
        if own_costs[-1] < math.log(ratio) - 1e-12:
            assert np.isnan(found[row])
        else:
            reached += 1
            assert found[row] == pytest.approx(np.interp(math.log(ratio), own_costs, own_effects))
    assert 20 < reached < len(costs)


def test_the_frontier_is_the_best_effect_up_to_each_cost() -> None:
    effects, costs = random_curves(np.random.default_rng(2), n=40)
    found = best_effect_up_to(1.8)(effects, costs)
    for row in range(len(costs)):
        own_costs, own_effects = pooled_by_a_loop(costs[row].tolist(), effects[row].tolist())
        grid = np.linspace(min(own_costs), math.log(1.8), 20_001)
        within = np.interp(grid, own_costs, own_effects)
        within[grid > own_costs[-1]] = -np.inf
        best = np.maximum(np.maximum.accumulate(within), 0)
        assert found[row] == pytest.approx(best[grid >= 0].mean(), abs=0.01)


def test_a_single_dose_is_interpolated_from_the_unsteered_model() -> None:
    effects, costs = np.array([[0.0, 0.8]]), np.array([[0.0, math.log(4)]])
    assert effect_at(2.0)(effects, costs) == pytest.approx(0.4)
    assert effect_at(4.0)(effects, costs) == pytest.approx(0.8)
    assert np.isnan(effect_at(4.1)(effects, costs))
    assert best_effect_up_to(4.0)(effects, costs) == pytest.approx(0.4, abs=1e-3)


def test_prompts_weigh_equally_and_points_without_likelihood_are_left_out_and_counted() -> None:
    points = (
        DosePoint(0.1, 0.2, 2.0, "a", 0),
        DosePoint(0.1, 0.4, 8.0, "a", 1),
        DosePoint(0.1, 0.9, 1.0, "b", 0),
        DosePoint(0.1, 5.0, None, "b", 1),
        DosePoint(0.2, 1.0, 3.0, "a", 0),
        DosePoint(0.2, 9.0, None, "b", 0),
    )
    curve = DoseCurve("add", points)
    assert (curve.doses, curve.left_out) == ((0.1, 0.2), 2)
    low, high = curve.means()
    assert (low.effect, low.perplexity_ratio, low.n_points, low.left_out) == (
        pytest.approx(0.6),
        pytest.approx(2.0),
        3,
        1,
    )
    assert (high.effect, high.perplexity_ratio, high.n_points, high.left_out) == (1.0, pytest.approx(3.0), 1, 1)
    assert curve.to_dict()["left_out"] == 2
    assert "dose 0.1: effect +0.600, perplexity x2.00" in repr(curve)
    assert "2 prompts, 2 points without likelihood left out" in repr(curve)


def test_the_mean_curve_of_drawn_prompts_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    points = [
        DosePoint(dose, float(rng.normal()), float(rng.uniform(1, 2)) if rng.random() < 0.8 else None, f"p{p}", s)
        for dose in (1.0, 2.0)
        for p in range(4)
        for s in range(1 + p % 3)
    ]
    prompts = [f"p{p}" for p in (3, 1, 0, 2)]
    tables = prompt_means(DoseCurve("m", tuple(points)), prompts)
    drawn = rng.integers(4, size=(6, 4))
    effects, costs = (dose_means(table[drawn]) for table in tables)
    for r in range(6):
        for d, dose in enumerate((1.0, 2.0)):
            known = [
                [
                    (point.effect, math.log(point.perplexity_ratio))
                    for point in points
                    if (point.dose, point.prompt) == (dose, prompts[i]) and point.perplexity_ratio is not None
                ]
                for i in drawn[r]
            ]
            expected = np.mean([np.mean(own, axis=0) for own in known if own], axis=0)
            np.testing.assert_allclose((effects[r, d], costs[r, d]), expected)
    start = np.zeros((6, 1))
    expected = effect_at(1.2)(np.hstack([start, effects]), np.hstack([start, costs]))
    found = curve_value(tables[0][drawn], tables[1][drawn], effect_at(1.2))
    np.testing.assert_array_equal(found, expected)


POINT = DosePoint(0.1, 0.2, 1.5, "a")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), "m has no points"),
        ((DosePoint(0.0, 0.2, 1.5, "a"),), "dose and ratio must be above 0"),
        ((DosePoint(0.1, 0.2, 0.0, "a"),), "dose and ratio must be above 0"),
        ((DosePoint(0.1, float("nan"), 1.5, "a"),), "all values finite"),
        ((DosePoint(0.1, 0.2, math.inf, "a"),), "all values finite"),
        ((POINT, POINT), r"more than one point for dose, prompt and seed \(0\.1, 'a', 0\)"),
        ((POINT, DosePoint(0.2, 0.2, None, "a")), r"every continuation at dose 0\.2 is empty"),
    ],
)
def test_bad_points_are_refused(points: tuple[DosePoint, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoseCurve("m", points)


@pytest.mark.parametrize("ratio", [1.0, 0.5, math.inf, math.nan])
def test_a_ratio_that_is_no_cost_is_refused(ratio: float) -> None:
    for statistic in (effect_at, best_effect_up_to):
        with pytest.raises(ValueError, match="perplexity ratio must be above 1"):
            statistic(ratio)
