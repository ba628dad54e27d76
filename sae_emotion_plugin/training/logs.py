"""Where a training's figures go: a JSON Lines file always, TensorBoard or Weights & Biases only when asked."""

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.messages import first_line

LOGGERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""The module that each logger needs."""


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

    def add(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The point as it was written: NaN and infinity are None."""
        whole = {name: _plain(value) for name, value in point.items()}
        self.points.append(whole)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(whole))
        return whole


def check_loggers(names: Sequence[str]) -> None:
    """Nothing, where every logger is known and its package is there; so that a run fails before its work, not after.

    Raises:
        ValueError: an unknown name.
        ImportError: its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"unknown logger {name!r} (valid: {', '.join(LOGGERS)})")
        try:
            importlib.import_module(LOGGERS[name])
        except ImportError as error:
            raise ImportError(f"the logger {name!r} needs its package: pip install {name}") from error


@contextmanager
def open_loggers(
    names: Sequence[str], folder: Path, run: str, settings: Mapping[str, Any]
) -> Iterator[list[Callable[[Mapping[str, Any]], None]]]:
    """A function for each logger that was asked for, which takes the points of a curve; closed at the end.

    A run that is resumed goes on in the logger's own record of it: one TensorBoard folder, one run of W&B.

    Raises:
        ValueError, ImportError: as `check_loggers`; W&B does not start (nobody is logged in, for one).
    """
    check_loggers(names)
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as opened:
        yield [makers[name](folder, run, settings, opened) for name in dict.fromkeys(names)]


def _tensorboard(
    folder: Path, run: str, settings: Mapping[str, Any], opened: ExitStack
) -> Callable[[Mapping[str, Any]], None]:
    module = importlib.import_module(LOGGERS["tensorboard"])
    writers: list[Any] = []

    def log(point: Mapping[str, Any]) -> None:
        if not writers:
            # What lies behind the point of a resumption is taken back.
            writers.append(module.SummaryWriter(str(folder / "tensorboard"), purge_step=point["step"]))
            opened.callback(writers[0].close)
        for name, value in _numbers(point).items():
            writers[0].add_scalar(name, value, point["step"])
        writers[0].flush()

    return log


def _wandb(
    folder: Path, run: str, settings: Mapping[str, Any], opened: ExitStack
) -> Callable[[Mapping[str, Any]], None]:
    module = importlib.import_module(LOGGERS["wandb"])
    # The checkpoints' folder is named by a hash of recipe and activations.
    again = {"id": folder.name, "resume": "allow"}
    try:
        session = module.init(project="sae-emotion", name=run, config=dict(settings), dir=str(folder), **again)
    except module.Error as error:
        advice = "log in with `wandb login`, or set WANDB_MODE=offline"
        raise ValueError(f"the logger 'wandb' does not start: {first_line(error)}; {advice}") from error
    opened.callback(session.finish)  # another run of this process would go on in this one otherwise

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
