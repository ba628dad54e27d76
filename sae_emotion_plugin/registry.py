"""Releases of dictionaries as data: one YAML file each, packaged with the plugin or in the user's own folder.

The keys are those of a stanza in SAELens's ``pretrained_saes.yaml`` plus ``release`` and ``provenance``. A
release without ``repo_id`` brings its files: ``<folder>/<release>/<path of the SAE>/cfg.json`` and so on, and the
labels of its features in ``<folder>/<release>/labels/<path of the SAE>.jsonl``.
"""

import importlib.resources
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from sae_emotion_plugin.feature_labels import FeatureLabel, labels_file, read_labels
from sae_emotion_plugin.files import sha256, write_whole

FOLDER_VARIABLE = "SAE_EMOTION_REGISTRY"
REQUIRED_FILES = ("cfg.json", "sae_weights.safetensors")
_YAML_KEYS = ("release", "repo_id", "model", "conversion_func", "config_overrides", "saes", "provenance")
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Bounded, because nested YAML aliases can make a value that is short on disk endless in print.
_bounded = reprlib.Repr()
_bounded.maxlevel = 2
_bounded.maxstring = 80
_shown = _bounded.repr


@dataclass(frozen=True)
class SaeRecord:
    """One dictionary of a release."""

    id: str
    path: str
    """Folder of its files: inside the release's folder, or inside the Hugging Face repository."""
    l0: float | None = None
    """Mean number of active features per token."""
    variance_explained: float | None = None
    neuronpedia: str | None = None

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("saes: id is empty; valid: text")
        check_path("saes: path", self.path)
        # Written so that NaN fails too.
        if self.l0 is not None and not 0 <= self.l0 < math.inf:
            raise ValueError(f"saes: l0 is {self.l0}; valid: a number from 0")
        if self.variance_explained is not None and not -math.inf < self.variance_explained <= 1:
            raise ValueError(f"saes: variance_explained is {self.variance_explained}; valid: a number up to 1")


@dataclass(frozen=True)
class Provenance:
    """Where a release comes from. File names are relative to the release's folder or repository."""

    recipe: str | None = None
    """File with the recipe that trained it."""
    report: str | None = None
    """File with its measurements on held-out documents."""
    repository: str | None = None
    """Hugging Face repository that files on this machine were fetched from."""
    revision: str | None = None
    """Commit of the repository that `sha256` speaks of."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File name to the 64 lower-case hexadecimal digits of its SHA-256."""
    licence: str | None = None
    texts: str | None = None
    """What it was trained on."""
    model_sha256: str | None = None
    """SHA-256 of the model weights that it was trained on."""
    notes: str | None = None

    def __post_init__(self) -> None:
        for name in ("recipe", "report"):
            if (file := getattr(self, name)) is not None:
                check_path(f"provenance: {name}", file)
        if self.repository is not None:
            check_repo_id("provenance: repository", self.repository)
        for file, digest in self.sha256.items():
            check_path("provenance: sha256", file)
            _check_sha256(f"provenance: sha256 of {file}", digest)
        if self.model_sha256 is not None:
            _check_sha256("provenance: model_sha256", self.model_sha256)


@dataclass(frozen=True)
class RegistryEntry:
    """One release."""

    release: str
    model: str
    """Name of the model as TransformerLens knows it."""
    saes: tuple[SaeRecord, ...]
    repo_id: str = ""
    """Hugging Face repository, or with `openai_blob` the account and container of a blob store; empty when the files
    lie beside the YAML file."""
    conversion_func: str | None = None
    """Name of the SAELens loader; None for SAELens's own format."""
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    folder: Path | None = field(default=None, compare=False)
    """The folder that the YAML file was read from; not written."""

    def __post_init__(self) -> None:
        if not _RELEASE.fullmatch(self.release):
            raise ValueError(f"release is {_shown(self.release)}; valid: letters, digits, '.', '_' and '-'")
        if not self.model:
            raise ValueError("model is empty; valid: text")
        if self.repo_id:
            check_repo_id("repo_id", self.repo_id)
        if not self.saes:
            raise ValueError(f"release {self.release!r} has no saes; valid: at least one")
        ids = [sae.id for sae in self.saes]
        if duplicates := sorted({sae_id for sae_id in ids if ids.count(sae_id) > 1}):
            raise ValueError(f"release {self.release!r} has the id {duplicates[0]!r} twice; ids are unique")


