"""A release -> the files of one commit to the Hub, by which plain SAELens loads every dictionary; nothing is sent.

In the repository a dictionary's folder has its id for a name, as ``SAE.from_pretrained("owner/repo", id)`` wants it.
``registry.yaml`` is the release's entry with the SHA-256 of every file; by it a release is fetched and compared.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_emotion_plugin import registry
from sae_emotion_plugin.feature_labels import FeatureLabel, Labels, labels_file, merge_labels, read_labels, write_labels
from sae_emotion_plugin.files import sha256
from sae_emotion_plugin.publishing.model_card import CardSources, model_card
from sae_emotion_plugin.registry import RegistryEntry, SaeRecord
from sae_emotion_plugin.release_files import RESERVED, ReleaseFiles, check_files, open_release, owner_of, stanza
from sae_emotion_plugin.tables import html_table, text_table

ENTRY_FILE, STANZA_FILE, CARD_FILE, PAGE_FILE = "registry.yaml", "pretrained_saes.yaml", "README.md", "report.html"
NEURONPEDIA = "neuronpedia"


@dataclass(frozen=True)
class CommitFile:
    """A file of the commit."""

    path: str
    content: Path | bytes
    size: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """What would be committed: every file, and the names of files of an earlier commit that go."""

    entry: RegistryEntry
    """As the repository will have it."""
    files: tuple[CommitFile, ...]
    deleted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: repository, files with size in bytes and SHA-256, deleted names."""
        files = [{"path": one.path, "size": one.size, "sha256": one.sha256} for one in self.files]
        return {"repo_id": self.entry.repo_id, "files": files, "deleted": list(self.deleted)}

    def _table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        caption = f"{self.entry.repo_id}: {len(self.files)} files, {sum(one.size for one in self.files):,} bytes"
        rows = [(one.path, f"{one.size:,}", one.sha256) for one in self.files]
        return caption, ("file", "bytes", "SHA-256"), rows + [(path, "deleted", "") for path in self.deleted]

    def __repr__(self) -> str:
        caption, head, rows = self._table()
        return f"{caption}\n{text_table(head, rows)}"

    def _repr_html_(self) -> str:
        return html_table(*self._table())


@dataclass(frozen=True)
class Earlier:
    """What an earlier publication left in the repository."""

    entry: RegistryEntry | None = None
    """Of the same release, whose other dictionaries stay; None when another release is replaced."""
    listed: tuple[str, ...] = ()
    """The files that it recorded, which go unless they stay."""


def prepare(
    release: ReleaseFiles,
    repo_id: str,
    *,
    labels: Labels = (),
    neuronpedia: str | Path | None = None,
    page: str | Path | None = None,
    licence: str | None = None,
    datasets: Sequence[str] | None = None,
    earlier: Earlier | None = None,
) -> Publication:
    """The commit that publishes a release.

    Args:
        labels: more labels, merged with those that the release has; for a release of one dictionary.
        neuronpedia: folder of an export for Neuronpedia.
        page: a report in HTML.
        licence, datasets: for the card's metadata; see `model_card`.

    Raises:
        ValueError, FileNotFoundError: a file is missing or altered, an id cannot name a folder, a label is outside
            the width, the neuronpedia folder or the page is missing.
    """
    registry.check_repo_id("repository", repo_id)
    check_files(release)
    if labels and len(release.entry.saes) > 1:
        raise ValueError(f"labels for which of {registry.listed(sae.id for sae in release.entry.saes)}? name one")
    contents: dict[str, Path | bytes] = {}
    sources: dict[str, CardSources] = {}
    for sae in release.entry.saes:
        _check_folder_name(sae.id, [other.id for other in release.entry.saes if other != sae])
        for file, path in release.files.items():
            if owner_of(release.entry, file) == sae and file != labels_file(sae.path):
                contents[f"{sae.id}/{file[len(sae.path) + 1 :]}"] = path
        contents[f"{sae.id}/cfg.json"] = _config(release, sae)
        merged = merge_labels(release.labels(sae), labels)
        if merged:
            contents[labels_file(sae.id)] = _label_bytes(merged, release.files[f"{sae.path}/cfg.json"])
        sources[sae.id] = _sources(contents, sae.id, merged)
    for file in (release.entry.provenance.recipe, release.entry.provenance.report):
        if file is not None and owner_of(release.entry, file) is None and file in release.files:
            contents[file] = release.files[file]
    contents |= _export_files(neuronpedia)
    if page is not None:
        if not Path(page).is_file():
            raise FileNotFoundError(f"there is no page {page}")
        contents[PAGE_FILE] = Path(page)
    files = {path: _file(path, content) for path, content in contents.items()}
    earlier = earlier or Earlier()
    entry = _published_entry(release.entry, repo_id, {path: one.sha256 for path, one in files.items()}, earlier.entry)
    card = model_card(entry, sources, licence=licence, datasets=datasets)
    for path, text in ((ENTRY_FILE, _entry_text(entry)), (STANZA_FILE, stanza(entry)), (CARD_FILE, card)):
        files[path] = _file(path, text.encode())
    gone = sorted(set(earlier.listed) - set(entry.provenance.sha256) - set(files))
    return Publication(entry, tuple(files[path] for path in sorted(files)), tuple(gone))


