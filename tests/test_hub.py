import hashlib
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import make_sae
from hub_server import TOKEN, Fault, HubServer, hub_server

from sae_emotion_plugin import registry
from sae_emotion_plugin.feature_labels import FeatureLabel, write_labels
from sae_emotion_plugin.publishing.hub import fetch, publish
from sae_emotion_plugin.publishing.hub_files import prepare
from sae_emotion_plugin.registry import Provenance, RegistryEntry, SaeRecord
from sae_emotion_plugin.release_files import ReleaseFiles, install

# huggingface_hub's own way of sending a large file, of which its HTTP library warns.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "ada/tiny"
JOY = FeatureLabel(7, ("joy",), "joy <script>alert(1)</script> | [x](http://evil)", {"auroc": 0.9}, "m", "1", "ada")
FILES = [
    ".gitattributes",
    "README.md",
    "a/cfg.json",
    "a/recipe.yaml",
    "a/report.json",
    "a/sae_weights.safetensors",
    "labels/a.jsonl",
    "pretrained_saes.yaml",
    "registry.yaml",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted dictionary as SAELens writes it."""
    folder = tmp_path_factory.mktemp("saved")
    make_sae().save_model(folder)
    (folder / "report.json").write_text('{"l0": 4.0, "fvu": 0.25, "n_tokens": 1234}')
    (folder / "recipe.yaml").write_text("k: 4\n")
    return folder


@pytest.fixture
def release(saved: Path, tmp_path: Path) -> ReleaseFiles:
    return made(saved, tmp_path / "labels.jsonl", "a")


def made(saved: Path, labels: Path, *ids: str) -> ReleaseFiles:
    write_labels(labels, [JOY])
    names = ("cfg.json", "recipe.yaml", "report.json", "sae_weights.safetensors")
    files = {f"{sae_id}/{name}": saved / name for sae_id in ids for name in names}
    files |= {f"labels/{sae_id}.jsonl": labels for sae_id in ids}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    saes = tuple(SaeRecord(sae_id, sae_id, l0=4.0) for sae_id in ids)
    return ReleaseFiles(RegistryEntry("tiny-mood", "me/tiny", saes, provenance=Provenance(sha256=hashes)), files)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, a token, and a cache and a registry of our own; waiting takes no time."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path / "own"))
    huggingface_hub.utils.disable_progress_bars()
    with hub_server() as server:
        yield server
    huggingface_hub.utils.enable_progress_bars()


def send(hub: HubServer, release: ReleaseFiles, **how: Any) -> Any:
    return publish(release, REPO, endpoint=hub.url, **how)


def test_a_release_is_published_in_one_commit_with_all_that_belongs_to_it(
    hub: HubServer, release: ReleaseFiles, tmp_path: Path
) -> None:
    export, page = tmp_path / "export", tmp_path / "page.html"
    (export / "features").mkdir(parents=True)
    (export / "features" / "batch-0.jsonl.gz").write_bytes(b"gz")
    (export / ".journal").write_text("not for others")
    page.write_text("<html>")
    done = send(hub, release, neuronpedia=export, page=page, licence="MIT", datasets=["go/emotions"])
    files = hub.files(REPO)
    assert sorted(files) == sorted([*FILES, "neuronpedia/features/batch-0.jsonl.gz", "report.html"])
    assert len(hub.repos[REPO].commits) == 2 and len(hub.asked("/commit/")) == 1
    assert (done.commit, done.changed, done.pull_request) == (hub.repos[REPO].branches["main"], True, None)
    recorded = yaml.safe_load(files["registry.yaml"])["provenance"]["sha256"]
    assert recorded == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in files.items()
        if name not in (".gitattributes", "README.md", "pretrained_saes.yaml", "registry.yaml")
    }
    assert yaml.safe_load(files["pretrained_saes.yaml"])["tiny-mood"]["repo_id"] == REPO
    assert files["a/sae_weights.safetensors"] == release.files["a/sae_weights.safetensors"].read_bytes()
    assert not hub.repos[REPO].private


def test_a_dry_run_lists_every_file_of_the_commit_and_asks_nobody(hub: HubServer, release: ReleaseFiles) -> None:
    publication = prepare(release, REPO)
    assert hub.requests == []
    listed = {one["path"]: (one["size"], one["sha256"]) for one in publication.to_dict()["files"]}
    send(hub, release)
    committed = {path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in hub.files(REPO).items()}
    del committed[".gitattributes"]
    assert listed == committed
    lines = repr(publication).splitlines()
    assert lines[0] == f"{REPO}: {len(listed)} files, {sum(size for size, _ in listed.values()):,} bytes"
    assert len(lines) == len(listed) + 2 and listed["a/cfg.json"][1] in repr(publication)
    assert "<table>" in publication._repr_html_()


FRESH = """
import sys, torch, sae_lens
sae = sae_lens.SAE.from_pretrained("ada/tiny", "a")
torch.save({name: value for name, value in sae.state_dict().items()}, sys.argv[1])
print(type(sae).__name__, sae.cfg.metadata.hook_name, "sae_emotion_plugin" in sys.modules)
"""


def fresh(hub: HubServer, tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process says that knows the server by HF_ENDPOINT alone."""
    homes = {"HF_HOME": str(tmp_path / "home"), registry.FOLDER_VARIABLE: str(tmp_path / "own")}
    switches = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    environment = {**os.environ, **homes, **switches}
    environment.pop("HF_HUB_CACHE", None)
    (tmp_path / "own").mkdir(exist_ok=True)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)


