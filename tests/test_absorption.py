import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_codes import codes_of, texts_of
from scipy.stats import beta

from sae_emotion_plugin.discovery.absorption import Absorption, absorption, sure_threshold
from sae_emotion_plugin.emotion_texts import LabelledTexts

OWN, ABSORBER, NOISE, SILENT = range(4)


def slow_threshold(scores: np.ndarray, positive: np.ndarray, precision: float) -> float | None:
    good = [
        s
        for s in scores
        if (scores >= s).sum() >= 10 and positive[scores >= s].sum() >= precision * (scores >= s).sum()
    ]
    return min(good) if good else None


def world(n: int = 400, seed: int = 0) -> dict[str, Any]:
    """Joy in 40 %; its feature fires in 70 % of it and the absorber in the rest; the probe scores joy above 0."""
    rng = np.random.default_rng(seed)
    joy = rng.random(n) < 0.4
    absorbed = joy & (rng.random(n) < 0.3)
    values = np.zeros((n, 4))
    values[:, OWN] = np.where(joy & ~absorbed, 1 + rng.random(n), 0)
    values[:, ABSORBER] = np.where(absorbed | (rng.random(n) < 0.02), 1.0, 0)
    values[:, NOISE] = np.maximum(rng.normal(size=n), 0)
    scores = np.where(joy, 1.0, -1.0) + 0.8 * rng.normal(size=n)
    texts = texts_of([("joy",) if j else ("other",) for j in joy], seed)
    return {"codes": codes_of(values), "texts": texts, "scores": scores, "joy": joy, "absorbed": absorbed}


def absorbed_in(made: dict[str, Any], **options: Any) -> Absorption:
    train = world(seed=1)
    options = {"train": train["texts"], "train_scores": {"joy": train["scores"]}, "precision": 0.9, **options}
    features, scores = options.pop("features", {"joy": OWN}), options.pop("scores", {"joy": made["scores"]})
    return absorption(made["codes"], made["texts"], features, scores, **options)


def test_the_share_of_silent_texts_is_found_with_the_feature_that_fires_in_them() -> None:
    made, train = world(), world(seed=1)
    row = absorbed_in(made).rows[0]
    threshold = slow_threshold(train["scores"], train["joy"], 0.9)
    assert row.threshold == threshold
    sure = made["scores"] >= threshold
    true = sure & made["joy"]
    assert (row.n_sure, row.n_true, row.precision) == (sure.sum(), true.sum(), pytest.approx(made["joy"][sure].mean()))
    silent = made["codes"].matrix().toarray()[:, OWN] == 0
    assert row.rate == silent[sure].mean() and row.true_rate == made["absorbed"][true].mean()
    k, n = (true & silent).sum(), true.sum()
    assert (row.true_low, row.true_high) == pytest.approx(
        (beta.ppf(0.025, k, n - k + 1), beta.ppf(0.975, k + 1, n - k))
    )
    assert row.true_low is not None and row.true_high is not None and row.true_low < 0.3 < row.true_high
    best = row.absorbers[0]
    assert best.feature == ABSORBER and best.rate_in == 1.0
    missed = true & silent
    fires = made["codes"].matrix().toarray()[:, ABSORBER] > 0
    assert best.rate_out == pytest.approx(fires[~missed].mean())
    assert OWN not in [one.feature for one in row.absorbers]


def test_examples_are_the_surest_silent_texts_of_the_emotion() -> None:
    made = world()
    row = absorbed_in(made).rows[0]
    missed = np.flatnonzero(made["absorbed"] & (made["scores"] >= row.threshold))
    assert row.examples == tuple(sorted(missed.tolist(), key=lambda n: -made["scores"][n])[:10])


def test_a_feature_that_is_always_or_never_silent_has_rate_1_or_0_and_a_width() -> None:
    made = world()
    never = made["codes"].matrix().toarray()
    never[:, NOISE] = 1.0
    made["codes"] = codes_of(never)
    silent = absorbed_in(made, features={"joy": SILENT}).rows[0]
    assert (silent.rate, silent.high) == (1.0, 1.0) and silent.low is not None and 0.9 < silent.low < 1
    loud = absorbed_in(made, features={"joy": NOISE}).rows[0]
    assert (loud.rate, loud.low, loud.true_rate) == (0.0, 0.0, 0.0) and loud.high is not None and loud.high > 0
    assert loud.examples == () and loud.absorbers == ()


def test_near_duplicates_count_once() -> None:
    made = world()
    row = absorbed_in(made).rows[0]
    copies = np.repeat(np.arange(400), 2)
    texts = made["texts"].texts
    doubled = LabelledTexts(
        tuple(texts[n] for n in copies),
        tuple(made["texts"].emotions[n] for n in copies),
        tuple(str(n) for n in range(800)),
    )
    twice = {"codes": made["codes"].select_texts(copies), "texts": doubled, "scores": made["scores"][copies]}
    found = absorbed_in(twice)
    assert (found.rows[0].n_sure, found.rows[0].rate) == (row.n_sure, row.rate) and found.meta["n_distinct"] == 400


def test_a_probe_that_is_never_that_sure_gives_no_rate() -> None:
    made, train = world(), world(seed=1)
    noise = np.random.default_rng(0).normal(size=400)
    row = absorbed_in(made, train_scores={"joy": noise}, precision=1.0, train=train["texts"]).rows[0]
    assert (row.threshold, row.n_sure, row.precision, row.rate, row.low, row.true_rate) == (None, 0, *(None,) * 4)


def test_the_threshold_is_the_lowest_with_the_precision_ties_together() -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=60).round(int(rng.integers(3)))
        positive = rng.random(60) < 1 / (1 + np.exp(-2 * scores))
        precision = float(rng.choice([0.5, 0.8, 1.0]))
        assert sure_threshold(scores, positive, precision) == slow_threshold(scores, positive, precision)
    assert sure_threshold(np.ones(5), np.ones(5, dtype=bool), 0.5) is None
    assert sure_threshold(np.zeros(0), np.zeros(0, dtype=bool), 0.5) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": 0.0}, "precision must be above 0 and at most 1, got 0.0"),
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        ({"features": {"joy": 4}}, r"no such features: 4 \(joy\) \(valid: 0 to 3\)"),
        ({"features": {"awe": 0}}, r"no held-out scores of 'awe' \(there are those of joy\)"),
        ({"train_scores": {}}, "no training scores of 'joy'"),
        ({"scores": {"joy": np.zeros(3)}}, "400 held-out texts, but 3 scores of joy"),
        ({"scores": {"joy": np.full(400, np.nan)}}, "held-out scores of joy must be finite, got nan"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        absorbed_in(world(), **options)


def test_the_table_names_the_absorber_and_the_file_holds_all(tmp_path: Path) -> None:
    found = absorbed_in(world())
    assert "1 (100% / " in repr(found) and "<td>joy</td>" in found._repr_html_()
    read = json.loads(found.save(tmp_path / "absorption.json").read_text())
    assert read["rows"][0]["absorbers"][0]["feature"] == ABSORBER and read["meta"]["precision"] == 0.9
    assert found.to_pandas().n_true.tolist() == [found.rows[0].n_true]
