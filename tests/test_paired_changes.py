import math

import numpy as np
import pytest
from test_steering_success import counting_judge

from sae_emotion_plugin.judges.judge import vader_judge
from sae_emotion_plugin.steering_studies.paired_changes import (
    changes_of,
    contrast,
    mean_change,
    measures_of,
    ratio_of,
    shown_interval,
    unsteered_level,
)
from sae_emotion_plugin.steering_studies.sweep import SweepText
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore


@pytest.mark.parametrize("seed", range(3))
def test_a_contrast_is_the_weighted_mean_over_prompts_that_all_have(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = [(f"p{n}", s) for n in range(5) for s in range(3)]
    changes = {
        name: {place: float(rng.normal()) for place in places if rng.random() > 0.15} for name in ("a", "b", "c")
    }
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    interval = contrast(changes, weights, 0)
    of_prompt: dict[str, list[float]] = {}
    for place in places:
        if all(place in changes[name] for name in weights):
            of_prompt.setdefault(place[0], []).append(sum(w * changes[n][place] for n, w in weights.items()))
    assert interval is not None
    assert interval.mean == pytest.approx(np.mean([np.mean(values) for values in of_prompt.values()]))
    assert interval.low < interval.mean < interval.high and interval.n_groups == len(of_prompt)


def test_one_prompt_is_too_few_for_an_interval() -> None:
    assert contrast({"a": {("p", 0): 1.0, ("p", 1): 2.0}}, {"a": 1.0}, 0) is None
    assert contrast({"a": {("p", 0): 1.0, ("q", 0): 2.0}, "b": {("p", 0): 1.0}}, {"a": 1.0, "b": 1.0}, 0) is None


def test_empty_texts_have_no_change_and_no_cost() -> None:
    rows = [
        SweepScore("v", 0.1, "p", 0, "j", "joy", 0.3, 0.1, 0.5, False, False),
        SweepScore("v", 0.1, "p", 1, "j", "joy", None, None, None, False, False),
        SweepScore("v", 0.1, "q", 0, "j", "joy", 0.2, 0.4, 1.5, True, False),
        SweepScore("v", 0.2, "q", 0, "j", "joy", 0.9, 0.9, 9.0, True, False),
    ]
    assert changes_of(rows, 0.1, 1, masked=True) == {("p", 0): 0.1, ("q", 0): 0.4}
    assert changes_of(rows, 0.1, -1, masked=False) == {("p", 0): -0.3, ("q", 0): -0.2}
    assert ratio_of(rows[:3]) == pytest.approx(math.exp(1.0))
    assert ratio_of(rows[1:2]) is None
    texts = [SweepText("", 0.0, "p", 0, "w1 w2", 1.0, False), SweepText("", 0.0, "q", 0, " ", None, False)]
    assert unsteered_level(counting_judge(), "joy", texts) == pytest.approx(0.5)
    assert unsteered_level(counting_judge(), "joy", texts[1:]) is None


def test_judges_that_cannot_tell_the_emotion_are_left_out() -> None:
    found = measures_of([counting_judge(), vader_judge()], "annoyance")
    assert [(judge.name, measure, sign) for judge, measure, sign in found] == [("vader", "valence", -1)]
    with pytest.raises(ValueError, match="no judge can tell 'anger'"):
        measures_of([counting_judge()], "anger")


def test_prompts_weigh_equally_whatever_their_numbers_of_seeds() -> None:
    assert mean_change({("p", 0): 1.0, ("p", 1): 3.0, ("q", 0): 6.0}) == pytest.approx(4)
    assert mean_change({}) is None


def test_an_interval_is_shown_with_its_ends() -> None:
    interval = contrast({0: {("p", 0): 1.0, ("q", 0): 1.0}}, {0: 1.0}, 0)
    assert shown_interval(interval) == "+1.000 [+1.000, +1.000]"
    assert shown_interval(None) == "-"
