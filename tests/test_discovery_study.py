import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EMOTIONS, labelled

from sae_emotion_plugin import discovery_study
from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.discovery_study import Study, study
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.pages.discovery import render
from sae_emotion_plugin.rated_texts import RatedTexts

TEXTS, HELD_OUT = labelled(60, seed=1), labelled(24, seed=2, prefix="h")
ELSEWHERE = labelled(40, seed=4, prefix="e")
RATED = RatedTexts(
    HELD_OUT.texts,
    {"pleasant": np.array([1.0 if own == ("joy",) else -0.01 * n for n, own in enumerate(HELD_OUT.emotions)])},
)
QUICK = ("latent", "neuron")


def studied(bridge: Any, sae: Any, texts: LabelledTexts = TEXTS, **settings: Any) -> Study:
    quick = {"methods": QUICK, "permutations": 20, "candidates": 0, "progress": False}
    return study(bridge, sae, texts, HELD_OUT, **{**quick, **settings})


@pytest.fixture(scope="module")
def found(bridge: Any, emotional_sae: Any) -> Study:
    return studied(
        bridge,
        emotional_sae,
        methods=("latent", "difference-of-means", "dense-probe", "neuron"),
        candidates=2,
        ratings=RATED,
        others={"elsewhere": ELSEWHERE},
    )


def test_the_scores_are_those_of_discover(found: Study, bridge: Any, emotional_sae: Any) -> None:
    assert found.scores == discover(bridge, emotional_sae, TEXTS, HELD_OUT, progress=False).scores
    assert {row.emotion: row.feature for row in found.scores.rows if row.auroc > 0.99} == EMOTIONS


def test_every_part_is_there_and_knows_the_planted_features(found: Study) -> None:
    assert found.left_out == {}
    assert found.methods is not None and found.specificity is not None and found.layers is not None
    assert found.methods.of("latent").auroc > 0.99 > found.methods.of("neuron").auroc
    own = {row.emotion: (row.auroc, row.margin) for row in found.specificity.rows}
    assert own.keys() == EMOTIONS.keys()
    assert all(auroc > 0.99 and margin > 0.4 for auroc, margin in own.values())
    # An emotion is one word here: without its texts that have the word nothing is left to tell.
    assert {row.keyword_free for row in found.specificity.rows} == {None}
    assert min(row.latent or 0 for row in found.layers.rows if row.layer == 0 and row.pooling == "mean") > 0.9
    assert {row.latent for row in found.layers.rows if row.layer == 1} == {None}
    assert found.absorption is not None and max(row.true_rate or 0 for row in found.absorption.rows) < 0.1
    assert found.calibration is not None and found.calibration.permutations == 20


def test_ratings_other_corpora_probes_and_ranks_know_the_planted_features(found: Study) -> None:
    assert found.ratings is not None and found.probes is not None and found.ranks is not None
    pearson = {row.emotion: row.pearson or 0.0 for row in found.ratings.rows}
    assert pearson["joy"] > 0.5 > 0 > max(pearson["anger"], pearson["sadness"])
    table = found.transfers["elsewhere"]
    assert {row.emotion: row.feature for row in table.rows} == EMOTIONS
    # Joy, anger and sadness are one word each everywhere, so that nothing is lost and without the word nothing left.
    assert all(row.auroc is not None and row.auroc > 0.99 for row in table.rows if row.subset == "all")
    assert {row.auroc for row in table.rows if row.subset == "keyword-free"} == {None}
    assert {row.emotion: row.feature for row in found.probes.rows} == EMOTIONS
    assert found.probes.mean_loss_ratio < 0.2
    assert len(found.ranks.rows) == 2 * len(EMOTIONS)


def test_a_corpus_without_a_shared_label_and_ratings_that_never_vary_are_left_out_and_said(
    bridge: Any, emotional_sae: Any
) -> None:
    others = {"strange": labelled(20, seed=5, words={"envy": "w3", "awe": "w4"}, prefix="s")}
    flat = RatedTexts(HELD_OUT.texts, {"V": np.ones(len(HELD_OUT))})
    found = studied(bridge, emotional_sae, others=others, ratings=flat, permutations=0, scan=False)
    assert found.transfers == {} and found.ratings is None
    assert "they have awe, envy; the scores anger, joy, sadness" in found.left_out["transfer to strange"]
    assert "all ratings of V are 1" in found.left_out["ratings"]
    assert "transfer to strange" in render(found.content)


