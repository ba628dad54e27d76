import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sae_emotion_plugin.evidence import resampling
from sae_emotion_plugin.evidence.resampling import (
    Comparison,
    Interval,
    bootstrap_mean_interval,
    by_prompt_and_seed,
    compare_hierarchical,
    compared,
    geometric_mean,
    hierarchical_interval,
    studentised_interval,
)


def test_percentile_interval_equals_a_plain_loop_over_groups() -> None:
    rng = np.random.default_rng(2)
    groups = ["a", "b", "b", "c", "c", "c", "d", "e", "e", "f"]
    values = rng.normal(size=10) + np.array([ord(name) - 97 for name in groups])
    members = {name: values[[g == name for g in groups]] for name in set(groups)}
    names = sorted(members)
    means = []
    for _ in range(20_000):
        drawn = rng.choice(names, size=len(names))
        means.append(np.concatenate([members[name] for name in drawn]).mean())
    found = bootstrap_mean_interval(values, groups=groups, level=0.9, resamples=20_000, seed=0, kind="percentile")
    assert (found.mean, found.kind, found.n_groups) == (pytest.approx(values.mean()), "percentile", 6)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=0.06)


def farther(mean: float, error: float, low: float, high: float, n: int, level: float) -> tuple[float, float]:
    """The ends from quantiles of the studentised replicates, none nearer than Student's."""
    student = float(stats.t.ppf((1 + level) / 2, n - 1))
    return mean - max(high, student) * error, mean - min(low, -student) * error


def test_studentised_interval_equals_a_plain_loop_over_groups() -> None:
    rng = np.random.default_rng(12)
    members = [rng.exponential(size=size) + 1000 for size in (1, 4, 2, 2, 3, 1, 5, 2, 3, 2, 1, 1)]
    values, groups = np.concatenate(members), np.repeat(np.arange(12), [len(member) for member in members])

    def mean_and_error(drawn: list[np.ndarray]) -> tuple[float, float]:
        mean = np.concatenate(drawn).mean()
        residuals = [(member - mean).sum() for member in drawn]
        return mean, np.sqrt(12 / 11 * np.square(residuals).sum()) / sum(map(len, drawn))

    mean, error = mean_and_error(members)
    scaled = []
    for _ in range(8_000):
        again, its_error = mean_and_error([members[i] for i in rng.integers(12, size=12)])
        scaled.append((again - mean) / its_error)
    low, high = np.quantile(scaled, [0.05, 0.95])
    found = bootstrap_mean_interval(values, groups=groups, level=0.9, resamples=20_000, seed=0)
    assert (found.mean, found.kind) == (pytest.approx(mean), "studentised")
    assert (found.low, found.high) == pytest.approx(farther(mean, error, low, high, 12, 0.9), abs=0.15 * error)


@pytest.mark.parametrize("values", [[0.1, 0.5], [0.3, 1.0, 0.2, 0.8], [0.0] * 5 + [1.0]])
def test_few_groups_or_resamples_without_spread_get_students_t(values: list[float]) -> None:
    found = bootstrap_mean_interval(values, seed=0)
    expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high, found.kind) == (*(pytest.approx(end) for end in expected), "student")


def test_small_chunks_give_the_same_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, prompts, seeds = rng.normal(size=30), np.repeat(np.arange(10), 3), np.tile(np.arange(3), 10)
    whole = [
        bootstrap_mean_interval(values, groups=prompts, resamples=500, seed=3),
        hierarchical_interval(values, prompts=prompts, seeds=seeds, resamples=30_000, seed=3),
    ]
    monkeypatch.setattr(resampling, "RESAMPLED_CELLS_PER_CHUNK", 999)
    chunked = [
        bootstrap_mean_interval(values, groups=prompts, resamples=500, seed=3),
        hierarchical_interval(values, prompts=prompts, seeds=seeds, resamples=30_000, seed=3),
    ]
    assert (chunked[0].low, chunked[0].high) == pytest.approx((whole[0].low, whole[0].high))
    # Prompts and seeds are drawn by turns, so that other chunks draw others.
    assert (chunked[1].low, chunked[1].high) == pytest.approx((whole[1].low, whole[1].high), abs=0.03)


def test_a_large_offset_costs_no_digits() -> None:
    values = np.random.default_rng(1).normal(size=20)
    near, far = (bootstrap_mean_interval(values + offset, seed=0) for offset in (0.0, 1e8))
    assert (far.low - 1e8, far.high - 1e8) == pytest.approx((near.low, near.high), abs=1e-6)


def test_replicates_that_are_undefined_are_left_out() -> None:
    rng = np.random.default_rng(0)
    replicates, errors = rng.normal(size=2000), rng.uniform(0.5, 1, size=2000)
    whole = studentised_interval(0.0, 1.0, replicates, errors, n_groups=20, level=0.9)
    gaps = [np.concatenate([array, np.full(500, np.nan)]) for array in (replicates, errors)]
    assert studentised_interval(0.0, 1.0, gaps[0], gaps[1], n_groups=20, level=0.9) == whole
    none = studentised_interval(0.0, 1.0, gaps[0][2000:], gaps[1][2000:], n_groups=20, level=0.9)
    assert none.kind == "student"


