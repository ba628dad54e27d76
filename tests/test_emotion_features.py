from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import EMOTIONS, HOOK, JOY, labelled

from sae_emotion_plugin import sparse_codes
from sae_emotion_plugin.discovery import emotion_features
from sae_emotion_plugin.discovery.emotion_features import Discovery, discover
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.sparse_codes import encode_texts


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests also run beside a package that is not installed, which has no version."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "0"

    monkeypatch.setattr(emotion_features, "metadata", SimpleNamespace(version=version))


@pytest.fixture(scope="module")
def texts() -> LabelledTexts:
    return labelled(60, seed=1)


@pytest.fixture(scope="module")
def held_out() -> LabelledTexts:
    return labelled(12, seed=2, prefix="h")


def test_the_planted_features_are_found(
    bridge: Any, emotional_sae: Any, texts: LabelledTexts, held_out: LabelledTexts
) -> None:
    found = discover(bridge, emotional_sae, texts, held_out, progress=False)
    for emotion, feature in EMOTIONS.items():
        best = found.scores.top(emotion, 1)[0]
        assert best.feature == feature and best.held_out_auroc is not None and best.held_out_auroc > 0.9
        assert len(best.promotes) == len(best.suppresses) == 10
    assert found.held_out is held_out
    codes = encode_texts(bridge, emotional_sae, held_out, progress=False)
    assert np.array_equal(found.held_out_codes.features, codes.features)


def test_the_scores_say_how_and_on_what_they_were_made(
    bridge: Any, emotional_sae: Any, texts: LabelledTexts, held_out: LabelledTexts
) -> None:
    meta = discover(bridge, emotional_sae, texts, held_out, pooling="mean", seed=3, progress=False).scores.meta
    assert (meta["pooling"], meta["pooling_chosen_on_train"], meta["seed"]) == ("mean", False, 3)
    assert meta["hook_name"] == HOOK and meta["model"] == "unknown"
    assert meta["dropped_near_duplicates"] == 0
    assert meta["n_texts"] == {"train": 180, "held_out": 36}
    assert set(meta["versions"]) == {"sae-emotion-plugin", "sae-lens", "transformer-lens", "transformers", "torch"}
    assert meta["versions"]["torch"] == metadata.version("torch")


def test_without_held_out_texts_half_are_kept_back(bridge: Any, emotional_sae: Any, texts: LabelledTexts) -> None:
    found = discover(bridge, emotional_sae, texts, progress=False)
    train, held_out = texts.split(0.5, 0)
    assert found.held_out.ids == held_out.ids and not set(train.ids) & set(held_out.ids)
    assert found.scores.meta["n_texts"] == {"train": len(train), "held_out": len(held_out)}
    assert found.held_out_codes.n_texts == len(held_out)


def test_training_texts_that_are_also_held_out_are_dropped_and_counted(
    bridge: Any, emotional_sae: Any, texts: LabelledTexts, held_out: LabelledTexts
) -> None:
    both = LabelledTexts(
        (*texts.texts, *held_out.texts[:5]),
        (*texts.emotions, *held_out.emotions[:5]),
        (*texts.ids, *(f"copy{n}" for n in range(5))),
        "en",
    )
    dropped = discover(bridge, emotional_sae, both, held_out, progress=False)
    clean = discover(bridge, emotional_sae, texts, held_out, progress=False)
    assert dropped.scores.meta["dropped_near_duplicates"] == 5
    assert dropped.scores.rows == clean.scores.rows


def test_pooling_is_chosen_on_training_texts_alone(
    bridge: Any, emotional_sae: Any, texts: LabelledTexts, held_out: LabelledTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def choose(codes: Any, given: LabelledTexts, *rest: Any, **named: Any) -> str:
        seen.append((codes.n_texts, given.ids))
        return "sum"

    monkeypatch.setattr(emotion_features, "choose_pooling", choose)
    meta = discover(bridge, emotional_sae, texts, held_out, pooling="choose", progress=False).scores.meta
    assert seen == [(len(texts), texts.ids)]
    assert (meta["pooling"], meta["pooling_chosen_on_train"]) == ("sum", True)


def test_emotions_and_top_limit_the_rows(
    bridge: Any, emotional_sae: Any, texts: LabelledTexts, held_out: LabelledTexts
) -> None:
    found = discover(bridge, emotional_sae, texts, held_out, emotions=["sadness"], top=2, progress=False)
    assert [row.emotion for row in found.scores.rows] == ["sadness"] * 2
    with pytest.raises(ValueError, match="unknown emotions: pride; the texts have: anger, joy, sadness"):
        discover(bridge, emotional_sae, texts, held_out, emotions=["pride"], progress=False)


def test_texts_of_one_class_are_refused(bridge: Any, emotional_sae: Any) -> None:
    with pytest.raises(ValueError, match="single class: joy"):
        discover(bridge, emotional_sae, labelled(20, 1, {"joy": "joy"}), progress=False)


def test_a_second_discovery_reads_the_codes_from_the_cache(
    bridge: Any,
    emotional_sae: Any,
    texts: LabelledTexts,
    held_out: LabelledTexts,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    first = discover(bridge, emotional_sae, texts, held_out, cache=tmp_path, progress=False)

    def encoded_again(*_: Any, **__: Any) -> None:
        raise AssertionError("the codes were in the cache")

    monkeypatch.setattr(sparse_codes, "_encode_block", encoded_again)
    second: Discovery = discover(bridge, emotional_sae, texts, held_out, cache=tmp_path, progress=False)
    assert second.scores == first.scores


def test_the_scores_survive_saving(
    bridge: Any, emotional_sae: Any, texts: LabelledTexts, held_out: LabelledTexts, tmp_path: Path
) -> None:
    scores = discover(bridge, emotional_sae, texts, held_out, top=3, progress=False).scores
    assert FeatureScores.load(scores.save(tmp_path / "scores.json")) == scores
    assert JOY in {row.feature for row in scores.rows}
