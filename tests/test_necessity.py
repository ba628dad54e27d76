import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import JOY, make_sae
from test_steering_success import counting_judge

from sae_emotion_plugin.emotion_texts import openings
from sae_emotion_plugin.sparse_codes import SparseCodes
from sae_emotion_plugin.steering_studies import necessity as module
from sae_emotion_plugin.steering_studies.necessity import (
    FEATURES,
    Necessity,
    contribution_sizes,
    matched_sets,
    necessity,
    removal_plan,
)
from sae_emotion_plugin.steering_studies.sweep import SweepText, Variant
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore, SweepScores

PROMPTS = ("he is such a", "w3 w4", "w9 is w7")


def codes_of(dense: np.ndarray) -> SparseCodes:
    tokens, features = dense.nonzero()
    return SparseCodes(
        values=dense[tokens, features].astype(np.float32),
        features=features.astype(np.int32),
        row_starts=np.searchsorted(tokens, np.arange(len(dense) + 1)).astype(np.int64),
        text_index=np.zeros(len(dense), dtype=np.int32),
        token_ids=np.zeros(len(dense), dtype=np.int32),
        n_texts=1,
        d_sae=dense.shape[1],
        hook_name="blocks.0.hook_resid_post",
    )


def planted_codes(sae: Any, twins: dict[int, int], seed: int = 0) -> np.ndarray:
    """Features of all sizes; each feature of `twins` has one other that fires as often and contributes as much."""
    rng = np.random.default_rng(seed)
    dense = (rng.random((400, 64)) < 10 ** rng.uniform(-2, 0, 64)) * rng.exponential(3, (400, 64))
    lengths = sae.W_dec.detach().norm(dim=1).numpy()
    for feature, twin in twins.items():
        dense[:, twin] = rng.permutation(dense[:, feature]) * lengths[feature] / lengths[twin]
    return dense


def firing() -> Any:
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[JOY] += 50
    return sae