def feature_url(neuronpedia: object, feature: int) -> str | None:
    """The feature's page on Neuronpedia; None where `neuronpedia` names no set there (`gpt2-small/8-res-jb` does)."""
    if not isinstance(neuronpedia, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", neuronpedia):
        return None
    return f"https://www.neuronpedia.org/{neuronpedia}/{feature}"


def packaged_folder() -> Path:
    """The folder of the releases that are installed with the plugin."""
    try:
        return Path(str(importlib.resources.files("sae_emotion_plugin._registry")))
    except ModuleNotFoundError as error:
        raise FileNotFoundError("the packaged registry is missing: reinstall sae-emotion-plugin") from error


def user_folder() -> Path:
    """The folder of the user's releases: ``$SAE_EMOTION_REGISTRY``, else inside the user's data folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen).expanduser()
    return Path(platformdirs.user_data_dir("sae_emotion_plugin")) / "registry"


def entries() -> tuple[RegistryEntry, ...]:
    """Every release, packaged ones first, each folder in the order of its file names.

    Raises ValueError for a broken file or a release that two files define, NotADirectoryError when
    ``$SAE_EMOTION_REGISTRY`` names a file. A folder that does not exist yet has no releases.
    """
    own = user_folder()
    if own.exists() and not own.is_dir():
        raise NotADirectoryError(f"{FOLDER_VARIABLE} is {str(own)!r}, which is not a folder")
    folders = dict.fromkeys(folder.resolve() for folder in (packaged_folder(), own) if folder.is_dir())
    return tuple(entry for entry, _ in entries_in(*folders).values())


def entries_in(*folders: Path) -> dict[str, tuple[RegistryEntry, Path]]:
    """The releases of the folders by name, each with its YAML file. ValueError as for `entries`."""
    found: dict[str, tuple[RegistryEntry, Path]] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.yaml"))):
        entry = read_entry(path)
        if entry.release in found:
            raise ValueError(f"{path} defines the release {entry.release!r} again, after {found[entry.release][1]}")
        found[entry.release] = (entry, path)
    return found


def find(name: str) -> tuple[RegistryEntry, SaeRecord]:
    """The release and dictionary of ``release``, ``release/sae_id`` or ``release:sae_id``.

    Raises ValueError naming the valid releases or ids; ``release`` alone needs a release of one dictionary.
    """
    # A release has neither "/" nor ":" in its name; an id may have both.
    release = re.split("[/:]", name, maxsplit=1)[0]
    separator, sae_id = name[len(release) : len(release) + 1], name[len(release) + 1 :]
    known = {entry.release: entry for entry in entries()}
    if release not in known:
        raise ValueError(f"unknown release {release!r}; valid: {listed(known)}")
    entry = known[release]
    saes = {sae.id: sae for sae in entry.saes}
    if not separator:
        if len(saes) > 1:
            names = listed(f"{release}/{each}" for each in saes)
            raise ValueError(f"release {release!r} has {len(saes)} dictionaries; valid: {names}")
        return entry, entry.saes[0]
    if sae_id not in saes:
        raise ValueError(f"unknown id {sae_id!r} in release {release!r}; valid: {listed(saes)}")
    return entry, saes[sae_id]


def file_path(entry: RegistryEntry, sae: SaeRecord, file: str) -> Path:
    """Where a file of a packaged dictionary lies, existing or not, never outside the release's folder."""
    return inside(entry, f"{sae.path}/{file}")


def verified_file(entry: RegistryEntry, sae: SaeRecord, file: str) -> Path:
    """Where a file of a packaged dictionary lies, once it is there with the SHA-256 recorded for it (if any).

    Raises FileNotFoundError or ValueError naming the file.
    """
    return _verified(entry, f"{sae.path}/{file}")


def labels(entry: RegistryEntry, sae: SaeRecord) -> tuple[FeatureLabel, ...]:
    """The labels of a dictionary's features; none when its release records no file of labels.

    Raises FileNotFoundError or ValueError naming the file, when it is missing, altered or has a bad line.
    """
    file = labels_file(sae.path)
    if entry.repo_id or file not in entry.provenance.sha256:
        return ()
    return read_labels(_verified(entry, file), width(verified_file(entry, sae, "cfg.json")))


def width(config: Path) -> int:
    """How many features the dictionary of this ``cfg.json`` has. ValueError naming the file when it does not say."""
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("d_sae")
    except (ValueError, AttributeError):
        found = None
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"{config} does not say d_sae, the number of features")
    return found


def check(entry: RegistryEntry) -> tuple[str, ...]:
    """What is wrong with the files of a release, one line each; nothing for a release in a repository."""
    if entry.repo_id:
        return ()
    hashes = entry.provenance.sha256
    weights = [f"{sae.path}/{file}" for sae in entry.saes for file in REQUIRED_FILES]
    papers = [file for file in (entry.provenance.recipe, entry.provenance.report) if file is not None]
    problems = []
    for file in dict.fromkeys([*weights, *papers, *hashes]):
        try:
            path = inside(entry, file)
        except ValueError as error:
            problems.append(str(error))
            continue
        if not path.is_file():
            problems.append(f"{file} is missing")
        elif file not in hashes:
            problems.append(f"{file} has no SHA-256 in the entry")
        elif (digest := sha256(path)) != hashes[file]:
            problems.append(f"{file} was altered: its SHA-256 is {digest}, not {hashes[file]}")
    if not problems:
        for sae in entry.saes:
            try:
                labels(entry, sae)
            except ValueError as error:
                problems.append(str(error))
    return tuple(problems)


