import json
import math
from pathlib import Path

import numpy as np
import pytest

from sae_emotion_plugin.evidence.association import holm
from sae_emotion_plugin.steering_studies.method_effects import MethodEffects
from sae_emotion_plugin.steering_studies.methods_at_cost import Tried, method_effects
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore, SweepScores

DOSES = (0.5, 1.0, 2.0)
NULLS = ("random",)


def scored(
    variant: str,
    slope: float,
    *,
    cost: float = math.log(1.5),
    noise: float = 0.05,
    n_prompts: int = 10,
    seeds: int = 2,
    loops: float = 0.0,
    empty: tuple[float, ...] = (),
) -> list[SweepScore]:
    """Effects of `slope` x dose at a log cost of `cost` x dose: at ratio 1.5 the effect is the slope (if cost is)."""
    rows = []
    for dose in DOSES:
        for prompt in range(n_prompts):
            rng = np.random.default_rng([prompt, sum(map(ord, variant))])
            for seed in range(seeds):
                wiggle = noise * rng.standard_normal()
                for measure, sign in (("joy", 1), ("valence", -1)):
                    change = sign * (slope * dose + wiggle)
                    gone = dose in empty
                    rows.append(
                        SweepScore(
                            variant=variant,
                            dose=dose,
                            prompt=f"p{prompt}",
                            seed=seed,
                            judge="words" if measure == "joy" else "tone",
                            measure=measure,
                            change=None if gone else 2 * change,
                            masked_change=None if gone else change,
                            log_perplexity_ratio=None if gone else cost * dose,
                            degenerate=prompt < loops * dose * n_prompts,
                            baseline_degenerate=False,
                        )
                    )
    return rows


MEASURES = {("words", "joy"): ("joy", 1), ("tone", "anger"): ("valence", -1)}
RANDOM = {f"random/{n}": slope for n, slope in enumerate((-0.2, 0.0, 0.1, 0.6))}


@pytest.fixture(scope="module")
def found() -> MethodEffects:
    rows = scored("features/joy", 0.5, loops=0.1) + scored("features/anger", 0.4) + scored("mean/joy", 0.3, n_prompts=6)
    rows += scored("mean/anger", 0.4, seeds=1) + scored("cheap/joy", 0.3, cost=0.1)
    tried = [
        *(
            Tried(f"{method}/{emotion}", method, emotion)
            for method in ("features", "mean")
            for emotion in ("joy", "anger")
        ),
        Tried("cheap/joy", "cheap", "joy"),
    ]
    for variant, slope in RANDOM.items():
        rows += scored(variant, slope, n_prompts=5, seeds=1)
        tried.append(Tried(variant, "random", None))
    return method_effects(
        SweepScores({}, tuple(rows)), tried, MEASURES, reference="features", nulls=NULLS, resamples=400, meta={"n": 1}
    )


def test_the_effect_at_the_cost_is_the_planted_one_whatever_the_measures_direction(found: MethodEffects) -> None:
    for emotion, judge, slope in (("joy", "words", 0.5), ("anger", "tone", 0.4)):
        row = found.of(emotion, "features", judge)
        assert row.effect == pytest.approx(slope, abs=0.05)
        assert row.low is not None and row.high is not None
        assert row.low < slope < row.high
        assert row.plain == pytest.approx(2 * (row.effect or 0))
        assert row.dose == pytest.approx(1.0)
        assert row.reach == pytest.approx(1.5**2)
        assert (row.n_prompts, row.n_seeds, row.n_variants) == (10, 2, 1)


def test_a_method_is_compared_on_the_prompts_that_it_shares_with_the_reference(found: MethodEffects) -> None:
    row = found.of("joy", "mean", "words")
    assert row.n_prompts == 6
    assert row.difference == pytest.approx(-0.2, abs=0.05)
    assert row.difference_high is not None and row.difference_high < 0
    equal = found.of("anger", "mean", "tone")
    assert equal.n_seeds == 1
    assert equal.difference == pytest.approx(0, abs=0.05)
    reference = found.of("joy", "features", "words")
    assert reference.difference is None and reference.area_difference is None


def test_a_method_that_does_not_reach_the_cost_has_an_area_all_the_same(found: MethodEffects) -> None:
    row = found.of("joy", "cheap", "words")
    assert row.effect is None and row.wrong_way is None and row.n_reached == 0
    assert row.area is not None and row.area_difference is not None
    assert row.reach == pytest.approx(math.exp(0.2))
    assert "reaches x1.22 only" in repr(found)


