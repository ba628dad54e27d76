"""`monitor calibrate` and `monitor check`, on the tiny model and its planted dictionary."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import EMOTIONS

from sae_emotion_plugin.cli.monitor import monitor
from sae_emotion_plugin.cli.options import OneLineErrors
from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.monitoring.thresholds import Thresholds


@click.group(cls=OneLineErrors)
def main() -> None:
    """What the commands are part of."""


main.add_command(monitor)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["monitor", *arguments])


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture
def tiny(bridge: Any, emotional_sae: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAE_EMOTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sae_emotion_plugin.models.load_model", lambda name: bridge)
    monkeypatch.setattr("sae_emotion_plugin.plugin.load_dictionary", lambda name, layer=None: emotional_sae)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.choice(50, size=6, replace=False)) for _ in range(240)]
    neutral = tmp_path / "neutral.jsonl"
    neutral.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    rows = (FeatureScore(name, number, 0.9, 0.8, 0.01, 0.02, 0.5, 0.1) for name, number in EMOTIONS.items())
    scores = FeatureScores({}, tuple(rows)).save(tmp_path / "scores.json")
    sets = tmp_path / "sets.json"
    sets.write_text('{"mine": [7, 21]}', encoding="utf-8")
    return {
        "neutral": str(neutral),
        "scores": str(scores),
        "sets": str(sets),
        "out": str(tmp_path / "thresholds.json"),
        "page": str(tmp_path / "page.html"),
    }


@pytest.mark.usefixtures("tiny")
def test_what_calibrate_writes_is_what_check_reads(files: dict[str, str]) -> None:
    union = ("--scores", files["scores"], "--emotion", "joy", "--union", "hostility=anger, sadness")
    result = run("calibrate", files["neutral"], "-o", files["out"], *union, "--sets", files["sets"], "--rate", "0.04")
    assert result.exit_code == 2 and "at least 125" in result.stderr
    result = run("calibrate", files["neutral"], "-o", files["out"], *union, "--sets", files["sets"])
    assert result.exit_code == 0, result.output
    made = Thresholds.load(files["out"])
    assert made.names == ("mine", "joy", "hostility")
    assert made.of("hostility").features == (EMOTIONS["anger"], EMOTIONS["sadness"])
    assert "false positives" in result.stdout

    asked = ("check", "he is such a joy", "w1 w2", "--thresholds", files["out"])
    result = run(*asked, "--set", "joy", "--report", files["page"], "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["set"], row["fires"]) for row in rows] == [("joy", True), ("joy", False)]
    assert "<mark" in Path(files["page"]).read_text(encoding="utf-8")
    result = run("check", "--file", files["neutral"], "--thresholds", files["out"])
    assert result.exit_code == 0 and "240 texts" in result.stdout


def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(files: dict[str, str], tmp_path: Path) -> None:
    out = ("-o", files["out"])
    assert "--scores" in refused("calibrate", files["neutral"], *out)
    assert "--union" in refused("calibrate", files["neutral"], *out, "--sets", files["sets"], "--union", "a=joy")
    wrong = ("--scores", files["scores"])
    assert "NAME=EMOTION" in refused("calibrate", files["neutral"], *out, *wrong, "--union", "hostility")
    assert "envy" in refused("calibrate", files["neutral"], *out, *wrong, "--emotion", "envy")
    absent = str(tmp_path / "absent" / "file.json")
    assert "absent" in refused("calibrate", files["neutral"], "-o", absent, *wrong)
    assert "absent" in refused("calibrate", absent, *out, *wrong)
    assert "no texts" in refused("check", "--thresholds", files["sets"])
    assert "holds no thresholds" in refused("check", "he is", "--thresholds", files["sets"])
    assert "absent" in refused("check", "he is", "--thresholds", absent)
    assert not Path(files["out"]).exists()


def test_the_help_loads_no_model_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sae_emotion_plugin.cli.monitor import monitor\n"
        "for command in ([], ['calibrate'], ['check']):\n"
        "    assert CliRunner().invoke(monitor, [*command, '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'sae_lens', 'transformers', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
