"""Our loaders and releases inside SAELens, and one function that loads a dictionary from any kind of name."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as sae_lens_loaders
from sae_lens.loading import pretrained_saes_directory as sae_lens_directory
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors import SafetensorError
from torch import Tensor

from sae_emotion_plugin import openai_format, openai_releases, registry
from sae_emotion_plugin.openai_checkpoint import all_finite
from sae_emotion_plugin.openai_saes import ensure_registered, repeatable_decode

DEFAULT_DICTIONARY = "gemma-3-270m-emotion"
OPENAI_LOADER = "openai"
REGISTRY_LOADER = "sae_emotion_registry"
_SPARSITY_FILE = "sparsity.safetensors"
_NAMES = "a registry name, 'owner/repo:id', a folder, a .pt file or the URL of one"


class RegisteredRelease(sae_lens_directory.PretrainedSAELookup):
    """A release that `register` added to SAELens's directory; the class tells it from SAELens's own."""


def register() -> tuple[str, ...]:
    """The releases of our registry, now known to plain ``SAE.from_pretrained(release, sae_id)``.

    Also adds the loaders ``openai``, ``openai_blob`` and ``sae_emotion_registry`` to SAELens's named loaders, and the
    architectures of `openai_saes` to its classes. Call it as often as you like: it follows changes of the registry, and
    repairs a directory that SAELens has rebuilt.

    Raises ValueError, with nothing changed, when SAELens has something else under one of these names.
    """
    tables: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        (sae_lens_loaders.NAMED_PRETRAINED_SAE_LOADERS, _loaders()),
        (sae_lens_loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, _config_getters()),
    )
    directory = sae_lens_directory.get_pretrained_saes_directory()
    releases = {entry.release: _lookup(entry) for entry in registry.entries()}
    for table, ours in tables:
        for name, function in ours.items():
            if table.get(name, function) is not function:
                raise ValueError(f"SAELens already has a loader {name!r} that is not ours; it is left alone")
    for release in releases:
        if not isinstance(directory.get(release), RegisteredRelease | None):
            raise ValueError(f"SAELens already has a release {release!r} that is not ours; it is left alone")
    ensure_registered()
    for table, ours in tables:
        table.update(ours)
    for release in [name for name, known in directory.items() if isinstance(known, RegisteredRelease)]:
        del directory[release]
    directory.update(releases)
    return tuple(releases)


def load_dictionary(
    source: str | Path | SAE, *, layer: int | None = None, device: str | None = None, dtype: str = "float32"
) -> SAE:
    """The SAELens SAE that `source` names; an SAE object is returned as it is.

    `source` is a registry name (``release`` or ``release/sae_id``), ``owner/repo:id`` on the Hugging Face
    Hub, ``release:id`` of SAELens's own directory, a folder with ``cfg.json`` and
    ``sae_weights.safetensors``, an OpenAI-format ``.pt`` file or its URL. By default it goes to a GPU if there is one.

    A TopK SAE on layer-normed input comes as an `openai_saes.OpenAITopKSAE`, which decodes any number of times.

    `layer` chooses among the SAEs of a release that is named without an id, and is checked against any other.

    Raises FileNotFoundError or ValueError in one line; also for a transcoder, which reads one hook and writes
    another.
    """
    if isinstance(source, SAE):
        metadata = source.cfg.metadata.to_dict()
        _refuse_transcoder(f"this {type(source).__name__}", source.cfg.architecture(), metadata)
        return _at_layer(f"this {type(source).__name__}", source, layer)
    device, dtype = openai_format.checked_device(device), openai_format.checked_dtype(dtype)
    with _without_sae_lens_advice():
        if isinstance(source, str) and layer is not None:
            source = _id_at_layer(source, layer)
        return _at_layer(str(source), _checked(str(source), _load(source, device, dtype)), layer)


def registry_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """SAELens's config, weights and sparsity of the dictionary in folder `folder_name` of release `repo_id`.

    Float16 weights arrive in the dtype that the config asks for. Raises ValueError when a file was altered.
    """
    entry, sae = _record(repo_id, folder_name)
    cfg = registry_config(repo_id, folder_name, device, force_download, cfg_overrides)
    path = registry.verified_file(entry, sae, "sae_weights.safetensors")
    try:
        cfg, weights = sae_lens_loaders.read_sae_components_from_disk(cfg, path, device)
        if not registry.file_path(entry, sae, _SPARSITY_FILE).is_file():
            return cfg, weights, None
        path = registry.verified_file(entry, sae, _SPARSITY_FILE)
        return cfg, weights, sae_lens_loaders.load_safetensors_weights(path, device)["sparsity"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged: {_first_line(error)}") from error


def registry_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """SAELens's config of a packaged dictionary."""
    entry, sae = _record(repo_id, folder_name)
    cfg = _read_config(registry.verified_file(entry, sae, "cfg.json"))
    for key, value in (cfg_overrides or {}).items():
        # SAELens keeps only the nested metadata of a config that names its version, and drops flat keys.
        if key in sae_lens_loaders.LLM_METADATA_KEYS:
            if value is not None:
                cfg.setdefault("metadata", {})[key] = value
        else:
            cfg[key] = value
    return {**cfg, "device": device}


