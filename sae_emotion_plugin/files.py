"""Files: written whole or not at all, their hashes, and the folder of what can be had again."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path
from safetensors import SafetensorError

CACHE_VARIABLE = "SAE_EMOTION_CACHE"


def cache_folder() -> Path:
    """The folder for downloads, converted models and codes: `SAE_EMOTION_CACHE`, or the user's cache folder."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser() if override else user_cache_path("sae_emotion_plugin")


def check_folder(path: str | Path) -> Path:
    """The path; FileNotFoundError when the folder that it would be written to does not exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`: what is written there takes the place of `path` when all went well.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: it could not be written, for one because the disk is full.
    """
    path = check_folder(path)
    # Without the suffix: who lists the folder by suffix must not meet half a file.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside it, tensors that cannot be written to `path` are an OSError, as any other content is."""
    try:
        yield
    except SafetensorError as error:  # an Exception of its own kind, also where the disk is full
        raise OSError(f"cannot write {path}: {error}") from error


def write_whole(path: str | Path, text: str) -> Path:
    """The path, after `text` was written there: under a temporary name in the same folder first, then renamed.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
    return Path(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
