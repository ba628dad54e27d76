"""The page of a trained dictionary: what its curves show, what is left out, what is escaped."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from test_charts import shapes
from test_report import HOSTILE, Page

from sae_emotion_plugin.evaluation import DictionaryReport
from sae_emotion_plugin.pages.training import headline, render, write_training_page
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe
from sae_emotion_plugin.training import TrainedDictionary

RECIPE = TrainingRecipe(
    "tiny", "layer-0", "embedded", "blocks.0.hook_resid_post", (TextSource("a.jsonl"),), 64, 4, 1.0, 0.001
)
REPORT = DictionaryReport(10, 1234, 64, 0.25, 0.3, 7, 0.4, 0.5, 4.0, 3, 1.0, 2.0, 5.0, 9.0)
CURVE: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 8.0 / step,
        "fvu": 0.9 - step / 500,
        "l0": 4.0,
        "dead": step / 1000,
        "shrinkage": None if step == 1 else 0.9,
        "lr": 0.001,
        **({"cosine_mean": 0.031, "cosine_max": 0.2, "cosine_random": 0.0288} if step in (1, 200) else {}),
        **({"loss_recovered": 0.8, "held_out_fvu": 0.5} if step == 200 else {}),
    }
    for step in (1, 50, 100, 150, 200)
]


def trained(folder: Path, curve: Any = CURVE, **changes: Any) -> TrainedDictionary:
    record = {
        "model": {"name": "tiny"},
        "versions": {"torch": "2"},
        "texts": [{"path": "a.jsonl", "licence": "CC0", "sha256": "ab" * 32, "training_texts": 5}],
        "training_tokens": 4096,
        "training": {"steps": 200, "curve": curve},
        **changes,
    }
    (folder / "provenance.json").write_text(json.dumps(record), encoding="utf-8")
    return TrainedDictionary(folder, RECIPE, REPORT, {"cfg.json": "cd" * 32})


def figures(page: str) -> dict[str, Markup]:
    found = re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)</figure>", page, flags=re.S)
    return {name: Markup(chart) for name, chart in found}


def test_every_figure_of_the_curve_is_drawn_over_the_steps(tmp_path: Path) -> None:
    drawn = figures(render(trained(tmp_path)))
    assert list(drawn) == ["Reconstruction", "Sparsity", "Directions", "Fidelity", "Steps"]
    # Loss and FVU at five steps each, one measurement on held-out documents.
    assert len(shapes(drawn["Reconstruction"], "point")) == 11
    places = [float(dot["cx"]) for dot in shapes(drawn["Sparsity"], "point")][:5]
    assert places == sorted(places) and places[-1] == pytest.approx(310.0)
    # A figure that is not defined is left out, not drawn as 0: four of shrinkage, one of the loss recovered.
    assert len(shapes(drawn["Fidelity"], "point")) == 5
    assert "random rows" in drawn["Directions"] and "random rows" not in drawn["Steps"]
    assert "Gradient norm" not in drawn["Steps"] and "Learning rate" in drawn["Steps"]


def test_the_page_says_how_good_the_dictionary_is_and_what_made_it(tmp_path: Path) -> None:
    page = render(trained(tmp_path))
    one = headline(trained(tmp_path), CURVE)
    assert one in page and "1,234 tokens of held-out documents" in one and "25\u00a0% of the variance" in one
    assert "keeps 75\u00a0% of the cross-entropy" in one and "3 of 64 features" in one
    assert "went from 8.000 to 0.040" in one
    for told in ("ab" * 32, "cd" * 32, "CC0", "0.0288", "Held out fvu", "4096"):
        assert told in page, told
    assert "random rows it would be 0.0288" in page


def test_a_dictionary_without_a_curve_has_a_page_without_charts(tmp_path: Path) -> None:
    for curve in ([], None):
        page = render(trained(tmp_path, curve))
        assert not figures(page) and 'id="curves"' not in page and "Its loss went" not in page
        assert 'id="fidelity"' in page
    assert render(trained(tmp_path, texts=[], training={}))


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-9, 1e9])
def test_a_flat_curve_is_drawn_whatever_its_height(value: float, tmp_path: Path) -> None:
    curve = [{"step": step, "loss": value, "fvu": value} for step in (1, 2)]
    assert len(shapes(figures(render(trained(tmp_path, curve)))["Reconstruction"], "point")) == 4
    one = [{"step": 1, "loss": value}]
    assert len(shapes(figures(render(trained(tmp_path, one)))["Reconstruction"], "point")) == 1


def test_a_report_with_figures_that_are_not_defined_has_a_page(tmp_path: Path) -> None:
    report = replace(REPORT, fvu=math.nan, cross_entropy_mean_ablated=1.0)
    assert "\u2013" in render(replace(trained(tmp_path), report=report))


def test_hostile_names_are_escaped_and_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    recipe = replace(RECIPE, name=HOSTILE, sae_id=HOSTILE)
    texts = [{"path": HOSTILE, "licence": HOSTILE, "sha256": HOSTILE}]
    given = trained(tmp_path, [{"step": 1, "loss": 1.0, HOSTILE: 2.0}], texts=texts, model={HOSTILE: HOSTILE})
    page = render(replace(given, recipe=recipe))
    assert HOSTILE not in page and "<script" not in page and "onerror" not in re.sub(r"&lt;.*?&gt;", "", page)
    read = Page(page)
    assert not any(name.startswith("on") for _, own in read.tags for name in own)
    assert "https://" not in page and "default-src 'none'" in page


def test_the_same_dictionary_gives_the_same_page_written_whole(tmp_path: Path) -> None:
    one = trained(tmp_path)
    assert write_training_page(tmp_path / "report.html", one).read_text(encoding="utf-8") == render(one)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_training_page(tmp_path / "absent" / "report.html", one)
