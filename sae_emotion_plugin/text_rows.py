"""Rows of labelled texts out of files, frames and data sets; a broken one is refused, with place and reason."""

import csv
import gzip
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABEL_COLUMNS = ("emotions", "label", "labels", "emotion")
FILE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz")

_FLAGS = {"0": False, "1": True, "false": False, "true": True}
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0*)?")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_logger = logging.getLogger(__name__)

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages ("corpus.csv, line 7"), and its values by column."""
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """What to read from a row, and how to understand its label."""

    text: str = "text"
    label: str | None = None
    """None: the first of LABEL_COLUMNS that the first row has."""
    name: str | None = None
    """What a flag of 1 means."""
    label_names: Sequence[str] | None = None
    """What the numbers 0, 1, ... mean."""
    delimiter: str | None = None
    """What separates several labels in one string; None: any of ; | , in cells of text, nothing elsewhere."""
    language: str | None = None
    unlabelled: bool = False
    cells: bool = False
    """Every value is a string, a number or a list written out, as in .csv files."""


def check_text(text: object, place: str) -> str:
    """The text, if it is one: a ValueError names the place where it is no string, blank or invalid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"{place}: the text is {_short(text)}, not a string")
    if not text.strip():
        raise ValueError(f"{place}: the text is empty")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: the text has a lone surrogate at character {error.start + 1}") from None
    return text


def labelled_rows(
    rows: Iterable[Row], source: str, columns: Columns
) -> tuple[tuple[str, ...], tuple[Labels, ...], tuple[str, ...], str]:
    """(texts, labels, ids, language) of all rows; `source` is named where all of them are at fault."""
    places, texts, values, ids, languages = [], [], [], [], set()
    label_column = columns.label
    for place, row in rows:
        if columns.text not in row:
            raise ValueError(f"{place}: no column {columns.text!r}; it has {_listed(row)}")
        if label_column is None and not columns.unlabelled:
            label_column = next((name for name in LABEL_COLUMNS if name in row), None)
            if label_column is None:
                tried = ", ".join(LABEL_COLUMNS)
                raise ValueError(
                    f"{place}: no label column ({tried}); it has {_listed(row)}; give one, or unlabelled=True"
                )
        if not columns.unlabelled and label_column not in row:
            raise ValueError(f"{place}: no column {label_column!r}; it has {_listed(row)}")
        places.append(place)
        texts.append(check_text(row[columns.text], place))
        values.append([] if columns.unlabelled else _plain(row[str(label_column)], columns))
        ids.append(row.get("id"))
        own_language = row.get("language")
        languages.add(columns.language or (own_language if isinstance(own_language, str) else "").strip() or "und")
    if not texts:
        raise ValueError(f"{source} has no rows")
    language = languages.pop() if len(languages) == 1 else "mixed"
    return tuple(texts), _labels(values, places, columns), _ids(ids, source), language


