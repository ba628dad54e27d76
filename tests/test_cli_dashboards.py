"""The command `sae-emotion dashboards`: what it makes, that it goes on, that parts join, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import labelled
from test_cli import refused, run

from sae_emotion_plugin import models, plugin
from sae_emotion_plugin.dashboards.types import Dashboards


@pytest.fixture(autouse=True)
def tiny(bridge: Any, emotional_sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", lambda name: bridge)
    monkeypatch.setattr(plugin, "load_dictionary", lambda name: emotional_sae)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files of different kinds."""
    first, second = labelled(6, 0).texts, labelled(6, 1).texts
    plain, rows = tmp_path / "first.txt", tmp_path / "second.jsonl"
    plain.write_text("\n\n".join(first), encoding="utf-8")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in second), encoding="utf-8")
    return [plain, rows]


def test_all_texts_of_all_files_are_read_once(
    texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made"
    done = run("dashboards", *map(str, texts), "-o", str(out))
    assert done.exit_code == 0, done.output
    assert str(out) in done.stdout
    made = Dashboards.load(out)
    assert made.meta["n_texts"] == 36
    monkeypatch.setattr(type(made), "__repr__", lambda one: "read again")
    assert "read again" in run("dashboards", *map(str, texts), "-o", str(out)).stdout


def test_parts_join_to_the_dashboards_of_the_whole(texts: list[Path], tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for text, part in zip(texts, parts, strict=True):
        assert run("dashboards", str(text), "-o", str(part)).exit_code == 0
    joined = run("dashboards", "--merge", *map(str, parts), "-o", str(tmp_path / "joined"), "--json")
    assert run("dashboards", *map(str, texts), "-o", str(tmp_path / "whole")).exit_code == 0
    assert json.loads(joined.stdout)["n_texts"] == 36
    ours, whole = Dashboards.load(tmp_path / "joined"), Dashboards.load(tmp_path / "whole")
    assert ours.maxima.tolist() == pytest.approx(whole.maxima.tolist(), rel=1e-5)


def test_fewer_texts_are_drawn_evenly(texts: list[Path], tmp_path: Path) -> None:
    assert run("dashboards", *map(str, texts), "-o", str(tmp_path / "made"), "--texts", "9").exit_code == 0
    assert Dashboards.load(tmp_path / "made").meta["n_texts"] == 9


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert "no such text file" in refused("dashboards", str(tmp_path / "none.txt"))
    assert "--merge joins" in refused("dashboards", "--merge", str(tmp_path), "--texts", "3")
