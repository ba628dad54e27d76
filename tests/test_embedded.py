"""The main job on the embedded model, as a user runs it. Slow: minutes of compute, and the extra `demo`."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sae_emotion_plugin.discovery.scores import LATER_FIELDS
from sae_emotion_plugin.generation.records import Generation, Generations, summary

pytestmark = pytest.mark.slow

SCORE_FIELDS = {
    *("emotion", "feature", "auroc", "held_out_auroc", "p", "q", "rate_in", "rate_out"),
    *("promotes", "suppresses", *LATER_FIELDS),
}
ROW_FIELDS = {
    *("prompt", "emotion", "features", "mode", "amount", "unit", "temperature", "seed", "part"),
    *("baseline_text", "text", "baseline_valence", "valence", "baseline_nll", "nll"),
    *("degenerate", "baseline_degenerate"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "report"
    done = subprocess.run(
        [sys.executable, "-m", "sae_emotion_plugin", "quickstart", "--out", str(out), "--json"],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["report"] == str(out / "index.html")
    return out


@pytest.fixture(scope="module")
def generations(folder: Path) -> Generations:
    return Generations.load(folder / "generations.json")


def reported(generations: Generations, emotion: str, kind: str) -> list[Generation]:
    from sae_emotion_plugin.emotion_texts import openings

    return [
        row
        for row in generations.rows
        if row.emotion == emotion and row.part == "report" and row.temperature > 0 and row.prompt in openings(kind)
    ]


def test_the_two_files_keep_their_contract(folder: Path) -> None:
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    made: dict[str, Any] = json.loads((folder / "generations.json").read_text(encoding="utf-8"))
    assert {row["emotion"] for row in scores["rows"]} == {
        *("anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral"),
    }
    assert all(set(row) == SCORE_FIELDS for row in scores["rows"])
    assert all(len(row["promotes"]) == len(row["suppresses"]) == 10 for row in scores["rows"])
    assert all(set(row) >= ROW_FIELDS for row in made["rows"])
    assert {row["part"] for row in made["rows"]} == {"choose", "report", "demo"}
    assert {row["temperature"] for row in made["rows"]} == {0.0, 0.7}
    assert set(made["meta"]["recommended"]) == {"anger", "joy", "sadness"}
    assert not {row["prompt"] for row in made["rows"] if row["part"] == "choose"} & {
        row["prompt"] for row in made["rows"] if row["part"] == "report"
    }


@pytest.mark.parametrize(("emotion", "kind", "sign"), [("anger", "neutral", -1), ("joy", "unpleasant", 1)])
def test_steering_moves_valence_on_openings_that_chose_nothing(
    generations: Generations, emotion: str, kind: str, sign: int
) -> None:
    rows = reported(generations, emotion, kind)
    assert {row.amount for row in rows} == {generations.meta["recommended"][emotion]}
    found = summary(rows)
    assert found.n_prompts == 10
    assert found.low is not None and found.high is not None and found.perplexity_ratio is not None
    assert found.valence_change * sign >= 0.3
    assert found.low * sign > 0 and found.high * sign > 0
    assert found.perplexity_ratio <= 2
    assert found.degenerate_share <= found.baseline_degenerate_share + 0.1


def test_unsteered_continuations_of_one_opening_and_seed_are_one_text(generations: Generations) -> None:
    seen: dict[tuple[str, float, int], str] = {}
    for row in generations.rows:
        seed = row.seed if row.temperature else 0
        assert seen.setdefault((row.prompt, row.temperature, seed), row.baseline_text) == row.baseline_text


class Outside(HTMLParser):
    """Collects whatever a page would load from somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "srcset") or tag == "link"]


def test_the_page_is_self_contained_and_shows_every_emotion(folder: Path) -> None:
    page = (folder / "index.html").read_text(encoding="utf-8")
    outside = Outside()
    outside.feed(page)
    assert outside.loads == []
    for word in ("anger", "joy", "sadness", "he is such a", 'id="method"'):
        assert word in page
    assert sorted(path.name for path in folder.iterdir()) == ["generations.json", "index.html", "scores.json"]
