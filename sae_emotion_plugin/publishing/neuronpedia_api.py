"""Calls of Neuronpedia's public API: one attempt each, with what may be tried again told from what may not.

Not the client `neuronpedia` (1.2.1), whose bodies these calls send: it has no time limit, drops the server's
`Retry-After`, prints every call, and sends nulls that the server refuses.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

from sae_emotion_plugin.publishing.neuronpedia_tables import line

SERVER = "https://neuronpedia.org/api"
KEY_VARIABLE = "NEURONPEDIA_API_KEY"
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_MEANING = {
    401: f"the key in {KEY_VARIABLE} is not valid there",
    403: "the key's owner may not do that",
    404: "there is no such thing",
    409: "it exists already, or something else of that name does",
    413: "the request is too large",
    429: "too many requests",
}


class PushStopped(ValueError):
    """The server refused, or could not be reached. What it had taken before stays there, and in the journal."""


class Refused(PushStopped):
    """An answer that trying again would not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TryAgain(PushStopped):
    """No answer, or one that may be another later."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after
        """Seconds, where the server says."""


class NeuronpediaApi:
    """A server with the key of the environment variable NEURONPEDIA_API_KEY, which is nowhere shown or written."""

    def __init__(self, server: str = SERVER, *, timeout: float = 60.0) -> None:
        """Raises ValueError for a server that is no address, or for a key that is missing or cannot be a key."""
        parts = urllib.parse.urlsplit(server)
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
            raise ValueError(f"server is {server!r}; valid: https://..., or http://localhost:PORT/api")
        self.server = server.rstrip("/")
        self._key = os.environ.get(KEY_VARIABLE, "")
        if not re.fullmatch(r"[!-~]+", self._key):
            state = "cannot be a key" if self._key else "is not set"
            raise ValueError(f"the environment variable {KEY_VARIABLE} {state}: see {SERVER[:-4]}/account")
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to one POST of `body`, or GET where there is none, as JSON gives it.

        Raises:
            TryAgain: the network failed, too many requests, or the server's own error.
            Refused: any other answer.
        """
        status, head, text = self._send(path, body)
        moved = self._moved(path, str(head.get("Location", ""))) if status in (301, 302, 307, 308) else None
        if moved:
            self.server = moved
            status, head, text = self._send(path, body)
        if 200 <= status < 300:
            try:
                return json.loads(text)
            except ValueError:
                raise Refused(f"{path}: the answer of {self.server} is not JSON", status) from None
        message = f"{path}: {self.server} answered {status}"
        said = _MEANING.get(status), self._said(text)
        message = ": ".join([message, *(part for part in said if part)])
        if status in _AGAIN:
            raise TryAgain(message, _seconds(head.get("Retry-After")))
        raise Refused(message, status)

    def _send(self, path: str, body: dict[str, Any] | None) -> tuple[int, Message, str]:
        request = urllib.request.Request(
            f"{self.server}/{path}",
            data=None if body is None else line(body).encode(),
            headers={"X-Api-Key": self._key, "Content-Type": "application/json", "Accept": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                return answer.status, answer.headers, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                try:
                    return error.code, error.headers, error.read(2000).decode("utf-8", "replace")
                except (OSError, http.client.HTTPException):
                    return error.code, error.headers, ""
        except (OSError, http.client.HTTPException) as error:
            reason = self._said(str(getattr(error, "reason", "") or error or type(error).__name__))
            raise TryAgain(f"{path}: no answer from {self.server}: {reason}") from None

    def _moved(self, path: str, location: str) -> str | None:
        """The same server with or without `www.`, where that is all that a redirection changes: the key goes along."""
        there, here = urllib.parse.urlsplit(location), urllib.parse.urlsplit(f"{self.server}/{path}")
        same = there.netloc.removeprefix("www.") == here.netloc.removeprefix("www.") and there.path == here.path
        return location.removesuffix(f"/{path}") if same and there.scheme == "https" else None

    def _said(self, text: str) -> str:
        """The server's own words in one line, without the key."""
        try:
            answer = json.loads(text)
            text = str(answer.get("message") or answer.get("error") or text) if isinstance(answer, dict) else text
        except ValueError:
            pass
        return " ".join(text.replace(self._key, "***").split())[:300]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, and its key elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _seconds(retry_after: str | None) -> float | None:
    """What `Retry-After` asks for: it is a number of seconds, or a date."""
    if retry_after is None:
        return None
    try:
        return max(float(retry_after), 0.0) if retry_after.strip().isdigit() else _until(retry_after)
    except (TypeError, ValueError):
        return None


def _until(date: str) -> float:
    return max((parsedate_to_datetime(date).astimezone(UTC) - datetime.now(UTC)).total_seconds(), 0.0)