def test_plain_saelens_loads_it_from_there_in_a_fresh_process(
    hub: HubServer, release: ReleaseFiles, tmp_path: Path
) -> None:
    send(hub, release)
    done = fresh(hub, tmp_path, "-W", "ignore", "-c", FRESH, str(tmp_path / "state.pt"))
    assert done.stdout.split() == ["TopKSAE", "blocks.0.hook_resid_post", "False"], done.stderr
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in make_sae().state_dict().items():
        torch.testing.assert_close(state[name], value)


def test_the_commands_publish_and_fetch_and_show_no_token(
    hub: HubServer, release: ReleaseFiles, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    install(release, tmp_path / "own")
    tool = ("-m", "sae_emotion_plugin", "-v")
    said = [fresh(hub, tmp_path, *tool, "publish", "hub", "tiny-mood", REPO, "--private", "--json")]
    assert json.loads(said[0].stdout)["changed"] is True, said[0].stderr
    assert hub.repos[REPO].private
    said.append(fresh(hub, tmp_path, *tool, "registry", "add", REPO, "--as", "fetched"))
    assert said[1].stdout == "added fetched/a\n", said[1].stderr
    said.append(fresh(hub, tmp_path, *tool, "registry", "export", "fetched"))
    assert yaml.safe_load(said[2].stdout)["fetched"]["repo_id"] == REPO
    said.append(fresh(hub, tmp_path, *tool, "registry", "remove", "fetched"))
    said.append(fresh(hub, tmp_path, *tool, "registry", "list"))
    assert "tiny-mood/a" in said[4].stdout and "fetched" not in said[4].stdout
    hub.writable = False
    said.append(fresh(hub, tmp_path, *tool, "publish", "hub", "tiny-mood", "bob/tiny"))
    assert said[5].returncode == 2 and said[5].stdout == ""
    assert said[5].stderr.splitlines()[-1].startswith("Error: creating bob/tiny failed: the token may not do that")
    for one in said:
        assert TOKEN not in one.stdout + one.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [name for name, data in hub.files(REPO).items() if TOKEN.encode() in data]


def test_publishing_again_commits_nothing_and_a_second_dictionary_joins_the_first(
    hub: HubServer, release: ReleaseFiles, saved: Path, tmp_path: Path
) -> None:
    first = send(hub, release)
    again = send(hub, release)
    assert (again.changed, again.commit, again.pull_request) == (False, first.commit, None)
    send(hub, made(saved, tmp_path / "others.jsonl", "b"))
    files = hub.files(REPO)
    assert {"a/sae_weights.safetensors", "b/sae_weights.safetensors", "labels/a.jsonl"} <= set(files)
    entry = fetch(REPO, endpoint=hub.url).entry
    assert [sae.id for sae in entry.saes] == ["a", "b"]
    assert len(hub.asked("PUT /large/")) == 1  # equal weights are sent once


def test_files_that_are_no_longer_wanted_go_and_extras_that_were_not_given_again_stay(
    hub: HubServer, release: ReleaseFiles, tmp_path: Path
) -> None:
    (tmp_path / "export").mkdir()
    for name in ("x.jsonl", "y.jsonl"):
        (tmp_path / "export" / name).write_text("{}")
    send(hub, release, neuronpedia=tmp_path / "export")
    less = {name: path for name, path in release.files.items() if name != "a/recipe.yaml"}
    kept = {name: digest for name, digest in release.entry.provenance.sha256.items() if name in less}
    slim = ReleaseFiles(replace(release.entry, provenance=Provenance(sha256=kept)), less)
    send(hub, slim)
    assert "a/recipe.yaml" not in hub.files(REPO) and "neuronpedia/y.jsonl" in hub.files(REPO)
    (tmp_path / "export" / "y.jsonl").unlink()
    send(hub, slim, neuronpedia=tmp_path / "export")
    assert "neuronpedia/x.jsonl" in hub.files(REPO) and "neuronpedia/y.jsonl" not in hub.files(REPO)
    assert fetch(REPO, endpoint=hub.url).entry.provenance.recipe is None


def changed_weights(release: ReleaseFiles, tmp_path: Path) -> ReleaseFiles:
    path = tmp_path / "changed.safetensors"
    path.write_bytes(release.files["a/sae_weights.safetensors"].read_bytes()[:-1] + b"\x01")
    name = "a/sae_weights.safetensors"
    hashes = {**release.entry.provenance.sha256, name: hashlib.sha256(path.read_bytes()).hexdigest()}
    entry = replace(release.entry, provenance=replace(release.entry.provenance, sha256=hashes))
    return ReleaseFiles(entry, {**release.files, name: path})


def test_what_is_not_ours_or_another_dictionary_is_overwritten_only_when_forced(
    hub: HubServer, release: ReleaseFiles, tmp_path: Path
) -> None:
    hub.add_repo(REPO, {"model.safetensors": b"a language model", "README.md": b"mine"})
    before = hub.files(REPO)
    with pytest.raises(ValueError, match=r"ada/tiny holds something else: model\.safetensors; nothing was published"):
        send(hub, release)
    assert hub.files(REPO) is before and not hub.asked("POST .*(preupload|commit|large)")
    send(hub, release, force=True)
    assert hub.files(REPO)["model.safetensors"] == b"a language model" and "a/cfg.json" in hub.files(REPO)
    other = changed_weights(release, tmp_path)
    with pytest.raises(ValueError, match="holds another dictionary 'a'; nothing was published; valid: another repos"):
        send(hub, other)
    send(hub, other, force=True)
    assert hub.files(REPO)["a/sae_weights.safetensors"].endswith(b"\x01")
    renamed = replace(release, entry=replace(release.entry, release="other"))
    with pytest.raises(ValueError, match="holds the release 'tiny-mood' of me/tiny"):
        send(hub, renamed)
    send(hub, renamed, force=True)
    assert yaml.safe_load(hub.files(REPO)["registry.yaml"])["release"] == "other"
    hub.files(REPO)["registry.yaml"] = b"colour: red"
    with pytest.raises(ValueError, match=r"holds a registry\.yaml that cannot be read"):
        send(hub, renamed)


def test_weights_that_were_changed_on_the_hub_count_as_another_dictionary(
    hub: HubServer, release: ReleaseFiles
) -> None:
    send(hub, release)
    hub.files(REPO)["a/sae_weights.safetensors"] = b"changed there"
    with pytest.raises(ValueError, match="holds another dictionary 'a'"):
        send(hub, release)


def test_an_empty_repository_is_filled_and_a_public_one_is_not_taken_for_private(
    hub: HubServer, release: ReleaseFiles
) -> None:
    hub.add_repo(REPO)
    with pytest.raises(ValueError, match="ada/tiny exists and is public; nothing was published: make it private"):
        send(hub, release, private=True)
    assert send(hub, release).changed and not hub.asked("repos/create")


def test_a_branch_or_a_pull_request_leaves_the_main_branch_alone(hub: HubServer, release: ReleaseFiles) -> None:
    hub.add_repo(REPO)
    before = hub.repos[REPO].branches["main"]
    send(hub, release, revision="v2")
    assert "a/cfg.json" in hub.files(REPO, "v2")
    done = send(hub, release, pull_request=True)
    assert done.pull_request == f"{hub.url}/{REPO}/discussions/1" and "a/cfg.json" in hub.files(REPO, "refs/pr/1")
    assert hub.repos[REPO].branches["main"] == before
    assert fetch(REPO, revision="v2", endpoint=hub.url).entry.provenance.revision == hub.repos[REPO].branches["v2"]
    with pytest.raises(ValueError, match="a pull request goes to the main branch, not to 'v2'"):
        send(hub, release, pull_request=True, revision="v2")


STEPS = {
    "look": "GET /api/models/",
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "upload": "PUT /large/",
    "verify": "POST /verify",
    "commit": "POST .*/commit/",
}
FAULTS = [
    *(("look", status) for status in (403, 500)),
    *(("create", status) for status in (401, 403, 409, 429, 503)),
    *(("card", status) for status in (429, 502)),
    *(("preupload", status) for status in (403, 429, 500)),
    *(("batch", status) for status in (401, 413, 500)),
    *(("upload", status) for status in (403, 413, 500)),
    ("verify", 500),
    *(("commit", status) for status in (401, 403, 409, 412, 413, 429, 500, 503)),
    *((step, None) for step in STEPS),
]
SAID = {
    401: "not logged in, or the token is not valid: `hf auth login`, or set HF_TOKEN",
    403: "it needs write permission",
    409: "run the same command again",
    412: "the repository changed meanwhile: run the same command again",
    413: "the Hub finds it too large",
    429: "too many requests: wait",
    None: "the connection was lost",
}


@pytest.mark.parametrize(("step", "status"), FAULTS)
def test_when_anything_fails_nothing_is_published_and_the_next_call_finishes(
    step: str, status: int | None, hub: HubServer, release: ReleaseFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.faults.append(Fault(STEPS[step], status))
    with pytest.raises(ValueError) as error:
        send(hub, release)
    message = str(error.value)
    assert SAID.get(status, f"the Hub answered {status}: run the same command again later") in message, message
    assert "nothing was published" in message and "\n" not in message and len(message) < 500
    assert REPO not in hub.repos or list(hub.files(REPO)) == [".gitattributes"]
    hub.faults.clear()
    sent = len(hub.large)
    assert send(hub, release).changed and sorted(hub.files(REPO)) == FILES
    assert len(hub.asked("PUT /large/")) >= 1 and (not sent or len(hub.large) == sent)
    assert TOKEN not in caplog.text


def test_what_was_uploaded_is_not_sent_again(hub: HubServer, release: ReleaseFiles) -> None:
    hub.faults.append(Fault(STEPS["commit"], 503))
    with pytest.raises(ValueError, match="the Hub answered 503"):
        send(hub, release)
    hub.faults.clear()
    sent = len(hub.asked("PUT /large/"))
    send(hub, release)
    assert sent == len(hub.asked("PUT /large/")) == 1


@pytest.mark.parametrize("step", ["look", "preupload", "batch", "upload"])
def test_a_passing_fault_is_waited_out(step: str, hub: HubServer, release: ReleaseFiles) -> None:
    hub.add_repo(REPO)
    hub.faults.append(Fault(STEPS[step], 503 if step != "upload" else None, times=1))
    if step == "look":
        with pytest.raises(ValueError, match="the Hub answered 503"):
            send(hub, release)
    assert send(hub, release).changed


def test_a_commit_whose_answer_was_lost_is_found_the_next_time(hub: HubServer, release: ReleaseFiles) -> None:
    hub.faults.append(Fault(STEPS["commit"], None, done_first=True))
    with pytest.raises(ValueError, match="unless the commit itself was lost on its way, nothing was published"):
        send(hub, release)
    hub.faults.clear()
    assert not send(hub, release).changed and sorted(hub.files(REPO)) == FILES
    assert len(hub.asked("/commit/")) == 1


def test_a_repository_that_changes_meanwhile_is_not_committed_to(
    hub: HubServer, release: ReleaseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.add_repo(REPO)
    create_commit = huggingface_hub.HfApi.create_commit

    def late(*arguments: Any, **named: Any) -> Any:
        repo.branches["main"] = repo.commit({"theirs.txt": b"x"})
        return create_commit(*arguments, **named)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    with pytest.raises(ValueError, match="the repository changed meanwhile"):
        send(hub, release)
    assert list(hub.files(REPO)) == ["theirs.txt"]


def test_without_a_token_it_says_how_to_log_in(
    hub: HubServer, release: ReleaseFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"creating ada/tiny failed: not logged in.*`hf auth login`.*nothing was publ"):
        send(hub, release)


def test_ctrl_c_during_the_upload_publishes_nothing(
    hub: HubServer, release: ReleaseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub._commit_api.lfs_upload", interrupted)
        with pytest.raises(KeyboardInterrupt):
            send(hub, release)
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert send(hub, release).changed


def test_a_fetched_release_is_verified_and_usable_by_name_with_labels_of_several_authors(
    hub: HubServer, release: ReleaseFiles, tmp_path: Path
) -> None:
    from sae_emotion_plugin.plugin import load_dictionary

    own = tmp_path / "own"
    send(hub, release)
    theirs = replace(JOY, text="delight", author="grace")
    publish(release, "grace/tiny", labels=(theirs,), endpoint=hub.url)
    install(fetch(REPO, endpoint=hub.url), own)
    install(fetch("grace/tiny", endpoint=hub.url), own)
    entry, sae = registry.find("tiny-mood")
    assert entry.provenance.repository == REPO and entry.provenance.revision == hub.repos[REPO].branches["main"]
    assert registry.check(entry) == () and registry.labels(entry, sae) == (JOY, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_dictionary("tiny-mood", device="cpu")
    torch.testing.assert_close(loaded.W_dec, make_sae().W_dec)


ALTERED = [
    (lambda files: files.update({"a/sae_weights.safetensors": b"x"}), "was altered: its SHA-256 is"),
    (lambda files: files.update({"a/report.json": b"{}"}), "was altered: its SHA-256 is"),
    (lambda files: files.pop("a/cfg.json"), r"ada/tiny lacks a/cfg\.json, which its registry\.yaml lists"),
    (lambda files: files.pop("registry.yaml"), r"ada/tiny has no registry\.yaml"),
    (lambda files: edit(files, lambda entry: entry["saes"][0].update(path="../../etc")), "valid: a relative path"),
    (lambda files: edit(files, lambda entry: entry["saes"][0].update(path="/etc")), "valid: a relative path"),
    (lambda files: edit(files, lambda entry: entry.update(colour=1)), "unknown key 'colour'"),
    (lambda files: edit(files, lambda entry: entry["saes"].append(entry["saes"][0])), "has the id 'a' twice"),
    (lambda files: edit(files, lambda entry: entry["provenance"].pop("sha256")), r"cfg\.json has no SHA-256"),
    (
        lambda files: edit(files, lambda entry: entry["provenance"]["sha256"].update({"a/../../x": "0" * 64})),
        "valid: a relative path",
    ),
    (lambda files: relabel(files, b'{"feature": 64}'), "line 1: .* missing"),
    (
        lambda files: relabel(files, json.dumps({**JOY.to_dict(), "feature": 64}).encode()),
        "feature is 64; valid: 0 to 63",
    ),
]


def edit(files: dict[str, bytes], change: Callable[[dict[str, Any]], Any]) -> None:
    entry = yaml.safe_load(files["registry.yaml"])
    change(entry)
    files["registry.yaml"] = yaml.safe_dump(entry).encode()


def relabel(files: dict[str, bytes], line: bytes) -> None:
    files["labels/a.jsonl"] = line
    edit(
        files, lambda entry: entry["provenance"]["sha256"].update({"labels/a.jsonl": hashlib.sha256(line).hexdigest()})
    )


@pytest.mark.parametrize(("alter", "message"), ALTERED)
def test_a_repository_that_is_not_what_it_says_is_refused_by_name(
    alter: Callable[[dict[str, bytes]], Any], message: str, hub: HubServer, release: ReleaseFiles
) -> None:
    send(hub, release)
    alter(hub.files(REPO))
    with pytest.raises(ValueError, match=message) as error:
        fetch(REPO, endpoint=hub.url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, None])
@pytest.mark.parametrize("where", ["GET /api/models", "(GET|HEAD) .*/resolve/.*/registry.yaml", "GET .*safetensors"])
def test_a_fetch_that_fails_says_why(where: str, status: int | None, hub: HubServer, release: ReleaseFiles) -> None:
    send(hub, release)
    hub.faults.append(Fault(where, status))
    with pytest.raises(ValueError, match="fetching ada/tiny failed: ") as error:
        fetch(REPO, endpoint=hub.url)
    assert "\n" not in str(error.value)
    hub.faults.clear()
    assert fetch(REPO, endpoint=hub.url).entry.saes == release.entry.saes


def test_a_damaged_cache_is_fetched_again(hub: HubServer, release: ReleaseFiles) -> None:
    send(hub, release)
    path = fetch(REPO, endpoint=hub.url).files["a/sae_weights.safetensors"]
    path.resolve().write_bytes(b"damaged")
    again = fetch(REPO, endpoint=hub.url).files["a/sae_weights.safetensors"]
    assert again.read_bytes() == release.files["a/sae_weights.safetensors"].read_bytes()


def test_what_cannot_be_published_is_refused_before_anything_is_asked(
    hub: HubServer, release: ReleaseFiles, saved: Path, tmp_path: Path
) -> None:
    both = made(saved, tmp_path / "both.jsonl", "a", "b")
    nested = made(saved, tmp_path / "nested.jsonl", "a", "b")
    nested = replace(nested, entry=replace(nested.entry, saes=(SaeRecord("x", "a"), SaeRecord("x/y", "b"))))
    upwards = replace(release, entry=replace(release.entry, saes=(SaeRecord("../x", "a"),)))
    (tmp_path / "empty").mkdir()
    for attempt, message in (
        (lambda: publish(release, "nowhere", endpoint=hub.url), "repository is 'nowhere'; valid: 'owner/name'"),
        (lambda: publish(release, "../x", endpoint=hub.url), r"repository is '\.\./x'"),
        (lambda: send(hub, both, labels=(JOY,)), "labels for which of a, b"),
        (lambda: send(hub, nested), "the id 'x/y' lies inside 'x'"),
        (lambda: send(hub, upwards), "id is '../x'; valid: a relative path"),
        (lambda: send(hub, release, labels=(replace(JOY, feature=64),)), "feature is 64; valid: 0 to 63"),
        (lambda: send(hub, release, neuronpedia=tmp_path / "empty"), "empty holds no files"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    for named in ({"page": tmp_path / "absent.html"}, {"neuronpedia": tmp_path / "absent"}):
        with pytest.raises(FileNotFoundError, match="absent"):
            send(hub, release, **named)
    assert hub.requests == []


def test_what_the_entry_overrides_stands_in_the_published_configuration(release: ReleaseFiles) -> None:
    record = SaeRecord("a", "a", neuronpedia="tiny/0-res")
    entry = replace(release.entry, saes=(record,), config_overrides={"context_size": 16, "k": 2})
    publication = prepare(replace(release, entry=entry), REPO)
    content = next(one.content for one in publication.files if one.path == "a/cfg.json")
    assert isinstance(content, bytes)
    config = json.loads(content)
    assert config["metadata"]["neuronpedia_id"] == "tiny/0-res" and config["metadata"]["context_size"] == 16
    assert config["k"] == 2 and "context_size" not in config
    assert publication.entry.config_overrides == {} and publication.entry.saes == (record,)
