import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result

from sae_emotion_plugin.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def refused(*arguments: str) -> str:
    """The one line with which a command refuses its arguments."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_the_choices_offered_are_those_that_the_library_has() -> None:
    # Repeated there, since `--help` may not import what defines them.
    from sae_emotion_plugin.activations import Pooling
    from sae_emotion_plugin.interventions.exports import FORMS
    from sae_emotion_plugin.interventions.plans import Mode, Unit
    from sae_emotion_plugin.training.logs import LOGGERS

    def offered(command: str, option: str) -> tuple[str, ...]:
        (found,) = (one for one in main.commands[command].params if one.name == option)
        return tuple(found.type.choices)  # type: ignore[attr-defined]

    assert offered("steer", "mode") == get_args(Mode)
    assert offered("steer", "unit") == get_args(Unit)
    assert offered("export", "form") == FORMS
    assert offered("train", "loggers") == tuple(LOGGERS)
    assert offered("discover", "pooling") == (*get_args(Pooling), "choose")


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "labels.jsonl")

    monkeypatch.setattr("sae_emotion_plugin.registry.entries", full)
    assert refused("registry", "list") == "Error: [Errno 28] No space left on device: 'labels.jsonl'"


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"text number {i}", "label": "joy" if i % 2 else "anger"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sae_emotion_plugin.cli import main\n"
        "for arguments in (['--help'], ['quickstart', '--help'], ['registry', 'list']):\n"
        "    assert CliRunner().invoke(main, arguments).exit_code == 0, arguments\n"
        "heavy = ('torch', 'sae_lens', 'transformers', 'transformer_lens', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_dictionary_is_one_line_that_names_the_valid_ones() -> None:
    line = refused("features", "hello", "--dictionary", "no-such-dictionary")
    assert "no-such-dictionary" in line
    assert "gemma-3-270m-emotion" in line


def test_an_unknown_registry_name_is_refused_with_the_valid_names() -> None:
    for command in ("show", "check"):
        line = refused("registry", command, "no-such-release")
        assert "no-such-release" in line
        assert "gemma-3-270m-emotion" in line


def test_missing_texts_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    line = refused("discover", str(tmp_path / "absent.jsonl"), "-o", str(tmp_path / "scores.json"))
    assert "absent.jsonl" in line
    assert list(tmp_path.iterdir()) == []


def test_a_scores_file_in_a_missing_folder_is_refused_before_anything_is_loaded(labelled: Path) -> None:
    line = refused("discover", str(labelled), "-o", str(labelled.parent / "absent" / "scores.json"))
    assert "absent" in line


def test_broken_rows_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine", "label": "joy"}\n{"text": \n', encoding="utf-8")
    line = refused("discover", str(path), "-o", str(tmp_path / "scores.json"))
    assert "broken.jsonl" in line
    assert "line 2" in line
    assert not (tmp_path / "scores.json").exists()


def test_steer_refuses_amounts_that_are_no_numbers() -> None:
    line = refused("steer", "he is", "--feature", "12:0.1")
    assert "12:0.1" in line
    assert "N=AMOUNT" in line


def test_steer_needs_features_or_an_emotion_but_not_both(tmp_path: Path) -> None:
    assert "--feature" in refused("steer", "he is")
    assert "--scores" in refused("steer", "he is", "--emotion", "joy")
    assert "either" in refused("steer", "he is", "--emotion", "joy", "--feature", "1=0.1")


def test_steer_names_the_emotions_of_the_scores_when_asked_for_another(tmp_path: Path) -> None:
    from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores

    path = tmp_path / "scores.json"
    FeatureScores({}, (FeatureScore("joy", 3, 0.9, 0.8, 0.01, 0.02, 0.5, 0.1),)).save(path)
    line = refused("steer", "he is", "--emotion", "envy", "--scores", str(path))
    assert "envy" in line
    assert "joy" in line


def test_convert_writes_a_folder_that_plain_sae_lens_loads(tmp_path: Path) -> None:
    import torch
    from sae_lens import SAE

    torch.manual_seed(0)
    state = {
        "encoder.weight": torch.randn(12, 6),
        "decoder.weight": torch.randn(6, 12),
        "pre_bias": torch.randn(6),
        "latent_bias": torch.randn(12),
        "activation": "ReLU",
        "activation_state_dict": {},
        "stats_last_nonzero": torch.zeros(12, dtype=torch.long),
        "latents_activation_frequency": torch.ones(12),
        "latents_mean_square": torch.ones(12),
    }
    torch.save(state, tmp_path / "relu.pt")
    hook = "blocks.1.hook_resid_post"
    result = run("convert", str(tmp_path / "relu.pt"), str(tmp_path / "out"), "--hook-name", hook, "--json")
    assert result.exit_code == 0, result.output
    sae = SAE.load_from_disk(Path(json.loads(result.stdout)["folder"]))
    assert sae.cfg.metadata.hook_name == hook
    assert torch.equal(sae.W_enc, state["encoder.weight"].T)
    # The folder is there now: a second conversion must not touch it.
    assert "out" in refused("convert", str(tmp_path / "relu.pt"), str(tmp_path / "out"))


def test_convert_refuses_a_truncated_checkpoint_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    assert "half.pt" in refused("convert", str(tmp_path / "half.pt"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_recipe_with_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\ncolour: red\n", encoding="utf-8")
    line = refused("train", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--texts", str(tmp_path))
    assert "colour" in line
    assert "lr_warm_up_steps" in line


def test_train_hands_its_options_on_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_emotion_plugin.recipes import TrainingRecipe

    seen: list[Any] = []

    def train(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments, options))
        arguments[3].mkdir()
        (arguments[3] / "report.json").write_text('{"fvu": 0.5}\n', encoding="utf-8")
        return "trained"

    monkeypatch.setattr("sae_emotion_plugin.training.train", train)
    monkeypatch.setattr("sae_emotion_plugin.models.load_model", lambda name: f"model {name}")
    monkeypatch.setattr("sae_emotion_plugin.pages.training.write_training_page", lambda *given: seen.append(given))
    monkeypatch.setattr("sae_emotion_plugin.publishing.hub_files.trained_card", lambda folder: "the card")
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = ("openai-topk", str(out), "--texts", str(tmp_path), "--work", str(work), "--log", "tensorboard")
    found = run("train", *arguments, "--measure-steps", "50", "--checkpoint-steps", "20", "--json", "--no-register")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == {"fvu": 0.5}
    options = {"work_dir": work, "measure_steps": 50, "checkpoint_steps": 20, "loggers": ("tensorboard",)}
    assert seen[0] == ((TrainingRecipe.read("openai-topk"), "model embedded", tmp_path, out), options)
    assert seen[1] == (out / "report.html", "trained") and (out / "README.md").read_text() == "the card"
    assert "mlflow" in run("train", *arguments[:4], "--log", "mlflow").stderr


def test_a_run_that_was_killed_behind_its_last_step_gets_its_page_and_a_taken_name_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from dataclasses import replace

    from sae_emotion_plugin.recipes import TrainingRecipe

    monkeypatch.setenv("SAE_EMOTION_REGISTRY", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()

    def trained_again(recipe: Any, model: Any, texts: Path, out: Path, **options: Any) -> None:
        raise ValueError(f"{out} exists already" if out.exists() else "it was trained again")

    monkeypatch.setattr("sae_emotion_plugin.training.train", trained_again)
    monkeypatch.setattr("sae_emotion_plugin.models.load_model", lambda name: None)
    out = tmp_path / "out"
    shutil.copytree(Path(__file__).parents[1] / "registry" / "gemma-3-270m-emotion" / "blocks.9.hook_resid_post", out)
    recipe = replace(TrainingRecipe.read(out / "recipe.yaml"), name="mine")
    for path in (out / "recipe.yaml", tmp_path / "mine.yaml"):
        path.write_text(recipe.to_yaml(), encoding="utf-8")
    plain = ("train", str(tmp_path / "mine.yaml"), str(out), "--texts", str(tmp_path))
    arguments = (*plain, "--register")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_emotion_plugin.training.register_dictionary", lambda *_: pytest.fail("killed here"))
        assert run(*plain, "--no-register").exit_code == 0
    card = (out / "README.md").read_text()
    assert (out / "report.html").is_file() and "# mine" in card and 'load_from_disk("FOLDER")' in card
    assert "None" not in card and "owner/repo" in card and not list((tmp_path / "own").iterdir())
    # What is still missing is the registration, asked for or by default.
    found = run(*plain)
    assert found.exit_code == 0 and "was trained before" in found.stderr, found.output
    assert "registered as mine/blocks.9.hook_resid_post" in found.stderr and (tmp_path / "own" / "mine.yaml").is_file()
    assert "out exists already" in refused(*plain)
    (out / "report.html").unlink()
    assert "release 'mine' has a dictionary 'blocks.9.hook_resid_post' already" in refused(*arguments)
    assert "not registered: release 'mine' has a dictionary" in run(*plain).stderr
    packaged = ("train", "embedded-gemma", str(tmp_path / "new"), "--texts", str(tmp_path), "--register")
    assert "the release 'gemma-3-270m-emotion' came with the plugin" in refused(*packaged)


def test_the_registry_lists_shows_and_checks_the_shipped_dictionary() -> None:
    listed = json.loads(run("registry", "list", "--json").stdout)
    assert "gemma-3-270m-emotion/blocks.9.hook_resid_post" in [row["name"] for row in listed]
    shown = json.loads(run("registry", "show", "gemma-3-270m-emotion", "--json").stdout)
    assert shown["provenance"]["model_sha256"].startswith("a5fd3b62230aa5ec")
    assert "Q4_K_M" in shown["provenance"]["notes"]
    checked = run("registry", "check", "gemma-3-270m-emotion", "--json")
    assert checked.exit_code == 0
    assert json.loads(checked.stdout) == {"gemma-3-270m-emotion": []}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_command(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_SAE_EMOTION_COMPLETE" in result.stdout
