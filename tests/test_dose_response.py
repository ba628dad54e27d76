import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_emotion_plugin.evidence.resampling import hierarchical_interval
from sae_emotion_plugin.steering_studies.amounts import DoseBounds
from sae_emotion_plugin.steering_studies.dose_effects import PANEL, known_mean, measures_of
from sae_emotion_plugin.steering_studies.dose_response import BOUNDS, DoseResponse, dose_response
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore, SweepScores

DOSES = (-0.2, -0.1, 0.1, 0.2, 0.3)
PROMPTS = tuple(f"opening {n:02d}" for n in range(20))
SEEDS = (0, 1, 2)
Planted = Callable[[float, str, int], float]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_emotion_plugin.steering_studies.dose_response.RESAMPLES_OF_CHOSEN", 200)


def quadratic(dose: float, prompt: str, seed: int) -> float:
    """A log perplexity ratio that breaks the bound of 1.5 at 0.3 alone."""
    return 6 * dose * dose


def planted(
    effect: Planted,
    cost: Planted = quadratic,
    loops: Callable[[float, str, int], bool] = lambda dose, prompt, seed: False,
    *,
    noise: float = 0.02,
    judges: Sequence[str] = ("words",),
    measure: str = "joy",
    emotion: str = "joy",
    variant: str = "v",
    doses: Sequence[float] = DOSES,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
) -> SweepScores:
    """Scores in which the masked change is `effect` and some noise, the plain one twice that, and "fear" is noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for judge in judges:
        for dose in doses:
            for prompt in prompts:
                for own in SEEDS:
                    masked = effect(dose, prompt, own) + float(rng.normal(0, noise))
                    costs = (cost(dose, prompt, own), loops(dose, prompt, own), False)
                    rows.append(SweepScore(variant, dose, prompt, own, judge, measure, 2 * masked, masked, *costs))
                    other = float(rng.normal(0, noise))
                    rows.append(SweepScore(variant, dose, prompt, own, judge, "fear", other, other / 2, *costs))
    meta = {"variants": {variant: {"emotion": emotion, "doses": list(doses)}}}
    return SweepScores(meta, tuple(rows))


def linear(dose: float, prompt: str, seed: int) -> float:
    return dose


def together(*parts: SweepScores) -> SweepScores:
    variants = {name: facts for one in parts for name, facts in one.meta["variants"].items()}
    return SweepScores({"variants": variants}, tuple(row for one in parts for row in one.rows))


def found(scores: SweepScores, **options: Any) -> DoseResponse:
    return dose_response(scores, **{"resamples": 200, **options})


def test_a_planted_effect_and_its_cost_are_recovered_at_every_dose_and_on_both_halves() -> None:
    response = found(planted(linear))
    for part in ("choose", "report"):
        rows = response.main("v", part)
        assert [row.dose for row in rows] == list(DOSES)
        for row in rows:
            assert row.masked == pytest.approx(row.dose, abs=0.02) and row.change == pytest.approx(
                2 * row.dose, abs=0.04
            )
            assert None not in (row.masked_low, row.masked_high, row.low, row.high)
            assert row.masked_low < row.masked < row.masked_high and row.low < row.change < row.high  # type: ignore[operator]
            assert row.perplexity_ratio == pytest.approx(math.exp(6 * row.dose**2))
            assert (row.n_texts, row.n_judged, row.degenerate_excess, row.wrong_share) == (30, 30, 0.0, 0.0)
            (other,) = row.others
            assert other.measure == "fear" and other.masked == pytest.approx(0, abs=0.02)


def test_effects_are_those_of_a_plain_loop_where_texts_are_missing() -> None:
    scores = planted(linear, noise=0.3)
    rows = tuple(
        replace(row, change=None, masked_change=None, log_perplexity_ratio=None if n % 2 else row.log_perplexity_ratio)
        if n % 5 == 0
        else row
        for n, row in enumerate(scores.rows)
    )
    response = found(SweepScores(scores.meta, rows), resamples=300, seed=4)
    for row in response.rows:
        half = set(response.meta[row.part])
        mine = [one for one in rows if one.dose == row.dose and one.prompt in half]
        own = [one for one in mine if one.measure == "joy" and one.masked_change is not None]
        by_prompt = [
            [one.masked_change or 0.0 for one in own if one.prompt == prompt]
            for prompt in sorted(half)
            if any(one.prompt == prompt for one in own)
        ]
        means = [float(np.mean(values)) for values in by_prompt]
        assert row.masked == pytest.approx(np.mean(means))
        assert row.n_judged == len(own) < row.n_texts
        assert row.wrong_share == pytest.approx(np.mean([mean * row.dose < 0 for mean in means]))
        own = sorted(own, key=lambda one: (one.prompt, one.seed))
        interval = hierarchical_interval(
            [one.masked_change or 0.0 for one in own],
            prompts=[one.prompt for one in own],
            seeds=[one.seed for one in own],
            resamples=300,
            seed=4,
        )
        assert (row.masked_low, row.masked_high) == pytest.approx((interval.low, interval.high))


def test_the_largest_effect_within_the_bounds_is_recommended_for_either_direction() -> None:
    response = found(planted(linear))
    up, down = response.recommended("v"), response.recommended("v", "away")
    assert (up.dose, down.dose) == (0.2, -0.2)  # 0.3 is better and costs too much
    assert up.masked == pytest.approx(0.2, abs=0.02) and down.masked == pytest.approx(-0.2, abs=0.02)
    assert up.found and down.found and up.keeps_bounds and down.keeps_bounds
    assert (up.wrong_share, down.wrong_share) == (0.0, 0.0)
    assert len(up.prompt_changes) == 10 and np.mean([one or 0.0 for one in up.prompt_changes]) == pytest.approx(
        up.masked
    )
    lenient = found(planted(linear), bounds=DoseBounds(2.0, 0.05))
    assert lenient.recommended("v").dose == 0.3


def test_a_dose_that_loops_too_often_is_not_recommended() -> None:
    def loops(dose: float, prompt: str, seed: int) -> bool:
        return dose == 0.2 and int(prompt[-2:]) % 4 < 2  # on about half of either half's openings

    response = found(planted(linear, loops=loops))
    assert response.recommended("v").dose == 0.1
    row = next(row for row in response.main("v") if row.dose == 0.2)
    half = response.meta["report"]
    assert row.degenerate_excess == pytest.approx(np.mean([loops(0.2, prompt, 0) for prompt in half]))
    assert found(planted(linear, loops=loops), bounds=DoseBounds(1.5, 1.0)).recommended("v").dose == 0.2


def test_the_bounds_hold_up_to_their_very_value_and_the_smaller_of_equal_doses_is_taken() -> None:
    def at_the_bound(dose: float, prompt: str, seed: int) -> float:
        return math.log(1.5) if dose == 0.2 else 3.0

    assert found(planted(linear, at_the_bound)).recommended("v").dose == 0.2
    flat = found(planted(lambda dose, prompt, seed: 0.5, lambda dose, prompt, seed: 0.0, noise=0.0))
    assert flat.recommended("v").dose == -0.1 and flat.recommended("v", "away").dose is None


def test_nothing_is_recommended_where_no_dose_keeps_the_bounds_and_the_reason_is_said() -> None:
    dear = found(planted(linear, lambda dose, prompt, seed: 2.0))
    one = dear.recommended("v")
    assert (one.dose, one.reason) == (None, "no dose keeps the bounds") and not one.found and one.oracle is None
    upwards = found(planted(lambda dose, prompt, seed: -0.5))
    assert upwards.recommended("v").reason == "no dose within the bounds raises the emotion"
    silent = found(planted(linear, lambda dose, prompt, seed: math.nan))
    assert silent.recommended("v").dose is None
    json.dumps(silent.to_dict(), allow_nan=False)


def test_the_reported_half_has_no_say_in_the_choice_and_the_choosing_half_none_in_the_report() -> None:
    scores = planted(linear, noise=0.1)
    before = found(scores)

    def spoilt(part: str) -> DoseResponse:
        half = set(before.meta[part])
        rows = tuple(
            replace(row, masked_change=-9.0 * row.dose, log_perplexity_ratio=4.0, degenerate=True)
            if row.prompt in half
            else row
            for row in scores.rows
        )
        return found(SweepScores(scores.meta, rows))

    other = spoilt("report")
    for way in ("towards", "away"):
        assert other.recommended("v", way).dose == before.recommended("v", way).dose
    assert other.recommended("v").keeps_bounds is False and not other.recommended("v").found
    assert [row for row in other.rows if row.part == "choose"] == [row for row in before.rows if row.part == "choose"]
    changed = spoilt("choose")
    assert [row for row in changed.rows if row.part == "report"] == [row for row in before.rows if row.part == "report"]
    assert changed.recommended("v").oracle == before.recommended("v").oracle
    assert changed.recommended("v").dose is None


def test_the_halves_are_disjoint_whole_seeded_and_independent_of_the_rows_order() -> None:
    scores = planted(linear)
    response = found(scores)
    choose, report = (set(response.meta[part]) for part in ("choose", "report"))
    assert not choose & report and choose | report == set(PROMPTS) and len(choose) == 10
    turned = found(SweepScores(scores.meta, scores.rows[::-1]))
    assert turned.meta["choose"] == response.meta["choose"] and turned.chosen == response.chosen
    assert found(scores, seed=1).meta["choose"] != response.meta["choose"]


def test_the_oracle_of_the_reported_half_is_never_worse_than_the_fixed_dose_within_the_bounds() -> None:
    for seed in range(5):
        response = found(planted(lambda dose, prompt, own: 0.05, noise=0.3, seed=seed))
        for one in response.chosen:
            wanted = 1 if one.direction == "towards" else -1
            if one.dose is not None and one.keeps_bounds and one.oracle is not None:
                assert wanted * one.oracle >= wanted * one.masked - 1e-12  # type: ignore[operator]


def test_the_oracle_of_each_opening_finds_its_own_dose_and_luck_alone_gains_nothing_on_other_seeds() -> None:
    def own(dose: float, prompt: str, seed: int) -> float:
        return 1.0 if dose == (0.1 if int(prompt[-2:]) % 2 else 0.2) else 0.0

    one = found(planted(own, noise=0.0)).recommended("v")
    odd = np.mean([int(prompt[-2:]) % 2 for prompt in found(planted(own)).meta["report"]])
    assert one.masked == pytest.approx(odd if one.dose == 0.1 else 1 - odd)
    assert one.prompt_oracle == pytest.approx(1.0) and one.prompt_oracle_held_out == pytest.approx(1.0)
    many = tuple(f"opening {n:03d}" for n in range(200))
    noise = found(planted(lambda dose, prompt, seed: 0.0, noise=1.0, prompts=many), resamples=20).recommended("v")
    assert noise.prompt_oracle is not None and noise.prompt_oracle > 0.4
    assert noise.prompt_oracle_held_out == pytest.approx(0, abs=0.2)


def test_a_single_seed_has_no_oracle_on_other_seeds() -> None:
    scores = planted(linear)
    rows = tuple(row for row in scores.rows if row.seed == 0)
    one = found(SweepScores(scores.meta, rows)).recommended("v")
    assert one.prompt_oracle is not None and one.prompt_oracle_held_out is None


def test_intervals_are_corrected_over_the_emotions_the_clearest_first() -> None:
    clear = planted(lambda dose, prompt, seed: 5 * dose, noise=0.05)
    faint = planted(linear, noise=0.3, variant="w", emotion="anger", measure="anger", seed=1)
    response = found(together(clear, faint))
    first, second = response.recommended("v"), response.recommended("w")
    assert (first.level, second.level) == pytest.approx((0.975, 0.95))
    alone = found(faint, seed=0).recommended("w")
    assert (alone.level, alone.low, alone.high) == (pytest.approx(0.95), second.low, second.high)
    wide = found(clear).recommended("v")
    assert first.low < wide.low and first.high > wide.high  # type: ignore[operator]


def test_the_levels_fall_from_the_clearest_emotion_on() -> None:
    def noisy(variant: str, seed: int) -> SweepScores:
        return planted(linear, noise=1.0, variant=variant, emotion=variant, measure=variant, seed=seed)

    response = found(together(*(noisy(f"e{n}", n) for n in range(6))))
    chosen = [response.recommended(f"e{n}") for n in range(6)]
    levels = sorted((one.level for one in chosen if one.level is not None), reverse=True)
    m = len(levels)
    assert m > 2 and levels == pytest.approx([1 - 0.05 / (m - rank) for rank in range(m)])


def test_what_is_less_clear_than_something_not_found_is_not_found_either() -> None:
    spread = np.random.default_rng(3).normal(size=len(PROMPTS))

    def shifted(shift: float, variant: str) -> SweepScores:
        def effect(dose: float, prompt: str, seed: int) -> float:
            return shift + float(spread[int(prompt[-2:])])

        names: dict[str, Any] = {"variant": variant, "emotion": variant, "measure": variant}
        return planted(effect, noise=0.0, doses=(0.1,), **names)

    def alone(shift: float, level: float) -> bool:
        return found(shifted(shift, "v"), level=level).recommended("v").found

    shift = next(shift for shift in np.arange(0, 3, 0.02).tolist() if alone(shift, 0.95))
    assert not alone(shift, 0.975)
    both = found(together(shifted(shift, "v"), shifted(shift, "w")))
    first, second = both.recommended("v"), both.recommended("w")
    assert (first.level, second.level) == pytest.approx((0.975, 0.95))
    assert second.low is not None and second.low > 0 and not first.found and not second.found


def test_the_mean_of_judges_chooses_and_every_judge_reports() -> None:
    up = planted(lambda dose, prompt, seed: 3 * dose, judges=("a",), noise=0.0)
    down = planted(lambda dose, prompt, seed: -dose, judges=("b",), noise=0.0)
    scores = SweepScores(up.meta, (*up.rows, *down.rows))
    response = found(scores)
    assert response.meta["variants"]["v"]["chosen_by"] == PANEL
    assert response.meta["variants"]["v"]["measures"] == {PANEL: "joy", "a": "joy", "b": "joy"}
    by_judge = {one.judge: one for one in response.chosen if one.direction == "towards"}
    assert {judge: one.masked for judge, one in by_judge.items()} == pytest.approx({PANEL: 0.2, "a": 0.6, "b": -0.2})
    assert {one.dose for one in by_judge.values()} == {0.2}
    assert by_judge["b"].wrong_share == 1.0 and not by_judge["b"].found
    assert [row.masked for row in response.main("v")] == pytest.approx(list(DOSES))
    assert found(scores, judge="b").recommended("v").dose == -0.2
    assert found(scores, judge="b").recommended("v").judge == "b"


def test_an_emotion_is_told_by_its_basic_emotion_and_else_by_valence_in_its_direction() -> None:
    known = {"vader": ["valence"], "words": ["joy", "anger", "valence"]}
    assert measures_of(known, "annoyance") == {"words": "anger"}
    assert measures_of(known, "sadness") == {"vader": "valence", "words": "valence"}
    assert measures_of({"words": ["joy"]}, "surprise") == {}
    response = found(planted(lambda dose, prompt, seed: -dose, measure="valence", emotion="anger"))
    assert response.recommended("v").dose == 0.2 and response.recommended("v").masked == pytest.approx(0.2, abs=0.02)
    pleasant = found(planted(linear, measure="valence", emotion="joy"))
    assert pleasant.recommended("v").dose == 0.2


def test_the_mean_leaves_out_what_is_missing() -> None:
    values = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
    assert known_mean(values)[0] == 2.0 and np.isnan(known_mean(values)[1])


def test_bad_questions_are_refused() -> None:
    scores = planted(linear)
    with pytest.raises(ValueError, match=r"no variant is meant for 'anger' .*joy"):
        dose_response(scores, ["anger"])
    with pytest.raises(ValueError, match=r"no judge 'nobody'.*words"):
        dose_response(scores, judge="nobody")
    with pytest.raises(ValueError, match=r"no judge can tell 'surprise'|cannot tell 'surprise'"):
        dose_response(planted(linear, emotion="surprise"))
    with pytest.raises(ValueError, match="3 prompts are too few"):
        dose_response(planted(linear, prompts=PROMPTS[:3]))
    with pytest.raises(ValueError, match="no variant is meant for None"):
        dose_response(SweepScores({"variants": {"v": {"emotion": None, "doses": []}}}, ()))
    with pytest.raises(ValueError, match="no variant 'w'"):
        found(scores).recommended("w")


def test_the_result_is_shown_and_kept(tmp_path: Path) -> None:
    response = found(planted(linear))
    text = repr(response)
    assert "10 openings to choose on, 10 reported" in text and "+0.2 *" in text and "x1.27" in text
    assert "<table>" in response._repr_html_()
    data = json.loads(response.save(tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert data["chosen"][0]["dose"] == 0.2 and len(data["rows"]) == 2 * len(DOSES)
    assert data["meta"]["bounds"] == {"perplexity_ratio": 1.5, "degenerate_excess": 0.05} == vars(BOUNDS)
    assert len(response.to_pandas()) == 2 * len(DOSES)
