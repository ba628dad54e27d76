import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_carries_the_registry_the_recipes_and_the_texts(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            tmp_path,
            ROOT,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    folder = "sae_emotion_plugin/_registry/gemma-3-270m-emotion/blocks.9.hook_resid_post"
    assert {
        "sae_emotion_plugin/_registry/gemma-3-270m-emotion.yaml",
        f"{folder}/cfg.json",
        f"{folder}/sae_weights.safetensors",
        f"{folder}/report.json",
        "sae_emotion_plugin/_recipes/embedded-gemma.yaml",
        "sae_emotion_plugin/data/corpus_en.jsonl",
        "sae_emotion_plugin/data/corpus_ko.jsonl",
        "sae_emotion_plugin/data/corpus_ja.jsonl",
        "sae_emotion_plugin/data/openings.jsonl",
        "sae_emotion_plugin/py.typed",
    } <= names
    listed = subprocess.run(
        [sys.executable, "-m", "sae_emotion_plugin", "registry", "check"],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        check=True,
    )
    openai = [f"gpt2-small-openai-{version}: sound" for version in ("v1", "v4", "v5_128k", "v5_32k")]
    assert listed.stdout.splitlines() == ["gemma-3-270m-emotion: sound", *openai]


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "sae_lens", "numpy", "transformers"}
    code = f"import sys, sae_emotion_plugin; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_declared_for_editors_and_resolves() -> None:
    import sae_emotion_plugin

    tree = ast.parse((ROOT / "sae_emotion_plugin/__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sae_emotion_plugin.")
        for alias in node.names
    }
    assert set(declared) == set(sae_emotion_plugin.__all__)
    for name, module in declared.items():
        assert getattr(sae_emotion_plugin, name).__module__ in (module, "sae_emotion_plugin.generation.records")
        assert name in dir(sae_emotion_plugin)
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(sae_emotion_plugin, "no_such_name")  # noqa: B009 (an attribute that type checkers know to be missing)


def test_the_constraints_pin_every_dependency_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in map(Requirement, wanted):
        if requirement.name != "sae-emotion-plugin":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_no_module_is_over_four_hundred_lines() -> None:
    for path in (ROOT / "sae_emotion_plugin").rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name


def test_weights_are_never_unpickled_and_remote_code_is_never_trusted() -> None:
    for path in (ROOT / "sae_emotion_plugin").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"trust_remote_code\s*=\s*True|pickle\.load|allow_pickle\s*=\s*True", source), path.name
        for call in re.findall(r"torch\.load\([^)]*\)", source):
            assert "weights_only=True" in call, path.name
