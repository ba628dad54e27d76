import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from conftest import D_SAE, JOY

from sae_emotion_plugin import SteeringPlan, mean_norm, steering_recipes
from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.emotion_texts import openings
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.judges.judge import valence
from sae_emotion_plugin.sparse_codes import token_settings
from sae_emotion_plugin.steering_recipes import PublishedLine, StudyRecipe, run_study

RECIPES = Path(__file__).parents[1] / "recipes"
MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "model": "embedded",
    "dictionary": "gemma-3-270m-emotion",
    "prompts": ["he is such a", "w3"],
    "features": [JOY, 3, 11],
    "amount": 2,
    "unit": "raw",
    "temperatures": [0, 0.7],
    "max_new_tokens": 5,
}


def written(folder: Path, **changes: Any) -> Path:
    """A recipe file; a change of None leaves the key out."""
    data = {key: value for key, value in {**MINIMAL, **changes}.items() if value is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def recipe_of(folder: Path, **changes: Any) -> StudyRecipe:
    return StudyRecipe.read(written(folder, **changes))


def test_a_recipe_is_read_with_its_kinds(tmp_path: Path) -> None:
    line = {"features": [JOY], "temperature": 0, "text": "joy w1"}
    recipe = recipe_of(tmp_path, published=[line, {**line, "features": [], "prompt": "w3"}], seeds=[0, 4])
    assert (recipe.amount, recipe.temperatures, recipe.seeds) == (2.0, (0.0, 0.7), (0, 4))
    assert isinstance(recipe.amount, float) and isinstance(recipe.temperatures[0], float)
    assert recipe.published == (PublishedLine((JOY,), 0.0, "joy w1"), PublishedLine((), 0.0, "joy w1", "w3"))
    assert recipe.share == "each" and recipe.features_used == 4


def test_the_studies_that_come_with_the_package_are_valid() -> None:
    for name in ("blog-embedded", "blog-gpt2"):
        assert StudyRecipe.read(RECIPES / f"{name}.yaml").name == name
    gpt2, embedded = StudyRecipe.read(RECIPES / "blog-gpt2.yaml"), StudyRecipe.read(RECIPES / "blog-embedded.yaml")
    assert gpt2.features == (62556, 79394, 86309, 69689)
    assert (gpt2.amount, gpt2.unit, gpt2.share, gpt2.prompts) == (20, "raw", "each", ("he is such a",))
    assert gpt2.temperatures == embedded.temperatures == (0.0, 0.7)
    assert (embedded.model, embedded.emotion, embedded.features) == ("embedded", "anger", ())


def test_gpt2s_dictionary_is_openais_own_file() -> None:
    from sae_emotion_plugin import registry

    entry, sae = registry.find(StudyRecipe.read(RECIPES / "blog-gpt2.yaml").dictionary)
    assert entry.repo_id == "openaipublic/sparse-autoencoder" and sae.id == "blocks.8.hook_resid_post"
    assert sae.path == "gpt2-small/resid_post_mlp_v5_128k/autoencoders/8.pt"


def test_a_study_is_found_by_its_name() -> None:
    assert StudyRecipe.read("blog-embedded") == StudyRecipe.read(RECIPES / "blog-embedded.yaml")
    with pytest.raises(FileNotFoundError, match=r"no such recipe: blog-none .*blog-embedded, blog-gpt2\)"):
        StudyRecipe.read("blog-none")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"colour": "red"}, "unknown key 'colour' .*temperatures"),
        ({"model": None}, "missing key 'model'"),
        ({"amount": "much"}, "amount is 'much'"),
        ({"amount": 0}, "amount is 0"),
        ({"amount": math.inf}, "amount is inf"),
        ({"unit": "metres"}, "unit is 'metres' .*residual_norm, raw"),
        ({"share": "half"}, "share is 'half' .*each, sum"),
        ({"features": 7}, "features is 7 .*a list"),
        ({"features": [7, 7]}, "features has 7"),
        ({"features": [-1]}, "features has -1"),
        ({"features": [True]}, "features has True .*whole numbers"),
        ({"features": [1.5]}, "features has 1.5 .*whole numbers"),
        ({"features": None}, "either features or an emotion"),
        ({"emotion": "joy"}, "either features or an emotion"),
        ({"emotion": "awe", "features": None}, "emotion is 'awe'"),
        ({"prompts": "he is"}, "prompts is 'he is'"),
        ({"prompts": []}, "prompts is"),
        ({"prompts": [" "]}, "prompts is"),
        ({"prompts": [3]}, "prompts has 3 .*texts"),
        ({"temperatures": [-1]}, "temperatures is"),
        ({"temperatures": []}, "temperatures is"),
        ({"seeds": []}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"published": "joy"}, "published is 'joy'"),
        ({"published": [{"temperature": 0, "text": "w1"}]}, "published, line 1: missing key 'features'"),
        ({"published": [{"features": [1], "temperature": 0, "text": "w1", "by": "me"}]}, "unknown key 'by'"),
        ({"published": [{"features": 1, "temperature": 0, "text": "w1"}]}, "published: features is 1"),
    ],
)
def test_a_broken_recipe_is_refused_in_one_line(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named) as error:
        recipe_of(tmp_path, **changes)
    assert "study.yaml" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_yaml_is_refused_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    for content in ("{", "!!python/object/apply:os.system [exit]", "- a list"):
        (tmp_path / "study.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"study\.yaml"):
            StudyRecipe.read(tmp_path / "study.yaml")


def test_the_tables_hold_every_cell_as_the_generator_writes_it(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, seeds=[0, 4])
    study = run_study(recipe, model=bridge, sae=planted_sae, progress=False)
    cells = [(row.prompt, row.temperature, row.features, row.seed) for row in study.rows]
    sets = [(), (JOY,), (JOY, 3), (JOY, 3, 11)]
    assert cells == [
        (prompt, temperature, features, seed)
        for prompt in MINIMAL["prompts"]
        for temperature, seeds in ((0.0, [0]), (0.7, [0, 4]))
        for features in sets
        for seed in seeds
    ]
    for row in study.rows:
        plan = SteeringPlan.of(dict.fromkeys(row.features, 2.0), planted_sae, unit="raw") if row.features else None
        request = Request(row.prompt, plan, row.temperature, row.seed)
        (alone,) = complete(bridge, planted_sae, [request], max_new_tokens=5, progress=False)
        assert row.text == alone.text and row.valence == valence(row.text)
        assert row.amounts == (2.0,) * len(row.features) and row.published is None
    assert len({row.text for row in study.rows}) > 8


def test_a_summed_vector_is_as_long_as_asked_for_however_many_features_share_it(
    bridge: Any, planted_sae: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, unit="residual_norm", share="sum", amount=0.5, prompts=["w3"], temperatures=[0])
    study = run_study(recipe, model=bridge, sae=planted_sae, progress=False)
    rows = planted_sae.W_dec.detach().double().numpy()
    for row in study.rows[1:]:
        steps = [a * rows[f] / np.linalg.norm(rows[f]) for a, f in zip(row.amounts, row.features, strict=True)]
        assert np.linalg.norm(np.sum(steps, axis=0)) == pytest.approx(0.5, rel=1e-5)
        assert len(set(row.amounts)) == 1
    hook = planted_sae.cfg.metadata.hook_name
    assert study.meta["residual_norm"] == mean_norm(bridge, openings("neutral"), hook, **token_settings(planted_sae))


def test_published_lines_stand_beside_their_cells(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    lines = [
        {"features": [], "temperature": 0, "text": "w1 published"},
        {"features": [JOY, 3], "temperature": 0.7, "text": "w2 published", "prompt": "w3"},
    ]
    study = run_study(recipe_of(tmp_path, published=lines), model=bridge, sae=planted_sae, progress=False)
    beside = {(row.prompt, row.features, row.temperature): row.published for row in study.rows if row.published}
    assert beside == {
        ("he is such a", (), 0.0): "w1 published",
        ("w3", (JOY, 3), 0.7): "w2 published",
    }
    assert "no published lines" not in repr(study) and "w2 published" in repr(study)


def test_a_table_says_what_it_is_and_is_kept(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    study = run_study(recipe_of(tmp_path), model=bridge, sae=planted_sae, progress=False)
    for text in ("a demonstration, not evidence", "the recipe holds no published lines", "unsteered", "2 raw for each"):
        assert text in repr(study)
    kept = json.loads(study.save(tmp_path / "study.json").read_text())
    assert kept["meta"]["label"] == "a demonstration, not evidence"
    assert len(kept["rows"]) == len(study.to_pandas()) == 2 * 2 * 4
    assert "<table>" in study._repr_html_()


def test_the_features_come_from_a_scores_file_in_their_causal_order(
    bridge: Any, planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_emotion_plugin.feature_roles.output_scores.EMOTION_WORDS", {"joy": "joy happy smile"})
    rows = [FeatureScore("joy", feature, 0.9, None, 0.0, 0.0, 1.0, 0.0) for feature in (3, JOY, 11, 20)]
    scores = FeatureScores({}, tuple(rows))
    scores.save(tmp_path / "scores.json")
    candidates = [row.feature for row in rows]
    wanted = steering_recipes.steering_order(bridge, planted_sae, "joy", candidates, progress=False)
    recipe = recipe_of(
        tmp_path, features=None, emotion="joy", scores="scores.json", features_used=2, prompts=["w3"], temperatures=[0]
    )
    for given in (None, scores):
        study = run_study(recipe, model=bridge, sae=planted_sae, scores=given, progress=False)
        assert study.meta["features"] == list(wanted[:2])
        assert study.meta["features_from"] == "scores for joy"
    with pytest.raises(FileNotFoundError, match="no scores file"):
        run_study(replace(recipe, scores=str(tmp_path / "none.json")), model=bridge, sae=planted_sae, progress=False)
    with pytest.raises(ValueError, match="unknown emotion 'fear'"):
        run_study(replace(recipe, emotion="fear"), model=bridge, sae=planted_sae, scores=scores, progress=False)


def test_without_scores_the_bundled_corpus_is_searched(
    bridge: Any, planted_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def discover(model: Any, sae: Any, texts: Any, **kwargs: Any) -> Any:
        seen.append(len(texts))
        row = FeatureScore("joy", JOY, 0.9, None, 0.0, 0.0, 1.0, 0.0)
        return type("Found", (), {"scores": FeatureScores({}, (row,))})

    monkeypatch.setattr(steering_recipes, "discover", discover)
    monkeypatch.setattr(
        steering_recipes, "steering_order", lambda model, sae, emotion, features, progress: tuple(features)
    )
    recipe = recipe_of(tmp_path, features=None, emotion="joy", prompts=["w3"], temperatures=[0])
    assert run_study(recipe, model=bridge, sae=planted_sae, progress=False).meta["features"] == [JOY]
    assert seen == [448]


def test_features_that_the_dictionary_lacks_are_refused(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no feature {D_SAE}"):
        run_study(recipe_of(tmp_path, features=[D_SAE]), model=bridge, sae=planted_sae, progress=False)


def test_offline_the_study_of_gpt2_fails_with_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The library reads the variables once, when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="the study 'blog-gpt2' needs the model 'gpt2' and the dictionary") as error:
        run_study(StudyRecipe.read("blog-gpt2"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_embedded_study_writes_its_lines(embedded: Any) -> None:
    study = run_study(replace(StudyRecipe.read("blog-embedded"), max_new_tokens=6), model=embedded, progress=False)
    assert [len(row.features) for row in study.rows] == [0, 1, 2, 3, 4] * 2
    assert len(study.meta["features"]) == 4
    assert any(row.text != study.rows[0].text for row in study.rows[1:5])