def file_rows(path: str | os.PathLike[str]) -> tuple[Iterator[Row], bool]:
    """(the rows of a .jsonl, .csv or .tsv file, plain or gzipped; whether its values are cells of text)."""
    path = Path(path)
    suffix = next((suffix for suffix in FILE_SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"cannot read {path}: the name must end in one of {', '.join(FILE_SUFFIXES)}")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if suffix.startswith(".jsonl"):
        return json_rows(_file_lines(path, suffix), str(path)), False
    return _cell_rows(_file_lines(path, suffix), str(path), "\t" if suffix.startswith(".tsv") else ","), True


def json_rows(lines: Iterable[str], name: str) -> Iterator[Row]:
    """The row in each line of JSON; blank lines hold none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: not a JSON object but {_short(row)}")
        yield place, row


def decoded_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a UTF-8 stream, a byte order mark at its start removed."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
            raise ValueError(f"{name}, line {number}: not UTF-8 ({wrong})") from None


def _file_lines(path: Path, suffix: str) -> Iterator[str]:
    with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
        try:
            yield from decoded_lines(stream, str(path))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from None


def _cell_rows(lines: Iterator[str], name: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{place}: {error}") from None
        if cells is None:
            return
        if header is None:
            header = cells
            if repeated := [cell for cell in header if header.count(cell) > 1]:
                raise ValueError(f"{place}: the header has the column {repeated[0]!r} more than once")
        elif cells:
            if len(cells) != len(header):
                raise ValueError(f"{place}: {len(cells)} cells, but the header has {len(header)}: {_listed(header)}")
            # A stray quotation mark that opens a cell of a .tsv file swallows rows until the next one.
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                raise ValueError(f"{place}: a quotation mark opens a cell that runs over several rows")
            yield place, dict(zip(header, cells, strict=True))


def _plain(value: Any, columns: Columns) -> Any:
    """A label value as None (missing), bool, int, str or a list of these; others are left for `_labels`."""
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return [_plain(item, Columns()) for item in value]
    if not isinstance(value, str):
        return value
    value = value.strip()
    if not columns.cells:
        return [part.strip() for part in value.split(columns.delimiter)] if columns.delimiter else value or None
    if value.startswith("[") and value.endswith("]"):
        try:
            return _plain(json.loads(value), columns)
        except (ValueError, RecursionError):  # lists as Python and numpy write them: ['a', 'b'] and ['a' 'b']
            quoted = [first or second for first, second in _QUOTED.findall(value)]
            if quoted:
                return quoted
            value = value[1:-1]
    parts = [
        part.strip() for part in (value.split(columns.delimiter) if columns.delimiter else re.split("[;|,]", value))
    ]
    items = [int(float(part)) if _NUMBER.fullmatch(part) else part for part in parts]
    items = [_FLAGS.get(item.lower(), item) if isinstance(item, str) else item for item in items]
    return items if len(items) > 1 else items[0] if items[0] != "" else None


def _labels(values: list[Any], places: list[str], columns: Columns) -> tuple[Labels, ...]:
    flags = columns.name is not None or (
        columns.label_names is None and any(isinstance(value, int) for value in values)  # bool is an int
    )
    # A column that somebody picks by a name of its own ("anger") says what its flags mean.
    name = columns.name or (columns.label if columns.label not in LABEL_COLUMNS else None)
    labels = []
    for value, place in zip(values, places, strict=True):
        if flags:
            if str(value).lower() not in _FLAGS:
                raise ValueError(
                    f"{place}: the label {_short(value)} is not 0 or 1 (numbered classes need label_names=)"
                )
            if name is None:
                raise ValueError(
                    f"{place}: the label {_short(value)} is a number: say what it means by name= (0 or 1) "
                    "or label_names="
                )
            labels.append((name,) if _FLAGS[str(value).lower()] else ())
        else:
            items = [] if value is None else value if isinstance(value, list) else [value]
            labels.append(tuple(dict.fromkeys(_label(item, place, columns.label_names) for item in items)))
    return tuple(labels)


def _label(item: Any, place: str, label_names: Sequence[str] | None) -> str:
    if isinstance(item, int) and not isinstance(item, bool):
        if label_names is None:
            raise ValueError(f"{place}: the label {item} is a number: give the names of the classes as label_names=")
        if not 0 <= item < len(label_names):
            valid = f"0 to {len(label_names) - 1} ({_listed(label_names)})"
            raise ValueError(f"{place}: the label {item} is not one of {valid}")
        return label_names[item]
    if not isinstance(item, str) or not item.strip():
        raise ValueError(f"{place}: the label {_short(item)} is not a name")
    return item.strip()


def _ids(values: list[Any], source: str) -> tuple[str, ...]:
    if all(isinstance(v, str | int) and str(v).strip() for v in values):
        ids = tuple(str(value) for value in values)
        if len(set(ids)) == len(ids):
            return ids
    if any(value is not None for value in values):
        _logger.warning("%s: the column 'id' is not a unique id for each text; texts are numbered instead", source)
    return tuple(f"text-{number:06d}" for number in range(len(values)))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no columns"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
