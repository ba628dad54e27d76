"""Where a training's figures go: a JSON Lines file always, TensorBoard or Weights & Biases only when asked."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_emotion_plugin.files import write_whole

LOGGERS = ("tensorboard", "wandb")


class CurveFile:
    """A JSON Lines file of points, each with its `step`; what lies after the point of a resumption is taken back."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        self.points: list[dict[str, Any]] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    point = json.loads(line)
                except ValueError:
                    break  # the process was killed in this line
                if point["step"] > resumed_at:
                    break
                self.points.append(point)
        write_whole(path, "".join(map(_line, self.points)))

    def add(self, point: Mapping[str, Any]) -> None:
        whole = {name: _plain(value) for name, value in point.items()}
        self.points.append(whole)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(whole))


def open_loggers(
    names: Sequence[str], folder: Path, run: str, settings: Mapping[str, Any]
) -> list[Callable[[Mapping[str, Any]], None]]:
    """A function for each logger that was asked for, which takes the points of a curve.

    Raises:
        ValueError: an unknown name.
        ImportError: its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"unknown logger {name!r} (valid: {', '.join(LOGGERS)})")
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [makers[name](folder, run, settings) for name in names]


def _tensorboard(folder: Path, run: str, settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("the logger 'tensorboard' needs its package: pip install tensorboard") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(point: Mapping[str, Any]) -> None:
        for name, value in _numbers(point).items():
            writer.add_scalar(name, value, point["step"])
        writer.flush()

    return log


def _wandb(folder: Path, run: str, settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("the logger 'wandb' needs its package: pip install wandb") from error
    session = wandb.init(project="sae-emotion", name=run, config=dict(settings), dir=str(folder))

    def log(point: Mapping[str, Any]) -> None:
        session.log(_numbers(point), step=int(point["step"]))

    return log


def _numbers(point: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in point.items() if name != "step" and isinstance(value, int | float)}


def _plain(value: Any) -> Any:
    # JSON has no NaN: a figure that is not defined is none.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(point: Mapping[str, Any]) -> str:
    return json.dumps(point, allow_nan=False) + "\n"
