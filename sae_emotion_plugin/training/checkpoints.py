"""The state of a training on disk: one safetensors file a checkpoint, whole or not there, and nothing pickled."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_emotion_plugin.files import replacing, write_whole

KEPT = 2
"""Checkpoints that stay: a second one, should the file system lose the last."""
_COUNTERS = "counters"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a training goes on from."""

    step: int
    """Steps that are behind it."""
    tensors: dict[str, Tensor]
    counters: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, checkpoint: Checkpoint) -> Path:
        """The file, after it was written under a temporary name, reached the disk and was renamed.

        Raises:
            OSError: the disk is full, for one; the former checkpoints stay.
        """
        path = self.folder / f"step-{checkpoint.step:09d}.safetensors"
        with replacing(path) as partial:
            tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
            save_file(tensors, partial, metadata={_COUNTERS: json.dumps(checkpoint.counters)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for old in self.paths()[:-KEPT]:
            old.unlink()
        return path

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that can be read, or None."""
        for path in reversed(self.paths()):
            try:
                with safe_open(path, framework="pt") as file:
                    counters = json.loads((file.metadata() or {})[_COUNTERS])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, KeyError, ValueError):
                continue
            return Checkpoint(int(path.stem.removeprefix("step-")), tensors, counters)
        return None


def begin_or_go_on(path: Path, settings: Mapping[str, Any]) -> None:
    """Write down what a run is begun with, or compare it with what it was begun with.

    Raises:
        ValueError: something differs; each difference is named.
    """
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
    if names:
        listed = "; ".join(f"{name} was {begun.get(name)!r} and is {settings.get(name)!r}" for name in names)
        raise ValueError(
            f"a run with another recipe was begun here: {listed}. Go on with the former one, begin in another folder "
            f"or delete {path}"
        )
