import errno
import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_dashboards import DEAD, planted_dashboards

from sae_emotion_plugin.feature_labels import FeatureLabel
from sae_emotion_plugin.publishing import neuronpedia_export
from sae_emotion_plugin.publishing.neuronpedia_checks import check_export
from sae_emotion_plugin.publishing.neuronpedia_export import export_neuronpedia
from sae_emotion_plugin.publishing.neuronpedia_source import NeuronpediaModel, NeuronpediaSource
from sae_emotion_plugin.publishing.neuronpedia_tables import mended, read_rows, rounded, row_id, write_rows

SOURCE = NeuronpediaSource(
    model=NeuronpediaModel("tiny-2l", layers=2, dimension=4, hf_id="owner/tiny"),
    layer=0,
    set_name="emotion-res-8",
    release="tiny-emotion",
    creator="A. Person",
    description="Emotion features of a tiny model",
    created_at="2026-01-31T12:00:00+09:00",
    hf_repo_id="owner/tiny-emotion",
    hf_folder="blocks.0.hook_resid_post",
)
LABELS = (
    FeatureLabel(0, ("joy",), "joy", {"auroc": 0.9, "q": 0.001}, "sae-emotion discover", "1", "A. Person"),
    FeatureLabel(2, ("anger", "fear"), "  anger or fear" + "!" * 600, {}, "by hand", "1", "B. Other"),
    FeatureLabel(2, ("anger",), "anger", {}, "sae-emotion discover", "1", "A. Person"),
)
VECTOR = {
    "label": "joy x 2",
    "model_id": "tiny-2l",
    "layer_num": 1,
    "hook_type": "hook_resid_pre",
    "vector": [0.5, -0.25, 0.0, 1 / 3],
    "default_steer_strength": 1.0,
}
PATH = Path("v1") / "tiny-2l" / "0-emotion-res-8"


def table(folder: Path, name: str, source: Path = PATH) -> list[dict[str, Any]]:
    return list(read_rows(folder / source / name))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export_neuronpedia(planted_dashboards(), LABELS, SOURCE, tmp_path / "np", vectors=[VECTOR]).folder


def test_an_export_states_its_rows_and_its_size(tmp_path: Path) -> None:
    dashboards = planted_dashboards()
    export = export_neuronpedia(dashboards, LABELS, SOURCE, tmp_path / "np", vectors=[VECTOR])
    rows = sum(len(group.sequences) for one in dashboards for group in one.groups)
    own, vectors = export.sources
    assert (own.source_id, own.features, own.activations, own.explanations) == ("0-emotion-res-8", 8, rows, 3)
    assert (vectors.source_id, vectors.features, vectors.activations) == ("1-emotion-res-8-vectors", 1, 0)
    assert export.n_bytes == sum(map(len, content(export.folder).values()))
    assert export.to_dict()["bytes_per_feature"] == pytest.approx(export.n_bytes / 9, abs=0.1)
    assert check_export(export.folder).problems == ()


def test_a_feature_row_says_what_its_dashboard_says(exported: Path) -> None:
    dashboards = planted_dashboards()
    for row, one in zip(table(exported, "features"), dashboards, strict=True):
        assert row["index"] == str(one.feature)
        assert row["maxActApprox"] == pytest.approx(one.maximum, rel=5e-4)
        assert row["frac_nonzero"] == one.n_active / dashboards.n_tokens
        assert row["hasVector"] is False and row["vector"] == [] and row["hookName"] is None
        assert row["vectorDefaultSteerStrength"] == (row["maxActApprox"] or 10)
        assert sum(row["freq_hist_data_bar_heights"]) == one.n_active
        assert row["pos_values"] == pytest.approx([effect.effect for effect in one.promoted], rel=5e-4)
        assert row["correlated_neurons_indices"] == [neuron.index for neuron in one.correlated_neurons]
    alive = {row["index"] for row in table(exported, "activations")}
    assert alive == {str(index) for index in range(8) if index not in DEAD}


def test_activations_agree_with_the_dashboard_and_stay_in_their_intervals(exported: Path) -> None:
    rows = iter(table(exported, "activations"))
    for one in planted_dashboards():
        for group in one.groups:
            for sequence in group.sequences:
                row = next(rows)
                assert row["values"] == pytest.approx(sequence.values, rel=5e-4)
                assert [value == 0 for value in row["values"]] == [value == 0 for value in sequence.values]
                assert row["tokens"] == [mended(token) for token in sequence.tokens]
                assert row["values"][row["maxValueTokenIndex"]] == max(row["values"]) == row["maxValue"]
                assert row["binMin"] <= row["maxValue"] <= row["binMax"]
                assert (row["binMin"], row["binContains"]) == (-1, -1) if group.lowest is None else row["binMin"] >= 0
    assert next(rows, None) is None


