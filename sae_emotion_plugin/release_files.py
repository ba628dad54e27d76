"""A release with its files, wherever they lie: from a trained folder or the registry, into the user's registry, out.

Nothing is in the registry before its YAML file says so, and that is written last.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from sae_emotion_plugin import registry
from sae_emotion_plugin.feature_labels import FeatureLabel, Labels, labels_file, merge_labels, read_labels, write_labels
from sae_emotion_plugin.files import sha256
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.registry import Provenance, RegistryEntry, SaeRecord

RESERVED = ("labels", "neuronpedia")
"""Folders of a release that are no dictionary's."""
_SAME_IN_A_RELEASE = ("model", "repo_id", "conversion_func", "config_overrides")
_SAME_PROVENANCE = ("model_sha256", "licence")


@dataclass(frozen=True)
class ReleaseFiles:
    """What a release is, and where each file of it lies."""

    entry: RegistryEntry
    files: Mapping[str, Path]
    """By name within the release, as in the entry's `sha256`."""

    def labels(self, sae: SaeRecord) -> tuple[FeatureLabel, ...]:
        """The labels of one of its dictionaries; none when it has no file of them. ValueError for a bad line."""
        path = self.files.get(labels_file(sae.path))
        return () if path is None else read_labels(path, registry.width(self.files[f"{sae.path}/cfg.json"]))


def trained_entry(
    recipe: TrainingRecipe, report: Mapping[str, Any], provenance: Mapping[str, Any], hashes: Mapping[str, str]
) -> RegistryEntry:
    """The registry entry of a trained dictionary; `hashes` are those of its folder's files, by name."""
    identity = provenance["model"]
    return RegistryEntry(
        release=recipe.name,
        model=identity["name"],
        saes=(
            SaeRecord(id=recipe.sae_id, path=recipe.sae_id, l0=report["l0"], variance_explained=1.0 - report["fvu"]),
        ),
        provenance=Provenance(
            recipe=f"{recipe.sae_id}/recipe.yaml",
            report=f"{recipe.sae_id}/report.json",
            sha256={f"{recipe.sae_id}/{name}": digest for name, digest in hashes.items()},
            licence=recipe.licence or None,
            texts="; ".join(f"{text['path']} ({text['licence']})" for text in provenance["texts"]),
            model_sha256=identity.get("gguf_sha256"),
            notes=identity.get("weights"),
        ),
    )


def open_release(source: str | Path) -> ReleaseFiles:
    """The release of a folder that `train` wrote, of a registry name, or of one dictionary of a registered release.

    Raises:
        FileNotFoundError, ValueError: the folder is no trained dictionary, the name is unknown, or a file is missing
            or was altered.
    """
    folder = Path(source).expanduser()
    release = _of_folder(folder) if str(source) and folder.is_dir() else _of_registry(str(source))
    check_files(release)
    return release


def check_files(release: ReleaseFiles) -> None:
    """ValueError naming a file that is missing, altered, without a hash, or no file of labels."""
    hashes = release.entry.provenance.sha256
    for sae in release.entry.saes:
        if sae.path.split("/")[0] in RESERVED:
            raise ValueError(f"saes: path is {sae.path!r}; valid: one that does not begin with {' or '.join(RESERVED)}")
        if missing := [file for file in registry.REQUIRED_FILES if f"{sae.path}/{file}" not in hashes]:
            raise ValueError(f"{sae.path}/{missing[0]} has no SHA-256 in release {release.entry.release!r}")
    for file, digest in hashes.items():
        path = release.files.get(file)
        if path is None or not path.is_file():
            raise ValueError(f"{file} of release {release.entry.release!r} is missing")
        if (found := sha256(path)) != digest:
            raise ValueError(f"{path} was altered: its SHA-256 is {found}, not {digest}")
    for sae in release.entry.saes:
        release.labels(sae)


def owner_of(entry: RegistryEntry, file: str) -> SaeRecord | None:
    """The dictionary that a file of a release belongs to: its labels, or what lies in its folder."""
    inside = [sae for sae in entry.saes if file.startswith(f"{sae.path}/") or file == labels_file(sae.path)]
    return max(inside, key=lambda sae: len(sae.path), default=None)


def same_weights(ours: RegistryEntry, sae: SaeRecord, theirs: RegistryEntry, other: SaeRecord) -> bool:
    """Whether two records are of one dictionary: configuration and weights have equal hashes."""
    pairs = (
        (ours.provenance.sha256.get(f"{sae.path}/{file}"), theirs.provenance.sha256.get(f"{other.path}/{file}"))
        for file in registry.REQUIRED_FILES
    )
    return all(one is not None and one == two for one, two in pairs)


