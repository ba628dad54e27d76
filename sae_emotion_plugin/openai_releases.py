"""OpenAI's published SAEs by the names that the registry gives them, and any OpenAI-format file behind a URL.

OpenAI keeps them in Azure's blob store. A release there has `account/container` for its `repo_id`, the loader
`openai_blob`, and for the id of each SAE the name of its hook.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sae_lens import SAE
from torch import Tensor

from sae_emotion_plugin import registry
from sae_emotion_plugin.downloads import download
from sae_emotion_plugin.files import cache_folder
from sae_emotion_plugin.openai_checkpoint import read_openai_checkpoint
from sae_emotion_plugin.openai_format import load_openai_checkpoint, openai_disk_config, openai_disk_loader

URL_VARIABLE = "SAE_EMOTION_OPENAI_URL"
BLOB_LOADER = "openai_blob"
_HOST = ".blob.core.windows.net"


def openai_blob_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """SAELens's config and weights of the OpenAI-format file `folder_name` in the blob container `repo_id`.

    ``SAE.from_pretrained("openaipublic/sparse-autoencoder", "gpt2-small/resid_post_mlp_v5_128k/autoencoders/8.pt",
    converter=openai_blob_loader)`` needs no registration; what the registry knows of the file becomes metadata.

    Raises FileNotFoundError or ValueError, as `downloads.download` and `read_openai_checkpoint` do.
    """
    path, metadata = _fetched(repo_id, folder_name, force=force_download)
    cfg, weights = openai_disk_loader(path, device, {**metadata, **(cfg_overrides or {})})
    return cfg, weights, None


def openai_blob_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """SAELens's flat config of the OpenAI-format file `folder_name` in the blob container `repo_id`."""
    path, metadata = _fetched(repo_id, folder_name, force=force_download)
    return openai_disk_config(path, device, {**metadata, **(cfg_overrides or {})})


def load_openai_url(url: str, *, device: str = "cpu", dtype: str = "float32") -> SAE:
    """The SAE of an OpenAI-format file behind ``https://``, ``http://`` or ``az://account/container/path``.

    The file is kept in the cache. Of a file that a release of the registry names, the metadata are that release's.
    """
    place = _blob_place(url)
    if place is not None:
        path, metadata = _fetched(*place)
    else:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or Path(parts.path).suffix != ".pt":
            raise ValueError(f"cannot load {url!r}; valid: an http, https or az URL of a .pt file")
        kept = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(parts.path).name
        path, metadata = download(url, kept, check=_check_structure), {}
    return load_openai_checkpoint(path, device=device, dtype=dtype, metadata=metadata)


def _fetched(repo_id: str, file: str, *, force: bool = False) -> tuple[Path, Mapping[str, Any]]:
    """Where the file of a blob container lies in the cache, downloaded if need be, and what the registry knows of it.

    ``$SAE_EMOTION_OPENAI_URL`` replaces ``https://<account>.blob.core.windows.net``, for a mirror.
    """
    registry.check_repo_id("repo_id", repo_id)
    registry.check_path("file", file)
    file = file if file.endswith(".pt") else f"{file}.pt"
    account, container = repo_id.split("/")
    base = os.environ.get(URL_VARIABLE, "").rstrip("/") or f"https://{account}{_HOST}"
    metadata, expected_sha256 = _known(repo_id, file)
    path = download(
        f"{base}/{container}/{file}",
        cache_folder() / "downloads" / repo_id / file,
        expected_sha256=expected_sha256,
        check=_check_structure,
        force=force,
    )
    return path, metadata


def _check_structure(path: Path) -> None:
    # The numbers are looked at when the file is loaded.
    read_openai_checkpoint(path, check_numbers=False)


def _blob_place(url: str) -> tuple[str, str] | None:
    """Container and file of a URL in Azure's blob store or its mirror, as the registry writes them."""
    mirror = os.environ.get(URL_VARIABLE, "").rstrip("/")
    if mirror and url.startswith(f"{mirror}/"):
        url = f"az://openaipublic{url.removeprefix(mirror)}"
    at = re.fullmatch(rf"(?:az://([\w-]+)|https://([\w-]+){re.escape(_HOST)})/([\w-]+)/([^?#]+\.pt)", url, re.ASCII)
    return (f"{at[1] or at[2]}/{at[3]}", at[4]) if at else None


def _known(repo_id: str, file: str) -> tuple[Mapping[str, Any], str | None]:
    """Metadata and SHA-256 of a blob that a release of the registry names."""
    for entry in registry.entries():
        if entry.repo_id == repo_id and entry.conversion_func == BLOB_LOADER:
            for sae in entry.saes:
                if sae.path == file:
                    own = {} if sae.neuronpedia is None else {"neuronpedia_id": sae.neuronpedia}
                    metadata = {**entry.config_overrides, "hook_name": sae.id, **own}
                    return metadata, entry.provenance.sha256.get(file)
    return {}, None
