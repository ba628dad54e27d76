"""Texts that a study has written, kept as a JSON file beside what they were made of."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sae_emotion_plugin.files import write_whole

logger = logging.getLogger(__name__)

KeptText: TypeAlias = tuple[str, float | None, bool]
"""A continuation, its mean negative log-likelihood under the unsteered model (None if empty), whether it loops."""


def read_texts(path: Path, made_of: Mapping[str, Any], n: int) -> list[KeptText] | None:
    """The `n` texts in the file; None where there is none, or (with a warning) it holds something else."""
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [(str(text), nll if nll is None else float(nll), bool(loops)) for text, nll, loops in data["rows"]]
        if data["made_of"] != made_of:
            raise ValueError("it was made of something else")
        if len(rows) != n:
            raise ValueError(f"it has {len(rows)} texts instead of {n}")
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and is made anew: %r", path, error)
        return None
    return rows


def save_texts(path: Path, made_of: Mapping[str, Any], rows: Sequence[KeptText]) -> None:
    """Writes the texts whole or not at all."""
    data = {"made_of": made_of, "rows": rows}
    write_whole(path, json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
