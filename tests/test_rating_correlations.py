import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_codes import codes_of
from scipy.stats import pearsonr, spearmanr

from sae_emotion_plugin.discovery.rating_correlations import RatingCorrelations, _correlations, rating_correlations


def rated(n: int = 400, slope: float = 0.6, seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    """Feature 0 goes with valence, 1 is silent, 2 noise with many zeros, 3 a straight line of valence."""
    rng = np.random.default_rng(seed)
    valence = np.round(rng.normal(size=n), 1)
    values = np.zeros((n, 4))
    values[:, 0] = 8 + slope * valence + np.sqrt(1 - slope**2) * rng.normal(size=n)
    values[:, 2] = np.maximum(rng.normal(size=n) - 1, 0)
    values[:, 3] = 8 + 0.5 * valence
    return codes_of(values), {"valence": valence, "arousal": rng.normal(size=n)}


FEATURES = {"joy": 0, "grief": 1, "fear": 2}


def test_the_correlations_are_those_of_the_pooled_activations() -> None:
    codes, ratings = rated()
    found = rating_correlations(codes, FEATURES, ratings, resamples=50)
    dense = codes.matrix().toarray().astype(float)
    assert [(row.emotion, row.rating) for row in found.rows] == [(e, r) for e in FEATURES for r in ratings]
    for row in found.rows:
        assert row.fires == (dense[:, row.feature] > 0).mean()
        if row.emotion == "grief":
            assert (row.pearson, row.pearson_low, row.spearman, row.spearman_high) == (None,) * 4
        else:
            assert row.pearson == pytest.approx(pearsonr(dense[:, row.feature], ratings[row.rating])[0])
            assert row.spearman == pytest.approx(spearmanr(dense[:, row.feature], ratings[row.rating])[0])


@pytest.mark.parametrize("ranked", [False, True])
def test_a_resample_is_the_correlation_of_the_texts_drawn(ranked: bool) -> None:
    rng = np.random.default_rng(1)
    member = np.sort(rng.integers(12, size=40))
    member = np.unique(member, return_inverse=True)[1]
    first, second = np.maximum(rng.normal(size=(2, 40)), 0)
    weights = rng.integers(0, 4, size=(5, int(member.max()) + 1)).astype(float)
    estimates, errors = _correlations(first, second, member, weights, ranked=ranked)
    for row, estimate, error in zip(weights, estimates, errors, strict=True):
        times = row[member].astype(int)
        drawn = np.repeat(first, times), np.repeat(second, times)
        assert estimate == pytest.approx((spearmanr if ranked else pearsonr)(*drawn)[0])
        if not ranked:
            x, y = ((one - one.mean()) / one.std() for one in drawn)
            pull = x * y - estimate * (x**2 + y**2) / 2
            group = np.repeat(np.arange(len(row)), np.bincount(member, weights=times).astype(int))
            sums = np.bincount(group, weights=pull, minlength=len(row))
            squares = sum(row[g] * (sums[g] / row[g]) ** 2 for g in range(len(row)) if row[g])
            assert error == pytest.approx(np.sqrt(squares * len(row) / (len(row) - 1)) / len(x))


def test_the_interval_is_fishers_for_normal_values() -> None:
    codes, ratings = rated(600)
    row = rating_correlations(codes, {"joy": 0}, {"valence": ratings["valence"]}, resamples=800).rows[0]
    for value, low, high, spread in (
        (row.pearson, row.pearson_low, row.pearson_high, 1.0),
        # Bonett and Wright (2000)
        (row.spearman, row.spearman_low, row.spearman_high, np.sqrt(1 + (row.spearman or 0) ** 2 / 2)),
    ):
        assert value is not None
        half = 1.96 * spread / np.sqrt(600 - 3)
        ends = np.tanh([np.arctanh(value) - half, np.arctanh(value) + half])
        assert (low, high) == pytest.approx(tuple(ends), abs=0.015)


def test_copies_in_one_document_narrow_no_interval() -> None:
    codes, ratings = rated(200)
    valence = {"valence": ratings["valence"]}
    once = rating_correlations(codes, {"joy": 0}, valence, resamples=500).rows[0]
    copies = np.tile(np.arange(200), 4)
    many = codes.select_texts(copies), {"joy": 0}, {"valence": ratings["valence"][copies]}
    grouped = rating_correlations(*many, groups=copies, resamples=500).rows[0]
    apart = rating_correlations(*many, resamples=500).rows[0]

    def width(low: float | None, high: float | None) -> float:
        assert low is not None and high is not None
        return high - low

    for kind in ("pearson", "spearman"):
        one, other, loose = (
            width(getattr(row, f"{kind}_low"), getattr(row, f"{kind}_high")) for row in (once, grouped, apart)
        )
        assert other == pytest.approx(one, rel=0.15) and loose < 0.65 * one


def test_a_straight_line_has_no_error() -> None:
    n = 50
    line = np.arange(1.0, n + 1)
    row = rating_correlations(codes_of(line[:, None]), {"joy": 0}, {"rank": -line}, resamples=50).rows[0]
    assert (row.pearson, row.pearson_low, row.pearson_high) == (-1, -1, -1)
    assert (row.spearman, row.spearman_low, row.spearman_high) == (-1, -1, -1)


def test_a_feature_that_fires_once_has_an_interval_that_can_be_saved(tmp_path: Path) -> None:
    values = np.zeros((60, 1))
    values[7] = 3.0
    valence = np.random.default_rng(0).normal(size=60)
    found = rating_correlations(codes_of(values), {"joy": 0}, {"valence": valence}, resamples=200)
    found.save(tmp_path / "one.json")
    row = found.rows[0]
    assert row.pearson is not None and row.pearson_low is not None and row.pearson_high is not None
    assert -1 <= row.pearson_low <= row.pearson <= row.pearson_high <= 1


@pytest.mark.parametrize(
    ("features", "ratings", "options", "message"),
    [
        ({"joy": 4}, {}, {}, r"no such features: 4 \(joy\) \(valid: 0 to 3\)"),
        ({"joy": 0}, {"valence": np.zeros(3)}, {}, "the codes are of 400 texts, but there are 3 ratings of valence"),
        ({"joy": 0}, {"valence": np.full(400, np.nan)}, {}, "ratings of valence must be finite, got nan"),
        ({"joy": 0}, {"valence": np.full(400, 2.5)}, {}, "all ratings of valence are 2.5: nothing goes with them"),
        ({"joy": 0}, {}, {"groups": np.arange(400) % 9}, "at least 10 groups of texts, got 9"),
        ({"joy": 0}, {}, {"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(features: Any, ratings: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rating_correlations(rated()[0], features, ratings, **options)


def test_the_table_and_the_file_hold_every_row(tmp_path: Path) -> None:
    codes, ratings = rated()
    found = rating_correlations(codes, FEATURES, ratings, resamples=50)
    assert isinstance(found, RatingCorrelations) and len(repr(found).splitlines()) == 2 + 6
    assert "<td>grief</td><td>1</td><td>valence</td><td>-</td>" in found._repr_html_()
    read = json.loads(found.save(tmp_path / "ratings.json").read_text())
    assert read == found.to_dict() and read["meta"]["n_groups"] == 400
    assert found.to_pandas().rating.tolist() == ["valence", "arousal"] * 3