def test_every_label_is_an_explanation_and_no_one_is_lost(exported: Path) -> None:
    rows = table(exported, "explanations")
    assert sorted((row["index"], row["description"][:13]) for row in rows) == [
        ("0", "joy"),
        ("2", "anger"),
        ("2", "anger or fear"),
    ]
    assert {row["typeName"] for row in rows} == {row["explanationModelName"] for row in rows} == {None}
    assert max(len(row["description"]) for row in rows) == 512
    notes = {json.loads(row["notes"])["author"]: json.loads(row["notes"]) for row in rows}
    assert notes["A. Person"]["version"] == "1"
    assert notes["B. Other"]["emotions"] == ["anger", "fear"]


def test_a_self_hosted_export_brings_the_rows_that_its_labels_name(tmp_path: Path) -> None:
    folder = export_neuronpedia(planted_dashboards(), LABELS, SOURCE, tmp_path / "np", self_hosted=True).folder
    types = {row["name"] for row in table(folder, "explanation_type.jsonl", Path("v1/config"))}
    models = {row["name"] for row in table(folder, "explanation_model_type.jsonl", Path("v1/config"))}
    rows = table(folder, "explanations")
    assert {row["typeName"] for row in rows} == types == {"by hand", "sae-emotion discover"}
    assert {row["explanationModelName"] for row in rows} == models
    (folder / "v1/config/explanation_type.jsonl").write_text("")
    assert any("typeName is 'by hand'" in problem for problem in check_export(folder).problems)


def test_vectors_are_a_source_of_their_own_with_their_default_strength(exported: Path) -> None:
    path = Path("v1/tiny-2l/1-emotion-res-8-vectors")
    (row,) = table(exported, "features", path)
    assert row["hasVector"] is True
    assert row["vector"] == pytest.approx(VECTOR["vector"], rel=1e-6)
    assert (row["hookName"], row["vectorLabel"]) == ("blocks.1.hook_resid_pre", "joy x 2")
    assert row["vectorDefaultSteerStrength"] == 1
    assert table(exported, "sourceset.jsonl", path)[0]["name"] == "emotion-res-8-vectors"
    with pytest.raises(ValueError, match="3 numbers; tiny-2l has 4"):
        export_neuronpedia(
            planted_dashboards(), (), SOURCE, exported.with_name("b"), vectors=[{**VECTOR, "vector": [1.0, 2.0, 3.0]}]
        )


def test_every_line_of_a_table_has_the_same_keys(exported: Path) -> None:
    for name in ("features", "activations", "explanations"):
        assert len({tuple(row) for row in table(exported, name)}) == 1
    own, vectors = table(exported, "features"), table(exported, "features", Path("v1/tiny-2l/1-emotion-res-8-vectors"))
    assert own[0].keys() == vectors[0].keys()


def test_the_same_input_and_time_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [
        export_neuronpedia(planted_dashboards(), labels, SOURCE, tmp_path / name, vectors=[VECTOR]).folder
        for name, labels in (("a", LABELS), ("b", LABELS[::-1]))
    ]
    assert content(folders[0]) == content(folders[1])
    later = export_neuronpedia(
        planted_dashboards(), LABELS, replace(SOURCE, created_at="2026-02-01"), tmp_path / "c", vectors=[VECTOR]
    ).folder
    ids = [[row["id"] for row in table(folder, "activations")] for folder in (folders[0], later)]
    assert content(later) != content(folders[0])
    assert ids[0] == ids[1]


def test_ids_are_unique_over_exports_of_several_dictionaries(tmp_path: Path) -> None:
    ids: list[str] = []
    for number, source in enumerate((SOURCE, replace(SOURCE, layer=1), replace(SOURCE, suffix="b"))):
        folder = export_neuronpedia(planted_dashboards(), LABELS, source, tmp_path / str(number)).folder
        path = Path("v1/tiny-2l") / source.id
        ids += [row["id"] for name in ("activations", "explanations") for row in table(folder, name, path)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"c[0-9a-z]{24}", one) for one in ids)


def test_what_a_database_refuses_in_tokens_and_labels_is_replaced(exported: Path) -> None:
    raw = b"".join(gzip.decompress(path.read_bytes()) for path in exported.rglob("*.gz"))
    assert b"\\u0000" not in raw and b"\\ud83d" not in raw
    tokens = {token for row in table(exported, "activations") for token in row["tokens"]}
    assert tokens <= {" joy", "ful", "\n", "<b>", " naïve", "感", "\ufffd", ' "quoted"', "a\ufffdb", "😀"}
    assert {"a\ufffdb", "😀"} <= tokens
    assert [mended(text) for text in ("\ud83d", "\ude00\ud83d", "x\\u0000y")] == ["\ufffd", "\ufffd\ufffd", "x\ufffdy"]


