import ast
import re
from pathlib import Path
from typing import Any

import click
import pytest
from readme_reference import README, commands, reference, updated
from sae_lens import SAE

from sae_emotion_plugin import LabelledTexts

TEXT = README.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_every_command_has_help_and_stands_in_the_readme(name: str, command: click.Command) -> None:
    assert (command.help and command.help.strip().endswith((".", ").", '".', ':"'))) or ":" in (command.help or "")
    assert f"### `{name}`" in TEXT
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"


def test_the_command_reference_in_the_readme_is_the_commands_own_help() -> None:
    assert updated(TEXT) == TEXT, "run `make readme`"
    assert reference().strip() in TEXT


def test_quickstart_and_test_are_the_first_commands_of_the_readme() -> None:
    first = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first.group(1).strip().splitlines()] == [
        "make quickstart",
        "make test",
    ]


def test_every_module_stands_in_the_module_map() -> None:
    package = README.parent / "sae_emotion_plugin"
    rows = [
        [set(re.findall(r"`(\w+)`", cell)) for cell in line.strip("|").split("|")]
        for line in TEXT.split("## Modules")[1].split("## Licences")[0].splitlines()
        if line.startswith("| `")
    ]
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert {name for first, *_ in rows for name in first} == folders | modules
    for first, *_, last in rows:
        for folder in first & folders:
            inside = {path.stem for path in (package / folder).glob("*.py")} - {"__init__"}
            assert last == inside, folder


def test_the_python_examples_import_only_public_names() -> None:
    import sae_emotion_plugin

    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    imported = [
        alias.name
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module == "sae_emotion_plugin"
        for alias in node.names
    ]
    assert set(imported) <= set(sae_emotion_plugin.__all__)


@pytest.mark.slow
@pytest.mark.usefixtures("sae_lens_as_before")
def test_the_five_minute_tour_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    tour = TEXT.split("## Five minutes in Python")[1]
    first, second = re.findall(r"```python\n(.*?)```", tour, re.DOTALL)[:2]
    scope: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), scope)
    assert "he is such a" in capsys.readouterr().out
    exec(compile(second, "README.md", "exec"), scope)
    assert scope["sae"].cfg.metadata.hook_name == "blocks.9.hook_resid_post"


@pytest.mark.slow
def test_a_dictionary_is_trained_on_texts_of_one_s_own_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TEXT.split("## Training")[1]
    found = [re.search(rf"```{kind}\n(.*?)```", training, re.DOTALL) for kind in ("yaml", "python")]
    recipe, code = (match.group(1) for match in found if match is not None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mine.txt").write_text("\n\n".join(LabelledTexts.bundled("en").texts[:250]))
    (tmp_path / "mine.yaml").write_text(recipe)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["trained"].report.d_sae == 2560 and "fvu" in capsys.readouterr().out
    assert SAE.load_from_disk(tmp_path / "mine").cfg.architecture() == "topk"


def test_files_linked_from_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (README.parent / Path(target)).is_file(), target