def test_degeneration_is_read_at_the_cost(found: MethodEffects) -> None:
    assert found.of("joy", "features", "words").degenerate_excess == pytest.approx(0.1)
    assert found.of("anger", "features", "tone").degenerate_excess == 0


def test_prompts_that_move_the_wrong_way_are_counted(found: MethodEffects) -> None:
    assert found.of("joy", "features", "words").wrong_way == 0
    random = found.of("joy", "random", "words")
    quantiles = random.quantiles
    assert quantiles is not None and list(quantiles) == sorted(quantiles) and quantiles[0] < 0 < quantiles[-1]
    # Five prompts of each direction: one goes down, one up or down, two go up.
    assert random.wrong_way is not None and 0.25 <= random.wrong_way <= 0.6


def test_random_directions_have_the_mean_effect_and_a_rank(found: MethodEffects) -> None:
    row = found.of("joy", "random", "words")
    assert (row.n_variants, row.n_reached) == (4, 4)
    assert row.effect == pytest.approx(np.mean(list(RANDOM.values())), abs=0.03)
    (null,) = [one for one in found.nulls if one.emotion == "joy" and one.method == "features"]
    assert (null.n, null.n_prompts, null.better) == (4, 5, 1)
    assert null.p == pytest.approx(2 / 5)
    assert null.share_better == 0.25
    assert null.null_best == pytest.approx(0.6, abs=0.06)
    assert null.difference == pytest.approx((null.effect or 0) - (null.null_mean or 0))
    assert null.low is not None and null.high is not None and null.low < (null.difference or 0) < null.high
    assert null.over_best == pytest.approx((null.effect or 0) - (null.null_best or 0))
    assert not [one for one in found.nulls if one.method in NULLS]


def test_p_values_are_corrected_over_the_emotions_of_one_judge_and_method() -> None:
    rows, slopes = [], {"joy": 0.03, "anger": 0.02, "fear": 0.1}
    for emotion, slope in slopes.items():
        rows += scored(f"features/{emotion}", slope, noise=0.1)
    tried = [Tried(f"features/{emotion}", "features", emotion) for emotion in slopes]
    measures = {("words", emotion): ("joy", 1) for emotion in slopes}
    found = method_effects(SweepScores({}, tuple(rows)), tried, measures, reference="features", resamples=200)
    p = np.array([row.p for row in found.rows])
    corrected = np.array([row.p_holm for row in found.rows], dtype=float)
    np.testing.assert_allclose(corrected, holm(p))
    assert (corrected >= p).all()


def test_a_dose_at_which_all_texts_are_empty_is_left_out_and_a_variant_of_such_doses_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = scored("features/joy", 0.5, empty=(0.5,)) + scored("silent/joy", 0.5, empty=DOSES)
    tried = [Tried("features/joy", "features", "joy"), Tried("silent/joy", "silent", "joy")]
    measures = {("words", "joy"): ("joy", 1)}
    found = method_effects(SweepScores({}, tuple(rows)), tried, measures, reference="features", resamples=50)
    assert [row.method for row in found.rows] == ["features"]
    assert found.rows[0].effect == pytest.approx(0.5, abs=0.05)
    assert "silent/joy" in caplog.text


def test_a_row_that_is_not_there_and_an_unknown_reference_are_refused(found: MethodEffects) -> None:
    with pytest.raises(ValueError, match="there are anger, joy; cheap, features, mean, random; tone, words"):
        found.of("joy", "features", "nobody")
    scores, tried = SweepScores({}, tuple(scored("a", 1.0))), [Tried("a", "a", "joy")]
    with pytest.raises(ValueError, match="the method 'b' was not tried"):
        method_effects(scores, tried, MEASURES, reference="b")
    with pytest.raises(ValueError, match="must be above 1"):
        method_effects(scores, tried, {("words", "joy"): ("joy", 1)}, reference="a", perplexity_ratios=[1.0])


def test_the_result_is_kept_as_json_with_both_tables(found: MethodEffects, tmp_path: Path) -> None:
    data = json.loads(found.save(tmp_path / "found.json").read_text())
    assert len(data["rows"]) == len(found.rows) == 7
    assert len(data["nulls"]) == len(found.nulls) == 5
    assert data["meta"]["n"] == 1 and data["meta"]["reference"] == "features"
    head, lines = found.null_table()
    assert {len(line) for line in lines} == {len(head)}
    assert len(found.to_pandas()) == 7
    assert "random (4 of 4)" in found._repr_html_()
