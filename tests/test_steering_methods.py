import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMOTIONS, VOCABULARY, labelled, make_sae

from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.generation.likelihoods import continuation_nll
from sae_emotion_plugin.judges.judge import Judge, Judgements
from sae_emotion_plugin.steering_studies import few_shot
from sae_emotion_plugin.steering_studies import sweep as steering_sweep
from sae_emotion_plugin.steering_studies.compared_methods import METHODS, NULLS, ComparisonDesign, other_layer
from sae_emotion_plugin.steering_studies.few_shot import few_shot_texts
from sae_emotion_plugin.steering_studies.method_effects import MethodEffects
from sae_emotion_plugin.steering_studies.methods import _amount_at, compare_steering

PROMPTS = ("he is such a", "w1 w2 w3", "a w4", "w5 he is", "such w6 a")
AMOUNTS, COSTS = (0.0, 1.0, 2.0), (0.0, 0.2, 0.6)
WANTED = ("joy", "anger")
FEATURES = {emotion: (EMOTIONS[emotion], 2, 3) for emotion in WANTED}
DESIGN = ComparisonDesign(
    seeds=(0, 1),
    reduced_prompts=3,
    doses=(0.5, 1.0, 2.0),
    pilot_amounts=(0.5, 2.0),
    pilot_prompts=2,
    examples=(1, 3),
    several=2,
    random=2,
    max_new_tokens=6,
)


def share_of(words: dict[str, str]) -> Judge:
    """A judge that counts words; it knows those of two emotions, and valence as the difference of them."""

    def judge(texts: Any) -> Judgements:
        shares = [[text.split().count(word) / len(text.split()) for word in words.values()] for text in texts]
        return Judgements(tuple(words), np.array(shares), np.array([own[0] - own[1] for own in shares]))

    return Judge("counting", "en", tuple(words), True, "nothing", judge)


JUDGES = (share_of({"joy": "joy", "anger": "anger"}), share_of({"joy": "w1", "surprise": "w2"}))
JUDGES = (JUDGES[0], dataclasses.replace(JUDGES[1], name="other"))


def compared(model: Any, sae: Any, folder: Path | None, **options: Any) -> MethodEffects:
    settings = {"design": DESIGN, "judges": JUDGES, "perplexity_ratios": (4.0,), "resamples": 50, "progress": False}
    return compare_steering(model, sae, FEATURES, labelled(6, 0), PROMPTS, folder=folder, **(settings | options))


@pytest.fixture(scope="module")
def writing_sae(bridge: Any) -> Any:
    """At the last layer, where its features write what makes the model say their emotion's word."""
    sae = make_sae(hook_name="blocks.1.hook_resid_post")
    with torch.no_grad():
        for emotion in WANTED:
            sae.W_dec[EMOTIONS[emotion]] = bridge.original_model.lm_head.weight[VOCABULARY[emotion]]
    return sae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def found(bridge: Any, writing_sae: Any, folder: Path) -> MethodEffects:
    return compared(bridge, writing_sae, folder)


def test_every_method_has_a_row_for_each_emotion_and_judge(found: MethodEffects) -> None:
    assert len(found.rows) == len(WANTED) * len(JUDGES) * len(METHODS)
    for judge in JUDGES:
        for emotion in WANTED:
            assert [row.method for row in found.rows if (row.emotion, row.judge) == (emotion, judge.name)] == [*METHODS]
    measures = {(row.emotion, row.judge): row.measure for row in found.rows}
    # The second judge knows no anger: its valence counts against it.
    assert measures[("anger", "other")] == "valence" and measures[("anger", "counting")] == "anger"
    for row in found.rows:
        full = row.method in ("features", "difference-of-means")
        assert (row.n_prompts, row.n_seeds) == ((5, 2) if full else (3, 1))
        assert row.n_variants == (2 if row.method in NULLS else 1)


def test_planted_features_bring_about_their_words_and_random_directions_do_not(found: MethodEffects) -> None:
    for emotion in WANTED:
        plain = {row.method: row.plain for row in found.rows if (row.emotion, row.judge) == (emotion, "counting")}
        assert plain["best-feature"] is not None and plain["best-feature"] > 0.1
        for null in NULLS:
            assert (plain[null] or 0) < 0.5 * plain["best-feature"]


def test_each_direction_has_doses_of_its_own(found: MethodEffects) -> None:
    doses = found.meta["doses"]
    assert len(doses) == len(WANTED) * (len(METHODS) - 3) + 2 * DESIGN.random
    for amounts in doses.values():
        np.testing.assert_allclose(np.array(amounts) / amounts[1], DESIGN.doses, rtol=0.02)
    assert len({tuple(amounts) for amounts in doses.values()}) > len(doses) / 2


def test_features_are_ranked_by_what_they_bring_about(found: MethodEffects) -> None:
    for emotion in WANTED:
        assert found.meta["features"][emotion][0] == EMOTIONS[emotion]
        assert len(found.meta["features"][emotion]) == DESIGN.several


