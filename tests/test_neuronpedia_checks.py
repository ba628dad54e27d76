import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_dashboards import planted_dashboards
from test_neuronpedia_export import LABELS, PATH, SOURCE, VECTOR

from sae_emotion_plugin.publishing.neuronpedia_checks import check_export
from sae_emotion_plugin.publishing.neuronpedia_export import export_neuronpedia
from sae_emotion_plugin.publishing.neuronpedia_tables import read_rows, row_problems

FILES = {
    **{name: f"{name}/batch-0.jsonl.gz" for name in ("features", "activations", "explanations")},
    **{name: f"{name}.jsonl" for name in ("release", "model", "sourceset", "source")},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound") / "np"
    export_neuronpedia(planted_dashboards(), LABELS, SOURCE, folder, vectors=[VECTOR])
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def export(sound: dict[str, bytes], tmp_path: Path) -> Path:
    for name, data in sound.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def changed(export: Path, name: str, change: Callable[[dict[str, Any]], object], row: int = 0) -> str:
    """The only problem after `change` was made to one row."""
    path = export / PATH / FILES[name]
    rows = list(read_rows(path))
    change(rows[row])
    write(path, "".join(json.dumps(one) + "\n" for one in rows))
    problems = check_export(export).problems
    assert problems, name
    return " | ".join(problems)


def test_a_sound_export_has_no_problem_and_its_rows_are_counted(export: Path) -> None:
    found = check_export(export)
    assert found.problems == ()
    assert [(one.source_id, one.features) for one in found.sources] == [
        ("0-emotion-res-8", 8),
        ("1-emotion-res-8-vectors", 1),
    ]


def longer(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda row: row[key].append(row[key][-1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features", lambda row: row.pop("hasVector"), "differ from the first line's: hasVector"),
        ("features", lambda row: row.pop("index"), "index is missing"),
        ("features", lambda row: row.update(extra=1), "unknown key 'extra'"),
        ("features", lambda row: row.update(index=0), "index is 0; valid: text"),
        ("features", lambda row: row.update(index="00"), "index is '00'"),
        ("features", lambda row: row.update(index="2"), "feature 2 stands twice"),
        ("features", lambda row: row.update(modelId="other"), "modelId is 'other'; valid: 'tiny-2l'"),
        ("features", lambda row: row.update(layer="0"), "layer is '0'"),
        ("features", lambda row: row.update(sourceSetName=None), "sourceSetName is None"),
        ("features", lambda row: row.update(creatorId="cljgamm90000076zdchicy6zj"), "creatorId is 'clj"),
        ("features", lambda row: row.update(frac_nonzero=1.5), "frac_nonzero is 1.5"),
        ("features", lambda row: row.update(frac_nonzero=0), "one is 0"),
        ("features", lambda row: row.update(frac_nonzero=float("nan")), "NaN is not JSON"),
        ("features", lambda row: row.update(maxActApprox=99.0), "maxActApprox is 99.0, its activations reach"),
        ("features", lambda row: row.update(correlated_neurons_indices=[1.0, 2.0]), "valid: int[]"),
        ("features", lambda row: row.update(hasVector=True), "all three or none"),
        ("features", lambda row: row.update(createdAt="now"), "createdAt is 'now'; valid: date"),
        ("features", longer("pos_str"), "pos_str and pos_values differ in length"),
        ("features", longer("neg_values"), "neg_str and neg_values differ in length"),
        ("features", longer("neuron_alignment_l1"), "neuron_alignment_indices and neuron_alignment_l1"),
        ("features", lambda row: row["freq_hist_data_bar_values"].reverse(), "not ascending at equal distances"),
        ("features", lambda row: row["logits_hist_data_bar_values"].__setitem__(0, -99), "not ascending at equal"),
        ("features", lambda row: row["freq_hist_data_bar_heights"].__setitem__(0, -1), "negative count"),
        ("activations", lambda row: row["tokens"].pop(), "11 tokens and 12 values"),
        ("activations", lambda row: row.update(tokens=[], values=[]), "0 tokens and 0 values"),
        ("activations", lambda row: row["tokens"].__setitem__(0, "\ud83d"), "tokens is"),
        ("activations", lambda row: row["tokens"].__setitem__(0, "a\0"), "\\u0000"),
        ("activations", lambda row: row.update(maxValue=row["maxValue"] + 1), "does not agree with the values"),
        ("activations", lambda row: row.update(maxValueTokenIndex=row["maxValueTokenIndex"] - 1), "does not agree"),
        ("activations", lambda row: row.update(maxValueTokenIndex=99), "does not agree"),
        ("activations", lambda row: row.update(minValue=-1), "minValue is -1"),
        ("activations", lambda row: row["values"].__setitem__(row["values"].index(0), -0.5), "a value is -0.5"),
        ("activations", lambda row: row.update(binMax=row["maxValue"] / 2), "outside its interval"),
        ("activations", lambda row: row.update(binMin=None), "all three or none"),
        ("activations", lambda row: row.update(binContains=2), "binContains is 2"),
        ("activations", lambda row: row.update(qualifyingTokenIndex=12), "qualifyingTokenIndex is 12"),
        ("activations", lambda row: row.update(dfaTargetIndex=0), "dfaTargetIndex"),
        ("activations", lambda row: row.update(index="77"), "there is no feature '77'"),
        ("activations", lambda row: row.update(creatorId="x"), "creatorId is 'x'"),
        ("explanations", lambda row: row.update(index="77"), "there is no feature '77'"),
        ("explanations", lambda row: row.update(embedding=[0.0] * 255), "embedding is"),
        ("explanations", lambda row: row.update(description=" "), "description has 0 characters"),
        ("explanations", lambda row: row.update(description="x" * 513), "description has 513"),
        ("explanations", lambda row: row.update(typeName="unknown"), "typeName is 'unknown'"),
        ("explanations", lambda row: row.update(explanationModelName="gpt"), "explanationModelName is 'gpt'"),
        ("release", lambda row: row.update(visibility="PRIVATE"), "visibility is 'PRIVATE'"),
        ("release", lambda row: row.update(visibility="public"), "visibility is 'public'"),
        ("release", lambda row: row.update(creatorNameShort=None), "creatorNameShort is empty"),
        ("release", lambda row: row.update(urls=None), "urls is None; valid: text[]"),
        ("release", lambda row: row.update(name="other"), "releaseName"),
        ("model", lambda row: row.update(id="other"), "model.jsonl: id: is 'other'; valid: 'tiny-2l'"),
        ("model", lambda row: row.update(defaultSourceId="0-emotion-res-8"), "defaultSourceId is"),
        ("model", lambda row: row.update(layers=2.0), "layers is 2.0; valid: int"),
        ("sourceset", lambda row: row.update(type=""), "type is empty"),
        ("sourceset", lambda row: row.update(name="other"), "valid: LAYER-other"),
        ("source", lambda row: row.update(id="0-other"), "id: is '0-other'"),
        ("source", lambda row: row.update(hfFolderId=""), "hfFolderId is empty"),
        ("source", lambda row: row.update(hfFolderId="a/../b"), "hfFolderId is 'a/../b'"),
        ("source", lambda row: row.update(inferenceHosts=["x"]), "unknown key 'inferenceHosts'"),
    ],
)
def test_what_the_importer_would_drop_or_misread_is_found(
    export: Path, name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert message in changed(export, name, change)


@pytest.mark.parametrize("name", ["activations", "explanations"])
def test_an_id_that_stands_twice_is_found_over_all_files(export: Path, name: str) -> None:
    rows = list(read_rows(export / PATH / FILES[name]))
    write(export / PATH / name / "batch-1.jsonl.gz", json.dumps(rows[0]) + "\n")
    assert any(f"the id {rows[0]['id']!r} stands twice" in problem for problem in check_export(export).problems)


def test_activations_that_are_missing_are_found(export: Path) -> None:
    (export / PATH / FILES["activations"]).unlink()
    assert "maxActApprox" in check_export(export).problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n", "not valid JSON"),
        ("[1]\n", "no JSON object"),
        ("{\n", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_that_holds_no_rows_is_found(export: Path, text: str, message: str) -> None:
    write(export / PATH / FILES["features"], text)
    assert any(message in problem for problem in check_export(export).problems)


def test_a_file_that_was_cut_off_is_found(export: Path) -> None:
    path = export / PATH / FILES["activations"]
    path.write_bytes(path.read_bytes()[:-30])
    assert any("cannot be read to its end" in problem for problem in check_export(export).problems)


def test_missing_files_folders_and_too_many_files_are_found(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (export / "v1/config/eval_type.jsonl").unlink()
    (export / PATH / "model.jsonl").unlink()
    monkeypatch.setattr("sae_emotion_plugin.publishing.neuronpedia_checks.MOST_FILES", 0)
    found = " | ".join(check_export(export).problems)
    assert "config/eval_type.jsonl: is missing" in found
    assert "model.jsonl: is missing" in found
    assert "1 files; the importer sees 0" in found
    assert "no folder of a model with a source" in check_export(export / "nowhere").problems[-1]


def test_a_folder_of_another_name_than_its_source_is_found(export: Path) -> None:
    (export / PATH).rename(export / "v1/tiny-2l/9-emotion-res-8")
    assert any("id: is '0-emotion-res-8'; valid: '9-emotion-res-8'" in one for one in check_export(export).problems)


def test_problems_are_bounded(export: Path) -> None:
    rows = list(read_rows(export / PATH / FILES["activations"]))
    write(export / PATH / FILES["activations"], "".join(json.dumps({**row, "creatorId": 1}) + "\n" for row in rows))
    assert len(check_export(export).problems) == 50


def test_whole_numbers_are_told_from_numbers_and_truth_values() -> None:
    row = {"name": "x", "displayName": "x", "description": "x", "outputSchema": {}, "featured": 1}
    assert row_problems("eval_type", row) == ("featured is 1; valid: bool",)
    assert row_problems("eval_type", {**row, "featured": True}) == ()
