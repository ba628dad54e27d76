"""Texts with ratings on scales, such as EmoBank's valence, arousal and dominance: `RatedTexts`, read from a file."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_emotion_plugin.text_rows import check_text, file_rows

DOCUMENT = "document"
"""The column that says which texts belong together."""
NO_RATINGS = ("id", "line", DOCUMENT)


@dataclass(frozen=True)
class RatedTexts:
    """Texts with the same ratings each; `read_ratings` makes one of a file."""

    texts: tuple[str, ...]
    ratings: Mapping[str, Float[np.ndarray, "text"]]
    """By the scale's name; all finite."""
    documents: tuple[str, ...] | None = None
    """The document of each text, where the file says; texts of one document do not vary independently."""

    def __len__(self) -> int:
        return len(self.texts)


def read_ratings(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, *, text_column: str = "text"
) -> RatedTexts:
    """Returns the texts of a .jsonl, .csv or .tsv file (also .gz) with the numbers in its columns.

    Without `columns`, every column that holds a number in the first row is a rating; `id`, `line` and `document` are
    none. A column `document` says which texts belong together.

    ValueError with file and line for a broken row, one without a number where others have one, or no ratings at all;
    FileNotFoundError for a missing file.
    """
    texts, places, rows = [], [], []
    for place, row in file_rows(path)[0]:
        if text_column not in row:
            raise ValueError(f"{place}: no column {text_column!r}; it has {', '.join(map(repr, row))}")
        texts.append(check_text(row[text_column], place))
        places.append(place)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    found = [name for name, value in rows[0].items() if name not in (text_column, *NO_RATINGS) and _is_number(value)]
    names = found if columns is None else list(columns)
    if not names:
        raise ValueError(f"{path} has no ratings: the columns {', '.join(map(repr, rows[0]))} hold no numbers")
    ratings = {}
    for name in names:
        for place, row in zip(places, rows, strict=True):
            if not _is_number(row.get(name)):
                raise ValueError(f"{place}: the rating {name!r} is {row.get(name)!r:.60}, not a number")
        ratings[name] = np.array([float(row[name]) for row in rows])
    documents = tuple(str(row[DOCUMENT]) for row in rows) if all(row.get(DOCUMENT) for row in rows) else None
    return RatedTexts(tuple(texts), ratings, documents)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