def read_entry(path: str | Path) -> RegistryEntry:
    """The release in one YAML file. Raises FileNotFoundError or ValueError naming file and bad value."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no registry file at {path}")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        return _entry_from(document, path.parent.resolve())
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{path} is not valid YAML: {line}{error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {next(iter(str(error).splitlines()), '')}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_entry(entry: RegistryEntry, folder: str | Path) -> Path:
    """The YAML file ``<folder>/<release>.yaml``, written whole or not at all."""
    document = asdict(entry)
    document["saes"] = [_without_none(sae) for sae in document["saes"]]
    document["provenance"] = _without_none(document["provenance"])
    path = Path(folder) / f"{entry.release}.yaml"
    document = _without_none({key: document[key] for key in _YAML_KEYS})
    try:
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    except yaml.YAMLError as error:
        raise ValueError(f"release {entry.release!r} cannot be written as YAML: {error.args[0]}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, text)


def check_repo_id(where: str, value: str) -> None:
    """ValueError when the value is no name of a Hugging Face repository."""
    owner, _, name = value.partition("/")
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    if any(not re.fullmatch(part, one, re.ASCII) or re.search(r"--|\.\.", one) for one in (owner, name)):
        raise ValueError(f"{where} is {_shown(value)}; valid: 'owner/name'")


def listed(names: Iterable[str]) -> str:
    """The names in one line for a message, at most twelve of them."""
    names = list(names)
    shown = ", ".join(names[:12]) or "none"
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


# PyYAML may have been built without its fast parser.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeyLoader(_SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_ENTRY_KEYS = dict.fromkeys(_YAML_KEYS, str) | {"config_overrides": dict, "saes": list, "provenance": dict}
_SAE_KEYS = {"id": str, "path": str, "l0": float, "variance_explained": float, "neuronpedia": str}
_PROVENANCE_KEYS = {each.name: dict if each.name == "sha256" else str for each in fields(Provenance)}
_KINDS = {str: "text", float: "a number", list: "a list", dict: "a mapping from text"}


def _entry_from(document: object, folder: Path) -> RegistryEntry:
    values = _typed(document, "the file", _ENTRY_KEYS, required=("release", "model", "saes"))
    saes = tuple(SaeRecord(**_typed(sae, "saes", _SAE_KEYS, required=("id", "path"))) for sae in values["saes"])
    provenance = _typed(values.get("provenance", {}), "provenance", _PROVENANCE_KEYS)
    for file, digest in provenance.get("sha256", {}).items():
        _check_sha256(f"provenance: sha256 of {file}", digest)
    return RegistryEntry(**{**values, "saes": saes, "provenance": Provenance(**provenance), "folder": folder})


def _typed(value: object, where: str, kinds: Mapping[str, type], required: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}; valid: a mapping with {', '.join(kinds)}")
    if unknown := [key for key in value if key not in kinds]:
        raise ValueError(f"{where} has the unknown key {_shown(unknown[0])}; valid: {', '.join(kinds)}")
    if missing := [key for key in required if value.get(key) is None]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    typed: dict[str, Any] = {}
    for key, each in value.items():
        kind = kinds[key]
        if kind is float and type(each) is int and abs(each) < 1e9:
            each = float(each)
        if each is None:
            continue  # an empty value in YAML means the same as leaving the key out
        if not isinstance(each, kind) or (isinstance(each, dict) and not all(isinstance(name, str) for name in each)):
            raise ValueError(f"{where}: {key} is {_shown(each)}; valid: {_KINDS[kind]}")
        typed[key] = each
    return typed


def _verified(entry: RegistryEntry, file: str) -> Path:
    path = inside(entry, file)
    if not path.is_file():
        raise FileNotFoundError(f"release {entry.release!r} lacks the file {path}")
    expected = entry.provenance.sha256.get(file)
    if expected is not None and sha256(path) != expected:
        raise ValueError(f"{path} was altered: its SHA-256 is not {expected}")
    return path


def inside(entry: RegistryEntry, file: str) -> Path:
    """Where a file of a release lies, existing or not. ValueError when that is not inside the release's folder."""
    if entry.folder is None or entry.repo_id:
        raise ValueError(f"release {entry.release!r} has no files on this machine")
    check_path("file", file)
    home = entry.folder.resolve() / entry.release
    path = (home / file).resolve()
    if not path.is_relative_to(home):
        raise ValueError(f"{file} of release {entry.release!r} leads out of its folder, to {path}")
    return path


def check_path(where: str, value: str) -> None:
    """ValueError when the value is no relative path that stays inside its folder, on every system."""
    if any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f]", part) for part in value.split("/")):
        raise ValueError(f"{where} is {_shown(value)}; valid: a relative path inside its folder")


def _check_sha256(where: str, value: object) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{where} is {_shown(value)}; valid: 64 lower-case hexadecimal digits")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