def test_a_second_run_with_fewer_methods_generates_nothing_and_finds_the_same(
    found: MethodEffects, bridge: Any, writing_sae: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("generated anew")

    monkeypatch.setattr(steering_sweep, "complete", refuse)
    monkeypatch.setattr(few_shot, "complete", refuse)
    methods = ("features", "probe", "few-shot", "random-rows")
    again = compared(bridge, writing_sae, folder, methods=methods)
    assert again.rows == tuple(row for row in found.rows if row.method in methods)
    assert again.nulls == tuple(one for one in found.nulls if one.method in methods and one.null == "random-rows")


def test_some_methods_alone_are_compared_without_a_folder(bridge: Any, writing_sae: Any) -> None:
    design = dataclasses.replace(DESIGN, full=("unranked-feature",), temperature=0.0)
    methods = ("unranked-feature", "few-shot", "random-rows")
    alone = compared(bridge, writing_sae, None, design=design, methods=methods)
    assert {row.method for row in alone.rows} == {*methods}
    assert {one.null for one in alone.nulls} == {"random-rows"}
    assert {row.n_seeds for row in alone.rows} == {1}
    reference_alone = compared(bridge, writing_sae, None, design=design, methods=methods[:2])
    assert {row.method for row in reference_alone.rows} == {*methods[:2]}


def test_the_number_of_texts_is_what_is_written(found: MethodEffects, folder: Path) -> None:
    written = sum(len(json.loads(path.read_text())["rows"]) for path in (folder / "texts").iterdir())
    assert len(found.rows) and written <= DESIGN.n_texts(len(WANTED), len(PROMPTS))
    # Methods that happen to steer alike share their texts.
    assert written >= 0.8 * DESIGN.n_texts(len(WANTED), len(PROMPTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("features", "magic")}, "unknown method 'magic'"),
        ({"methods": ("features", "features")}, "'features' stands twice"),
        ({"methods": ("probe",)}, "the reference 'features' must be one of the methods"),
        ({"design": dataclasses.replace(DESIGN, full=("features", "few-shot"))}, "have the reduced design only"),
        ({"wrong_hook": "blocks.9.hook_resid_post"}, "no hook 'blocks.9.hook_resid_post'"),
        ({"design": dataclasses.replace(DESIGN, examples=(1, 7))}, "7 examples of 'joy' alone are wanted"),
        ({"judges": (dataclasses.replace(JUDGES[1], has_valence=False),)}, "cannot tell 'anger'"),
    ],
)
def test_what_cannot_be_compared_is_refused(bridge: Any, writing_sae: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(bridge, writing_sae, None, **options)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "no emotions"),
        ({"joy": ()}, "no features of 'joy'"),
        ({"joy": (1, 1)}, "a feature of 'joy' stands twice"),
        ({"envy": (1,)}, r"no label 'envy' \(valid: anger, joy, sadness\)"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(
    bridge: Any, writing_sae: Any, features: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_steering(bridge, writing_sae, features, labelled(6, 0), PROMPTS, design=DESIGN, judges=JUDGES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"doses": (1.0, 0.5)}, "doses must be above 0 and ascending"),
        ({"examples": (0, 1)}, "examples must be above 0"),
        ({"seeds": (1, 1)}, "seeds must be different values"),
        ({"random": 0}, "random is 0"),
    ],
)
def test_an_impossible_design_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DESIGN, **changed)


def test_the_amount_at_a_cost_is_read_between_the_pilots_amounts() -> None:
    assert _amount_at(0.4, AMOUNTS, COSTS) == pytest.approx(1.5)
    assert _amount_at(0.1, AMOUNTS, COSTS) == pytest.approx(0.5)
    assert _amount_at(0.2, AMOUNTS, COSTS) == pytest.approx(1.0)
    # 0.5 and 0.1 are pooled to 0.3: neither is known to be right.
    assert _amount_at(0.3, (*AMOUNTS, 3.0), (0.0, 0.5, 0.1, 0.9)) == pytest.approx(1.0)
    assert _amount_at(0.7, AMOUNTS, COSTS) is None


def test_the_wrong_layer_is_half_as_deep_and_never_the_right_one() -> None:
    assert other_layer("blocks.9.hook_resid_post") == "blocks.4.hook_resid_post"
    assert other_layer("blocks.0.hook_resid_post") == "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match="in no layer"):
        other_layer("hook_embed")


def test_texts_after_examples_are_those_of_the_longer_prompt_and_cost_what_they_cost_after_the_bare_one(
    bridge: Any, writing_sae: Any, tmp_path: Path
) -> None:
    examples = ["w7 joy w8", "joy happy w9"]
    options: dict[str, Any] = {"counts": (1, 2), "seeds": (0, 5), "max_new_tokens": 4, "progress": False}
    made = few_shot_texts(bridge, writing_sae, "few-shot/joy", examples, PROMPTS[:2], folder=tmp_path, **options)
    assert [(one.dose, one.prompt, one.seed) for one in made] == [
        (count, prompt, seed) for count in (1, 2) for prompt in PROMPTS[:2] for seed in (0, 5)
    ]
    for one in made:
        longer = "\n".join([*examples[: int(one.dose)], one.prompt])
        request = Request(longer, None, 0.7, one.seed)
        (alone,) = complete(bridge, writing_sae, [request], max_new_tokens=4, progress=False)
        assert one.text == alone.text
        ids = bridge.tokenizer(one.prompt, add_special_tokens=False)["input_ids"]
        (nll,) = continuation_nll(bridge, [((bridge.tokenizer.bos_token_id, *ids), alone.token_ids)])
        assert one.nll == pytest.approx(nll, abs=1e-4)
    again = few_shot_texts(bridge, writing_sae, "few-shot/joy", examples, PROMPTS[:2], folder=tmp_path, **options)
    assert again == made
    (file,) = tmp_path.iterdir()
    file.write_text("{}")
    anew = few_shot_texts(bridge, writing_sae, "few-shot/joy", examples, PROMPTS[:2], folder=tmp_path, **options)
    assert [one.text for one in anew] == [one.text for one in made]
    with pytest.raises(ValueError, match="from 1 to 2 examples"):
        few_shot_texts(bridge, writing_sae, "x", examples, PROMPTS, **{**options, "counts": (3,)})