def test_repeating_each_value_within_its_group_does_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=40)
    once = bootstrap_mean_interval(values, seed=1)
    copies = np.repeat(values, 5)
    grouped = bootstrap_mean_interval(copies, groups=np.repeat(np.arange(40), 5), seed=1)
    ungrouped = bootstrap_mean_interval(copies, seed=1)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    assert ungrouped.high - ungrouped.low < 0.6 * (once.high - once.low)


CLUSTER_EFFECTS: dict[str, Any] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
    "half zeros": lambda rng, shape: (
        np.where(rng.random(shape) < 0.5, 0, rng.choice([-0.8, -0.5, -0.3, 0.4], shape)) + 0.15
    ),
    "heavy tails": lambda rng, shape: rng.standard_t(3, size=shape),
}


@pytest.mark.parametrize("effects", CLUSTER_EFFECTS)
@pytest.mark.parametrize("n_groups", [10, 20, 50])
def test_intervals_cover_the_true_mean_as_often_as_they_say(effects: str, n_groups: int) -> None:
    rng = np.random.default_rng(n_groups)
    groups = np.repeat(np.arange(n_groups), 3)
    covered = 0
    for data_set in range(1000):
        values = CLUSTER_EFFECTS[effects](rng, n_groups)[groups] + 0.5 * rng.normal(size=len(groups))
        interval = bootstrap_mean_interval(values, groups=groups, resamples=399, seed=data_set)
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_percentile_intervals_of_few_clusters_cover_too_seldom() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for data_set in range(1000):
        interval = bootstrap_mean_interval(rng.normal(size=10), resamples=399, seed=data_set, kind="percentile")
        covered += interval.low <= 0 <= interval.high
    assert covered / 1000 < 0.93


@pytest.mark.parametrize("seed_noise", [0.3, 5.0])
@pytest.mark.parametrize("n_prompts", [10, 20])
def test_hierarchical_intervals_cover_whether_prompts_or_seeds_vary_most(n_prompts: int, seed_noise: float) -> None:
    rng = np.random.default_rng(n_prompts)
    prompts, seeds = np.repeat(np.arange(n_prompts), 3), np.tile(np.arange(3), n_prompts)
    covered = 0
    for data_set in range(1000):
        values = rng.normal(size=n_prompts)[prompts] + seed_noise * rng.normal(size=len(prompts))
        interval = hierarchical_interval(values, prompts=prompts, seeds=seeds, resamples=399, seed=data_set)
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_hierarchical_interval_equals_a_plain_loop_over_prompts_and_their_seeds() -> None:
    rng = np.random.default_rng(4)
    by_prompt = [rng.normal(size=size) + rng.normal() for size in (1, 3, 2, 5, 3, 3, 4, 2)]
    values = np.concatenate(by_prompt)
    prompts = [f"p{i}" for i, own in enumerate(by_prompt) for _ in own]
    seeds = [j for own in by_prompt for j in range(len(own))]
    averages = np.array([own.mean() for own in by_prompt])
    mean, error = averages.mean(), stats.sem(averages)
    scaled = []
    for _ in range(8_000):
        drawn = [rng.choice(by_prompt[i], size=len(by_prompt[i])).mean() for i in rng.integers(8, size=8)]
        scaled.append((np.mean(drawn) - mean) / stats.sem(drawn))
    low, high = np.quantile(scaled, [0.05, 0.95])
    found = hierarchical_interval(values, prompts=prompts, seeds=seeds, level=0.9, resamples=20_000, seed=0)
    assert (found.mean, found.n_groups, found.kind) == (pytest.approx(mean), 8, "studentised")
    assert (found.low, found.high) == pytest.approx(farther(mean, error, low, high, 8, 0.9), abs=0.2 * error)
    shuffled = rng.permutation(len(values))
    again = hierarchical_interval(
        values[shuffled],
        prompts=[prompts[i] for i in shuffled],
        seeds=[seeds[i] for i in shuffled],
        level=0.9,
        resamples=20_000,
        seed=0,
    )
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=0.2 * error)


def test_values_of_one_prompt_and_seed_are_averaged_and_prompts_weigh_equally() -> None:
    table = by_prompt_and_seed(np.array([1.0, 3, 5, 8, 9]), ["a", "a", "b", "a", "a"], [0, 0, 7, 1, 2])
    np.testing.assert_array_equal(table, [[2, 8, 9], [5, np.nan, np.nan]])
    found = hierarchical_interval([2.0, 8.0, 8.0, 1.0], prompts=["a", "a", "a", "b"], seeds=[0, 1, 2, 0], seed=0)
    assert found.mean == pytest.approx((6 + 1) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": [1.0, 2.0], "prompts": ["a", "a"], "seeds": [0, 1]}, "at least 2 prompts, got 1"),
        ({"values": [], "prompts": [], "seeds": []}, "at least 2 prompts, got 0"),
        ({"values": [1.0, 2.0], "prompts": ["a"], "seeds": [0, 1]}, "2 values, but 1 prompts"),
        ({"values": [1.0, 2.0], "prompts": ["a", "b"], "seeds": [0]}, "2 values, but 1 seeds"),
        ({"values": [1.0, np.inf], "prompts": ["a", "b"], "seeds": [0, 0]}, "must be finite, got inf"),
    ],
)
def test_hierarchical_interval_refuses_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hierarchical_interval(**options, seed=0)


