"""What each method of a comparison chose and scored, on disk: an interrupted comparison goes on behind the last one."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sae_emotion_plugin.discovery.probes import Fitted, ProbeInputs, Rows
from sae_emotion_plugin.evidence.selection import Choice
from sae_emotion_plugin.files import replacing

logger = logging.getLogger(__name__)

_CHOSEN = "chosen"
_SCORES = "scores"


class KeptMethods:
    """A folder of one comparison, with a file for each method that is done.

    It is named by a hash of everything that the methods see, of the folds, and of this package's version.
    """

    def __init__(self, cache: str | Path, inputs: ProbeInputs, folds: Sequence[Rows]) -> None:
        self.folder = Path(cache) / _key(inputs, folds)
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, method: str) -> tuple[Choice, Fitted] | None:
        """What was chosen, and the fit's scores; None where there is no file or it is damaged."""
        path = self._path(method)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                chosen = json.loads((file.metadata() or {})[_CHOSEN])
                scores = file.get_tensor(_SCORES)
            tried = {name: tuple(map(float, aurocs)) for name, aurocs in chosen["scores"].items()}
            return Choice(str(chosen["name"]), tried), Fitted(scores, tuple(map(str, chosen["details"])))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s is damaged: the method is fitted anew", path)
            return None

    def write(self, method: str, choice: Choice, fitted: Fitted) -> None:
        """Keep a method, whole or not at all."""
        chosen = {"name": choice.name, "scores": choice.scores, "details": fitted.details}
        with replacing(self._path(method)) as partial:
            save_file({_SCORES: np.ascontiguousarray(fitted.scores)}, partial, {_CHOSEN: json.dumps(chosen)})

    def _path(self, method: str) -> Path:
        return self.folder / f"{method}.safetensors"


def _key(inputs: ProbeInputs, folds: Sequence[Rows]) -> str:
    named = [metadata.version("sae-emotion-plugin"), inputs.texts, [fold.tolist() for fold in folds]]
    digest = hashlib.sha256(json.dumps(named).encode())
    for name, array in _arrays(inputs):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:24]


def _arrays(inputs: ProbeInputs) -> Iterator[tuple[str, np.ndarray]]:
    yield "labels", inputs.labels
    for pooling, matrix in sorted(inputs.pooled.items()):
        yield from ((f"{pooling} {part}", getattr(matrix, part)) for part in ("data", "indices", "indptr"))
    yield from sorted(inputs.dense.items())
