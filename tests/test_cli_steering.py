"""`steer`, `export` and `study` on the tiny model and its planted dictionary."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import JOY, make_sae
from safetensors.torch import load_file

from sae_emotion_plugin.cli import main
from sae_emotion_plugin.interventions.plans import Gate, SteeringPlan, dictionary_sha256
from sae_emotion_plugin.sparse_codes import encode_texts

PROMPT = "he is such a"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture(autouse=True)
def tiny(bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_emotion_plugin.models.load_model", lambda name: bridge)
    monkeypatch.setattr("sae_emotion_plugin.plugin.load_dictionary", lambda name, layer=None: planted_sae)


def steered(*arguments: str) -> dict[str, Any]:
    result = run("steer", PROMPT, "--json", "--tokens", "5", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_option_reaches_the_plan(tmp_path: Path, planted_sae: Any) -> None:
    path = tmp_path / "plan.json"
    made = steered(
        *("--feature", f"{JOY}=2", "--feature", "3=-1", "--unit", "raw", "--at", "blocks.1.hook_resid_post"),
        *("--positions", "1:", "--first-tokens", "3", "--decay", "0.5", "--save-plan", str(path)),
    )
    plan = SteeringPlan.load(path)
    assert {one.feature: one.amount for one in plan.interventions} == {JOY: 2, 3: -1}
    assert (plan.unit, plan.positions, plan.first_tokens, plan.decay) == ("raw", "1:", 3, 0.5)
    assert plan.at == ("blocks.1.hook_resid_post",) and plan.dictionary == dictionary_sha256(planted_sae)
    assert SteeringPlan.from_dict(made["meta"]["plan"]) == plan
    again = steered("--plan", str(path))
    assert again["rows"] == made["rows"]


def test_gates_modes_and_error_terms_are_options_too(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    steered("--feature", "3=1", "--mode", "ablate", "--gate", f"{JOY}>0.5", "--no-error-term", "--save-plan", str(path))
    plan = SteeringPlan.load(path)
    assert plan.gate == Gate(JOY, 0.5) and not plan.keep_error and plan.mode == "ablate"


def test_the_largest_activation_is_measured(tmp_path: Path, bridge: Any, planted_sae: Any) -> None:
    largest = encode_texts(bridge, planted_sae, ["joy joy"], progress=False).pooled("max").toarray()[0]
    feature, measured = int(largest.argmax()), float(largest.max())
    path = tmp_path / "plan.json"
    steered("--feature", f"{feature}=0.5", "--actual", "joy joy", "--save-plan", str(path))
    (one,) = SteeringPlan.load(path).interventions
    assert SteeringPlan.load(path).unit == "activation" and one.amount == pytest.approx(0.5 * measured)
    assert "--actual" in refused("steer", PROMPT, "--feature", "7=1", "--actual", "joy", "--unit", "raw")


def test_a_stream_prints_the_text_that_is_generated() -> None:
    sampled = ("--feature", f"{JOY}=0.5", "--temperature", "0.9", "--seed", "4", "--top-k", "9", "--top-p", "0.9")
    (row,) = steered(*sampled)["rows"]
    result = run("steer", PROMPT, "--stream", "--tokens", "5", *sampled)
    assert result.stdout == PROMPT + row["text"] + "\n"


def test_a_plan_of_another_dictionary_needs_force(
    tmp_path: Path, bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = SteeringPlan.of({3: 1.0}, planted_sae, unit="raw").save(tmp_path / "plan.json")
    other = make_sae()
    other.W_dec.data[5] += 1
    monkeypatch.setattr("sae_emotion_plugin.plugin.load_dictionary", lambda name, layer=None: other)
    assert "made for the dictionary" in refused("steer", PROMPT, "--plan", str(path))
    assert "made for the dictionary" in refused(
        "export", str(path), str(tmp_path / "x.safetensors"), "--form", "safetensors"
    )
    assert steered("--plan", str(path), "--force")["rows"]
    assert not (tmp_path / "x.safetensors").exists()


def test_a_plan_is_exported(tmp_path: Path, planted_sae: Any) -> None:
    plan = SteeringPlan.of({3: 2.0}, planted_sae, unit="raw")
    path, out = plan.save(tmp_path / "plan.json"), tmp_path / "vectors.safetensors"
    result = run("export", str(path), str(out), "--form", "safetensors", "--json")
    assert json.loads(result.stdout) == {"file": str(out)}
    (vector,) = load_file(out).values()
    assert float(vector.norm()) == pytest.approx(2, abs=1e-5)
    scheduled = SteeringPlan.of({3: 2.0}, planted_sae, unit="raw", decay=0.5).save(tmp_path / "fading.json")
    assert "decay 0.5" in refused("export", str(scheduled), str(out), "--form", "safetensors")


def test_a_sweep_writes_its_page(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    asked = ("steer", "--sweep", str(folder), "--emotion", "joy", "--feature", f"{JOY}=1", "--openings", "4")
    result = run(*asked, "--seeds", "1", "--tokens", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (folder / "sweep.html").is_file() and (folder / "sweep.json").is_file()
    assert {row["dose"] for row in found["rows"]} >= {-0.3, 0.2}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["steer"], "no PROMPT"),
        (["steer", PROMPT], "--feature N=AMOUNT"),
        (["steer", PROMPT, "--feature", "3=1", "--plan", "p.json"], "either"),
        (["steer", PROMPT, "--feature", "3=1", "--gate", "7"], "--gate '7'"),
        (["steer", PROMPT, "--feature", "999=1"], "no feature 999"),
        (["steer", PROMPT, "--feature", "3=nan"], "feature 3 is nan"),
        (["steer", PROMPT, "--feature", "3=1", "--at", "blocks.9.hook_resid_post"], "blocks.9.hook_resid_post"),
        (["steer", PROMPT, "--feature", "3=1", "--positions", "some"], "'some'"),
        (["steer", PROMPT, "--feature", "3=1", "--top-p", "0"], "top_p is 0"),
        (["steer", " ", "--feature", "3=1"], "empty"),
        (["steer", "he", "is", "--feature", "3=1", "--stream"], "--stream"),
        (["steer", PROMPT, "--feature", "3=1", "--save-plan", "nowhere/plan.json"], "nowhere"),
        (["steer", "--sweep", "s", "--feature", "3=1"], "--emotion NAME"),
        (["steer", PROMPT, "--sweep", "s", "--emotion", "joy", "--feature", "3=1"], "no PROMPT"),
        (["steer", PROMPT, "--plan", "absent.json"], "absent.json"),
        (["study", "no-such-study"], "no-such-study"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], named: str) -> None:
    assert named in refused(*arguments)
