"""The commands that look for emotions, on the tiny model and its planted dictionary."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import EMOTIONS, labelled
from test_cli import refused, run

from sae_emotion_plugin.discovery.scores import FeatureScores


@pytest.fixture
def tiny(bridge: Any, emotional_sae: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAE_EMOTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sae_emotion_plugin.models.load_model", lambda name: bridge)
    monkeypatch.setattr("sae_emotion_plugin.plugin.load_dictionary", lambda name, layer=None: emotional_sae)


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    paths = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    labelled(40, seed=1).save(paths[0])
    labelled(24, seed=2, prefix="h").save(paths[1])
    return str(paths[0]), str(paths[1])


@pytest.mark.usefixtures("tiny")
def test_discover_writes_scores_evidence_and_a_page(corpora: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    (folder := tmp_path / "our-dictionary").mkdir()
    quick = ("--method", "latent", "--permutations", "0", "--no-layers", "--dictionary", str(folder))
    result = run("discover", corpora[0], "--held-out", corpora[1], "-o", str(out), *quick)
    assert result.exit_code == 0, result.output
    best = FeatureScores.load(out)
    assert {emotion: best.top(emotion, 1)[0].feature for emotion in best.emotions} == EMOTIONS
    assert "dense-probe" in result.stdout and "mean held-out AUROC of the best feature: " in result.stdout
    evidence = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert evidence["layers"] is None and evidence["specificity"]["rows"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "our-dictionary on train.jsonl" in page
    assert str(tmp_path) not in page


@pytest.mark.usefixtures("tiny")
def test_discover_scores_elsewhere_correlates_with_ratings_and_ranks_for_steering(
    corpora: tuple[str, str], tmp_path: Path
) -> None:
    rated, other = tmp_path / "rated.jsonl", tmp_path / "other.jsonl"
    texts = labelled(10, seed=5, prefix="r").texts
    rated.write_text("".join(json.dumps({"text": t, "V": n % 5}) + "\n" for n, t in enumerate(texts)), encoding="utf-8")
    labelled(40, seed=6, prefix="o").save(other)
    quick = ("--method", "latent", "--permutations", "20", "--no-layers", "--candidates", "2")
    asked = ("--ratings", str(rated), "--transfer", str(other))
    result = run("discover", corpora[0], "--held-out", corpora[1], "-o", str(tmp_path / "s.json"), *quick, *asked)
    assert result.exit_code == 0, result.output
    assert "by causal score" in result.stdout and "correlation of features with ratings over 30 texts" in result.stdout
    assert "features chosen on another corpus" in result.stdout
    evidence = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert list(evidence["transfers"]) == [f"{tmp_path.name}/other.jsonl"] and evidence["ratings"]["rows"]
    assert evidence["calibration"]["permutations"] == 20 and len(evidence["calibration"]["deciles"]) == 10
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Do the tests keep their promise?" in page and 'id="ratings"' in page and 'id="transfer"' in page


@pytest.mark.usefixtures("tiny")
def test_scores_are_there_though_what_follows_is_interrupted(
    corpora: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_emotion_plugin.discovery_study.examine", interrupted)
    out = tmp_path / "scores.json"
    result = run("discover", corpora[0], "--held-out", corpora[1], "-o", str(out))
    assert result.exit_code == 130 and "goes on from what it has kept" in result.stderr
    assert {row.feature for row in FeatureScores.load(out).rows} >= set(EMOTIONS.values())
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("tiny")
def test_discover_writes_parquet_and_nothing_else_when_only_scores_are_asked_for(
    corpora: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out" / "scores.parquet"
    out.parent.mkdir()
    result = run("discover", corpora[0], "-o", str(out), "--scores-only", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [row["feature"] for row in printed["rows"]] == [row.feature for row in FeatureScores.load(out).rows]
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]


@pytest.mark.usefixtures("tiny")
def test_layers_writes_the_scan_and_a_page(corpora: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    result = run("layers", corpora[0], "--held-out", corpora[1], "-o", str(out), "--dictionary", "planted", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert json.loads(result.stdout)["rows"] == rows
    assert {row["layer"] for row in rows} == {0, 1}
    assert {row["latent"] is None for row in rows if row["layer"] == 1} == {True}
    assert "Layers" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("tiny")
def test_lens_shows_every_layer_and_draws_it(tmp_path: Path) -> None:
    page = tmp_path / "lens.html"
    result = run("lens", "he is such a joy", "--report", str(page), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == ["he", "is", "such", "a", "joy"]
    assert len(found["top"]) == 2 and len(found["top"][0]) == 5
    assert "<svg" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("tiny")
def test_roles_of_the_best_features_name_what_they_fire_on(corpora: tuple[str, str], tmp_path: Path) -> None:
    scores, out = tmp_path / "scores.json", tmp_path / "roles.json"
    assert run("discover", corpora[0], "-o", str(scores), "--scores-only").exit_code == 0
    result = run("roles", "--scores", str(scores), "--texts", corpora[0], "-o", str(out))
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["feature"] for row in rows} == set(EMOTIONS.values())
    assert "fires on: joy" in result.stdout or any("joy" in str(row["fires_on"]) for row in rows)


def test_what_cannot_be_done_is_refused_before_anything_is_loaded(corpora: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "scores.json")
    line = refused("discover", corpora[0], "-o", str(tmp_path / "scores.xlsx"))
    assert "scores.xlsx" in line and ".parquet" in line
    assert "--scores-only" in refused("discover", corpora[0], "-o", out, "--scores-only", "--report", "a.html")
    assert "--transfer" in refused("discover", corpora[0], "-o", out, "--scores-only", "--transfer", corpora[1])
    assert "given twice" in refused("discover", corpora[0], "-o", out, *("--transfer", corpora[1]) * 2)
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a", "label": "envy"}\n', encoding="utf-8")
    line = refused("discover", corpora[0], "-o", out, "--transfer", str(strange))
    assert "strange.jsonl shares no label with the training texts: envy against anger, joy, sadness" in line
    assert "has no ratings" in refused("discover", corpora[0], "-o", out, "--ratings", str(strange))
    line = refused("discover", corpora[0], "-o", out, "--report", str(tmp_path / "absent" / "page.html"))
    assert "absent" in line
    (tmp_path / "margins.json").write_text("{}")
    line = refused("discover", corpora[0], "-o", out, "--margins", str(tmp_path / "margins.json"))
    assert "margins.json holds no margins" in line
    assert "absent" in refused("layers", corpora[0], "-o", str(tmp_path / "absent" / "layers.json"))
    assert "absent" in refused("lens", "he is", "--report", str(tmp_path / "absent" / "lens.html"))
    assert "--feature" in refused("roles")
    assert not Path(out).exists()


@pytest.mark.usefixtures("tiny")
def test_a_prompt_without_tokens_has_no_lens() -> None:
    assert "no tokens" in refused("lens", "")
