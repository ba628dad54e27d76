"""Pushes a finished export to a Neuronpedia server: its source, features with labels, vectors, and lists by emotion.

Every request that the server took stands in a journal beside the export, so that the same call goes on after a stop.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sae_emotion_plugin.publishing.neuronpedia_api import SERVER, NeuronpediaApi, PushStopped, Refused, TryAgain
from sae_emotion_plugin.publishing.neuronpedia_requests import Request, send_all, upload_request
from sae_emotion_plugin.publishing.neuronpedia_tables import line

LONGEST_WAIT = 3600.0
"""Seconds: a server that asks for more is left, to be continued later."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushReport:
    """What a push did."""

    sent: int
    """Requests that the server took now."""
    skipped: int
    """Requests that it had taken before."""
    journal: Path
    answers: Mapping[str, Mapping[str, Any]]
    """Subject to the ids and addresses that the server gave."""


def push(
    folder: str | Path,
    *,
    server: str = SERVER,
    journal: str | Path | None = None,
    lists: bool = True,
    create_model: bool = False,
    tries: int = 8,
    timeout: float = 60.0,
    sleep: Callable[[float], object] = time.sleep,
) -> PushReport:
    """What was done to bring the export in `folder` to the server. The key is NEURONPEDIA_API_KEY's.

    Features that the server has already are left by it as they are, labels included. Before a vector, a list or a
    source set is created, the server is asked whether it has it: a request whose answer was lost makes no second one.

    Args:
        journal: by default `<folder>.push.jsonl`. It names requests by hash; delete it to send everything again.
        lists: a list of the features of each emotion in the labels.
        create_model: for a model that Neuronpedia does not have.
        tries: of each request, with 1, 2, 4, ... up to 60 seconds between, or what the server asks for.

    Raises:
        PushStopped: the server refused or could not be reached. The same call goes on from there.
        ValueError: an export that is not sound or that the API does not take, no key, an address that is not safe.
    """
    folder = Path(folder)
    api = NeuronpediaApi(server, timeout=timeout)
    done = _Journal(Path(journal) if journal else folder.with_name(f"{folder.name}.push.jsonl"), server)
    session = _Session(api, done, tries, sleep)
    try:
        for _ in send_all(folder, session.once, lists=lists, create_model=create_model):
            pass
    except PushStopped as stopped:
        done_now = f"{session.sent + session.skipped} requests are done, and the same command goes on from there"
        raise PushStopped(f"{stopped}; {done_now}") from None
    return PushReport(session.sent, session.skipped, done.path, session.answers)


class _Session:
    """Sends each request once, whatever happens on the way."""

    def __init__(self, api: NeuronpediaApi, journal: "_Journal", tries: int, sleep: Callable[[float], object]) -> None:
        self.api, self.journal, self.tries, self.sleep = api, journal, tries, sleep
        self.sent = self.skipped = 0
        self.answers: dict[str, Mapping[str, Any]] = {}

    def once(self, request: Request) -> Mapping[str, Any]:
        answer = self.journal.answer(request)
        if answer is None:
            _log.info("%s: %s", request.path, request.subject)
            try:
                answer = self._repeated(request)
            except Refused as refused:
                halves = _halves(request) if refused.status == 413 else ()
                if not halves:
                    raise
                for half in halves:
                    self.once(half)
                return {}
            self.journal.add(request, answer)
            self.sent += 1
        else:
            self.skipped += 1
        if answer:
            self.answers[request.subject] = answer
        return answer

    def _repeated(self, request: Request) -> Mapping[str, Any]:
        found = _FOUND.get(request.path, lambda api, body: None)
        for attempt in range(self.tries):
            try:
                answer = found(self.api, request.body)
                if answer is None:
                    answer = self.api.call(request.path, dict(request.body))
                return _kept(request.path, answer)
            except (KeyError, TypeError, AttributeError) as error:
                raise Refused(f"{request.path}: the answer is not what is documented: {error!r}", 200) from None
            except TryAgain as error:
                wait = min(2.0**attempt, 60.0) if error.after is None else error.after
                if attempt + 1 == self.tries or wait > LONGEST_WAIT:
                    raise
                _log.warning("%s; trying again in %.0f s", error, wait)
                self.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


class _Journal:
    """The requests that a server took, a line each, safe on disk before the next is sent."""

    def __init__(self, path: Path, server: str) -> None:
        self.path, self._server = path, server
        self._answers: dict[str, Mapping[str, Any]] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # a stop in the middle of a line: that request is asked for again
            with path.open("r+b") as stream:
                stream.truncate(len(whole))
        for number, text in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(text)
                self._answers[row["request"]] = dict(row["answer"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}, is no line of a journal; delete the file to begin anew"
                ) from None

    def answer(self, request: Request) -> Mapping[str, Any] | None:
        return self._answers.get(self._name(request))

    def add(self, request: Request, answer: Mapping[str, Any]) -> None:
        name = self._name(request)
        with self.path.open("ab") as stream:
            stream.write(f"{line({'request': name, 'subject': request.subject, 'answer': answer})}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._answers[name] = answer

    def _name(self, request: Request) -> str:
        return sha256(line([self._server, request.path, request.body]).encode()).hexdigest()


def _halves(request: Request) -> tuple[Request, ...]:
    features = request.body.get("features", [])
    if len(features) < 2:
        return ()
    middle = len(features) // 2
    parts = (features[:middle], features[middle:])
    return tuple(upload_request(request.body["modelId"], request.body["source"], part) for part in parts)


def _found_source_set(api: NeuronpediaApi, body: Mapping[str, Any]) -> Any:
    try:
        return api.call(f"source-set/{body['modelId']}/{body['name']}")
    except Refused as refused:
        if refused.status == 404:
            return None
        raise


def _found_vector(api: NeuronpediaApi, body: Mapping[str, Any]) -> Any:
    hook = f"blocks.{body['layerNumber']}.{body['hookType']}"
    for vector in api.call("vector/list-owned", {})["vectors"]:
        if (vector["modelId"], vector["hookName"], vector["vectorLabel"]) == (
            body["modelId"],
            hook,
            body["vectorLabel"],
        ) and vector["vector"] == body["vector"]:
            return {"vector": {"source": vector["layer"], "index": vector["index"]}}
    return None


def _found_list(api: NeuronpediaApi, body: Mapping[str, Any]) -> Any:
    return next((one for one in api.call("list/list", {}) if one["name"] == body["name"]), None)


def _found_items(api: NeuronpediaApi, body: Mapping[str, Any]) -> Any:
    """Something where the list has all the features already."""
    there = {
        (one["modelId"], one["layer"], str(one["index"]))
        for one in api.call("list/get", {"listId": body["listId"]})["neurons"]
    }
    wanted = {(one["modelId"], one["layer"], one["index"]) for one in body["featuresToAdd"]}
    return {} if wanted <= there else None


_FOUND: Mapping[str, Callable[[NeuronpediaApi, Mapping[str, Any]], Any]] = {
    "source-set/new": _found_source_set,
    "vector/new": _found_vector,
    "list/new": _found_list,
    "list/add-features": _found_items,
}
"""How to ask whether the server has it already; it sees to that itself for features."""


def _kept(path: str, answer: Any) -> Mapping[str, Any]:
    """What the journal keeps of an answer."""
    if path == "list/new":
        return {"id": str(answer["id"])}
    if path == "vector/new":
        return {key: answer["vector"][key] for key in ("source", "index")}
    return {}
