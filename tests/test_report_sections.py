from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HOOK, VOCABULARY

from sae_emotion_plugin import registry
from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evaluation import DictionaryReport
from sae_emotion_plugin.generation.records import Generation, Generations, Part
from sae_emotion_plugin.pages.report_content import Bounds, broken_bounds
from sae_emotion_plugin.pages.report_sections import (
    calibration_note,
    dictionary_metrics,
    dose_response_rows,
    findings_of,
    highlighted_texts,
    score_distributions,
)
from sae_emotion_plugin.registry import Provenance, RegistryEntry, SaeRecord
from sae_emotion_plugin.sparse_codes import SparseCodes

REPORT = DictionaryReport(
    n_documents=2,
    n_tokens=10,
    d_sae=4,
    fvu=0.25,
    fvu_without_largest_dimension=0.5,
    largest_dimension=1,
    largest_dimension_share=0.5,
    fvu_mean_over_dimensions=0.75,
    l0=2.0,
    dead=0,
    cross_entropy=3.0,
    cross_entropy_spliced=4.0,
    cross_entropy_mean_ablated=7.0,
    mean_norm=5.0,
)
WORDS = ("joy", "he", "is", "sad", "w1")
# Five texts of one to three words, with the code of feature 0 ("joy") and of feature 2 ("sadness") on each word.
TEXTS = {
    "a": (("joy",), ["joy", "he"], [4.0, 1.0], [0.0, 0.0]),
    "b": (("sadness",), ["sad"], [2.0], [3.0]),
    "c": ((), ["w1", "is", "w1"], [0.0, 5.0, 0.0], [0.0, 0.0, 1.0]),
    "d": (("joy", "sadness"), ["he", "joy"], [0.0, 3.0], [2.0, 4.0]),
    "e": ((), ["w1"], [0.0], [0.0]),
}


def codes() -> SparseCodes:
    rows = [
        (text, word, [(feature, value) for feature, value in ((0, joy), (2, sad)) if value])
        for text, (_, words, joys, sads) in enumerate(TEXTS.values())
        for word, joy, sad in zip(words, joys, sads, strict=True)
    ]
    return SparseCodes(
        values=np.array([value for *_, found in rows for _, value in found], dtype=np.float32),
        features=np.array([feature for *_, found in rows for feature, _ in found], dtype=np.int32),
        row_starts=np.cumsum([0, *(len(found) for *_, found in rows)]).astype(np.int64),
        text_index=np.array([text for text, *_ in rows], dtype=np.int32),
        token_ids=np.array([VOCABULARY[word] for _, word, _ in rows], dtype=np.int32),
        n_texts=len(TEXTS),
        d_sae=4,
        hook_name=HOOK,
    )


def texts() -> LabelledTexts:
    return LabelledTexts(
        tuple(" ".join(words) for _, words, *_ in TEXTS.values()),
        tuple(emotions for emotions, *_ in TEXTS.values()),
        tuple(TEXTS),
    )


def scores(pooling: str = "max") -> FeatureScores:
    rows = [("joy", 0), ("joy", 1), ("sadness", 2)]
    return FeatureScores({"pooling": pooling}, tuple(FeatureScore(e, f, 0.9, 0.8, 0.1, 0.1, 0.5, 0.1) for e, f in rows))


def test_distributions_are_the_pooled_codes_in_and_out_of_class() -> None:
    joy, sadness = score_distributions(scores(), codes(), texts())
    assert (joy.emotion, joy.feature, sadness.emotion, sadness.feature) == ("joy", 0, "sadness", 2)
    assert (list(joy.in_class), list(joy.out_class)) == ([4.0, 3.0], [2.0, 5.0, 0.0])
    assert (list(sadness.in_class), list(sadness.out_class)) == ([3.0, 4.0], [0.0, 1.0, 0.0])


def test_distributions_use_the_pooling_of_the_scores() -> None:
    joy, _ = score_distributions(scores("mean"), codes(), texts())
    assert list(joy.in_class) == [2.5, 1.5]
    assert list(joy.out_class) == pytest.approx([2.0, 5 / 3, 0.0])


def test_texts_on_which_a_feature_fires_most_are_shown_whatever_their_class(bridge: Any) -> None:
    shown = highlighted_texts(bridge, scores(), codes(), texts(), 2)
    assert [(one.emotion, one.feature, one.text_id) for one in shown] == [
        ("joy", 0, "c"),
        ("joy", 0, "a"),
        ("sadness", 2, "d"),
        ("sadness", 2, "b"),
    ]
    first = shown[0]
    assert list(first.tokens) == ["w1", "is", "w1"] and list(first.activations) == [0.0, 5.0, 0.0]


def test_texts_on_which_a_feature_is_silent_are_not_shown(bridge: Any) -> None:
    shown = highlighted_texts(bridge, scores(), codes(), texts(), 99)
    assert [one.text_id for one in shown if one.emotion == "joy"] == ["c", "a", "d", "b"]
    assert all(any(one.activations) for one in shown)


def generation(
    prompt: str, change: float, *, emotion: str = "joy", amount: float = 0.1, part: Part = "report", **more: Any
) -> Generation:
    row = Generation(
        prompt=prompt,
        emotion=emotion,
        features=(0,),
        mode="add",
        amount=amount,
        unit="residual_norm",
        temperature=0.7,
        seed=0,
        part=part,
        baseline_text="w1",
        text="w2",
        baseline_valence=0.1,
        valence=0.1 + change,
        baseline_nll=1.0,
        nll=1.0,
        degenerate=False,
        baseline_degenerate=False,
    )
    return replace(row, **more)