def test_sizes_are_the_firing_rate_and_the_norm_of_what_a_firing_feature_contributes() -> None:
    sae = make_sae()
    dense = planted_codes(sae, {})
    dense[:, 11] = 0
    rates, norms = contribution_sizes(codes_of(dense), sae)
    for feature in range(64):
        fired = [token for token in range(400) if dense[token, feature] > 0]
        contributions = [np.linalg.norm(dense[t, feature] * sae.W_dec[feature].detach().numpy()) for t in fired]
        assert rates[feature] == pytest.approx(len(fired) / 400)
        assert norms[feature] == pytest.approx(np.mean(contributions) if fired else 0, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_stand_ins_are_the_planted_twins(seed: int) -> None:
    sae, twins = make_sae(), {3: 40, 7: 50, 20: 60}
    codes = codes_of(planted_codes(sae, twins, seed))
    assert set(matched_sets(codes, sae, list(twins), 4, nearest=1, seed=seed)) == {(40, 50, 60)}
    (other,) = matched_sets(codes, sae, [7], 1, exclude=[50], nearest=1)
    assert other != (50,)


def test_matched_features_are_really_matched() -> None:
    sae = make_sae()
    codes = codes_of(planted_codes(sae, {}, 5))
    rates, norms = contribution_sizes(codes, sae)
    features = [3, 7, 20]
    sets = matched_sets(codes, sae, features, 30, nearest=5, seed=1)
    assert len(sets) == 30 and len(set(sets)) > 10
    assert sets == matched_sets(codes, sae, features, 30, nearest=5, seed=1) != matched_sets(codes, sae, features, 30)
    allowed = [one for one in range(64) if one not in features]
    for place, feature in enumerate(features):
        apart = np.hypot(np.log(rates / rates[feature]), np.log(norms / norms[feature]))
        near = sorted(allowed, key=lambda one: apart[one])[: 5 + len(features) - 1]  # some may be taken already
        assert {some[place] for some in sets} <= set(near)
    for some in sets:
        assert len(set(some)) == 3 and not set(some) & set(features)


def test_silent_features_have_no_stand_in(caplog: pytest.LogCaptureFixture) -> None:
    sae = make_sae()
    dense = planted_codes(sae, {})
    dense[:, [3, 9]] = 0
    with caplog.at_level(logging.WARNING):
        sets = matched_sets(codes_of(dense), sae, [3, 7], 5)
    assert {len(some) for some in sets} == {1} and all(9 not in some for some in sets)
    assert "1 of 2 features are silent" in caplog.text
    with pytest.raises(ValueError, match="none of the features 3, 9 fires"):
        matched_sets(codes_of(dense), sae, [3, 9])
    only = np.zeros((10, 64))
    only[:, 7] = 1
    with pytest.raises(ValueError, match="0 other features fire"):
        matched_sets(codes_of(only), sae, [7])
    with pytest.raises(ValueError, match="no feature 64"):
        matched_sets(codes_of(dense), sae, [7], exclude=[64])


def test_removing_is_ablating_and_a_clamp_goes_below() -> None:
    sae = make_sae()
    plan = removal_plan(sae, [3, JOY], None, 4.0)
    assert plan.mode == "ablate" and [one.amount for one in plan.interventions] == [1.0, 1.0]
    assert removal_plan(sae, [3, JOY], 0, 4.0) == plan
    below = removal_plan(sae, [3], -0.1, 4.0)
    assert (below.mode, below.amount, below.residual_norm) == ("clamp", -0.1, 4.0)
    with pytest.raises(ValueError, match="feature 3 stands twice"):
        removal_plan(sae, [3, 3], None, 4.0)


def run(bridge: Any, sae: Any, **changes: Any) -> Necessity:
    given: dict[str, Any] = {
        "features": [JOY], "emotion": "joy", "prompts": PROMPTS, "sets": 3, "words": ["joy", "happy"],
        "neutral_texts": ["w1 w2 w3", "w8 w9"], "seeds": (0, 1), "max_new_tokens": 6, "judges": [counting_judge()],
        "residual_norm": 4.0, "progress": False, **changes,
    }  # fmt: skip
    return necessity(bridge, sae, given.pop("features"), given.pop("emotion"), **given)


def planted(monkeypatch: pytest.MonkeyPatch, drops: dict[str, float]) -> None:
    """Scores in which each variant changes each measure by its number, sadness not at all."""

    def write(model: Any, variants: Sequence[Variant], prompts: Sequence[str], **kwargs: Any) -> tuple[SweepText, ...]:
        return ()

    def score(model: Any, variants: Sequence[Variant], texts: Sequence[SweepText], **kwargs: Any) -> SweepScores:
        rows = [
            SweepScore(
                variant.name, plan.amount, prompt, seed, judge.name, measure, 2 * value, value, 0.1, False, False
            )
            for judge in kwargs["judges"]
            for measure in judge.measures
            for variant in variants
            for plan in variant.plans
            for prompt in PROMPTS
            for seed in range(2)
            for value in [drops[variant.name] if measure == "joy" else 0.0]
        ]
        return SweepScores({}, tuple(rows))

    monkeypatch.setattr(module, "write_texts", write)
    monkeypatch.setattr(module, "score_texts", score)


def test_the_drop_is_set_against_that_of_the_controls(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {FEATURES: -0.3, "control 0": -0.1, "control 1": 0.3, "control 2": -0.2})
    found = run(bridge, firing())
    joy, fear = found.rows
    assert (joy.measure, fear.measure) == ("joy", "fear")
    assert joy.plain is not None and joy.masked is not None and joy.beyond is not None
    assert (joy.plain.mean, joy.masked.mean) == pytest.approx((-0.6, -0.3))
    assert joy.controls == pytest.approx(0)
    assert (joy.beyond.mean, joy.beyond.low, joy.beyond.high) == pytest.approx((-0.3, -0.3, -0.3))
    assert joy.p == pytest.approx(2 / 4)  # one control set changes as much, the other way
    assert fear.p == 1 and fear.masked is not None and fear.masked.mean == 0
    assert found.perplexity_ratio == pytest.approx(np.exp(0.1))


def test_the_whole_study_with_the_model(bridge: Any, tmp_path: Path) -> None:
    sae = firing()
    found = run(bridge, sae, folder=tmp_path / "texts")
    assert [(row.judge, row.measure) for row in found.rows] == [("counting", "joy"), ("counting", "fear")]
    assert any(row.plain is not None and row.plain.mean != 0 for row in found.rows)
    assert len(found.controls_kl) == 3 and found.kl > 0
    assert found.meta["firing_rates"] == {str(JOY): 1.0}
    assert all(JOY not in some and len(some) == 1 for some in found.meta["controls"])
    assert found.repair[0].features is not None
    assert found.repair[0].features.mean == pytest.approx(1, abs=1e-5)
    assert {row.what for row in found.logits} == {"features", "controls"}
    assert run(bridge, sae, folder=tmp_path / "texts").to_dict() == found.to_dict()
    kept = json.loads(found.save(tmp_path / "necessity.json").read_text())
    assert len(kept["rows"]) == len(found.to_pandas()) == 2 and kept["kl"] == found.kl
    assert len(kept["repair"]) == 2 and len(kept["controls_kl"]) == 3
    for text in ("ablated on 3 prompts", "still missing at", "put back", "3 matched control sets"):
        assert text in repr(found)
    assert "<table>" in found._repr_html_()


def test_clamping_below_zero_is_another_removal(bridge: Any) -> None:
    sae = firing()
    ablated, clamped = run(bridge, sae, words=[]), run(bridge, sae, clamp=-1.0, words=[])
    assert clamped.meta["removal"] == "clamped to -1 of the residual norm"
    assert clamped.kl != ablated.kl and clamped.logits == ()


def test_the_emotion_names_its_openings(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    def stop(model: Any, texts: tuple[str, ...], *args: Any, **kwargs: Any) -> float:
        seen.append(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "mean_norm", stop)
    for emotion in ("anger", "annoyance"):
        with pytest.raises(KeyboardInterrupt):
            run(bridge, firing(), emotion=emotion, prompts=None, residual_norm=None)
    assert seen == [openings("anger")] * 2
    with pytest.raises(ValueError, match="no openings for 'awe'"):
        run(bridge, firing(), emotion="awe", prompts=None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features": []}, "at least one intervention"),
        ({"features": [64]}, "no feature 64"),
        ({"features": [3, 3]}, "stands twice"),
        ({"prompts": ["w1"]}, "at least 2 prompts"),
        ({"prompts": "w1 w2"}, "at least 2 prompts"),
        ({"exclude": list(range(64))}, "0 other features"),
        ({"words": ["nowhere"]}, "none of the words"),
    ],
)
def test_what_cannot_be_taken_away_is_refused(bridge: Any, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run(bridge, firing(), **change)
