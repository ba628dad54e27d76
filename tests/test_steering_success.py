import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import JOY

from sae_emotion_plugin import SteeringPlan
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.judges.judge import Judge, Judgements, vader_judge
from sae_emotion_plugin.judges.masking import emotion_mask
from sae_emotion_plugin.steering_studies import success as steering_success
from sae_emotion_plugin.steering_studies.success import EKMAN, measure_of
from sae_emotion_plugin.steering_studies.success import steering_success as succeed

NORM = 4.0
PROMPTS = ("he is such a", "w3 w4", "w9 is w7")


def counting_judge(emotions: tuple[str, ...] = ("joy", "fear"), has_valence: bool = False) -> Judge:
    """The share of words with an odd number, blanks not counted: simple enough to be done by hand."""

    def judge(texts: Sequence[str]) -> Judgements:
        shares = np.array([share_of_odd(text) for text in texts])
        scores = np.stack([shares, 1 - shares], axis=1)[:, : len(emotions)]
        return Judgements(emotions, scores, shares if has_valence else None)

    return Judge("counting", "en", emotions, has_valence, "nothing", judge)


def share_of_odd(text: str) -> float:
    numbers = [word[1:] for word in text.split() if word[1:].isdigit()]
    return sum(int(one) % 2 for one in numbers) / max(1, len(text.split()))


def test_success_is_the_mean_masked_change_of_the_same_draws(bridge: Any, planted_sae: Any) -> None:
    pairs = [("joy", 3), ("fear", 3), ("joy", JOY)]
    found = succeed(
        bridge, planted_sae, pairs, amount=1.5, prompts=PROMPTS, max_new_tokens=8, seed=5, residual_norm=NORM,
        judge=counting_judge(), progress=False,
    )  # fmt: skip
    assert [(one.emotion, one.feature, one.measure) for one in found] == [(a, b, a) for a, b in pairs]
    promoted = steering_success.promoted_tokens(bridge, planted_sae, [3, JOY], 50)
    for one in found:
        plan = SteeringPlan.of({one.feature: 1.5}, planted_sae, residual_norm=NORM)
        mask, changes, plain = emotion_mask(promoted[one.feature]), [], []
        for place, prompt in enumerate(PROMPTS):
            steered, before = (
                complete(bridge, planted_sae, [Request(prompt, some, 0.7, 5 + place)], max_new_tokens=8, progress=False)
                for some in (plan, None)
            )
            sign = 1 if one.emotion == "joy" else -1  # the second score is 1 - the first
            changes.append(sign * (share_of_odd(mask(steered[0].text)) - share_of_odd(mask(before[0].text))))
            plain.append(sign * (share_of_odd(steered[0].text) - share_of_odd(before[0].text)))
        assert one.changes == pytest.approx(changes, abs=1e-12)
        assert (one.success, one.plain) == pytest.approx((np.mean(changes), np.mean(plain)), abs=1e-12)
    assert any(change != 0 for one in found for change in one.changes)


def test_an_interrupted_run_goes_on_where_it_was(
    bridge: Any, planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(features: list[int], folder: Path | None = tmp_path) -> tuple[Any, ...]:
        return succeed(
            bridge, planted_sae, [("joy", one) for one in features], amount=1, prompts=PROMPTS, max_new_tokens=4,
            residual_norm=NORM, judge=counting_judge(), folder=folder, progress=False,
        )  # fmt: skip

    whole = run([1, 2, 3, 4], None)
    monkeypatch.setattr(steering_success, "BATCH_ROWS", 2 * len(PROMPTS))
    made: list[int] = []

    def interrupted(model: Any, sae: Any, requests: Sequence[Request], **kwargs: Any) -> Any:
        if len(made) == 2 * 2 * len(PROMPTS):
            raise KeyboardInterrupt
        made.extend(request.seed for request in requests)
        return complete(model, sae, requests, **kwargs)

    monkeypatch.setattr(steering_success, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([1, 2, 3, 4])
    parts = list(tmp_path.glob("*/*.json"))
    assert len(parts) == 2
    made.clear()
    assert run([1, 2, 3, 4]) == whole
    assert len(made) == len(PROMPTS)  # the unsteered texts and three features were there
    made.clear()
    assert run([4, 2]) == (whole[3], whole[1])
    assert made == []
    assert run([5])[0].feature == 5  # further features join the folder
    parts[0].write_text(json.dumps([{"feature": 1}]))
    with pytest.raises(ValueError, match="holds no continuations"):
        run([1, 2])


def test_a_seed_of_its_own_makes_other_texts(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    for seed in (0, 100):
        succeed(
            bridge, planted_sae, [("joy", 3)], prompts=PROMPTS, max_new_tokens=4, residual_norm=NORM, seed=seed,
            judge=counting_judge(), folder=tmp_path, progress=False,
        )  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2


def test_empty_continuations_are_left_out(bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def some_empty(model: Any, sae: Any, requests: Sequence[Request], **kwargs: Any) -> Any:
        done = complete(model, sae, requests, **kwargs)
        return [type(one)(one.request, "" if one.request.prompt == "w3 w4" else one.text, (), None) for one in done]

    monkeypatch.setattr(steering_success, "complete", some_empty)
    given: dict[str, Any] = {"residual_norm": NORM, "judge": counting_judge(), "progress": False}
    found = succeed(bridge, planted_sae, [("joy", 3)], prompts=PROMPTS, **given)[0]
    assert [change is None for change in found.changes] == [False, True, False]
    with pytest.raises(ValueError, match="feature 3 are all empty"):
        succeed(bridge, planted_sae, [("joy", 3)], prompts=["w3 w4"], **given)


def test_the_judge_is_asked_for_the_emotion_its_basic_emotion_or_valence() -> None:
    assert measure_of(counting_judge(("joy", "love")), "love") == ("love", 1)
    assert measure_of(counting_judge(), "love") == ("joy", 1)
    assert measure_of(counting_judge(), "nervousness") == ("fear", 1)
    assert measure_of(vader_judge(), "annoyance") == ("valence", -1)
    assert measure_of(counting_judge(has_valence=True), "sadness") == ("valence", -1)
    for judge, emotion in ((vader_judge(), "curiosity"), (counting_judge(), "anger"), (counting_judge(), "awe")):
        with pytest.raises(ValueError, match=f"cannot tell {emotion!r}"):
            measure_of(judge, emotion)


def test_every_label_has_one_basic_emotion() -> None:
    labels = [label for labels in EKMAN.values() for label in labels.split()]
    assert len(labels) == len(set(labels)) == 27


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pairs": []}, "no features"),
        ({"pairs": [("joy", 64)]}, "no feature 64"),
        ({"pairs": [("anger", 3)]}, "cannot tell 'anger'"),
        ({"prompts": "he is"}, "not one string"),
        ({"prompts": []}, "empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_steered_is_refused(bridge: Any, planted_sae: Any, change: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {
        "pairs": [("joy", 3)], "prompts": PROMPTS, "residual_norm": NORM, "judge": counting_judge(), "progress": False,
        **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=named):
        succeed(bridge, planted_sae, given.pop("pairs"), **given)
