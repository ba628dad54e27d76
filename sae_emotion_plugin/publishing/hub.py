"""A release to a Hugging Face repository in one commit, and back: fetched, verified, ready to be installed."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_emotion_plugin import registry
from sae_emotion_plugin.publishing.hub_errors import hub_errors
from sae_emotion_plugin.publishing.hub_files import ENTRY_FILE, Earlier, Publication, prepare
from sae_emotion_plugin.registry import RegistryEntry
from sae_emotion_plugin.release_files import ReleaseFiles, check_files, owner_of, same_weights

_HARMLESS = (".gitattributes", "README.md", "LICENSE", "LICENSE.md")
"""What a repository may have that holds nothing yet."""


@dataclass(frozen=True)
class Published:
    """What was published where."""

    repo_id: str
    commit: str
    """Hash of the commit that has the release."""
    url: str
    pull_request: str | None
    changed: bool
    """False when the repository had all of it already, so that nothing was committed."""


def publish(
    release: ReleaseFiles,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    force: bool = False,
    endpoint: str | None = None,
    **what: Any,
) -> Published:
    """Where the release is, after one commit to the Hub; a repository that is not there is created.

    The token is the one that `huggingface_hub` finds (`hf auth login`, HF_TOKEN). Large files are uploaded before the
    commit and not sent twice when this is called again; the commit is refused when the repository has changed since
    it was looked at.

    Args:
        private: create the repository so.
        revision: a branch, created when it is not there.
        pull_request: open one instead of committing to the main branch.
        force: publish over a repository that holds another dictionary or something else. Files that no publication
            recorded stay.
        endpoint: of another server than HF_ENDPOINT says.
        what: as for `prepare`.

    Raises:
        ValueError: the repository holds something else, the Hub refused or was lost; nothing was committed, unless the
            connection was lost during the commit, and then calling it again finds out.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if pull_request and revision is not None:
        raise ValueError(f"a pull request goes to the main branch, not to {revision!r}: give one of the two")
    ours = prepare(release, repo_id, **what)  # what is wrong here is said before anything is asked there
    api, nothing = HfApi(endpoint=endpoint), "; nothing was published"
    with hub_errors(f"looking at {repo_id}", nothing):
        info, new_branch = _look(api, repo_id, revision)
    if info is not None and private and not info.private:
        raise ValueError(f"{repo_id} exists and is public{nothing}: make it private in its settings first")
    if info is None:
        with hub_errors(f"creating {repo_id}", nothing):
            api.create_repo(repo_id, private=private)
            info, new_branch = _look(api, repo_id, revision)
    if info is None:
        raise ValueError(f"{repo_id} was created but cannot be seen{nothing}")
    earlier = _earlier(info, repo_id, ours, force, endpoint)
    publication = prepare(release, repo_id, earlier=earlier, **what)
    operations: list[Any] = [
        CommitOperationAdd(one.path, one.content if isinstance(one.content, bytes) else str(one.content))
        for one in publication.files
    ]
    operations += [CommitOperationDelete(path) for path in publication.deleted if path in _names(info)]
    with hub_errors(
        f"publishing to {repo_id}", "; unless the commit itself was lost on its way, nothing was published"
    ):
        if new_branch:
            api.create_branch(repo_id, branch=str(revision), revision=info.sha)
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=f"{release.entry.release}: {registry.listed(sae.id for sae in release.entry.saes)}",
            revision=revision,
            create_pr=pull_request,
            parent_commit=info.sha,
        )
    changed = done.oid != info.sha
    return Published(repo_id, done.oid, str(done.commit_url), done.pr_url if changed else None, changed)