KINDS = {"neutral": ("a", "b"), "unpleasant": ("u", "v")}


def generations(*rows: Generation, **recommended: float | None) -> Generations:
    return Generations({"recommended": recommended}, rows)


def test_each_kind_of_opening_and_each_decoding_is_a_finding_of_its_own() -> None:
    found = findings_of(
        generations(
            generation("a", 0.4),
            generation("b", 0.6),
            generation("u", 0.8),
            generation("v", 0.8),
            generation("a", 0.1, temperature=0.0),
            generation("b", 0.1, temperature=0.0),
            joy=0.1,
        ),
        {"joy": 1},
        KINDS,
    )
    assert [one.setting for one in found] == [
        "2 neutral openings, sampled",
        "2 neutral openings, greedy",
        "2 unpleasant openings, sampled",
    ]
    first = found[0]
    assert (first.emotion, first.amount, first.expected, first.n) == ("joy", 0.1, "rise", 2)
    assert first.effect == pytest.approx(0.5) and first.perplexity_ratio == pytest.approx(1.0)
    assert first.low is not None and first.high is not None and first.low < 0.5 < first.high
    assert (first.degenerate_steered, first.degenerate_baseline) == (0.0, 0.0)
    assert found[1].effect == pytest.approx(0.1) and found[2].effect == pytest.approx(0.8)
    # Two openings that differ say little: the interval is wide. Two that agree have one without width.
    assert broken_bounds(first, Bounds()) == ("the interval includes 0",)
    assert broken_bounds(found[2], Bounds()) == ()


def test_only_rows_of_the_report_at_the_recommended_amount_are_findings() -> None:
    found = findings_of(
        generations(
            generation("a", 0.4),
            generation("a", 0.9, part="choose"),
            generation("a", 0.9, part="demo"),
            generation("a", 0.9, amount=0.2),
            generation("a", 0.9, emotion="fear"),
            joy=0.1,
        ),
        {"joy": 1},
        KINDS,
    )
    assert len(found) == 1 and found[0].effect == pytest.approx(0.4) and found[0].n == 1


def test_an_emotion_without_a_recommended_amount_is_a_finding_without_numbers() -> None:
    joy, anger = findings_of(generations(generation("a", 0.4), joy=0.1, anger=None), {"joy": 1, "anger": -1}, KINDS)
    assert joy.effect is not None
    assert (anger.emotion, anger.amount, anger.effect, anger.expected, anger.n) == ("anger", None, None, "fall", 0)
    assert "no amount is recommended" in broken_bounds(anger, Bounds())


def test_dose_response_leaves_out_the_demonstration_and_greedy_rows() -> None:
    rows = dose_response_rows(
        generations(
            generation("a", 0.4, part="choose"),
            generation("b", 0.6, part="choose"),
            generation("a", 0.3),
            generation("a", 0.9, part="demo"),
            generation("a", 0.9, amount=0.2, temperature=0.0),
        )
    )
    assert [(row.emotion, row.amount, row.part, row.n) for row in rows] == [
        ("joy", 0.1, "choose", 2),
        ("joy", 0.1, "report", 1),
    ]
    assert rows[0].valence_shift == pytest.approx(0.5) and rows[0].degenerate_share == 0
    assert rows[1].low is None


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "packaged_folder", lambda: tmp_path / "packaged")
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path / "own"))
    for name in ("packaged", "own"):
        (tmp_path / name).mkdir()
    return tmp_path / "own"


def test_a_registered_dictionary_brings_its_report(own: Path) -> None:
    (own / "tiny").mkdir()
    REPORT.save(own / "tiny" / "report.json")
    entry = RegistryEntry("tiny", "tiny", (SaeRecord("a", "a"),), provenance=Provenance(report="report.json"))
    registry.write_entry(entry, own)
    for name in ("tiny", "tiny/a", "tiny:a"):
        metrics = dictionary_metrics(name)
        assert metrics["fvu"] == 0.25 and metrics["loss_recovered"] == pytest.approx(0.75)


def test_any_other_dictionary_has_no_report(own: Path, planted_sae: Any) -> None:
    registry.write_entry(RegistryEntry("bare", "tiny", (SaeRecord("a", "a"),)), own)
    for dictionary in (planted_sae, "bare", "unknown", "owner/repo:id", own, 3):
        assert dictionary_metrics(dictionary) == {}


def test_the_null_runs_are_told_with_their_share_and_interval() -> None:
    note = calibration_note(many_codes(), many_texts(), "max", 0)
    assert "permuted 200 times" in note.text and "95 % interval" in note.text
    assert note.text.endswith("the tests keep their promise.")


def many_texts() -> LabelledTexts:
    return LabelledTexts(
        tuple(f"text {index}" for index in range(120)),
        tuple((("joy",), ("anger",), ())[index % 3] for index in range(120)),
        tuple(f"t{index}" for index in range(120)),
    )


def many_codes() -> SparseCodes:
    rng = np.random.default_rng(0)
    active = rng.random((120, 30)) < 0.3
    features = np.nonzero(active)[1].astype(np.int32)
    return SparseCodes(
        values=(rng.random(len(features)) + 0.1).astype(np.float32),
        features=features,
        row_starts=np.cumsum([0, *active.sum(axis=1)]).astype(np.int64),
        text_index=np.arange(120, dtype=np.int32),
        token_ids=np.zeros(120, dtype=np.int32),
        n_texts=120,
        d_sae=30,
        hook_name=HOOK,
    )
