import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sae_emotion_plugin import registry
from sae_emotion_plugin.registry import Provenance, RegistryEntry, SaeRecord

RELEASE, SAE_ID = "tiny-emotion", "blocks.1.hook_resid_post"
MINIMAL = f"release: {RELEASE}\nmodel: tiny\nsaes:\n- {{id: a, path: a}}\n"


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """An empty packaged folder and an empty user's folder, in the place of the real ones."""
    packaged, own = tmp_path / "packaged", tmp_path / "own"
    packaged.mkdir()
    own.mkdir()
    monkeypatch.setattr(registry, "packaged_folder", lambda: packaged)
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(own))
    return packaged, own


def packaged_release(folder: Path, release: str = RELEASE) -> RegistryEntry:
    """A release with two files beside its YAML, which need not be real weights here."""
    contents = {f"{SAE_ID}/cfg.json": b"{}", f"{SAE_ID}/sae_weights.safetensors": b"weights", "recipe.yaml": b"k: 8"}
    for file, content in contents.items():
        path = folder / release / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    entry = RegistryEntry(
        release=release,
        model="tiny",
        saes=(SaeRecord(SAE_ID, SAE_ID, l0=32.0, variance_explained=0.8, neuronpedia="tiny/1-res"),),
        config_overrides={"context_size": 64},
        provenance=Provenance(recipe="recipe.yaml", sha256=hashes, licence="CC0-1.0", notes="한국어: yes"),
    )
    return registry.read_entry(registry.write_entry(entry, folder))


def test_an_entry_reads_back_as_it_was_written(folders):
    entry = packaged_release(folders[0])
    assert registry.entries() == (entry,)
    assert entry.saes[0].neuronpedia == "tiny/1-res" and entry.provenance.notes == "한국어: yes"
    hub = replace(entry, release="on-the-hub", repo_id="me/name", conversion_func="openai", provenance=Provenance())
    assert registry.read_entry(registry.write_entry(hub, folders[1])) == hub
    assert registry.entries() == (entry, hub)


def test_writing_replaces_the_whole_file_and_leaves_no_other(folders):
    entry = packaged_release(folders[1])
    registry.write_entry(replace(entry, model="other"), folders[1])
    assert [each.model for each in registry.entries()] == ["other"]
    assert sorted(path.name for path in folders[1].iterdir()) == [RELEASE, f"{RELEASE}.yaml"]


def test_a_value_that_yaml_cannot_say_leaves_no_file(folders):
    entry = RegistryEntry("odd", "tiny", (SaeRecord("a", "a"),), config_overrides={"x": object()})
    with pytest.raises(ValueError, match="'odd' cannot be written as YAML"):
        registry.write_entry(entry, folders[1])
    assert list(folders[1].iterdir()) == []


@pytest.mark.parametrize("name", [RELEASE, f"{RELEASE}/{SAE_ID}", f"{RELEASE}:{SAE_ID}"])
def test_a_dictionary_is_found_by_release_alone_or_with_its_id(name, folders):
    entry = packaged_release(folders[0])
    assert registry.find(name) == (entry, entry.saes[0])


def test_an_id_may_hold_slashes_and_colons(folders):
    saes = (SaeRecord("layer/0:a", "x"), SaeRecord("layer/1:a", "y"))
    registry.write_entry(RegistryEntry("many", "tiny", saes), folders[1])
    assert registry.find("many/layer/1:a")[1].path == "y"
    assert registry.find("many:layer/0:a")[1].path == "x"


def test_unknown_names_list_the_valid_ones(folders):
    packaged_release(folders[0])
    registry.write_entry(RegistryEntry("many", "m", tuple(SaeRecord(f"l{i}", f"l{i}") for i in range(14))), folders[1])
    with pytest.raises(ValueError, match=r"unknown release 'tiny'; valid: tiny-emotion, many$"):
        registry.find("tiny")
    with pytest.raises(ValueError, match=r"unknown id 'x' in release 'tiny-emotion'; valid: blocks.1.hook_resid_post$"):
        registry.find(f"{RELEASE}/x")
    with pytest.raises(ValueError, match=r"'many' has 14 dictionaries; valid: many/l0, .*many/l11 and 2 more$"):
        registry.find("many")


