"""What is wrong with a folder for Neuronpedia's bulk import. The importer itself accepts most of it without a word."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sae_emotion_plugin.publishing.neuronpedia_tables import (
    BOT,
    BULK,
    CONFIG,
    LONGEST_LABEL,
    METADATA,
    row_problems,
)

MOST_FILES = 1000
"""Of a folder, the importer sees as many."""
SET_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SOURCE_ID = re.compile(r"(?P<layer>\d+|e)-(?P<set>[a-z0-9]+(?:-[a-z0-9]+)*)(?:__[A-Za-z0-9][A-Za-z0-9._-]*)?")
HF_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_ENOUGH = 50
_PAIRS = (
    ("neg_str", "neg_values"),
    ("pos_str", "pos_values"),
    ("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    ("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    ("topkCosSimIndices", "topkCosSimValues"),
    ("neuron_alignment_indices", "neuron_alignment_values"),
    ("neuron_alignment_indices", "neuron_alignment_l1"),
    ("correlated_neurons_indices", "correlated_neurons_pearson"),
    ("correlated_neurons_indices", "correlated_neurons_l1"),
    ("correlated_features_indices", "correlated_features_pearson"),
    ("correlated_features_indices", "correlated_features_l1"),
)
_SHOWN = {
    "release.jsonl": ("creatorNameShort", "descriptionShort"),
    "sourceset.jsonl": ("type", "releaseName"),
    "source.jsonl": ("hfRepoId", "hfFolderId"),
}
"""What the page prints as "null", or a link that it leaves out, where it is empty."""


@dataclass(frozen=True)
class SourceCounts:
    """The rows of one source."""

    model_id: str
    source_id: str
    features: int
    activations: int
    explanations: int


@dataclass(frozen=True)
class ExportCheck:
    """What stands in an export, and what is wrong with it, at most fifty lines."""

    problems: tuple[str, ...]
    sources: tuple[SourceCounts, ...]


def check_export(folder: str | Path) -> ExportCheck:
    """What is wrong with the export in `folder` (it holds `v1`), each line beginning with the file; none if sound."""
    v1 = Path(folder) / "v1"
    found = _Findings()
    for table in CONFIG:
        for where, row in _rows(v1 / "config" / f"{table}.jsonl", found, v1):
            found.add(where, *row_problems(table, row))
            found.names.setdefault(table, set()).add(row.get("name"))
    paths = sorted(path for path in v1.glob("*/*") if path.is_dir() and path.parent.name != "config")
    if not paths:
        found.add(str(v1), "no folder of a model with a source")
    counts = [_Source(path, found, v1).check() for path in paths]
    return ExportCheck(tuple(found.problems), tuple(counts))


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    names: dict[str, set[Any]] = field(default_factory=dict)
    """Of the rows in `config`."""
    ids: dict[str, set[Any]] = field(default_factory=dict)
    """Of activations and explanations, over all sources: a clash drops the row silently."""

    def add(self, where: str, *problems: str) -> None:
        room = max(_ENOUGH - len(self.problems), 0)
        self.problems += [f"{where}: {problem}" for problem in problems[:room]]


class _Source:
    """The check of one source's folder, file after file; what later files refer to is kept, and no row."""

    def __init__(self, path: Path, found: _Findings, v1: Path) -> None:
        self.path, self.found, self.v1 = path, found, v1
        self.set_name = ""
        self.largest: dict[str, float] = {}
        """Feature to the maximum activation that its row states."""
        self.seen: dict[str, float] = {}
        """Feature to the largest maximum among its activations."""

    def check(self) -> SourceCounts:
        self._metadata()
        tables = {"features": self._feature, "activations": self._activation, "explanations": self._explanation}
        counts = {table: self._table(table, tables[table]) for table in BULK}
        for index, stated in self.largest.items():
            if stated != self.seen.get(index, 0):
                self._add(
                    f"feature {index}", f"maxActApprox is {stated}, its activations reach {self.seen.get(index, 0)}"
                )
        return SourceCounts(self.path.parent.name, self.path.name, **counts)

    def _add(self, where: str, *problems: str) -> None:
        self.found.add(f"{self.path.relative_to(self.v1)}: {where}", *problems)

    def _metadata(self) -> None:
        rows: dict[str, Mapping[str, Any]] = {}
        for name in METADATA:
            found = list(_rows(self.path / name, self.found, self.v1))
            if len(found) != 1:
                self._add(name, f"{len(found)} rows; valid: one")
            rows[name] = row = found[0][1] if found else {}
            self._add(name, *row_problems(name, row))
            if row.get("visibility") not in ("PUBLIC", "UNLISTED"):
                self._add(name, f"visibility is {row.get('visibility')!r}; valid: PUBLIC, UNLISTED")
            if row.get("creatorId") != BOT:
                self._add(name, f"creatorId is {row.get('creatorId')!r}; valid: {BOT}, the user that every server has")
            self._add(name, *(f"{key} is empty; the page shows it" for key in _SHOWN.get(name, ()) if not row.get(key)))
        release, model, source_set, source = (rows[name] for name in METADATA)
        model_id, source_id = self.path.parent.name, self.path.name
        self.set_name = str(source_set.get("name"))
        for where, found_id, valid in (
            ("model.jsonl: id", model.get("id"), model_id),
            ("sourceset.jsonl: modelId", source_set.get("modelId"), model_id),
            ("source.jsonl: modelId", source.get("modelId"), model_id),
            ("source.jsonl: id", source.get("id"), source_id),
            ("source.jsonl: setName", source.get("setName"), self.set_name),
            ("sourceset.jsonl: releaseName", source_set.get("releaseName"), release.get("name")),
        ):
            if found_id != valid:
                self._add(where, f"is {found_id!r}; valid: {valid!r}")
        match = SOURCE_ID.fullmatch(source_id)
        if match is None or match["set"] != self.set_name or self.set_name == "neurons":
            self._add("source.jsonl: id", f"is {source_id!r}; valid: LAYER-{self.set_name}, with or without __SUFFIX")
        if source.get("hfFolderId") and not HF_FOLDER.fullmatch(str(source["hfFolderId"])):
            self._add("source.jsonl", f"hfFolderId is {source['hfFolderId']!r}; valid: folders of letters, digits, ._-")

    def _table(self, table: str, check: Any) -> int:
        files = sorted((self.path / table).glob("*.jsonl.gz"))
        if len(files) > MOST_FILES:
            self._add(table, f"{len(files)} files; the importer sees {MOST_FILES}")
        count, keys = 0, None
        for file in files:
            before = count
            for where, row in _rows(file, self.found, self.v1):
                count += 1
                # The importer takes its columns from a first line.
                keys = row.keys() if keys is None else keys
                problems = list(row_problems(table, row))
                if row.keys() != keys:
                    problems.append(f"its keys differ from the first line's: {', '.join(sorted(row.keys() ^ keys))}")
                for key, valid in (("modelId", self.path.parent.name), ("layer", self.path.name)):
                    if row.get(key) != valid:
                        problems.append(f"{key} is {row.get(key)!r}; valid: {valid!r}")
                # A row of the wrong kinds is not read further.
                self.found.add(where, *(problems or check(row)))
            if count == before and table != "explanations":
                self._add(f"{table}/{file.name}", "is empty; the importer stops there")
        return count

    def _feature(self, row: Mapping[str, Any]) -> Iterator[str]:
        index = row["index"]
        if not re.fullmatch(r"0|[1-9]\d*", index):
            yield f"index is {index!r}; valid: a number as text"
        if index in self.largest:
            yield f"feature {index} stands twice"
        self.largest[index] = row.get("maxActApprox") or 0
        if row.get("sourceSetName") != self.set_name:
            yield f"sourceSetName is {row.get('sourceSetName')!r}; valid: {self.set_name!r}"
        if row.get("creatorId") != BOT:
            yield f"creatorId is {row.get('creatorId')!r}; valid: {BOT}"
        for one, other in _PAIRS:
            if len(row.get(one) or ()) != len(row.get(other) or ()):
                yield f"{one} and {other} differ in length"
        for name in ("freq_hist_data_bar", "logits_hist_data_bar"):
            if not _even(row.get(f"{name}_values") or []):
                yield f"{name}_values are not ascending at equal distances"
            if min(row.get(f"{name}_heights") or [0]) < 0:
                yield f"{name}_heights has a negative count"
        if not (0 <= row.get("frac_nonzero", 0) <= 1 or row["frac_nonzero"] == -1):
            yield f"frac_nonzero is {row['frac_nonzero']}; valid: 0 to 1, or -1 for unknown"
        elif row.get("frac_nonzero", 0) >= 0 and (row.get("frac_nonzero", 0) > 0) != (self.largest[index] > 0):
            yield f"frac_nonzero is {row.get('frac_nonzero', 0)}, maxActApprox {self.largest[index]}: one is 0"
        if self.largest[index] < 0:
            yield f"maxActApprox is {self.largest[index]}; valid: 0 for a dead feature, more for any other"
        if bool(row.get("hasVector")) != bool(row.get("vector")) or bool(row.get("vector")) != bool(
            row.get("hookName")
        ):
            yield "hasVector, vector and hookName: all three or none"

    def _activation(self, row: Mapping[str, Any]) -> Iterator[str]:
        yield from self._refers(row, "activations", "creatorId")
        tokens, values = row.get("tokens") or [], row.get("values") or []
        if len(tokens) != len(values) or not values:
            yield f"{len(tokens)} tokens and {len(values)} values; valid: as many, at least one"
            return
        largest, at, bins = row["maxValue"], row["maxValueTokenIndex"], [row.get("binMin"), row.get("binMax")]
        self.seen[row["index"]] = max(self.seen.get(row["index"], 0), largest)
        if largest != max(values) or not 0 <= at < len(values) or values[at] != largest:
            yield f"maxValue {largest} at {at} does not agree with the values, whose maximum is {max(values)}"
        if row["minValue"] != min(values):
            yield f"minValue is {row['minValue']}; the values' minimum is {min(values)}"
        if min(values) < 0:
            yield f"a value is {min(values)}; valid: from 0"
        if (bins[0] is None) != (bins[1] is None) or (bins[0] is None) != (row.get("binContains") is None):
            yield "binMin, binMax and binContains: all three or none"
        elif bins[0] is not None and not bins[0] <= largest <= bins[1]:
            yield f"maxValue {largest} is outside its interval, {bins[0]} to {bins[1]}"
        if row.get("binContains") is not None and not (0 <= row["binContains"] <= 1 or row["binContains"] == -1):
            yield f"binContains is {row['binContains']}; valid: 0 to 1, or -1 for the top group"
        sampled = row.get("qualifyingTokenIndex")
        if sampled is not None and not 0 <= sampled < len(tokens):
            yield f"qualifyingTokenIndex is {sampled}; valid: 0 to {len(tokens) - 1}"
        if row.get("dfaTargetIndex") is not None:
            yield "dfaTargetIndex is not null, which adds a header for attention"

    def _explanation(self, row: Mapping[str, Any]) -> Iterator[str]:
        yield from self._refers(row, "explanations", "authorId")
        if not 1 <= (length := len(row["description"].strip())) <= LONGEST_LABEL:
            yield f"description has {length} characters that are not blank; valid: 1 to {LONGEST_LABEL}"
        for key, table in (("typeName", "explanation_type"), ("explanationModelName", "explanation_model_type")):
            if row.get(key) is not None and row[key] not in self.found.names.get(table, ()):
                yield f"{key} is {row[key]!r}; valid: null, or a name in config/{table}.jsonl"

    def _refers(self, row: Mapping[str, Any], table: str, author: str) -> Iterator[str]:
        ids = self.found.ids.setdefault(table, set())
        if row["id"] in ids:
            yield f"the id {row['id']!r} stands twice; the importer drops the second"
        ids.add(row["id"])
        if row["index"] not in self.largest:
            yield f"there is no feature {row['index']!r}"
        if row[author] != BOT:
            yield f"{author} is {row[author]!r}; valid: {BOT}"


def _even(centres: list[float | int]) -> bool:
    """Whether the numbers ascend in equal steps, up to rounding."""
    steps = [after - before for before, after in pairwise(centres)]
    width = (centres[-1] - centres[0]) / len(steps) if steps else 1.0
    return width > 0 and all(math.isclose(step, width, rel_tol=1e-2) for step in steps)


def _rows(path: Path, found: _Findings, v1: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row stands, and the row. What is no row is reported."""
    name = str(path.relative_to(v1))
    if not path.is_file():
        found.add(name, "is missing")
        return
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                where = f"{name}, line {number}"
                if b"\\u0000" in raw:
                    found.add(where, "holds \\u0000, which the importer replaces by a space")
                row = json.loads(raw.decode(), parse_constant=_refused)
                if isinstance(row, dict):
                    yield where, row
                else:
                    found.add(where, f"{raw[:60]!r} is no JSON object")
    except (OSError, EOFError, zlib.error) as error:
        found.add(name, f"cannot be read to its end: {error}")
    except (ValueError, RecursionError) as error:
        found.add(f"{name}, line {number}", f"is not valid JSON: {error}")


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
