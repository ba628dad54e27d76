"""A local server with the part of Neuronpedia's API that takes uploads; it checks bodies as that one does."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-np-secret"


class Wrong(Exception):
    """A body that the server refuses with a 400."""


class NeuronpediaServer:
    """What was uploaded, every call, and the failures that the next calls meet."""

    url = ""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.sets: dict[tuple[str, str], dict[str, Any]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.features: dict[int, dict[str, Any]] = {}
        self.vectors: list[dict[str, Any]] = []
        self.lists: dict[str, dict[str, Any]] = {}
        self.failures: list[Any] = []
        """For each of the next POSTs that create something: None, or (status, head, text), or "lost": done without an
        answer, or "refused": not done without an answer."""
        self.most_bytes = 10**9

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.calls]

    def created(self, path: str) -> list[Any]:
        return [body for _, name, body in self.calls if name == path]

    def answer(self, path: str, body: Any) -> Any:
        model, _, name = path.removeprefix("source-set/").partition("/")
        if body is None:
            if (model, name) not in self.sets:
                raise LookupError("no such source set")
            return self.sets[model, name]
        return {
            "model/new": self.new_model,
            "source-set/new": self.new_set,
            "feature/upload-batch": self.upload,
            "vector/new": self.new_vector,
            "vector/list-owned": lambda body: {"vectors": self.vectors},
            "list/list": lambda body: [
                {key: one[key] for key in ("id", "name", "description")} for one in self.lists.values()
            ],
            "list/new": self.new_list,
            "list/get": lambda body: self.lists[body["listId"]],
            "list/add-features": self.add,
        }[path](body)

    def new_model(self, body: Any) -> Any:
        keys(body, {"id": str, "layers": int}, {"displayName": str, "url": str})
        self.models[body["id"]] = body
        return {**body, "website": body.get("url")}

    def new_set(self, body: Any) -> Any:
        keys(body, {"name": str, "modelId": str}, {"description": str, "url": str})
        need(len(body.get("description", "")) <= 128, "description")
        need((body["modelId"], body["name"]) not in self.sets, "exists")
        sources = [
            {"id": f"{layer}-{body['name']}", "modelId": body["modelId"], "setName": body["name"]}
            for layer in range(12)
        ]
        self.sets[body["modelId"], body["name"]] = {**body, "urls": [], "description": "", "sources": sources}
        return {**body, "urls": [], "description": "", "sources": []}

    def upload(self, body: Any) -> Any:
        keys(body, {"modelId": str, "source": str, "features": list}, {})
        need(any(body["source"] in [one["id"] for one in found["sources"]] for found in self.sets.values()), "source")
        need(1 <= len(body["features"]) <= 128, "1 to 128 features")
        for feature in body["features"]:
            optional = {"density": (int, float), "topLogits": list, "bottomLogits": list, "explanations": list}
            keys(feature, {"index": int, "activations": list}, optional)
            need(0 <= feature["index"] <= 10_000_000 and 0 <= feature.get("density", 0) <= 1, "index, density")
            need(len(feature["activations"]) >= 1, "activations")
            for row in feature["activations"]:
                number = (int, float)
                keys(
                    row,
                    {"tokens": list, "values": list},
                    dict.fromkeys(("quantileMin", "quantileMax", "quantileFraction"), number),
                )
                need(1 <= len(row["tokens"]) <= 1024 and len(row["tokens"]) == len(row["values"]), "tokens")
                need(all(token for token in row["tokens"]), "empty token")
                need(all(math.isfinite(value) for value in row["values"]), "values")
                need(0 <= row.get("quantileFraction", 0) <= 1, "quantileFraction")
            for logits in (feature.get("topLogits", []), feature.get("bottomLogits", [])):
                need(len(logits) <= 20, "logits")
                for logit in logits:
                    keys(logit, {"token": str, "value": (int, float)}, {})
            for label in feature.get("explanations", []):
                keys(label, {"text": str}, {"methodName": str})
                need(1 <= len(label["text"]) <= 512, "text")
            self.features.setdefault(feature["index"], feature)
        return {"message": "ok"}

    def new_vector(self, body: Any) -> Any:
        wanted = {"modelId": str, "layerNumber": int, "hookType": str, "vector": list, "vectorLabel": str}
        keys(body, {**wanted, "vectorDefaultSteerStrength": (int, float)}, {})
        need(body["hookType"] in ("hook_resid_pre", "hook_resid_post"), "hookType")
        need(-300 <= body["vectorDefaultSteerStrength"] <= 300 and len(body["vector"]) == 4, "strength, length")
        place = {"source": f"{body['layerNumber']}-neuronpedia-{body['hookType']}", "index": str(len(self.vectors))}
        hook = f"blocks.{body['layerNumber']}.{body['hookType']}"
        row = {
            **body,
            **place,
            "layer": place["source"],
            "hookName": hook,
            "values": body["vector"],
            "label": body["vectorLabel"],
        }
        self.vectors.append({**row, "defaultSteerStrength": body["vectorDefaultSteerStrength"]})
        return {"message": "ok", "url": "https://...", "vector": self.vectors[-1]}

    def new_list(self, body: Any) -> Any:
        keys(body, {"name": str}, {"description": str, "testText": str})
        made = {"id": f"list{len(self.lists)}", "description": "", **body, "neurons": []}
        self.lists[made["id"]] = made
        return made

    def add(self, body: Any) -> Any:
        keys(body, {"listId": str, "featuresToAdd": list}, {})
        need(1 <= len(body["featuresToAdd"]) <= 100, "1 to 100 features")
        for one in body["featuresToAdd"]:
            keys(one, {"modelId": str, "layer": str, "index": str}, {"description": str})
        self.lists[body["listId"]]["neurons"] += body["featuresToAdd"]
        return body["featuresToAdd"]


def need(good: bool, what: str) -> None:
    if not good:
        raise Wrong(what)


def keys(body: Any, required: dict[str, Any], optional: dict[str, Any]) -> None:
    """Null is no value, and unknown keys are refused here: they would be lost."""
    need(
        isinstance(body, dict) and required.keys() <= body.keys() <= required.keys() | optional.keys(), str(body)[:200]
    )
    for key, value in body.items():
        kind = (required | optional)[key]
        need(isinstance(value, kind) and not isinstance(value, bool), f"{key} is {value!r}"[:200])


@contextmanager
def neuronpedia_server() -> Iterator[NeuronpediaServer]:
    state = NeuronpediaServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.handle_call(None)

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.handle_call(json.loads(raw or b"{}"), len(raw))

        def handle_call(self, body: Any, n_bytes: int = 0) -> None:
            path = self.path.removeprefix("/api/")
            state.calls.append((self.command, path, body))
            creates = body is not None and path not in ("vector/list-owned", "list/list", "list/get")
            failure = state.failures.pop(0) if creates and state.failures else None
            if failure == "refused":
                return self.connection.close()
            if isinstance(failure, tuple):
                return self.reply(*failure)
            if self.headers["X-Api-Key"] != KEY:
                return self.reply(401, {}, json.dumps({"message": f"bad key {self.headers['X-Api-Key']}"}))
            if n_bytes > state.most_bytes:
                return self.reply(413, {}, "<html>Request Entity Too Large</html>")
            try:
                answer = state.answer(path, body)
            except Wrong as error:
                return self.reply(400, {}, json.dumps({"error": str(error)}))
            except LookupError as error:
                return self.reply(404, {}, json.dumps({"error": str(error)}))
            if failure == "lost":
                return self.connection.close()
            return self.reply(200, {}, json.dumps(answer))

        def reply(self, status: int, head: dict[str, str], text: str) -> None:
            self.send_response(status)
            for name, value in {**head, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/api"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
