import subprocess
import sys

import numpy as np
import pytest

from sae_emotion_plugin.resampling import bootstrap_mean_interval, geometric_mean


def test_bootstrap_interval_equals_a_plain_loop_over_groups() -> None:
    rng = np.random.default_rng(2)
    groups = ["a", "b", "b", "c", "c", "c", "d", "e", "e", "f"]
    values = rng.normal(size=10) + np.array([ord(name) - 97 for name in groups])
    members = {name: values[[g == name for g in groups]] for name in set(groups)}
    names = sorted(members)
    means = []
    for _ in range(20_000):
        drawn = rng.choice(names, size=len(names))
        means.append(np.concatenate([members[name] for name in drawn]).mean())
    found = bootstrap_mean_interval(values, groups=groups, level=0.9, resamples=20_000, seed=0)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=0.06)


def test_repeating_each_value_within_its_group_does_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=40)
    once = bootstrap_mean_interval(values, seed=1)
    copies = np.repeat(values, 5)
    grouped = bootstrap_mean_interval(copies, groups=np.repeat(np.arange(40), 5), seed=1)
    ungrouped = bootstrap_mean_interval(copies, seed=1)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    assert ungrouped.high - ungrouped.low < 0.6 * (once.high - once.low)


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for data_set in range(400):
        prompt_effects = np.repeat(rng.normal(size=40), 3)
        values = prompt_effects + 0.5 * rng.normal(size=120)
        interval = bootstrap_mean_interval(values, groups=np.repeat(np.arange(40), 3), resamples=400, seed=data_set)
        covered += interval.low <= 0 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_interval_depends_on_the_seed_alone() -> None:
    values = [0, 1, 1.5, 4]
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


@pytest.mark.parametrize("module", ["association", "resampling", "text_costs", "judges"])
def test_statistics_load_no_model_library(module: str) -> None:
    code = (
        f"import sys, sae_emotion_plugin.{module}; "
        "print(sorted({'torch', 'sae_lens', 'transformer_lens', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
