import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sae_lens.loading import pretrained_saes_directory

from sae_emotion_plugin import registry, release_files
from sae_emotion_plugin.feature_labels import FeatureLabel, read_labels, write_labels
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe
from sae_emotion_plugin.registry import Provenance, RegistryEntry, SaeRecord
from sae_emotion_plugin.release_files import ReleaseFiles, install, open_release, remove, stanza

JOY = FeatureLabel(7, ("joy",), "joy", {"auroc": 0.9}, "m", "1", "ada")
SAD = FeatureLabel(3, ("sadness",), "sad", {}, "by hand", "1", "grace")
Make = Callable[..., ReleaseFiles]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, and a packaged one that is empty."""
    (tmp_path / "packaged").mkdir()
    monkeypatch.setattr(registry, "packaged_folder", lambda: tmp_path / "packaged")
    monkeypatch.setattr(registry, "user_folder", lambda: tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """Makes a release whose files lie wherever they are, with text for weights."""

    def make(
        *ids: str, weights: str = "weights", labels: tuple[FeatureLabel, ...] = (), **changes: object
    ) -> ReleaseFiles:
        home = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        files = {}
        for sae_id in ids or ("a",):
            contents = {"cfg.json": '{"d_sae": 8}', "sae_weights.safetensors": weights, "report.json": '{"l0": 4.0}'}
            for name, content in contents.items():
                path = home / f"{sae_id}-{name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
                files[f"{sae_id}/{name}"] = path
            if labels:
                files[f"labels/{sae_id}.jsonl"] = write_labels(home / f"{sae_id}-labels", labels)
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        saes = tuple(SaeRecord(sae_id, sae_id, l0=4.0) for sae_id in ids or ("a",))
        entry = RegistryEntry("mine", "tiny", saes, provenance=Provenance(sha256=hashes, licence="CC0-1.0"))
        return ReleaseFiles(replace(entry, **changes), files)  # type: ignore[arg-type]

    return make


def snapshot(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_installed_release_is_found_sound_and_has_its_labels(own: Path, made: Make) -> None:
    entry = install(made("a", labels=(JOY,)), own)
    found, sae = registry.find("mine/a")
    assert found == entry and registry.check(found) == ()
    assert registry.labels(found, sae) == (JOY,)
    assert sorted(snapshot(own)) == [
        "mine.yaml",
        "mine/a/cfg.json",
        "mine/a/report.json",
        "mine/a/sae_weights.safetensors",
        "mine/labels/a.jsonl",
    ]


def test_a_second_dictionary_comes_beside_the_first(own: Path, made: Make) -> None:
    install(made("a", labels=(JOY,)), own)
    texts = replace(made("b").entry.provenance, texts="other texts")
    second = made("b", weights="others")
    install(
        replace(second, entry=replace(second.entry, provenance=replace(texts, sha256=second.entry.provenance.sha256))),
        own,
    )
    entry, _ = registry.find("mine/b")
    assert [sae.id for sae in entry.saes] == ["a", "b"] and registry.check(entry) == ()
    assert entry.provenance.texts == "other texts"
    assert registry.labels(*registry.find("mine/a")) == (JOY,) and registry.labels(*registry.find("mine/b")) == ()


def test_the_same_dictionary_by_another_author_adds_labels_and_nothing_else(own: Path, made: Make) -> None:
    install(made("a", labels=(JOY,)), own)
    before = snapshot(own)
    install(made("a", labels=(SAD, JOY)), own)
    assert registry.labels(*registry.find("mine")) == (SAD, JOY)
    install(made("a"), own, labels={"a": (replace(SAD, author="lin"),)})
    assert [label.author for label in registry.labels(*registry.find("mine"))] == ["grace", "lin", "ada"]
    assert registry.check(registry.find("mine")[0]) == ()
    after = snapshot(own)
    assert {name for name in after if after[name] != before.get(name)} == {"mine.yaml", "mine/labels/a.jsonl"}


def test_another_dictionary_of_the_same_id_is_refused_and_replaced_when_forced(own: Path, made: Make) -> None:
    install(made("a", "b", labels=(JOY,)), own)
    before = snapshot(own)
    other = made("a", weights="others")
    with pytest.raises(ValueError, match="has another dictionary 'a': it exists already: remove it or choose another"):
        install(other, own)
    assert snapshot(own) == before
    entry = install(other, own, force=True)
    assert registry.check(entry) == () and {sae.id for sae in entry.saes} == {"a", "b"}
    assert (own / "mine/a/sae_weights.safetensors").read_text() == "others"
    assert registry.labels(*registry.find("mine/a")) == () and not (own / "mine/labels/a.jsonl").exists()
    assert registry.labels(*registry.find("mine/b")) == (JOY,)


REFUSED = [
    (lambda made: made("b", model="other"), "release 'mine' has model 'tiny', not 'other'"),
    (lambda made: made("b", config_overrides={"k": 1}), "has config_overrides {}, not {'k': 1}"),
    (lambda made: made("a/b"), "the folder a/b of 'a/b' is that of 'a'; choose another id"),
    (lambda made: made("labels/x"), "path is 'labels/x'; valid: one that does not begin with labels or neuronpedia"),
    (lambda made: altered(made("b"), "b/cfg.json", b"{}"), "b-cfg.json was altered: its SHA-256 is"),
    (lambda made: without_file(made("b"), "b/cfg.json"), "b/cfg.json of release 'mine' is missing"),
    (lambda made: without_hash(made("b"), "b/cfg.json"), "b/cfg.json has no SHA-256 in release 'mine'"),
    (lambda made: made("b", labels=(replace(JOY, feature=8),)), "b-labels, line 1: feature is 8; valid: 0 to 7"),
]


def altered(release: ReleaseFiles, name: str, content: bytes) -> ReleaseFiles:
    release.files[name].write_bytes(content)
    return release


def without_file(release: ReleaseFiles, name: str) -> ReleaseFiles:
    release.files[name].unlink()
    return release


def without_hash(release: ReleaseFiles, name: str) -> ReleaseFiles:
    hashes = {file: digest for file, digest in release.entry.provenance.sha256.items() if file != name}
    entry = replace(release.entry, provenance=replace(release.entry.provenance, sha256=hashes))
    return replace(release, entry=entry)


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(
    make: Callable[[Make], ReleaseFiles], message: str, own: Path, made: Make
) -> None:
    install(made("a", labels=(JOY,)), own)
    before = snapshot(own)
    with pytest.raises(ValueError, match=message.replace("{", r"\{")) as error:
        install(make(made), own)
    assert "\n" not in str(error.value) and snapshot(own) == before


def test_labels_outside_the_width_or_of_no_dictionary_are_refused(own: Path, made: Make) -> None:
    with pytest.raises(ValueError, match=r"line 1: feature is 9; valid: 0 to 7"):
        install(made("a"), own, labels={"a": (replace(JOY, feature=9),)})
    with pytest.raises(ValueError, match="labels are for 'x'; valid: a"):
        install(made("a"), own, labels={"x": (JOY,)})
    assert snapshot(own) == {}


def test_a_name_of_the_plugins_own_is_refused(own: Path, made: Make) -> None:
    (registry.packaged_folder() / "mine.yaml").write_text("release: mine\nmodel: m\nsaes:\n- {id: a, path: a}\n")
    with pytest.raises(ValueError, match="the release 'mine' came with the plugin; valid: another name"):
        install(made("a"), own)


def test_an_interruption_leaves_the_registry_as_it_was(own: Path, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    install(made("a", labels=(JOY,)), own)
    before = snapshot(own)
    calls = []

    def full(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(release_files.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        install(made("b"), own)
    assert snapshot(own) == before
    monkeypatch.setattr(registry, "write_entry", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        install(made("c"), own)
    monkeypatch.undo()
    assert [entry.saes for entry in registry.entries_in(own)["mine"][:1]] == [(SaeRecord("a", "a", l0=4.0),)]
    assert registry.check(install(made("c"), own)) == ()


def test_a_release_or_one_dictionary_of_it_is_removed_with_its_files(own: Path, made: Make) -> None:
    install(made("a", "b", labels=(JOY,)), own)
    remove("mine/a", own)
    assert sorted(snapshot(own)) == [
        "mine.yaml",
        "mine/b/cfg.json",
        "mine/b/report.json",
        "mine/b/sae_weights.safetensors",
        "mine/labels/b.jsonl",
    ]
    assert registry.check(registry.find("mine")[0]) == ()
    with pytest.raises(ValueError, match="unknown id 'a' in release 'mine'; valid: b"):
        remove("mine:a", own)
    with pytest.raises(ValueError, match=r"no release 'yours' in .*; valid: mine"):
        remove("yours", own)
    assert remove("mine", own).release == "mine"
    assert snapshot(own) == {} and not (own / "mine").exists()


def test_removing_a_linked_release_leaves_what_it_links_to(own: Path, made: Make, tmp_path: Path) -> None:
    install(made("a"), own)
    shutil.move(own / "mine", tmp_path / "elsewhere")
    (own / "mine").symlink_to(tmp_path / "elsewhere")
    remove("mine", own)
    assert not (own / "mine").exists() and (tmp_path / "elsewhere" / "a" / "cfg.json").is_file()


def test_a_file_with_another_name_is_taken_over(own: Path, made: Make) -> None:
    install(made("a"), own)
    (own / "mine.yaml").rename(own / "other.yaml")
    install(made("b"), own)
    assert [path.name for path in own.glob("*.yaml")] == ["mine.yaml"]
    assert len(registry.find("mine/b")[0].saes) == 2


def test_a_trained_folder_and_a_registered_name_are_the_same_release(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    recipe = TrainingRecipe(
        "mine", "layer-0", "tiny", "blocks.0.hook_resid_post", (TextSource("t.txt"),), 8, 2, 1.0, 0.1
    )
    contents = {
        "cfg.json": json.dumps({"d_sae": 8}),
        "sae_weights.safetensors": "weights",
        "recipe.yaml": recipe.to_yaml(),
        "report.json": json.dumps({"l0": 2.0, "fvu": 0.25}),
        "provenance.json": json.dumps({"model": {"name": "tiny"}, "texts": [{"path": "t.txt", "licence": "CC0"}]}),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    release = open_release(folder)
    assert release.entry.saes == (SaeRecord("layer-0", "layer-0", l0=2.0, variance_explained=0.75),)
    assert release.entry.provenance.texts == "t.txt (CC0)"
    installed = install(release, own)
    assert open_release("mine").entry == installed == open_release("mine/layer-0").entry
    (folder / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trained: report.json or provenance.json lacks 'l0'"):
        open_release(folder)
    (folder / "report.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"trained lacks report\.json: it is no folder that `train` wrote"):
        open_release(folder)
    with pytest.raises(ValueError, match="unknown release 'absent'; valid: mine"):
        open_release("absent")


def test_one_dictionary_of_a_release_is_opened_without_the_others(own: Path, made: Make) -> None:
    install(made("a", "b", labels=(JOY,)), own)
    release = open_release("mine/b")
    assert [sae.id for sae in release.entry.saes] == ["b"] and set(release.files) == set(
        release.entry.provenance.sha256
    )
    assert all(file.startswith(("b/", "labels/b.")) for file in release.files)
    assert len(registry.entries()[0].saes) == 2


def test_the_stanza_is_read_by_saelens_itself(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(made("a", "b").entry, conversion_func="openai", config_overrides={"context_size": 64})
    text = stanza(entry, "me/mine")
    assert set(yaml.safe_load(text)["mine"]) == {"conversion_func", "model", "repo_id", "config_overrides", "saes"}
    (tmp_path / "pretrained_saes.yaml").write_text(text)
    monkeypatch.setattr(pretrained_saes_directory, "files", lambda _: tmp_path)
    lookup = pretrained_saes_directory.get_pretrained_saes_directory.__wrapped__()["mine"]
    assert (lookup.repo_id, lookup.model, lookup.conversion_func) == ("me/mine", "tiny", "openai")
    assert lookup.saes_map == {"a": "a", "b": "b"} and lookup.expected_l0["a"] == 4.0
    assert lookup.config_overrides == {"context_size": 64}
    with pytest.raises(ValueError, match="release 'mine' is in no repository; valid: --repo owner/name"):
        stanza(entry)
    with pytest.raises(ValueError, match=r"repo_id is '../x'; valid: 'owner/name'"):
        stanza(entry, "../x")


def test_labels_are_read_only_when_recorded_and_unaltered(own: Path, made: Make) -> None:
    entry = install(made("a", labels=(JOY,)), own)
    path = own / "mine/labels/a.jsonl"
    assert read_labels(path) == (JOY,)
    path.write_text(path.read_text().replace("joy", "awe"))
    with pytest.raises(ValueError, match=r"a\.jsonl was altered"):
        registry.labels(*registry.find("mine"))
    assert [problem.split(" was ")[0] for problem in registry.check(entry)] == ["labels/a.jsonl"]