@pytest.mark.parametrize(
    ("ends", "margin", "verdict"),
    [
        ((0.01, 0.05), 0.02, "superior"),
        ((0.0, 0.05), 0.02, "non-inferior"),
        ((-0.019, 0.03), 0.02, "non-inferior"),
        ((-0.02, 0.03), 0.02, "inconclusive"),
        ((-0.05, -0.01), 0.02, "inconclusive"),
        ((-0.05, -0.03), 0.02, "inferior"),
        ((-0.05, -0.01), 0.0, "inferior"),
        ((-0.05, 0.0), 0.0, "inconclusive"),
    ],
)
def test_the_verdict_compares_the_interval_with_zero_and_the_margin(
    ends: tuple[float, float], margin: float, verdict: str
) -> None:
    found = compared(Interval(sum(ends) / 2, *ends, 0.95), 0.8, 0.7, margin)
    assert found.verdict == verdict
    assert Comparison(**found.to_dict()) == found


def test_a_paired_comparison_of_steering_finds_a_planted_difference() -> None:
    rng = np.random.default_rng(5)
    prompts, seeds = np.repeat(np.arange(20), 3), np.tile(np.arange(3), 20)
    shared = rng.normal(size=20)[prompts] + rng.normal(size=60)
    second = shared + 0.2 * rng.normal(size=60)
    found = compare_hierarchical(shared + 0.3, second, prompts=prompts, seeds=seeds, margin=0.1, seed=0)
    assert found.verdict == "superior"
    assert found.low < 0.3 < found.high < 0.5
    assert (found.first, found.second) == pytest.approx(((shared + 0.3).mean(), second.mean()))
    assert compare_hierarchical(second, shared + 0.3, prompts=prompts, seeds=seeds, margin=0.1, seed=0).verdict == (
        "inferior"
    )
    with pytest.raises(ValueError, match="equally many, got 60 and 59"):
        compare_hierarchical(shared, second[1:].tolist(), prompts=prompts, seeds=seeds, margin=0.1, seed=0)
    for margin in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="margin must be 0 or more"):
            compare_hierarchical(shared, second, prompts=prompts, seeds=seeds, margin=margin, seed=0)


def test_bootstrap_interval_depends_on_the_seed_alone() -> None:
    values = [0, 1, 1.5, 4, 2, 5]
    assert bootstrap_mean_interval(values, seed=1) == bootstrap_mean_interval(values, seed=1)
    assert bootstrap_mean_interval(values, seed=1, resamples=50) != bootstrap_mean_interval(
        values, seed=2, resamples=50
    )
    constant = bootstrap_mean_interval([2.0, 2.0, 2.0], seed=0)
    assert (constant.mean, constant.low, constant.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": []}, "at least 2 groups of values, got 0"),
        ({"values": [1.0]}, "at least 2 groups of values, got 1"),
        ({"values": [1.0, 2.0], "groups": ["a", "a"]}, "at least 2 groups of values, got 1"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, "2 values, but 1 groups"),
        ({"values": [1.0, float("nan")]}, "must be finite, got nan"),
        ({"values": [1.0, 2.0], "level": 95.0}, r"between 0 and 1, got 95\.0"),
        ({"values": [1.0, 2.0], "resamples": 0}, "at least 1, got 0"),
        ({"values": [1.0, 2.0], "kind": "bca"}, "studentised or percentile, got 'bca'"),
    ],
)
def test_bootstrap_interval_refuses_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean_interval(**options, seed=0)


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
    assert geometric_mean(np.array([1, 10, 100])) == pytest.approx(10.0)
    assert geometric_mean([1e300, 1e300]) == pytest.approx(1e300)


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "of no values"), ([1.0, 0.0], r"got 0\.0"), ([-2.0], r"got -2\.0"), ([float("nan")], "got nan")],
)
def test_geometric_mean_refuses_what_has_no_logarithm(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometric_mean(values)


@pytest.mark.parametrize(
    "module",
    [
        *(
            f"evidence.{name}"
            for name in ("association", "auroc_intervals", "calibration", "dose_curves", "equal_cost")
        ),
        *(f"evidence.{name}" for name in ("placements", "resampling", "selection", "stratified")),
        *("judges.judge", "judges.linear", "judges.masking", "text_costs"),
    ],
)
def test_statistics_load_no_model_library(module: str) -> None:
    code = (
        f"import sys, sae_emotion_plugin.{module}; "
        "print(sorted({'torch', 'sae_lens', 'transformer_lens', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
