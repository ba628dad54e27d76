import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sae_emotion_plugin.training.logs import CurveFile, open_loggers


def opened(names: list[str], folder: Path) -> list[Any]:
    with open_loggers(names, folder, "run", {}) as loggers:
        return loggers


POINT = {"step": 5, "loss": 0.5, "dead": 1, "shrinkage": None}


def test_a_curve_goes_on_from_the_step_of_a_resumption(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    curve = CurveFile(path, 0)
    for step in (5, 10, 15):
        curve.add({"step": step, "loss": float("nan") if step == 5 else 1.0 / step})
    path.write_text(path.read_text() + '{"step": 20, "lo')  # killed in the line
    again = CurveFile(path, 12)
    assert again.points == [{"step": 5, "loss": None}, {"step": 10, "loss": 0.1}]
    again.add({"step": 15, "loss": 2.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10, 15]


def test_an_unknown_logger_and_one_that_is_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"unknown logger 'mlflow' .valid: tensorboard, wandb"):
        opened(["mlflow"], tmp_path)
    assert opened([], tmp_path) == []
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ImportError, match=f"the logger '{name}' needs its package: pip install {name}"):
            opened([name], tmp_path)


def test_loggers_get_the_numbers_of_a_point_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            seen.append("closed")

    def init(**options: Any) -> Any:
        seen.append((options["id"], options["resume"]))
        log = lambda values, step: seen.append((options["name"], values, step))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: seen.append("finished"))

    for name, content in (("torch.utils.tensorboard", {"SummaryWriter": Writer}), ("wandb", {"init": init})):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    with open_loggers(["tensorboard", "wandb", "wandb"], tmp_path, "run", {"lr": 1.0}) as loggers:
        for log in loggers:
            log(POINT)
    numbers = {"loss": 0.5, "dead": 1}
    started = [(tmp_path.name, "allow"), (str(tmp_path / "tensorboard"), 5)]
    assert seen == [*started, ("loss", 0.5, 5), ("dead", 1, 5), ("run", numbers, 5), "closed", "finished"]


def test_a_logger_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def init(**options: Any) -> Any:
        raise Refused("api_key not configured (no-tty). call wandb.login(key=[your_api_key])\nmore")

    module = ModuleType("wandb")
    vars(module).update({"init": init, "Error": Refused})
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match=r"the logger 'wandb' does not start: api_key not configured .*WANDB_MODE"):
        opened(["wandb"], tmp_path)