def test_numbers_that_are_not_finite_stop_an_export_and_leave_nothing(tmp_path: Path) -> None:
    whole = planted_dashboards()
    for name in ("promoted_effects", "logit_ends", "entry_values", "related_neurons_pearson"):
        broken = np.array(getattr(whole, name))
        broken.flat[0] = np.inf if name == "logit_ends" else np.nan
        with pytest.raises(ValueError, match="finite"):
            export_neuronpedia(replace(whole, **{name: broken}), (), SOURCE, tmp_path / "np")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_stop_or_a_full_disk_leaves_nothing_or_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    earlier = export_neuronpedia(planted_dashboards(), LABELS, SOURCE, tmp_path / "earlier").folder
    before = content(earlier)

    def write(path: Path, rows: Any) -> Path:
        if path.parent.name == "explanations":
            raise error
        return write_rows(path, rows)

    monkeypatch.setattr(neuronpedia_export, "write_rows", write)
    for folder, overwrite in ((tmp_path / "np", False), (earlier, True)):
        with pytest.raises(type(error)):
            export_neuronpedia(planted_dashboards(seed=1), LABELS, SOURCE, folder, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    assert content(earlier) == before


def test_an_unsound_export_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = neuronpedia_export.feature_row

    def row(source: NeuronpediaSource, dashboard: Any) -> dict[str, Any]:
        return {**made(source, dashboard), "frac_nonzero": 2.0}

    monkeypatch.setattr(neuronpedia_export, "feature_row", row)
    with pytest.raises(ValueError, match=r"features/batch-0.jsonl.gz, line 1: frac_nonzero is 2.0"):
        export_neuronpedia(planted_dashboards(), LABELS, SOURCE, tmp_path / "np")
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_kept(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overwrite"):
        export_neuronpedia(planted_dashboards(), (), SOURCE, exported)
    export_neuronpedia(planted_dashboards(), (), SOURCE, exported, overwrite=True)
    assert table(exported, "explanations") == []
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something else"):
        export_neuronpedia(planted_dashboards(), (), SOURCE, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export_neuronpedia(planted_dashboards(), (), SOURCE, tmp_path / "nowhere" / "np")


def test_a_label_of_a_feature_outside_the_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"feature 8 \(valid: 0 to 7\)"):
        export_neuronpedia(planted_dashboards(), [replace(LABELS[0], feature=8)], SOURCE, tmp_path / "np")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set_name": "Emotion"}, "set name is 'Emotion'"),
        ({"set_name": "emotion__res"}, "single hyphens"),
        ({"set_name": "neurons"}, "neurons"),
        ({"layer": -1}, "layer is -1"),
        ({"suffix": "a/b"}, "suffix 'a/b'"),
        ({"release": "../x"}, "release is '../x'"),
        ({"hf_folder": ""}, "FOLDER not empty"),
        ({"hf_folder": "../x"}, "OWNER/REPO:FOLDER"),
        ({"hf_repo_id": "tiny"}, "tiny:blocks"),
        ({"visibility": "PRIVATE"}, "hides everything"),
        ({"description": " "}, "description is empty"),
        ({"created_at": "yesterday"}, "yesterday"),
    ],
)
def test_what_neuronpedia_would_misread_is_refused_by_name(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SOURCE, **change)


def test_a_model_needs_a_name_and_a_size() -> None:
    with pytest.raises(ValueError, match="Tiny"):
        NeuronpediaModel("Tiny Model", layers=2, dimension=4)
    with pytest.raises(ValueError, match="layers is 0"):
        NeuronpediaModel("tiny", layers=0, dimension=4)


def test_times_are_written_in_utc() -> None:
    assert SOURCE.date == "2026-01-31T03:00:00.000Z"
    assert replace(SOURCE, created_at="2026-01-31").date == "2026-01-31T00:00:00.000Z"


def test_rounding_keeps_order_zero_and_what_is_small() -> None:
    values = np.array([0, 1e-30, 0.12344, 0.12346, 123456.0])
    assert rounded("x", values) == [0, 1e-30, 0.1234, 0.1235, 123500.0]
    assert json.dumps(rounded("x", values)[:1]) == "[0]"
    with pytest.raises(ValueError, match="x is inf"):
        rounded("x", np.array([1.0, np.inf]))


def test_an_id_depends_on_all_that_it_is_of() -> None:
    assert row_id("a", 1) == row_id("a", 1)
    assert len({row_id("a", 1), row_id("a", "1"), row_id("a1"), row_id(["a", 1]), row_id("a", 1, None)}) == 5


def test_many_files_are_avoided_by_larger_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia_export, "FEATURES_PER_FILE", 1)
    monkeypatch.setattr(neuronpedia_export, "MOST_FILES", 3)
    folder = export_neuronpedia(planted_dashboards(), LABELS, SOURCE, tmp_path / "np").folder
    assert len(list((folder / PATH / "features").iterdir())) == 3
    assert [row["index"] for row in table(folder, "features")] == [str(index) for index in range(8)]


def test_batches_without_activations_have_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia_export, "FEATURES_PER_FILE", 1)
    folder = export_neuronpedia(planted_dashboards(), LABELS, SOURCE, tmp_path / "np").folder
    names = {path.name for path in (folder / PATH / "activations").iterdir()}
    assert names == {f"batch-{index}.jsonl.gz" for index in range(8) if index not in DEAD}