def test_the_page_and_the_file_hold_what_was_found(found: Study, tmp_path: Path) -> None:
    page = render(found.content)
    assert all(f"{emotion}" in page for emotion in EMOTIONS)
    assert "specificity" in page.lower() and "dense probe" in page
    assert {(curve.emotion, curve.method) for curve in found.content.rocs or ()} >= {
        (emotion, method) for emotion in EMOTIONS for method in ("latent", "difference-of-means", "dense-probe")
    }
    saved = json.loads(found.save(tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert saved["methods"]["scores"][0]["method"] == "latent"
    assert saved["margins"] is None and saved["left_out"] == {}
    assert len(saved["layers"]["rows"]) == 2 * 2 * (len(EMOTIONS) + 1)
    assert saved["absorption"]["rows"][0]["emotion"] in EMOTIONS
    assert saved["calibration"]["permutations"] == 20 and saved["calibration"]["deciles"]
    assert saved["ratings"]["rows"][0]["rating"] == "pleasant" and saved["transfers"]["elsewhere"]["rows"]
    assert len(saved["steering_ranks"]["rows"]) == 2 * len(EMOTIONS) and saved["probes"]["rows"]
    assert all(f'id="{part}"' in page for part in ("calibration", "ratings", "transfer", "probes", "steering"))


def test_what_the_texts_are_too_few_for_is_left_out_and_said(bridge: Any, emotional_sae: Any) -> None:
    few = labelled(12, seed=3, prefix="f")
    with pytest.raises(ValueError, match="20"):
        studied(bridge, emotional_sae, few)
    rare = replace(HELD_OUT.select(range(9)))
    found = study(bridge, emotional_sae, TEXTS, rare, permutations=0, scan=False, progress=False)
    assert found.methods is None and found.absorption is None
    assert "fewer than" in found.left_out["methods"] or "20" in found.left_out["methods"]
    assert found.layers is None and found.calibration is None
    assert "not computed" in render(found.content) or "Not computed" in render(found.content)


def test_a_second_run_with_a_cache_reads_no_activations(
    bridge: Any, emotional_sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Study
) -> None:
    first = studied(bridge, emotional_sae, cache=tmp_path)
    for name in ("sparse_codes.activation_batches", "pooled_activations._pooled_block"):
        monkeypatch.setattr(f"sae_emotion_plugin.{name}", lambda *a, **k: pytest.fail("activations were read"))
    second = studied(bridge, emotional_sae, cache=tmp_path)
    assert second.scores == first.scores
    assert second.methods is not None and first.methods is not None
    assert second.methods.to_dict() == first.methods.to_dict()


def test_few_texts_scan_all_and_many_a_part(
    bridge: Any, emotional_sae: Any, monkeypatch: pytest.MonkeyPatch, found: Study
) -> None:
    monkeypatch.setattr(discovery_study, "SCAN_TEXTS", 150)
    part = studied(bridge, emotional_sae)
    assert part.layers is not None and found.layers is not None
    assert part.layers.meta["n_texts"] == {"train": 150, "held_out": 72}
    assert found.layers.meta["n_texts"] == {"train": 180, "held_out": 72}


def test_some_of_the_emotions_are_studied_among_all_texts(bridge: Any, emotional_sae: Any) -> None:
    found = studied(bridge, emotional_sae, emotions=["joy", "sadness"], scan=False)
    assert found.left_out == {}
    assert found.scores.emotions == ("joy", "sadness")
    assert found.calibration is not None and found.calibration.n_labels == 2
    assert found.methods is not None and found.methods.meta["n_texts"]["train"] == len(TEXTS)
    assert found.methods.methods == ("latent", "neuron", "dense-probe") and found.absorption is not None


def test_every_feature_that_is_named_links_to_its_page_where_the_metadata_know_it(
    bridge: Any, emotional_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emotional_sae.cfg.metadata, "neuronpedia_id", "tiny/0-emotion")
    found = studied(bridge, emotional_sae, others={"elsewhere": ELSEWHERE}, permutations=0, scan=False)
    assert found.scores.meta["neuronpedia_id"] == "tiny/0-emotion"
    assert found.content.links[EMOTIONS["joy"]] == "https://www.neuronpedia.org/tiny/0-emotion/7"
    ceilings = {row.ceiling_feature for row in found.transfers["elsewhere"].rows} - {None}
    assert found.content.links.keys() >= {row.feature for row in found.scores.rows} | ceilings
    assert 'href="https://www.neuronpedia.org/tiny/0-emotion/7"' in render(found.content)
