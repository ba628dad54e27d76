import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import HOOK

from sae_emotion_plugin import quickstart as module
from sae_emotion_plugin.discovery import emotion_features
from sae_emotion_plugin.discovery.scores import LATER_FIELDS, FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.generation.records import Generations
from sae_emotion_plugin.quickstart import QuickstartResult, quickstart

WORD = {"joy": "joy", "anger": "anger", "sadness": "sad", "fear": "fear"}
OPENINGS = {
    "neutral": ("he is", "such a", "a w1", "he w2"),
    "unpleasant": ("sad w3", "fear is"),
    "anger": ("w4 is",),
    "sadness": ("sad w5",),
}
SCORE_FIELDS = ["emotion", "feature", "auroc", "held_out_auroc", "p", "q", "rate_in", "rate_out"]
SCORE_FIELDS += ["promotes", "suppresses", *LATER_FIELDS]
GENERATION_FIELDS = ["prompt", "emotion", "features", "mode", "amount", "unit", "temperature", "seed", "part"]
GENERATION_FIELDS += ["baseline_text", "text", "baseline_valence", "valence", "baseline_nll", "nll"]
GENERATION_FIELDS += ["degenerate", "baseline_degenerate"]


def corpus(language: str = "en") -> LabelledTexts:
    assert language == "en"
    rng = np.random.default_rng(4)
    pairs: list[tuple[str, tuple[str, ...]]] = []
    for _ in range(48):
        for emotion, word in WORD.items():
            others = [f"w{n}" for n in rng.permutation(50)[:5]]
            pairs.append((" ".join([*others[:2], word, *others[2:]]), (emotion,)))
    texts, emotions = zip(*pairs, strict=True)
    return LabelledTexts(texts, emotions, tuple(str(n) for n in range(len(pairs))), "en")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LabelledTexts", SimpleNamespace(bundled=corpus))
    monkeypatch.setattr(module, "openings", lambda kind: OPENINGS[kind])
    monkeypatch.setattr(module, "AMOUNTS", (0.5, 1.5))
    monkeypatch.setattr(module, "CHOOSE_SEEDS", (0, 1))
    monkeypatch.setattr(module, "REPORT_SEEDS", (0, 1))
    monkeypatch.setattr(module, "NEW_TOKENS", 4)
    monkeypatch.setattr(module, "CONSIDERED", 5)
    monkeypatch.setattr(module, "CANDIDATES", 4)
    monkeypatch.setattr(module, "FEATURES_PER_EMOTION", 2)

    def version(name: str) -> str:
        """The tests also run beside a package that is not installed, which has no version."""
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "0"

    monkeypatch.setattr(emotion_features, "metadata", SimpleNamespace(version=version))


RECOMMENDED: dict[str, float | None] = {"anger": None, "joy": 0.5, "sadness": 1.5}


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"out": tmp_path_factory.mktemp("quickstart") / "new" / "report"}


@pytest.fixture
def result(_shared: dict[str, Any], bridge: Any, planted_sae: Any) -> QuickstartResult:
    """One run for all tests, made within the small settings above."""
    if "result" not in _shared:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "recommend", lambda rows, signs: RECOMMENDED)
            _shared["result"] = quickstart(_shared["out"], model=bridge, dictionary=planted_sae, progress=False)
    return _shared["result"]


def test_three_files_are_written_and_no_other(result: QuickstartResult) -> None:
    assert sorted(path.name for path in result.page.parent.iterdir()) == [
        "generations.json",
        "index.html",
        "scores.json",
    ]
    page = result.page.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html") or page.startswith("<!DOCTYPE html")
    for emotion in module.SIGNS:
        assert emotion in page


def test_the_scores_file_has_the_documented_fields(result: QuickstartResult) -> None:
    data = json.loads((result.page.parent / "scores.json").read_text(encoding="utf-8"))
    assert list(data) == ["meta", "rows"]
    assert all(list(row) == SCORE_FIELDS for row in data["rows"])
    assert {row["emotion"] for row in data["rows"]} == set(WORD)
    assert all(0 <= row["held_out_auroc"] <= 1 and row["promotes"] for row in data["rows"])
    assert data["meta"]["hook_name"] == HOOK
    assert FeatureScores.load(result.page.parent / "scores.json") == result.scores


def test_the_generations_file_has_the_documented_fields(result: QuickstartResult) -> None:
    data = json.loads((result.page.parent / "generations.json").read_text(encoding="utf-8"))
    assert list(data) == ["meta", "rows"]
    assert data["meta"]["recommended"] == RECOMMENDED
    assert all(list(row) == GENERATION_FIELDS for row in data["rows"])
    assert {row["part"] for row in data["rows"]} == {"choose", "report", "demo"}
    assert {(row["unit"], row["mode"]) for row in data["rows"]} == {("residual_norm", "add")}
    assert not any(row["text"].startswith(row["prompt"]) for row in data["rows"])
    assert Generations.load(result.page.parent / "generations.json") == result.generations


