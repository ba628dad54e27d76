import json
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData

from sae_emotion_plugin import registry
from sae_emotion_plugin.feature_labels import FeatureLabel
from sae_emotion_plugin.publishing.hub_files import prepare
from sae_emotion_plugin.publishing.model_card import CardSources, markdown, model_card
from sae_emotion_plugin.registry import Provenance, RegistryEntry, SaeRecord
from sae_emotion_plugin.release_files import open_release

ENTRY = RegistryEntry("mood", "google/gemma-3-270m", (SaeRecord("l9", "l9"),), "ada/mood", provenance=Provenance())
REPORT = {
    "d_sae": 64,
    "n_tokens": 1234,
    "fvu": 0.25,
    "fvu_without_largest_dimension": 0.5,
    "l0": 4.0,
    "dead": 3,
    "cross_entropy": 2.0,
    "cross_entropy_spliced": 2.5,
    "cross_entropy_mean_ablated": 4.0,
}
PROVENANCE = {"texts": [{"path": "corpus/train.jsonl.gz", "licence": "CC0", "training_texts": 4321}]}
HOSTILE = '<script>alert("x")</script> | [a](javascript:b) ![i](http://e.vil) `c` **d** \n# e\0'


def label(feature: int, emotion: str, held_out: float, text: str = "words") -> FeatureLabel:
    return FeatureLabel(
        feature, (emotion,), text, {"auroc": 0.9, "held_out_auroc": held_out, "q": 0.001}, "m", "1", "ada"
    )


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_metadata_are_what_the_hub_reads() -> None:
    card = model_card(ENTRY, {"l9": CardSources(provenance=PROVENANCE)}, licence="Apache-2.0")
    found = metadata(card)
    assert found["library_name"] == "saelens" and found["base_model"] == "google/gemma-3-270m"
    assert found["license"] == "apache-2.0" and found["datasets"] == ["corpus"] and "saelens" in found["tags"]
    assert ModelCardData(**found).to_dict()["base_model"] == "google/gemma-3-270m"
    other = metadata(model_card(ENTRY, {}, licence="Ask me: first!", datasets=["a/b"]))
    assert (other["license"], other["license_name"], other["datasets"]) == ("other", "ask-me-first", ["a/b"])
    bare = metadata(model_card(replace(ENTRY, model="/home/me/model"), {}))
    assert not {"license", "datasets", "base_model"} & set(bare)


def test_figures_are_those_of_the_report_and_none_is_made_up() -> None:
    card = model_card(ENTRY, {"l9": CardSources({"d_in": 32, "d_sae": 64}, REPORT)})
    row = next(line for line in card.splitlines() if line.startswith("| l9 |"))
    assert row == "| l9 | 64 | 32 | 4.0 | 0.750 | 0.500 | 0.750 | 3 | 1,234 |"
    assert "l9 loses 25.0% of the variance of its inputs, and 25.0% of the cross-entropy" in card
    empty = model_card(ENTRY, {})
    assert "## Measured" not in empty and "## Training" not in empty and "## Emotions" not in empty
    assert "loses" not in empty and "with labels of" not in empty and "How to steer" not in empty
    assert "nan" not in model_card(ENTRY, {"l9": CardSources(report={"fvu": float("nan"), "l0": True})}).lower()


def test_a_recorded_training_curve_becomes_a_short_table_with_its_ends() -> None:
    curve = [{"tokens": n * 1000, "loss": 1 / (n + 1)} for n in range(100)]
    card = model_card(ENTRY, {"l9": CardSources(provenance={"training": {"curve": curve, "steps": 3}})})
    rows = card.split("## Training")[1].split("##")[0].splitlines()
    rows = [line for line in rows if line.startswith("| ") and "---" not in line]
    assert rows[0] == "| tokens | loss |" and rows[1] == "| 0 | 1 |" and rows[-1] == "| 9.9e+04 | 0.01 |"
    assert len(rows) <= 14


def test_the_best_features_of_each_emotion_are_listed_and_the_best_of_all_steered() -> None:
    labels = [label(n, "joy", 0.6 + n / 100) for n in range(6)] + [label(40, "anger", 0.95)]
    card = model_card(ENTRY, {"l9": CardSources(labels=labels)})
    rows = [line.split(" | ")[:2] for line in card.splitlines() if re.match(r"\| (joy|anger) \|", line)]
    assert rows == [["| anger", "40"], ["| joy", "5"], ["| joy", "4"], ["| joy", "3"]]
    assert "l9: 7 labels by ada in `labels/`" in card
    assert "SteeringPlan.of({40: 0.1}" in card and "Feature 40 is labelled anger" in card


def test_the_code_of_the_card_is_python() -> None:
    card = model_card(replace(ENTRY, model="it's"), {"l9": CardSources(labels=[label(1, "joy", 0.9)])})
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")


def test_texts_of_others_are_neither_markup_nor_links_nor_new_lines() -> None:
    shown = markdown(HOSTILE)
    assert "<" not in shown and "\n" not in shown and "\0" not in shown and "://" not in shown
    for mark in "|[]()*`#!":
        assert not re.search(rf"(?<!\\){re.escape(mark)}", shown.replace("&#58;", "").replace("&#x27;", "")), mark
    sources = CardSources(
        config={"d_in": HOSTILE},
        report={"l0": HOSTILE},
        provenance={
            "texts": [{"path": HOSTILE, "licence": HOSTILE, "training_texts": HOSTILE}],
            "training": {"curve": [{HOSTILE: HOSTILE}]},
        },
        labels=[FeatureLabel(1, (HOSTILE[:-1],), HOSTILE[:-1], {}, "m", "1", HOSTILE[:-1])],
    )
    provenance = Provenance(notes=HOSTILE, licence=HOSTILE, texts=HOSTILE)
    saes = (SaeRecord(HOSTILE[:-1], "l9"),)
    entry = replace(ENTRY, model=HOSTILE, saes=saes, provenance=provenance)
    card = model_card(entry, {HOSTILE[:-1]: sources})
    outside = re.sub(r"```.*?```", "", card.split("---\n", 2)[2], flags=re.DOTALL)
    assert "<script" not in outside and "](java" not in outside.replace("\\", "\0")
    assert "\n# e" not in card and isinstance(metadata(card), dict)
    assert len({line.replace("\\|", "").count("|") for line in outside.splitlines() if "labels/" in line}) <= 1


def test_the_card_of_the_shipped_dictionary_has_its_report() -> None:
    release = open_release("gemma-3-270m-emotion")
    publication = prepare(release, "ada/gemma")
    card = next(one.content for one in publication.files if one.path == "README.md")
    assert isinstance(card, bytes)
    report = json.loads(release.files["blocks.9.hook_resid_post/report.json"].read_bytes())
    text = card.decode()
    assert f"{1 - report['fvu']:.3f}" in text and f"{report['n_tokens']:,}" in text
    assert "SAE.from_pretrained('ada/gemma', 'blocks.9.hook_resid_post')" in text
    found = metadata(text)
    assert found["base_model"] == "google/gemma-3-270m" and found["license"] == "other"
    assert {"goemotions", "nsmc"} <= set(found["datasets"])
    assert str(registry.find("gemma-3-270m-emotion")[0].provenance.licence) in text.replace("\\", "")


@pytest.mark.parametrize("name", ["mit", "MIT", " CC BY 4.0 "])
def test_a_known_licence_is_named_as_the_hub_names_it(name: str) -> None:
    assert metadata(model_card(ENTRY, {}, licence=name))["license"] in ("mit", "cc-by-4.0")