BAD_YAML = [
    ("a: [", r"is not valid YAML: line \d: "),  # PyYAML's two parsers count differently
    ("a: 1\na: 2\n", "is not valid YAML: line 2: the key 'a' stands twice"),
    ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML: line 1: could not determine a constructor"),
    ("- 1\n", r"the file is \[1\]; valid: a mapping"),
    ("", "the file is None; valid: a mapping"),
    (MINIMAL + "colour: red\n", "the file has the unknown key 'colour'; valid: release, repo_id"),
    (MINIMAL.replace("path: a", "path: a, size: 3"), "saes has the unknown key 'size'; valid: id, path"),
    (MINIMAL + "provenance: {author: me}\n", "provenance has the unknown key 'author'; valid: recipe"),
    (MINIMAL.replace("model: tiny\n", ""), "the file lacks model"),
    (MINIMAL.replace("id: a, ", ""), "saes lacks id"),
    (MINIMAL.replace("model: tiny", "model: 3"), "the file: model is 3; valid: text"),
    (MINIMAL.replace("model: tiny", "model:"), "the file lacks model"),
    (MINIMAL.replace("release: tiny-emotion", "release: a/b"), "release is 'a/b'; valid: letters"),
    (MINIMAL.replace("id: a", "id: 3"), "saes: id is 3; valid: text"),
    (MINIMAL.replace("path: a", "path: a, l0: many"), "saes: l0 is 'many'; valid: a number"),
    (MINIMAL.replace("path: a", "path: a, l0: .nan"), "saes: l0 is nan; valid: a number from 0"),
    (MINIMAL.replace("path: a", "path: a, l0: true"), "saes: l0 is True; valid: a number"),
    (
        MINIMAL.replace("path: a", "path: a, variance_explained: 1.5"),
        r"variance_explained is 1.5; valid: a number up to 1$",
    ),
    (MINIMAL + "- {id: a, path: b}\n", "release 'tiny-emotion' has the id 'a' twice"),
    (MINIMAL.replace("saes:\n- {id: a, path: a}", "saes: []"), "has no saes"),
    (MINIMAL.replace("saes:\n- {id: a, path: a}", "saes: {id: a}"), r"the file: saes is \{'id': 'a'\}; valid: a list"),
    (MINIMAL + "repo_id: nowhere\n", "repo_id is 'nowhere'; valid: 'owner/name'"),
    (MINIMAL + "config_overrides: 3\n", "the file: config_overrides is 3; valid: a mapping"),
    (MINIMAL + "provenance: {sha256: {a: xyz}}\n", "sha256 of a is 'xyz'; valid: 64"),
    (MINIMAL + "provenance: {sha256: [a]}\n", r"provenance: sha256 is \['a'\]; valid: a mapping"),
    (MINIMAL + "config_overrides: {1: 2}\n", r"config_overrides is \{1: 2\}; valid: a mapping from text"),
    (MINIMAL + "provenance: {sha256: {a: 1}}\n", "sha256 of a is 1; valid: 64"),
    (MINIMAL + "provenance: {recipe: ../recipe.yaml}\n", r"recipe is '../recipe.yaml'; valid: a relative path"),
    *(
        (MINIMAL.replace("path: a", f"path: {path!r}"), "saes: path is .*; valid: a relative path")
        for path in ("/etc", "..", "a/../b", "a//b", "./a", "", "C:/a", "a\\b")
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_a_broken_registry_file_is_refused_in_one_line_that_names_it(text, message, folders):
    (folders[1] / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        registry.entries()
    assert "\n" not in str(error.value) and "mine.yaml" in str(error.value)


def test_bytes_that_are_no_text_and_endless_aliases_are_refused_in_one_short_line(folders):
    (folders[1] / "mine.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"mine\.yaml is not valid YAML"):
        registry.entries()
    layers = "".join(f"- &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 40))
    (folders[1] / "mine.yaml").write_text(f"release: r\nmodel: m\nsaes:\n- &l0 [1]\n{layers}- *l39\n")
    with pytest.raises(ValueError, match=r"saes is \[1\]; valid: a mapping"):
        registry.entries()
    (folders[1] / "mine.yaml").write_text(f"model: m\nsaes:\n- &l0 [1]\n{layers}release: *l39\n")
    with pytest.raises(ValueError, match=r"release is \[\[\[") as error:
        registry.entries()
    assert len(str(error.value)) < 500


def test_a_release_in_two_files_is_refused(folders):
    entry = packaged_release(folders[0])
    registry.write_entry(entry, folders[1])
    with pytest.raises(ValueError, match=r"own.*defines the release 'tiny-emotion' again, after .*packaged"):
        registry.entries()


def test_only_yaml_files_at_the_top_of_a_folder_are_releases(folders):
    packaged_release(folders[0])
    (folders[0] / "__init__.py").write_text("")
    (folders[0] / "notes.txt").write_text("not yaml: [")
    assert [entry.release for entry in registry.entries()] == [RELEASE]


def test_the_users_folder_is_named_by_the_variable_or_lies_in_the_data_folder(tmp_path, monkeypatch, folders):
    assert registry.user_folder() == folders[1]
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path / "absent"))
    assert registry.entries() == ()
    (tmp_path / "absent").write_text("a file")
    with pytest.raises(NotADirectoryError, match=r"SAE_EMOTION_REGISTRY is '.*absent', which is not a folder"):
        registry.entries()
    monkeypatch.delenv(registry.FOLDER_VARIABLE)
    monkeypatch.setattr(registry.platformdirs, "user_data_dir", lambda name: str(tmp_path / "data" / name))
    assert registry.user_folder() == tmp_path / "data" / "sae_emotion_plugin" / "registry"
    assert registry.entries() == ()


def test_check_names_missing_altered_and_unlisted_files(folders):
    entry = packaged_release(folders[0])
    home = folders[0] / RELEASE
    assert registry.check(entry) == ()
    (home / SAE_ID / "sae_weights.safetensors").write_bytes(b"other weights")
    (home / "recipe.yaml").unlink()
    altered, missing = registry.check(entry)
    assert altered.startswith(f"{SAE_ID}/sae_weights.safetensors was altered: its SHA-256 is ")
    assert missing == "recipe.yaml is missing"
    unlisted = replace(entry, provenance=replace(entry.provenance, sha256={}, recipe=None))
    assert registry.check(unlisted) == (
        f"{SAE_ID}/cfg.json has no SHA-256 in the entry",
        f"{SAE_ID}/sae_weights.safetensors has no SHA-256 in the entry",
    )
    assert registry.check(replace(entry, repo_id="owner/name")) == ()


def test_a_verified_file_is_there_and_unaltered(folders):
    entry = packaged_release(folders[0])
    path = registry.verified_file(entry, entry.saes[0], "cfg.json")
    assert path == folders[0].resolve() / RELEASE / SAE_ID / "cfg.json"
    path.write_text("{ }")
    with pytest.raises(ValueError, match=r"cfg\.json was altered"):
        registry.verified_file(entry, entry.saes[0], "cfg.json")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"release 'tiny-emotion' lacks the file .*cfg\.json"):
        registry.verified_file(entry, entry.saes[0], "cfg.json")


@pytest.mark.parametrize("file", ["../../other.json", "/etc/passwd", "", ".", "a\\..\\b"])
def test_a_file_path_never_leaves_the_folder(file, folders):
    entry = packaged_release(folders[0])
    with pytest.raises(ValueError, match="valid: a relative path inside its folder"):
        registry.file_path(entry, entry.saes[0], file)


def test_a_link_that_leads_out_of_the_folder_is_refused(folders, tmp_path):
    entry = packaged_release(folders[0])
    (tmp_path / "secret.json").write_text("{}")
    (folders[0] / RELEASE / SAE_ID / "link.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match=r"link\.json of release 'tiny-emotion' leads out of its folder"):
        registry.file_path(entry, entry.saes[0], "link.json")
    linked = replace(entry, provenance=Provenance(sha256={f"{SAE_ID}/link.json": "0" * 64}))
    assert any("leads out of its folder" in problem for problem in registry.check(linked))


def test_a_release_in_a_repository_has_no_files_here(folders):
    entry = replace(packaged_release(folders[0]), repo_id="owner/name")
    with pytest.raises(ValueError, match="has no files on this machine"):
        registry.file_path(entry, entry.saes[0], "cfg.json")


def test_every_packaged_release_is_sound():
    folder = registry.packaged_folder()
    assert (folder / "__init__.py").is_file()
    for path in folder.glob("*.yaml"):
        entry = registry.read_entry(path)
        assert path.stem == entry.release
        assert registry.check(entry) == ()


def test_importing_the_registry_imports_no_model_library():
    code = (
        "import sys, sae_emotion_plugin.registry as r; print(*{'torch', 'sae_lens', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
