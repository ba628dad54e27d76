"""A file behind a URL -> the same file on this machine: resumed, tried again, checked, and there whole or not at all.

The transfer is `requests` with urllib3's retries; what is added here is going on where a connection broke.
"""

import base64
import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from filelock import FileLock
from requests.adapters import HTTPAdapter
from tqdm.auto import tqdm
from urllib3.util import Retry

from sae_emotion_plugin.files import CACHE_VARIABLE, sha256
from sae_emotion_plugin.messages import first_line

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often a request is tried again, and how many broken transfers in a row may bring nothing new."""
BACK_OFF = 0.5
"""Seconds before the second new attempt; twice as long before each further one."""
TIMEOUT = (10.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""
_CHUNK = 1 << 20
_TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass
class _Transfer:
    """What is known of the file at the other end, from the headers of the last answer."""

    validator: str | None = None
    """ETag or date: where it changes, what was received so far is of another file."""
    size: int | None = None
    md5: str | None = field(default=None, repr=False)


def download(
    url: str,
    path: str | Path,
    *,
    expected_sha256: str | None = None,
    check: Callable[[Path], Any] | None = None,
    force: bool = False,
) -> Path:
    """The path, once the file behind `url` is there; when it is there already no network is touched.

    What comes is written to a hidden file beside `path` and takes its place when its size, its hash (the one given, and
    the MD5 that the server states, if any) and `check` (which raises ValueError) find nothing wrong. An interrupted
    download goes on where it broke, also in a later process. Two processes that ask at once download once.

    Raises:
        FileNotFoundError: the server has no such file, or cannot be reached.
        ValueError: another size or hash than expected, what `check` says, or a folder that cannot be written.
    """
    path = Path(path)
    if path.is_file() and not force:
        return path
    partial = path.with_name(f".{path.name}.part")
    with _writing(partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and not force:
                return path
            logger.info("downloading %s", url)
            known = _fetch(url, partial)
            try:
                _verify(url, partial, known, expected_sha256)
                if check is not None:
                    check(partial)
            except ValueError as error:
                _discard(partial)
                raise ValueError(str(error).replace(str(partial), url)) from error
            os.replace(partial, path)
            _note(partial).unlink(missing_ok=True)
    return path


def _fetch(url: str, partial: Path) -> _Transfer:
    """Receives all of the file into `partial`, in as many answers as it takes."""
    known, best, failures = _Transfer(validator=_read_note(partial)), 0, 0
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        # Without Retry-After: a server may ask for hours, and nobody would know what is being waited for.
        retry = Retry(
            total=ATTEMPTS,
            backoff_factor=BACK_OFF,
            status_forcelist=_TRANSIENT,
            raise_on_status=False,
            respect_retry_after_header=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        while True:
            try:
                _receive(session, url, partial, known)
                return known
            except requests.RequestException as error:
                received = partial.stat().st_size if partial.is_file() else 0
                best, failures = max(best, received), 0 if received > best else failures + 1
                if failures > ATTEMPTS or not isinstance(error, _Interrupted):
                    raise FileNotFoundError(f"cannot download {url}: {_reason(error)}") from error
                logger.warning("the download of %s broke at %d bytes (%s), going on", url, received, error)
                time.sleep(BACK_OFF * 2 ** max(failures - 1, 0))


class _Interrupted(requests.RequestException):
    """The transfer has to be taken up again."""


def _receive(session: requests.Session, url: str, partial: Path, known: _Transfer) -> None:
    """One answer of the server, appended to `partial` where it continues that, else in its place."""
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have and (known.validator or known.size) else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:
            _discard(partial)
            raise _Interrupted(f"the server has no bytes from {have}")
        answer.raise_for_status()
        start, total = _extent(answer)
        validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        changed = validator != known.validator or (known.size is not None and total != known.size)
        if start and (start != have or changed):
            _discard(partial)
            known.validator = known.size = None
            raise _Interrupted("the server does not always send the same file")
        known.validator, known.size = validator, total
        known.md5 = answer.headers.get("x-ms-blob-content-md5") or (
            None if start else answer.headers.get("Content-MD5")
        )
        free = shutil.disk_usage(partial.parent).free
        if total is not None and total - start > free:
            raise OSError(errno.ENOSPC, f"{total - start:,} bytes are needed, {free:,} are free")
        with partial.open("ab" if start else "wb") as file:
            _write_note(partial, validator)
            bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None)
            with bar:
                for chunk in _chunks(answer):
                    file.write(chunk)
                    bar.update(len(chunk))
        size = partial.stat().st_size
        if total is not None and size != total:
            _discard(partial)
            raise _Interrupted(f"{size:,} bytes came, {total:,} were announced")


def _chunks(answer: requests.Response) -> Iterator[bytes]:
    try:
        yield from answer.iter_content(_CHUNK)
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        raise _Interrupted("the connection breaks again and again") from error


def _extent(answer: requests.Response) -> tuple[int, int | None]:
    """At which byte of the file an answer starts, and how long the whole file is, where the server says so."""
    if answer.status_code == 206:
        unit, _, extent = answer.headers.get("Content-Range", "").partition(" ")
        span, _, total = extent.partition("/")
        start = span.partition("-")[0]
        if unit == "bytes" and start.isdigit():
            return int(start), int(total) if total.isdigit() else None
        raise _Interrupted(f"an answer in part without its place: {answer.headers.get('Content-Range')!r}")
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _verify(url: str, partial: Path, known: _Transfer, expected: str | None) -> None:
    if expected is not None and (found := sha256(partial)) != expected:
        raise ValueError(f"{url} has the SHA-256 {found}, not {expected}")
    if known.md5 is not None:
        with partial.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).digest()
        if base64.b64encode(digest).decode() != known.md5:
            raise ValueError(f"{url} came with another MD5 than its server states: it was damaged on its way")


def _note(partial: Path) -> Path:
    return partial.with_suffix(".etag")


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _note(partial).unlink(missing_ok=True)


def _read_note(partial: Path) -> str | None:
    return _note(partial).read_text(encoding="utf-8") if partial.is_file() and _note(partial).is_file() else None


def _write_note(partial: Path, validator: str | None) -> None:
    if validator is None:
        _note(partial).unlink(missing_ok=True)
    else:
        _note(partial).write_text(validator, encoding="utf-8")


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"the server answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout | requests.ConnectionError):
        return "the server cannot be reached or does not answer"
    return first_line(error)


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """Turns a full disk or a folder that may not be written into one line that says what helps."""
    try:
        yield
    except (FileNotFoundError, requests.RequestException):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _discard(partial)
        folder = partial.parent
        raise ValueError(
            f"cannot write {folder}: {error.strerror or error}; {CACHE_VARIABLE} names another folder"
        ) from error
