"""What a push of a finished export sends to Neuronpedia's API: the requests, one by one, as its server takes them."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sae_emotion_plugin.publishing.neuronpedia_checks import check_export
from sae_emotion_plugin.publishing.neuronpedia_tables import line, read_rows

MOST_FEATURES = 128
"""In one request, by the server's rule."""
MOST_BYTES = 3_500_000
"""In one request: common hosts refuse bodies above 4.5 MB. A batch that is refused as too large is halved."""
MOST_LISTED = 100
MOST_TOKENS = 1024
MOST_LOGITS = 20
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(hook_resid_(?:pre|post))")


@dataclass(frozen=True)
class Request:
    """One POST of a push."""

    path: str
    """Below the server's address."""
    body: Mapping[str, Any]
    subject: str
    """What it creates, for people."""

    @property
    def n_bytes(self) -> int:
        return len(line(self.body).encode())


Once = Callable[[Request], Mapping[str, Any]]
"""Sends a request, and returns the ids in its answer."""


def planned_requests(folder: str | Path, *, lists: bool = True, create_model: bool = False) -> Iterator[Request]:
    """The requests that `push` would send for the export in `folder`, in order. Nothing is sent, and no key needed.

    Raises ValueError for an export that is not sound, or that the API does not take.
    """
    planned: list[Request] = []

    def note(request: Request) -> Mapping[str, Any]:
        planned.append(request)
        return {"id": "(the new list's)"}

    for _ in send_all(folder, note, lists=lists, create_model=create_model):
        yield from planned
        planned.clear()


def send_all(folder: str | Path, once: Once, *, lists: bool, create_model: bool) -> Iterator[None]:
    """Calls `once` with request after request, each made from what came before, and yields after each."""
    folder = Path(folder)
    if problems := (checked := check_export(folder)).problems:
        raise ValueError(f"{folder} is no sound export: {problems[0]} ({len(problems)} problems)")
    for counts in checked.sources:
        path = folder / "v1" / counts.model_id / counts.source_id
        (model,), (source_set,) = ([*read_rows(path / name)] for name in ("model.jsonl", "sourceset.jsonl"))
        if create_model:
            body = {"id": model["id"], "layers": model["layers"], "displayName": model["displayName"] or model["id"]}
            once(Request("model/new", _without_null({**body, "url": model.get("website")}), f"model {model['id']}"))
            create_model = False
            yield
        features = _features(path)
        first = next(features, None)
        if first is None:
            continue
        if first[0].get("hasVector"):
            for vector in [first, *features]:
                once(_vector_request(vector[0]))
                yield
            continue
        body = {"name": source_set["name"], "modelId": source_set["modelId"]}
        body |= {"description": source_set["description"][:128], "url": next(iter(source_set["urls"]), None)}
        once(Request("source-set/new", _without_null(body), f"source set {source_set['name']}"))
        yield
        labels: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(path / "explanations"):
            labels.setdefault(row["index"], []).append(row)
        for batch in _batches(_uploads(path, labels)):
            once(upload_request(counts.model_id, counts.source_id, batch))
            yield
        for name, items in _lists(counts.model_id, counts.source_id, labels).items() if lists else ():
            description = f"Features of {counts.source_id} that tell {name}"
            found = once(
                Request("list/new", {"name": f"{name} · {counts.source_id}", "description": description}, name)
            )
            yield
            for start in range(0, len(items), MOST_LISTED):
                part = items[start : start + MOST_LISTED]
                body = {"listId": found["id"], "featuresToAdd": part}
                once(Request("list/add-features", body, f"{len(part)} features of the list {name}"))
                yield


def _features(path: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each feature's row with its activations' rows, which stand in the same order."""
    groups = groupby(read_rows(path / "activations"), key=lambda row: row["index"])
    index, rows = next(groups, (None, iter(())))
    for feature in read_rows(path / "features"):
        if index == feature["index"]:
            yield feature, list(rows)
            index, rows = next(groups, (None, iter(())))
        else:
            yield feature, []
    if index is not None:
        raise ValueError(f"{path}: the activations of feature {index} are not in the order of the features")


def _uploads(path: Path, labels: Mapping[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The features as the API takes them. It takes none without activations."""
    for feature, activations in _features(path):
        if activations:
            yield _upload(feature, activations, labels.get(feature["index"], []))


def _upload(
    feature: Mapping[str, Any], activations: list[dict[str, Any]], labels: list[dict[str, Any]]
) -> dict[str, Any]:
    longest = max(len(row["tokens"]) for row in activations)
    if longest > MOST_TOKENS:
        raise ValueError(
            f"feature {feature['index']} has an activation of {longest} tokens; the API takes {MOST_TOKENS}"
        )
    upload: dict[str, Any] = {
        "index": int(feature["index"]),
        # Not modelName: the server fails on it.
        "explanations": [
            _without_null({"text": label["description"], "methodName": label["typeName"]}) for label in labels
        ],
        "activations": [
            _without_null(
                {
                    "tokens": _said(row["tokens"]),
                    "values": row["values"],
                    "quantileMin": row["binMin"],
                    "quantileMax": row["binMax"],
                    # The top group's -1 is refused; its share is not shown.
                    "quantileFraction": None if row["binContains"] is None else max(row["binContains"], 0),
                }
            )
            for row in activations
        ],
    }
    if feature["frac_nonzero"] >= 0:
        upload["density"] = feature["frac_nonzero"]
    for name, side in (("topLogits", "pos"), ("bottomLogits", "neg")):
        pairs = zip(_said(feature[f"{side}_str"]), feature[f"{side}_values"], strict=True)
        upload[name] = [{"token": token, "value": value} for token, value in pairs][:MOST_LOGITS]
    return upload


def _said(tokens: list[str]) -> list[str]:
    """The API refuses empty tokens."""
    return [token or "\ufffd" for token in tokens]


def _batches(features: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for feature in features:
        own = len(line(feature).encode()) + 1
        if batch and (len(batch) == MOST_FEATURES or size + own > MOST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(feature)
        size += own
    if batch:
        yield batch


def upload_request(model_id: str, source: str, features: list[dict[str, Any]]) -> Request:
    """The request that uploads the features, at most `MOST_FEATURES` of them."""
    named = f"{len(features)} features of {source} from {features[0]['index']} to {features[-1]['index']}"
    return Request("feature/upload-batch", {"modelId": model_id, "source": source, "features": features}, named)


def _vector_request(row: Mapping[str, Any]) -> Request:
    match = _RESIDUAL.fullmatch(row["hookName"])
    if match is None:
        raise ValueError(f"the API takes no vector at {row['hookName']} (valid: a block's residual input or output)")
    body = {
        "modelId": row["modelId"],
        "layerNumber": int(match[1]),
        "hookType": match[2],
        "vector": row["vector"],
        "vectorDefaultSteerStrength": row["vectorDefaultSteerStrength"],
        "vectorLabel": row["vectorLabel"],
    }
    return Request("vector/new", body, f"vector {row['vectorLabel']}")


def _lists(model_id: str, source: str, labels: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Emotion to the features whose labels name it, in the order of the features."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for index, rows in labels.items():
        for row in rows:
            for emotion in json.loads(row["notes"])["emotions"]:
                item = {"modelId": model_id, "layer": source, "index": index, "description": row["description"]}
                found.setdefault(emotion, {}).setdefault(index, item)
    return {emotion: list(items.values()) for emotion, items in sorted(found.items())}


def _without_null(body: dict[str, Any]) -> dict[str, Any]:
    """The server refuses null for what may be left out."""
    return {key: value for key, value in body.items() if value is not None}