def test_each_emotion_is_steered_with_the_best_of_its_candidates(result: QuickstartResult) -> None:
    meta = result.generations.meta
    for emotion, sign in module.SIGNS.items():
        considered = [row.feature for row in result.scores.top(emotion, 5)]
        tried = {one["feature"]: sign * one["valence_change"] for one in meta["screening"] if one["emotion"] == emotion}
        candidates = list(tried)
        assert len(set(candidates)) == 4 and set(candidates) <= set(considered)
        kept = meta["features"][emotion]
        assert len(set(kept)) == 2 and set(kept) <= set(candidates)
        assert min(tried[feature] for feature in kept) >= max(tried[f] for f in candidates if f not in kept)
        assert {row.features for row in result.generations.rows if row.emotion == emotion} == {tuple(kept)}


def test_the_openings_of_the_report_had_no_part_in_the_choice(result: QuickstartResult) -> None:
    def prompts(emotion: str, part: str) -> set[str]:
        return {row.prompt for row in result.generations.rows if (row.emotion, row.part) == (emotion, part)}

    for emotion in ("joy", "sadness"):
        assert not prompts(emotion, "choose") & prompts(emotion, "report")
    for emotion in module.SIGNS:
        lifts = {"w4 is", "sad w5"} if emotion == "joy" else set()
        assert prompts(emotion, "choose") == {"he is", "a w1"} | lifts
    assert prompts("joy", "report") == {"such a", "he w2", *OPENINGS["unpleasant"]}
    assert prompts("sadness", "report") == {"such a", "he w2"}
    assert prompts("anger", "demo") == {"he is such a"}


def test_every_amount_is_tried_and_only_the_recommended_one_reported(result: QuickstartResult) -> None:
    rows = result.generations.rows
    for emotion, amount in RECOMMENDED.items():
        tried = {
            (row.amount, row.temperature, row.seed) for row in rows if (row.emotion, row.part) == (emotion, "choose")
        }
        assert tried == {(a, t, s) for a in (0.5, 1.5) for t, s in ((0.7, 0), (0.7, 1))}
        assert {row.amount for row in rows if (row.emotion, row.part) == (emotion, "demo")} == {0.5, 1.5}
        reported = {row.amount for row in rows if (row.emotion, row.part) == (emotion, "report")}
        assert reported == (set() if amount is None else {amount})


def test_the_findings_stand_for_every_kind_of_opening_and_decoding(result: QuickstartResult) -> None:
    found = [(one.emotion, one.setting, one.amount) for one in result.findings]
    assert found == [
        ("anger", "", None),
        ("joy", "2 neutral openings, sampled", 0.5),
        ("joy", "2 neutral openings, greedy", 0.5),
        ("joy", "2 unpleasant openings, sampled", 0.5),
        ("joy", "2 unpleasant openings, greedy", 0.5),
        ("sadness", "2 neutral openings, sampled", 1.5),
        ("sadness", "2 neutral openings, greedy", 1.5),
    ]
    lines = result.summary().splitlines()
    assert len(lines) == 7 and lines[0].startswith("anger: no amount is recommended")
    assert lines[1].startswith("joy at 0.5, 2 neutral openings, sampled: valence ")


def test_the_amounts_are_chosen_by_the_rows_of_the_choosing_half_alike_in_every_run(
    result: QuickstartResult, bridge: Any, planted_sae: Any, tmp_path: Path
) -> None:
    told: list[str] = []
    again = quickstart(tmp_path, model=bridge, dictionary=planted_sae, progress=False, say=told.append)
    assert again.scores == result.scores
    rows, before = ([r for r in one.generations.rows if r.part == "choose"] for one in (again, result))
    assert rows == before
    assert again.generations.meta["recommended"] == module.recommend(rows, module.SIGNS)
    assert [line.split()[0] for line in told] == ["loading", "discovering", "steering"]
    assert "192 bundled texts" in told[1]


def test_a_model_or_dictionary_that_does_not_load_leaves_no_folder(
    bridge: Any, planted_sae: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cannot use a int as a model"):
        quickstart(tmp_path / "report", model=3, dictionary=planted_sae)
    with pytest.raises(ValueError, match="unknown dictionary 'no-such-thing'"):
        quickstart(tmp_path / "report", model=bridge, dictionary="no-such-thing")
    assert list(tmp_path.iterdir()) == []
