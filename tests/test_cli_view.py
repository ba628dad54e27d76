"""The command `sae-emotion view`: whose labels and which dashboards it shows, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import EMOTIONS, labelled
from test_browser_page import data_of
from test_cli import refused, run

from sae_emotion_plugin import models, plugin
from sae_emotion_plugin.dashboards.build import build_dashboards
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.feature_labels import FeatureLabel, labels_file, write_labels
from sae_emotion_plugin.files import sha256
from sae_emotion_plugin.registry import FOLDER_VARIABLE, Provenance, RegistryEntry, SaeRecord, write_entry

JOY, ANGER = EMOTIONS["joy"], EMOTIONS["anger"]


@pytest.fixture(scope="module")
def dashboards(bridge: Any, emotional_sae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dashboards")
    build_dashboards(bridge, emotional_sae, labelled(12, 0), folder, progress=False)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered dictionary whose release brings the label of one feature; beside it, `bare` has none."""
    folder = tmp_path / "registry"
    home = folder / "tiny"
    labels = home / labels_file("a")
    for path in (home / "a", labels.parent):
        path.mkdir(parents=True)
    (home / "a" / "cfg.json").write_text(json.dumps({"d_sae": 64}), encoding="utf-8")
    write_labels(labels, [FeatureLabel(JOY, ("joy",), "its own label", author="maintainers")])
    provenance = Provenance(sha256={labels_file("a"): sha256(labels)})
    write_entry(
        RegistryEntry("tiny", "tiny", (SaeRecord("a", "a", neuronpedia="m/0-x"),), provenance=provenance), folder
    )
    write_entry(RegistryEntry("bare", "tiny", (SaeRecord("a", "a"),)), folder)
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return "tiny"


def label_file(path: Path, *labels: FeatureLabel) -> Path:
    return write_labels(path, list(labels))


def test_the_labels_and_links_of_a_registered_dictionary_are_shown_with_given_dashboards(
    own: str, dashboards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    done = run("view", own, "-o", str(out), "--dashboards", str(dashboards))
    assert done.exit_code == 0, done.output
    assert done.stdout == f"1 labelled feature: {out}\n"
    (feature,) = data_of(out.read_text(encoding="utf-8"))["features"]
    assert feature["id"] == JOY and feature["labels"][0]["text"] == "its own label"
    assert feature["url"] == f"https://www.neuronpedia.org/m/0-x/{JOY}"
    words = [piece for piece in feature["texts"][0]["rows"][0]["tokens"] if isinstance(piece, list)]
    assert re.search(r"<dt>Tokens</dt><dd>\d+</dd>", out.read_text(encoding="utf-8"))
    assert any("joy" in word for word, _, _ in words)


def test_labels_of_several_files_are_shown_of_a_dictionary_that_is_not_registered(
    dashboards: Path, tmp_path: Path
) -> None:
    one = label_file(tmp_path / "one.jsonl", FeatureLabel(JOY, ("joy",), "gladness", author="one"))
    two = label_file(
        tmp_path / "two.jsonl",
        FeatureLabel(JOY, (), "the word itself", author="two"),
        FeatureLabel(ANGER, ("anger",), "wrath", author="two"),
    )
    out = tmp_path / "page.html"
    files = ("--labels", str(one), "--labels", str(two))
    done = run("view", "owner/repo:id", "-o", str(out), "--dashboards", str(dashboards), *files)
    assert done.exit_code == 0, done.output
    page = out.read_text(encoding="utf-8")
    features = data_of(page)["features"]
    assert [feature["id"] for feature in features] == sorted([JOY, ANGER])
    texts = {label["text"] for feature in features for label in feature["labels"]}
    assert texts == {"gladness", "the word itself", "wrath"} and "one, two" in page


def test_without_dashboards_small_ones_are_made_of_the_bundled_texts(
    own: str, bridge: Any, emotional_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda name: bridge)
    monkeypatch.setattr(plugin, "load_dictionary", lambda name: emotional_sae)
    monkeypatch.setattr(LabelledTexts, "bundled", lambda: labelled(4, 1))
    out = tmp_path / "page.html"
    done = run("view", own, "-o", str(out))
    assert done.exit_code == 0, done.output
    (feature,) = data_of(out.read_text(encoding="utf-8"))["features"]
    assert feature["facts"][0][0] == "Fires on" and feature["texts"]
    far = label_file(tmp_path / "far.jsonl", FeatureLabel(4096, (), "far"))
    assert "no feature 4096 (valid: 0 to 63)" in refused("view", own, "-o", str(out), "--labels", str(far))


def test_what_cannot_be_shown_is_refused_in_one_line(own: str, dashboards: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "page.html")
    assert "no-such" in refused("view", "no-such", "-o", out)
    assert "there is no folder" in refused("view", own, "-o", str(tmp_path / "absent" / "page.html"))
    assert "bare has no labels" in refused("view", "bare", "-o", out)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl holds no labels" in refused("view", "no-such", "-o", out, "--labels", str(empty))
    assert "absent.jsonl" in refused("view", own, "-o", out, "--labels", str(tmp_path / "absent.jsonl"))
    assert "absent" in refused("view", own, "-o", out, "--dashboards", str(tmp_path / "absent"))
    assert "holds no dashboards" in refused("view", own, "-o", out, "--dashboards", str(tmp_path))
    far = label_file(tmp_path / "far.jsonl", FeatureLabel(4096, (), "far"))
    line = refused("view", own, "-o", out, "--dashboards", str(dashboards), "--labels", str(far))
    assert "no feature 4096 (valid: 0 to 63)" in line
    assert not Path(out).exists()