def trained_card(folder: str | Path) -> str:
    """The model card of a folder that `train` wrote, as it lies there. Errors as of `open_release`."""
    release = open_release(folder)
    (sae,) = release.entry.saes
    return model_card(release.entry, {sae.id: _sources(release.files, sae.path, release.labels(sae))})


def _check_folder_name(sae_id: str, others: Sequence[str]) -> None:
    registry.check_path("saes: id", sae_id)
    if sae_id.split("/")[0] in (*RESERVED, ENTRY_FILE, STANZA_FILE, CARD_FILE, PAGE_FILE):
        raise ValueError(f"the id {sae_id!r} cannot name a folder of the repository; valid: another first part")
    if inside := [other for other in others if sae_id.startswith(f"{other}/")]:
        raise ValueError(f"the id {sae_id!r} lies inside {inside[0]!r}; valid: ids that are no folders of each other")


def _config(release: ReleaseFiles, sae: SaeRecord) -> Path | bytes:
    """The dictionary's cfg.json; with what the entry overrides, because plain SAELens reads only the file."""
    path, overrides = release.files[f"{sae.path}/cfg.json"], dict(release.entry.config_overrides)
    if sae.neuronpedia is not None:
        overrides["neuronpedia_id"] = sae.neuronpedia
    config = _read_json(path)
    metadata = config.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, Mapping) else {}
    changed = {**config, "metadata": metadata}
    for key, value in overrides.items():
        # A key that the configuration does not have itself is of its metadata.
        (changed if key in config and key != "metadata" else metadata)[key] = value
    if not overrides or changed == config:
        return path
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _label_bytes(labels: Labels, config: Path) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        path = write_labels(Path(scratch) / "labels.jsonl", labels)
        read_labels(path, registry.width(config))
        return path.read_bytes()


def _export_files(folder: str | Path | None) -> dict[str, Path | bytes]:
    if folder is None:
        return {}
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with an export for Neuronpedia")
    found: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ValueError(f"{path} is a link; valid: files")
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            registry.check_path(NEURONPEDIA, name)
            found[f"{NEURONPEDIA}/{name}"] = path
    if not found:
        raise ValueError(f"{folder} holds no files")
    return found


def _sources(contents: Mapping[str, Path | bytes], sae_id: str, labels: Sequence[FeatureLabel]) -> CardSources:
    found = [contents.get(f"{sae_id}/{name}") for name in ("cfg.json", "report.json", "provenance.json")]
    config, report, provenance = ({} if content is None else _read_json(content) for content in found)
    return CardSources(config, report, provenance, labels)


def _read_json(content: Path | bytes) -> dict[str, Any]:
    try:
        found = json.loads(content.read_bytes() if isinstance(content, Path) else content)
    except ValueError as error:
        raise ValueError(f"{content!s:.200} is not valid JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{content!s:.200} holds no JSON object")
    return found


def _file(path: str, content: Path | bytes) -> CommitFile:
    if isinstance(content, Path):
        return CommitFile(path, content, content.stat().st_size, sha256(content))
    return CommitFile(path, content, len(content), hashlib.sha256(content).hexdigest())


def _entry_text(entry: RegistryEntry) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        return registry.write_entry(entry, scratch).read_text(encoding="utf-8")


def _published_entry(
    entry: RegistryEntry, repo_id: str, hashes: Mapping[str, str], earlier: RegistryEntry | None
) -> RegistryEntry:
    """The entry as it lies in the repository, with what stays of an earlier one: its other dictionaries and extras."""
    saes = [replace(sae, path=sae.id) for sae in entry.saes]
    kept: dict[str, str] = {}
    if earlier is not None:
        others = [sae for sae in earlier.saes if sae.id not in {ours.id for ours in saes}]
        for sae in saes:
            _check_folder_name(sae.id, [other.path for other in others])
        for file, digest in earlier.provenance.sha256.items():
            extra = next((one for one in (PAGE_FILE, f"{NEURONPEDIA}/") if file.startswith(one)), None)
            unasked = extra is not None and not any(path.startswith(extra) for path in hashes)
            if unasked or owner_of(earlier, file) in others:
                kept[file] = digest
        saes = [*others, *saes]
    recorded = dict(sorted({**kept, **hashes}.items()))
    papers = {
        name: next((path for path in (file, *(f"{sae.path}/{file}" for sae in saes)) if path in recorded), None)
        for name, file in (("recipe", "recipe.yaml"), ("report", "report.json"))
    }
    provenance = replace(entry.provenance, repository=None, revision=None, sha256=recorded, **papers)
    return RegistryEntry(entry.release, entry.model, tuple(saes), repo_id, provenance=provenance)