def _id_at_layer(name: str, layer: int) -> str:
    """The name with the id of the release's one SAE at `layer`, by what ids look like; other names as they are."""
    ours = {entry.release: [sae.id for sae in entry.saes] for entry in registry.entries()}
    directory = sae_lens_directory.get_pretrained_saes_directory()
    ids, separator = (ours[name], "/") if name in ours else (list(getattr(directory.get(name), "saes_map", ())), ":")
    if len(ids) < 2:
        return name
    # blocks.8.hook_resid_pre, layer_8/width_16k, l8r_8x, 8-res-jb
    at = re.compile(rf"(?:^|[^a-z])(?:blocks\.|layer_?){layer}(?:$|[-./_])|^l{layer}[rma]_|^{layer}(?:$|[-./_])")
    found = [one for one in ids if at.search(one)]
    if len(found) != 1:
        valid = registry.listed(found or ids)
        raise ValueError(f"{len(found)} SAEs of {name!r} are at layer {layer}; name one: {valid}")
    return f"{name}{separator}{found[0]}"


def _at_layer(name: str, sae: SAE, layer: int | None) -> SAE:
    hook_name = str(sae.cfg.metadata.hook_name)
    at = re.match(r"blocks\.(\d+)\.", hook_name)
    if layer is not None and (at is None or int(at.group(1)) != layer):
        raise ValueError(f"{name} reads {hook_name}, not layer {layer}")
    return sae


def _load(source: str | Path, device: str, dtype: str) -> SAE:
    name, path = str(source), Path(source).expanduser()
    releases = {entry.release for entry in registry.entries()}
    if isinstance(source, str) and re.split("[/:]", name, maxsplit=1)[0] in releases:
        return _from_registry(*registry.find(name), device, dtype)
    if isinstance(source, str) and "://" in name:
        return openai_releases.load_openai_url(name, device=device, dtype=dtype)
    if name and path.is_dir():
        return _from_folder(path, device, dtype)
    if path.suffix == ".pt":
        return openai_format.load_openai_checkpoint(path, device=device, dtype=dtype)
    release, separator, sae_id = name.partition(":")
    if isinstance(source, str) and separator and sae_id:
        known = sae_lens_directory.get_pretrained_saes_directory()
        if release in known and sae_id not in known[release].saes_map:
            valid = registry.listed(known[release].saes_map)
            raise ValueError(f"unknown id {sae_id!r} in release {release!r}; valid: {valid}")
        if release in known or re.fullmatch(r"[\w.-]+/[\w.-]+", release):
            return _from_sae_lens(release, sae_id, device, dtype)
    if name and path.exists():
        raise ValueError(f"{path} is neither a folder nor a .pt file; valid: {_NAMES}")
    names = [f"{entry.release}/{sae.id}" for entry in registry.entries() for sae in entry.saes]
    raise ValueError(f"unknown dictionary {name!r}; valid: {_NAMES}; in the registry: {registry.listed(names)}")


def _from_registry(entry: registry.RegistryEntry, sae: registry.SaeRecord, device: str, dtype: str) -> SAE:
    # Not through register(): loading one dictionary changes nothing in SAELens, nor waits for its large directory.
    lookup = _lookup(entry)
    loaders = {**sae_lens_loaders.NAMED_PRETRAINED_SAE_LOADERS, **_loaders()}
    getters = {**sae_lens_loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, **_config_getters()}
    conversion = lookup.conversion_func or "sae_lens"
    if conversion not in loaders:
        raise ValueError(
            f"unknown conversion_func {conversion!r} in release {entry.release!r}; valid: {', '.join(loaders)}"
        )
    overrides: dict[str, Any] = {**entry.config_overrides}
    if sae.neuronpedia is not None:
        overrides["neuronpedia_id"] = sae.neuronpedia

    def converter(path: str | Path, device: str, cfg_overrides: dict[str, Any] | None):
        both = {**overrides, **(cfg_overrides or {})}
        return loaders[conversion](lookup.repo_id, sae.path, device, False, both)[:2]

    name = f"{entry.release}/{sae.id}"
    with _one_line_errors(name):
        cfg = getters[conversion](lookup.repo_id, sae.path, device, False, {**overrides})
        cfg = sae_lens_loaders.handle_config_defaulting(cfg)
        _refuse_transcoder(name, cfg["architecture"], cfg.get("metadata", {}))
        return SAE.load_from_disk(sae.path, device=device, dtype=dtype, converter=converter)