def install(
    release: ReleaseFiles,
    folder: str | Path,
    *,
    labels: Mapping[str, Labels] | None = None,
    force: bool = False,
) -> RegistryEntry:
    """The entry as it stands in `folder` after the release came to what is there.

    A dictionary that is there already, with the same configuration and weights, keeps its files, and the labels of
    both are merged. One with a new id comes beside the others of its release.

    Args:
        labels: more labels, by the id of the dictionary.
        force: a dictionary with the same id and other weights is replaced, with its labels.

    Raises:
        ValueError: a file is missing or altered; a dictionary of that id is there with other weights; the release
            there is of another model, licence or repository, or came with the plugin.
    """
    folder, name = Path(folder), release.entry.release
    check_files(release)
    _check_not_packaged(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        there, path = registry.entries_in(folder).get(name, (None, None))
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".add-"))
        try:
            entry, incoming = _merged(there, release, labels or {}, force, scratch)
            for file, origin in incoming.items():
                target = scratch / "files" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin, target)
                if sha256(target) != entry.provenance.sha256[file]:
                    raise ValueError(f"{origin} changed while it was copied")
            for file in incoming:
                target = folder / name / file
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(scratch / "files" / file, target)
            _write(entry, folder, path)
            stale = set(there.provenance.sha256) - set(entry.provenance.sha256) if there else ()
            for file in stale:
                registry.inside(replace(entry, folder=folder), file).unlink(missing_ok=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return replace(entry, folder=folder.resolve())


def check_free(release: str, sae_id: str, folder: str | Path) -> None:
    """ValueError when `install` into `folder` would refuse any new dictionary of that release and id."""
    _check_not_packaged(release, Path(folder))
    entry, _ = registry.entries_in(Path(folder)).get(release, (None, None))
    if entry is not None and sae_id in [sae.id for sae in entry.saes]:
        raise ValueError(f"release {release!r} has a dictionary {sae_id!r} already: remove it or choose another name")


def remove(name: str, folder: str | Path) -> RegistryEntry:
    """The entry that was in `folder`, after the release, or the one dictionary `release/id` of it, was taken out.

    Raises:
        ValueError: the folder has no such release or id; nothing is removed.
    """
    folder = Path(folder)
    known = registry.entries_in(folder)
    release, sae_id = [*re.split("[/:]", name, maxsplit=1), None][:2]
    if release not in known:
        raise ValueError(f"no release {release!r} in {folder}; valid: {registry.listed(known)}")
    with FileLock(folder / ".lock"):
        entry, path = known[release]
        ids = [sae.id for sae in entry.saes]
        if sae_id is not None and sae_id not in ids:
            raise ValueError(f"unknown id {sae_id!r} in release {release!r}; valid: {registry.listed(ids)}")
        if sae_id is None or len(ids) == 1:
            path.unlink()
            home = folder / release
            if home.is_symlink():
                home.unlink()
            elif home.is_dir():
                shutil.rmtree(home)
            return entry
        left, gone = _without(entry, sae_id)
        _write(left, folder, path)
        for file in gone:
            registry.inside(entry, file).unlink(missing_ok=True)
    return entry


def stanza(entry: RegistryEntry, repo_id: str | None = None) -> str:
    """The release as a stanza of SAELens's ``pretrained_saes.yaml``.

    `repo_id` is the repository where it was published, by default the one that the entry knows. ValueError when it
    knows none.
    """
    repo_id = repo_id or entry.repo_id or entry.provenance.repository
    if not repo_id:
        raise ValueError(f"release {entry.release!r} is in no repository; valid: --repo owner/name, once published")
    registry.check_repo_id("repo_id", repo_id)
    values = {
        "conversion_func": entry.conversion_func,
        "model": entry.model,
        "repo_id": repo_id,
        "config_overrides": dict(entry.config_overrides) or None,
        "saes": [_without_none(asdict(sae)) for sae in entry.saes],
    }
    return yaml.safe_dump({entry.release: _without_none(values)}, sort_keys=False, allow_unicode=True, width=110)


def _check_not_packaged(release: str, folder: Path) -> None:
    packaged = registry.packaged_folder()
    if (packaged / f"{release}.yaml").is_file() and packaged.resolve() != folder.resolve():
        raise ValueError(f"the release {release!r} came with the plugin; valid: another name (--as)")


def _write(entry: RegistryEntry, folder: Path, old: Path | None) -> None:
    written = registry.write_entry(entry, folder)
    if old is not None and old.resolve() != written.resolve():
        old.unlink()


def _merged(
    there: RegistryEntry | None, release: ReleaseFiles, labels: Mapping[str, Labels], force: bool, scratch: Path
) -> tuple[RegistryEntry, dict[str, Path]]:
    """The entry of what is there and what comes, and the files to be copied; merged labels are written to `scratch`."""
    entry = release.entry
    if unknown := [sae_id for sae_id in labels if sae_id not in {sae.id for sae in entry.saes}]:
        raise ValueError(f"labels are for {unknown[0]!r}; valid: {registry.listed(sae.id for sae in entry.saes)}")
    known = {} if there is None else {sae.id: sae for sae in there.saes}
    replaced = [sae.id for sae in entry.saes if sae.id in known and not _same(there, known[sae.id], entry, sae)]
    if replaced and not force:
        raise ValueError(
            f"release {entry.release!r} has another dictionary {replaced[0]!r}: it exists already: remove it or choose "
            "another name"
        )
    for sae_id in replaced:
        there = None if there is None or len(there.saes) == 1 else _without(there, sae_id)[0]
        del known[sae_id]
    incoming: dict[str, Path] = {}
    result = replace(entry, folder=None, provenance=replace(entry.provenance, sha256={})) if there is None else there
    hashes = dict(result.provenance.sha256)
    new = [sae for sae in entry.saes if sae.id not in known]
    if there is not None and new:
        _check_belongs(there, entry, new)
        result = replace(result, saes=(*result.saes, *new), provenance=_joined(result.provenance, entry.provenance))
    for file, digest in entry.provenance.sha256.items():
        owner = owner_of(entry, file)
        if owner in new if owner else there is None:
            incoming[file], hashes[file] = release.files[file], digest
    for number, sae in enumerate(entry.saes):
        old = known.get(sae.id, sae)
        before = registry.labels(there, old) if there is not None and sae.id in known else ()
        merged = merge_labels(before, release.labels(sae), labels.get(sae.id, ()))
        if merged and merged != before:
            file = labels_file(old.path)
            incoming[file] = write_labels(scratch / f"labels-{number}", merged)
            hashes[file] = sha256(incoming[file])
            read_labels(incoming[file], registry.width(release.files[f"{sae.path}/cfg.json"]))
    return replace(result, provenance=replace(result.provenance, sha256=hashes)), incoming


def _same(there: RegistryEntry | None, old: SaeRecord, entry: RegistryEntry, sae: SaeRecord) -> bool:
    return there is not None and same_weights(there, old, entry, sae)


def _check_belongs(there: RegistryEntry, entry: RegistryEntry, new: Iterable[SaeRecord]) -> None:
    pairs = [(name, getattr(there, name), getattr(entry, name)) for name in _SAME_IN_A_RELEASE]
    ours, theirs = there.provenance, entry.provenance
    pairs += [(name, getattr(ours, name), getattr(theirs, name)) for name in _SAME_PROVENANCE]
    for name, one, other in pairs:
        if one != other:
            raise ValueError(
                f"release {entry.release!r} has {name} {one!r}, not {other!r}: remove it or choose another name"
            )
    for sae in new:
        for other in there.saes:
            if f"{sae.path}/".startswith(f"{other.path}/") or f"{other.path}/".startswith(f"{sae.path}/"):
                raise ValueError(f"the folder {sae.path} of {sae.id!r} is that of {other.id!r}; choose another id")


def _joined(ours: Provenance, theirs: Provenance) -> Provenance:
    """Of two dictionaries of one release: texts and notes of both, recipe and report of the first."""
    both = {
        name: "; ".join(dict.fromkeys(text for text in (getattr(ours, name), getattr(theirs, name)) if text)) or None
        for name in ("texts", "notes")
    }
    return replace(ours, **both)


def _without(entry: RegistryEntry, sae_id: str) -> tuple[RegistryEntry, list[str]]:
    """The entry without one of its dictionaries, and the names of that one's files."""
    gone = [file for file in entry.provenance.sha256 if (sae := owner_of(entry, file)) and sae.id == sae_id]
    left = {file: digest for file, digest in entry.provenance.sha256.items() if file not in gone}
    papers = {name: None for name in ("recipe", "report") if getattr(entry.provenance, name) in gone}
    saes = tuple(sae for sae in entry.saes if sae.id != sae_id)
    return replace(entry, saes=saes, provenance=replace(entry.provenance, sha256=left, **papers)), gone


def _of_registry(name: str) -> ReleaseFiles:
    entry, sae = registry.find(name)
    if entry.repo_id:
        raise ValueError(f"release {entry.release!r} lies in {entry.repo_id}, not on this machine")
    if re.search("[/:]", name):
        for other in [other.id for other in entry.saes if other.id != sae.id]:
            entry, _ = _without(entry, other)
    return ReleaseFiles(entry, {file: registry.inside(entry, file) for file in entry.provenance.sha256})


def _of_folder(folder: Path) -> ReleaseFiles:
    for file in (*registry.REQUIRED_FILES, "recipe.yaml", "report.json", "provenance.json"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}: it is no folder that `train` wrote")
    recipe = TrainingRecipe.read(folder / "recipe.yaml")
    report, provenance = (_read_object(folder / name) for name in ("report.json", "provenance.json"))
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    try:
        entry = trained_entry(recipe, report, provenance, {name: sha256(path) for name, path in files.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: report.json or provenance.json lacks {error}") from error
    return ReleaseFiles(entry, {f"{recipe.sae_id}/{name}": path for name, path in files.items()})


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; valid: a JSON object")
    return found


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
