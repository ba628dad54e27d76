import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from sae_emotion_plugin import registry
from sae_emotion_plugin.cli import main
from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.feature_labels import FeatureLabel, write_labels
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe

RECIPE = TrainingRecipe("mine", "layer-0", "tiny", "blocks.0.hook_resid_post", (TextSource("t.txt"),), 8, 2, 1.0, 0.1)
SCORES = FeatureScores({}, (FeatureScore("joy", 3, 0.9, 0.85, 0.001, 0.001, 0.5, 0.1),))


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `train` writes it, and an empty registry of our own."""
    (tmp_path / "own").mkdir()
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path / "own"))
    folder = tmp_path / "trained"
    folder.mkdir()
    provenance = {"model": {"name": "tiny"}, "texts": [{"path": "t.txt", "licence": "CC0"}]}
    contents = {
        "cfg.json": json.dumps({"d_sae": 8}),
        "sae_weights.safetensors": "weights",
        "recipe.yaml": RECIPE.to_yaml(),
        "report.json": json.dumps({"l0": 2.0, "fvu": 0.25}),
        "provenance.json": json.dumps(provenance),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.stderr.strip()


def test_a_trained_folder_is_added_labelled_shown_exported_and_removed(trained: Path, tmp_path: Path) -> None:
    scores, labels = tmp_path / "scores.json", tmp_path / "labels.jsonl"
    SCORES.save(scores)
    write_labels(labels, [FeatureLabel(7, ("anger",), "rage", {}, "by hand", "1", "grace")])
    assert run("registry", "add", trained, "--scores", scores, "--author", "ada").stdout == "added mine/layer-0\n"
    assert json.loads(run("registry", "add", "mine", "--labels", labels, "--json").stdout) == ["mine/layer-0"]
    shown = json.loads(run("registry", "show", "mine", "--json").stdout)
    assert shown["labels"] == {"number": 2, "authors": ["ada", "grace"]}
    assert "mine: sound" in run("registry", "check").stdout
    assert yaml.safe_load(run("registry", "export", "mine", "--repo", "me/mine").stdout)["mine"]["repo_id"] == "me/mine"
    listed = run("publish", "hub", "mine", "me/mine", "--dry-run").stdout
    assert "labels/layer-0.jsonl" in listed and "README.md" in listed and listed.startswith("me/mine: 9 files")
    assert json.loads(run("publish", "hub", trained, "me/mine", "--dry-run", "--json").stdout)["repo_id"] == "me/mine"
    assert run("registry", "remove", "mine/layer-0").stdout == "removed mine/layer-0\n"
    assert "mine" not in run("registry", "list").stdout


def test_another_name_lets_two_releases_stand_side_by_side(trained: Path) -> None:
    run("registry", "add", trained)
    run("registry", "add", trained, "--as", "yours")
    assert {"mine/layer-0", "yours/layer-0"} <= {
        row["name"] for row in json.loads(run("registry", "list", "--json").stdout)
    }


def test_what_cannot_be_added_or_removed_is_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    run("registry", "add", trained)
    before = {path: path.read_bytes() for path in (tmp_path / "own").rglob("*") if path.is_file()}
    (trained / "sae_weights.safetensors").write_text("others")
    assert "has another dictionary 'layer-0'" in refused("registry", "add", trained)
    assert "came with the plugin" in refused("registry", "add", trained, "--as", "gemma-3-270m-emotion")
    assert "release is '../x'" in refused("registry", "add", trained, "--as", "../x")
    assert "unknown release 'ghost'" in refused("registry", "add", "ghost")
    assert "--revision v1 is for a repository" in refused("registry", "add", trained, "--revision", "v1")
    assert "needs --author NAME" in refused("registry", "add", trained, "--scores", "x.json")
    assert "there is no file of labels x.jsonl" in refused("registry", "add", trained, "--labels", "x.jsonl")
    assert "no release 'gemma-3-270m-emotion' in" in refused("registry", "remove", "gemma-3-270m-emotion")
    assert "valid: --repo owner/name" in refused("registry", "export", "mine")
    assert "repository is 'a/b/c'" in refused("publish", "hub", "mine", "a/b/c", "--dry-run")
    assert {path: path.read_bytes() for path in (tmp_path / "own").rglob("*") if path.is_file()} == before