def _from_sae_lens(release: str, sae_id: str, device: str, dtype: str) -> SAE:
    name = f"{release}:{sae_id}"
    with _one_line_errors(name):
        # The config first: a transcoder is refused before its weights are downloaded.
        cfg = sae_lens_loaders.load_sae_config_from_huggingface(release, sae_id, device)
        _refuse_transcoder(name, cfg["architecture"], cfg.get("metadata", {}))
        return SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)


def _from_folder(folder: Path, device: str, dtype: str) -> SAE:
    for file in registry.REQUIRED_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}; valid: {_NAMES}")
    cfg = _read_config(folder / "cfg.json")
    architecture, metadata = cfg.get("architecture", "standard"), cfg.get("metadata")
    if architecture not in SAE_CLASS_REGISTRY:
        valid = ", ".join(sorted(SAE_CLASS_REGISTRY))
        raise ValueError(f"{folder} has the unknown architecture {architecture!r}; valid: {valid}")
    _refuse_transcoder(str(folder), architecture, metadata if isinstance(metadata, Mapping) else cfg)
    try:
        return SAE.load_from_disk(folder, device=device, dtype=dtype)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} is not a SAELens dictionary: {_first_line(error)}") from error


def _checked(name: str, sae: SAE) -> SAE:
    _refuse_transcoder(name, sae.cfg.architecture(), sae.cfg.metadata.to_dict())
    for parameter, tensor in sae.state_dict().items():
        if not all_finite(tensor):
            raise ValueError(f"{name}: {parameter} holds NaN or infinite numbers; valid: finite numbers")
    return repeatable_decode(sae)


def _refuse_transcoder(name: str, architecture: str, metadata: Mapping[str, Any]) -> None:
    hook, hook_out = metadata.get("hook_name"), metadata.get("hook_name_out")
    if "transcoder" in architecture or (hook_out and hook_out != hook):
        raise ValueError(
            f"{name} is a transcoder ({architecture}: reads {hook}, writes {hook_out or 'another hook'});"
            " valid: a dictionary that reads and writes one hook"
        )


def _loaders() -> dict[str, Any]:
    return {
        OPENAI_LOADER: openai_format.openai_huggingface_loader,
        openai_releases.BLOB_LOADER: openai_releases.openai_blob_loader,
        REGISTRY_LOADER: registry_loader,
    }


def _config_getters() -> dict[str, Any]:
    return {
        OPENAI_LOADER: openai_format.openai_huggingface_config,
        openai_releases.BLOB_LOADER: openai_releases.openai_blob_config,
        REGISTRY_LOADER: registry_config,
    }


def _lookup(entry: registry.RegistryEntry) -> RegisteredRelease:
    # Without a repository SAELens hands the release's own name to `registry_loader`.
    lookup = RegisteredRelease(
        release=entry.release,
        repo_id=entry.repo_id or entry.release,
        model=entry.model,
        conversion_func=entry.conversion_func if entry.repo_id else REGISTRY_LOADER,
        saes_map={sae.id: sae.path for sae in entry.saes},
        expected_var_explained={
            sae.id: 1.0 if sae.variance_explained is None else sae.variance_explained for sae in entry.saes
        },
        expected_l0={sae.id: sae.l0 or 0.0 for sae in entry.saes},
        # An id without a page must stay out: SAELens would override the config's own with None.
        neuronpedia_id={sae.id: sae.neuronpedia for sae in entry.saes if sae.neuronpedia is not None},
        norm_scaling_factor={},
        config_overrides=None,
    )
    # Set afterwards: SAELens declares text only, although its own overrides hold numbers and booleans too.
    lookup.config_overrides = dict(entry.config_overrides)
    return lookup


def _record(release: str, path: str) -> tuple[registry.RegistryEntry, registry.SaeRecord]:
    for entry in registry.entries():
        for sae in entry.saes:
            if (entry.release, sae.path) == (release, path):
                return entry, sae
    raise ValueError(f"the registry has no {release}/{path}; call sae_emotion_plugin.register() again")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {_first_line(error)}") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{path} holds a {type(cfg).__name__}; valid: a JSON object")
    return cfg


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"cannot load {name}: {_first_line(error)}") from error
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"cannot load {name}: {_first_line(error)}") from error


@contextmanager
def _without_sae_lens_advice() -> Iterator[None]:
    """Silences SAELens's advice on how to load the model, and to name a release instead of its repository."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        warnings.filterwarnings("ignore", message=r"You are loading an SAE using the HuggingFace repo_id")
        yield


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