def fetch(repo_id: str, *, revision: str | None = None, endpoint: str | None = None) -> ReleaseFiles:
    """The release that `publish` put into a repository: dictionaries, labels, recipes and reports, every file verified.

    The files lie in the cache of `huggingface_hub`. What is for looking at alone (pages, exports) is not fetched.

    Raises:
        ValueError: the repository is not there or holds no release, the Hub refused or was lost, its entry is broken,
            or a file is missing or differs from its SHA-256.
    """
    from huggingface_hub import HfApi, hf_hub_download

    registry.check_repo_id("repository", repo_id)
    with hub_errors(f"fetching {repo_id}"):
        info = HfApi(endpoint=endpoint).repo_info(repo_id, revision=revision)
        names, commit = _names(info), str(info.sha)
        if ENTRY_FILE not in names:
            raise ValueError(f"{repo_id} has no {ENTRY_FILE}: nothing was published there with this tool")

        def download(file: str) -> Path:
            return Path(hf_hub_download(repo_id, file, revision=commit, endpoint=endpoint))

        published = registry.read_entry(download(ENTRY_FILE))
        recorded = published.provenance.sha256
        wanted = [file for file in recorded if owner_of(published, file) is not None]
        if missing := [file for file in wanted if file not in names]:
            raise ValueError(f"{repo_id} lacks {missing[0]}, which its {ENTRY_FILE} lists")
        files = {file: download(file) for file in wanted}
    papers = {name: None for name in ("recipe", "report") if getattr(published.provenance, name) not in (None, *wanted)}
    provenance = replace(
        published.provenance,
        repository=repo_id,
        revision=commit,
        sha256={file: recorded[file] for file in wanted},
        **papers,
    )
    entry = replace(published, repo_id="", folder=None, conversion_func=None, provenance=provenance)
    release = ReleaseFiles(entry, files)
    check_files(release)
    return release


def _names(info: Any) -> set[str]:
    return {one.rfilename for one in info.siblings or ()}


def _look(api: Any, repo_id: str, revision: str | None) -> tuple[Any, bool]:
    """What the repository has, None when it is not there; True when its branch is still to be made off the main one."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.repo_info(repo_id, revision=revision, files_metadata=True), False
    except RevisionNotFoundError:
        return api.repo_info(repo_id, files_metadata=True), True
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None, False


def _earlier(info: Any, repo_id: str, ours: Publication, force: bool, endpoint: str | None) -> Earlier:
    """What there is of an earlier publication; ValueError when it, or something else, would be overwritten."""
    refused = f"{repo_id} holds {{}}; nothing was published; valid: another repository, or --force"
    others = sorted(name for name in _names(info) if name not in _HARMLESS)
    if not others:
        return Earlier()
    if ENTRY_FILE not in others:
        if force:
            return Earlier()
        raise ValueError(refused.format(f"something else: {registry.listed(others)}"))
    entry = _read_entry(repo_id, info.sha, endpoint)
    if entry is None:
        if force:
            return Earlier()
        raise ValueError(refused.format(f"a {ENTRY_FILE} that cannot be read"))
    listed = tuple(entry.provenance.sha256)
    if (entry.release, entry.model) != (ours.entry.release, ours.entry.model):
        if force:
            return Earlier(None, listed)
        raise ValueError(refused.format(f"the release {entry.release!r} of {entry.model}"))
    uploaded = _as_uploaded(entry, info)
    known = {sae.id: sae for sae in entry.saes}
    for sae in ours.entry.saes:
        if sae.id in known and not force and not same_weights(ours.entry, sae, uploaded, known[sae.id]):
            raise ValueError(refused.format(f"another dictionary {sae.id!r}"))
    return Earlier(entry, listed)


def _read_entry(repo_id: str, commit: str, endpoint: str | None) -> RegistryEntry | None:
    from huggingface_hub import hf_hub_download

    with (
        tempfile.TemporaryDirectory() as scratch,
        hub_errors(f"reading {ENTRY_FILE} of {repo_id}", "; nothing was published"),
    ):
        path = hf_hub_download(repo_id, ENTRY_FILE, revision=commit, endpoint=endpoint, local_dir=scratch)
        try:
            return registry.read_entry(path)
        except ValueError:
            return None


def _as_uploaded(entry: RegistryEntry, info: Any) -> RegistryEntry:
    """The entry with the hashes that the Hub itself knows, of large files: weights may have been changed there."""
    known = {one.rfilename: one.lfs.sha256 for one in info.siblings or () if one.lfs}
    hashes = {file: known.get(file, digest) for file, digest in entry.provenance.sha256.items()}
    return replace(entry, provenance=replace(entry.provenance, sha256=hashes))
