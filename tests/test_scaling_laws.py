"""Laws with known parameters are found again; intervals cover; too little gives one line and no numbers."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from sae_emotion_plugin.evidence.scaling_laws import (
    ScalingLaw,
    fit_power_law,
    fit_stable_rate,
    fit_width_and_sparsity,
    per_doubling,
)

WIDTHS = 640.0 * np.array([2, 3, 4, 6, 8, 12, 16])


def values(law: ScalingLaw) -> dict[str, float]:
    assert law.reason is None, law
    return {one.name: one.value for one in law.parameters}


def noisy(exact: np.ndarray, seed: int, size: float = 0.01) -> np.ndarray:
    return exact * (1 + size * np.random.default_rng(seed).standard_normal(len(exact)))


def no_fit(law: ScalingLaw, words: str) -> None:
    assert law.reason is not None and words in law.reason
    assert law.parameters == law.left_out == ()
    assert "\n" not in str(law) and str(law) == f"{law.name}: no fit, {law.reason}"


@pytest.mark.parametrize(("e", "a", "b"), [(0.05, 3.0, 0.4), (0.0, 12.0, 0.7), (0.3, 40.0, 1.1)])
def test_a_power_law_without_noise_gives_back_its_parameters(e: float, a: float, b: float) -> None:
    law = fit_power_law(WIDTHS, e + a * WIDTHS**-b, resamples=50)
    assert values(law) == pytest.approx({"e": e, "a": a, "b": b}, rel=1e-3, abs=1e-4)
    assert [one.predicted for one in law.left_out] == pytest.approx([one.measured for one in law.left_out], rel=1e-3)
    assert [one.extrapolated for one in law.left_out] == [True, *[False] * 5, True]


def test_a_rising_law_gives_back_its_parameters() -> None:
    law = fit_power_law(WIDTHS, 2e4 + 30 * WIDTHS**0.6, rising=True, resamples=50)
    assert values(law) == pytest.approx({"e": 2e4, "a": 30, "b": 0.6}, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_scipys_where_that_converges(seed: int) -> None:
    ys = noisy(0.05 + 9 * WIDTHS**-0.6, seed)
    middle = float(np.exp(np.log(WIDTHS).mean()))
    theirs, _ = curve_fit(
        lambda x, e, a, b: e + a * (x / middle) ** -b,
        WIDTHS,
        ys,
        p0=(0.05, 0.1, 0.6),
        sigma=ys,
        bounds=([0, 0, 0.02], [np.inf, np.inf, 4]),
    )
    ours = values(fit_power_law(WIDTHS, ys, resamples=10))
    assert [ours["e"], ours["b"]] == pytest.approx(theirs[[0, 2]], rel=0.01, abs=1e-3)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    runs = 50
    inside = {"e": 0, "a": 0, "b": 0}
    held = 0
    for seed in range(runs):
        law = fit_power_law(WIDTHS, noisy(0.05 + 9 * WIDTHS**-0.6, seed), resamples=100, seed=seed)
        for one, truth in zip(law.parameters, (0.05, 9.0, 0.6), strict=True):
            inside[one.name] += one.low <= truth <= one.high
        held += sum(one.low <= one.measured <= one.high for one in law.left_out)
    # 95 % of 50 are 47.5; by chance fewer than 43 come about once in a hundred times.
    assert all(count >= 43 for count in inside.values()), inside
    assert held >= 0.88 * runs * len(WIDTHS)


def test_seeds_at_one_width_count_each_and_are_left_out_together() -> None:
    xs = np.repeat(WIDTHS, 3)
    law = fit_power_law(xs, noisy(0.05 + 9 * xs**-0.6, 0), resamples=100)
    assert law.n_points == 21 and [one.at["N"] for one in law.left_out] == WIDTHS.tolist()
    alone = fit_power_law(WIDTHS, noisy(0.05 + 9 * WIDTHS**-0.6, 0), resamples=100)
    (b,), (alone_b,) = ([p for p in one.parameters if p.name == "b"] for one in (law, alone))
    assert b.high - b.low < alone_b.high - alone_b.low


def test_a_point_that_breaks_the_law_lies_outside_its_prediction() -> None:
    ys = noisy(0.05 + 9 * WIDTHS**-0.6, 3, 0.002)
    ys[-1] *= 1.1
    last = fit_power_law(WIDTHS, ys).left_out[-1]
    assert last.extrapolated and not last.low <= last.measured <= last.high


def test_too_few_or_useless_points_give_a_reason_and_no_numbers() -> None:
    no_fit(fit_power_law(WIDTHS[:4], WIDTHS[:4] ** -0.5), "needs 5 different N, and there are 4")
    no_fit(fit_power_law(np.repeat(WIDTHS[:2], 9), np.ones(18)), "there are 2")
    no_fit(fit_power_law([], []), "there are 0")
    no_fit(fit_power_law(WIDTHS, np.ones(7)), "L(N) does not fall with N")
    no_fit(fit_power_law(WIDTHS, WIDTHS**0.5), "does not fall")
    no_fit(fit_power_law(WIDTHS, WIDTHS**-0.5, rising=True), "does not rise")
    no_fit(fit_power_law(WIDTHS, np.where(WIDTHS < 1300, 1.0, 0.5)), "exponent is not between 0.02 and 4")
    wild = [1.0, 0.93, 0.7, 0.75, 0.6, 0.66, 0.5]
    no_fit(fit_power_law(WIDTHS, wild), "7 points do not tell its exponent")


def test_values_that_no_law_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"L\(N\) must be finite, got nan"):
        fit_power_law(WIDTHS, [math.nan] * 7)
    with pytest.raises(ValueError, match="N must be above 0, got 0"):
        fit_power_law([0, 1, 2], [1, 1, 1])
    with pytest.raises(ValueError, match=r"2 values of N, but 1 of L\(N\)"):
        fit_power_law([1, 2], [1])
    with pytest.raises(ValueError, match="1 values of N and 1 of K, but 2 losses"):
        fit_width_and_sparsity([1], [1], [1, 2])
    with pytest.raises(ValueError, match="1 widths and 1 rates, but 2 verdicts"):
        fit_stable_rate([1], [1], [True, False])
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        fit_power_law(WIDTHS, WIDTHS, level=1.5)


TRUE_SURFACE = {"alpha": -0.5, "beta_k": -0.2, "beta_n": -0.25, "gamma": 0.01, "zeta": -1.0, "eta": -0.6}


def surface() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, k = (one.ravel() for one in np.meshgrid(WIDTHS, [16.0, 32.0, 64.0]))
    falls = np.exp(-0.5 - 0.2 * np.log(k) - 0.25 * np.log(n) + 0.01 * np.log(k) * np.log(n))
    return n, k, falls + np.exp(-1 - 0.6 * np.log(k))


def test_the_surface_without_noise_gives_back_its_parameters() -> None:
    law = fit_width_and_sparsity(*surface(), resamples=20)
    assert values(law) == pytest.approx(TRUE_SURFACE, rel=0.01, abs=1e-3)
    assert {tuple(one.at) for one in law.left_out} == {("N", "K")} and len(law.left_out) == 21


def test_the_surface_with_noise_covers_its_parameters_and_foretells_what_was_left_out() -> None:
    n, k, losses = surface()
    law = fit_width_and_sparsity(n, k, noisy(losses, 1, 0.003), resamples=100)
    for one in law.parameters:
        assert one.low <= TRUE_SURFACE[one.name] <= one.high, one
    assert sum(one.low <= one.measured <= one.high for one in law.left_out) >= 18


def test_a_surface_needs_widths_and_sparsities() -> None:
    n, k, losses = surface()
    no_fit(fit_width_and_sparsity(n[:7], k[:7], losses[:7]), "there are 7 and 1")
    few = np.isin(n, WIDTHS[:3])
    no_fit(fit_width_and_sparsity(n[few], k[few], losses[few]), "there are 3 and 3")
    some = np.isin(n, WIDTHS[:4]) & (k < 64)
    no_fit(fit_width_and_sparsity(n[some], k[some], losses[some]), "needs 7 different points without")


@pytest.mark.parametrize("rising", [0.0, 0.02])
def test_losses_that_do_not_fall_with_the_width_have_no_surface(rising: float) -> None:
    n, k, _ = surface()
    flat = noisy(0.6 * k**-0.4 * (n / n.mean()) ** rising, 1, 0.01)
    no_fit(fit_width_and_sparsity(n, k, flat, resamples=100), "21 points do not tell that it falls with N")


def ladder(exponent: float, widths: np.ndarray = WIDTHS) -> tuple[list[float], list[float], list[bool]]:
    """Rates a factor of 2 apart, stable up to (2,000 / N) ** exponent / 100."""
    runs = [(n, 2.0**-step) for n in widths.tolist() for step in range(14)]
    return [n for n, _ in runs], [lr for _, lr in runs], [lr <= 0.01 * (2000 / n) ** exponent for n, lr in runs]


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_exponent_of_the_largest_stable_rate_is_covered(exponent: float) -> None:
    law = fit_stable_rate(*ladder(exponent))
    b = law.parameters[1]
    assert b.low <= exponent <= b.high and abs(b.value - exponent) < 0.3
    assert law.n_points == 7 and len(law.left_out) == 7


def test_a_rate_is_stable_only_if_all_its_runs_were() -> None:
    n, lr, stable = ladder(0.5)
    first = fit_stable_rate(n, lr, stable)
    again = fit_stable_rate([*n, *n], [*lr, *lr], [*stable, *stable])
    assert values(again) == pytest.approx(values(first))
    broken = [held and rate < 0.001 for held, rate in zip(stable, lr, strict=True)]
    lower = fit_stable_rate([*n, *n], [*lr, *lr], [*stable, *broken])
    assert lower.left_out[0].measured < first.left_out[0].measured


def test_rates_without_an_unstable_one_above_give_no_bound() -> None:
    n, lr, _ = ladder(0.5)
    no_fit(fit_stable_rate(n, lr, [True] * len(n)), "needs 4 widths with a stable rate and an unstable one above it")
    no_fit(fit_stable_rate(n, lr, [False] * len(n)), "and there are 0")
    no_fit(fit_stable_rate(*ladder(0.5, WIDTHS[:3])), "and there are 3")


def test_a_doubling_adds_the_slope_that_groups_have_in_common() -> None:
    xs = np.tile(WIDTHS, 2)
    groups = ["a"] * 7 + ["b"] * 7
    ys = 0.02 * np.log2(xs) + np.repeat([0.1, 0.7], 7)
    slope = per_doubling(xs, ys, groups)
    assert slope is not None and slope.value == pytest.approx(0.02) and slope.high - slope.low < 1e-9
    assert per_doubling(WIDTHS[:2], [0.1, 0.2]) is None and per_doubling([64] * 9, range(9)) is None
    rng = np.random.default_rng(0)
    found = [per_doubling(WIDTHS, 0.02 * np.log2(WIDTHS) + 0.01 * rng.standard_normal(7)) for _ in range(300)]
    assert sum(one is not None and one.low <= 0.02 <= one.high for one in found) >= 270


def test_points_of_one_width_that_err_together_are_no_more_evidence_than_one() -> None:
    rng = np.random.default_rng(0)
    drawn = 0.02 * np.log2(WIDTHS) + 0.01 * rng.standard_normal((300, 7))
    xs, groups = np.repeat(WIDTHS, 3), ["a", "b", "c"] * 7
    found = [per_doubling(xs, np.repeat(ys, 3), groups) for ys in drawn]
    covered = sum(one is not None and one.low <= 0.02 <= one.high for one in found)
    assert 270 <= covered <= 297  # 95 % of 300; three times the points would have made it about 230
    one, alone = found[0], per_doubling(WIDTHS, drawn[0])
    assert one is not None and alone is not None
    assert (one.value, one.low, one.high) == pytest.approx((alone.value, alone.low, alone.high))


def test_a_law_goes_through_json_and_back() -> None:
    for law in (fit_power_law(WIDTHS, WIDTHS**-0.5, resamples=20), fit_power_law([], [])):
        assert ScalingLaw.from_dict(json.loads(json.dumps(law.to_dict(), allow_nan=False))) == law
