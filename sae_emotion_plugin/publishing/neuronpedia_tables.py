"""The tables of Neuronpedia's bulk import: their columns, which text, numbers and ids they take, and their files."""

import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

BOT = "clkht01d40000jv08hvalcvly"
"""The user that every instance has, and whose activations every instance shows."""
LONGEST_LABEL = 512
"""Characters of an explanation that Neuronpedia's upload takes."""
EMBEDDING = 256
"""Numbers in an embedding of an explanation."""
DIGITS = 4
"""Significant digits of activations: a page shows fewer, and they are most of an export's size."""
METADATA = ("release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl")
BULK = ("features", "activations", "explanations")
CONFIG = (
    "explanation_type",
    "explanation_model_type",
    "explanation_score_type",
    "explanation_score_model",
    "eval_type",
)


def _columns(text: str) -> dict[str, str]:
    return dict(pair.split(":", 1) for pair in text.split())


_NAMED = "name:text! displayName:text! description:text! featured:bool createdAt:date updatedAt:date url:text?"
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "release.jsonl": _columns(
        """name:text! visibility:visibility isNewUi:bool featured:bool description:text! descriptionShort:text?
        urls:text[] creatorEmail:text? creatorName:text! creatorNameShort:text? creatorId:text!
        defaultSourceSetName:text? defaultSourceId:text? defaultUmapSourceIds:text[] createdAt:date"""
    ),
    "model.jsonl": _columns(
        """id:text! displayNameShort:text displayName:text creatorId:text! tlensId:text? openRouterId:text?
        dimension:int? thinking:bool visibility:visibility defaultSourceSetName:null? defaultSourceId:null?
        defaultGraphSourceSetName:null? inferenceEnabled:bool instruct:bool layers:int! neuronsPerLayer:int!
        createdAt:date owner:text! updatedAt:date website:text?"""
    ),
    "sourceset.jsonl": _columns(
        """modelId:text! name:text! hasDashboards:bool allowInferenceSearch:bool visibility:visibility
        description:text! type:text creatorName:text! urls:text[] creatorEmail:text? creatorId:text!
        releaseName:text? hasGraphs:bool graphEnabled:bool similarityMatrixEnabled:bool defaultOfModelId:text?
        defaultGraphModelId:text? defaultRange:int defaultShowBreaks:bool showDfa:bool showCorrelated:bool
        showHeadAttribution:bool showUmap:bool createdAt:date"""
    ),
    "source.jsonl": _columns(
        """id:text! modelId:text! hasDashboards:bool inferenceEnabled:bool saelensConfig:json? saelensRelease:text?
        saelensSaeId:text? hfRepoId:text? hfFolderId:text? visibility:visibility defaultOfModelId:text?
        setName:text! creatorId:text! hasUmap:bool hasUmapLogSparsity:bool hasUmapClusters:bool num_prompts:int?
        num_tokens_in_prompt:int? dataset:text? notes:text? cosSimMatchModelId:text? cosSimMatchSourceId:text?
        createdAt:date"""
    ),
    "features": _columns(
        """modelId:text! layer:text! index:text! sourceSetName:text? creatorId:text? createdAt:date
        maxActApprox:number? hasVector:bool vector:number[]? vectorLabel:text? vectorDefaultSteerStrength:number?
        hookName:text? topkCosSimIndices:int[]? topkCosSimValues:number[]? neuron_alignment_indices:int[]?
        neuron_alignment_values:number[]? neuron_alignment_l1:number[]? correlated_neurons_indices:int[]?
        correlated_neurons_pearson:number[]? correlated_neurons_l1:number[]? correlated_features_indices:int[]?
        correlated_features_pearson:number[]? correlated_features_l1:number[]? neg_str:text[]? neg_values:number[]?
        pos_str:text[]? pos_values:number[]? frac_nonzero:number freq_hist_data_bar_heights:number[]?
        freq_hist_data_bar_values:number[]? logits_hist_data_bar_heights:number[]?
        logits_hist_data_bar_values:number[]? decoder_weights_dist:number[]? umap_cluster:int?
        umap_log_feature_sparsity:number? umap_x:number? umap_y:number?"""
    ),
    "activations": _columns(
        """id:text! tokens:text[]? dataIndex:text? index:text! layer:text! modelId:text! dataSource:text?
        maxValue:number! maxValueTokenIndex:int! minValue:number! values:number[]? dfaValues:number[]?
        dfaTargetIndex:int? dfaMaxValue:number? zQIndices:int[]? zKIndices:int[]? zValues:number[]? creatorId:text!
        createdAt:date lossValues:number[]? logitContributions:text? binMin:number? binMax:number?
        binContains:number? qualifyingTokenIndex:int?"""
    ),
    "explanations": _columns(
        """id:text! modelId:text! layer:text! index:text! embedding:embedding? description:text! authorId:text!
        triggeredByUserId:text? notes:text? scoreV1:number scoreV2:number? umap_x:number? umap_y:number?
        umap_cluster:int? umap_log_feature_sparsity:number? typeName:text? explanationModelName:text?
        createdAt:date updatedAt:date"""
    ),
    "explanation_type": _columns(
        f"{_NAMED} isAttention:bool explainerModelSettingsId:text? settings:text? creatorName:text! creatorId:text!"
    ),
    "explanation_model_type": _columns(f"{_NAMED} openRouterModelId:text? creatorName:text!"),
    "explanation_score_type": _columns(
        f"""{_NAMED} isAttention:bool scoreDescription:text? scorerModel:text? settings:text? creatorName:text!
        creatorId:text!"""
    ),
    "explanation_score_model": _columns(f"{_NAMED} openRouterModelId:text? creatorName:text!"),
    "eval_type": _columns(f"{_NAMED} longerDescription:text outputSchema:json!"),
}
"""Table to column to kind. `?`: null is taken; `!`: required. A model's defaults are null: their rows come later."""


def row_problems(table: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """What Neuronpedia would refuse, drop or misread in one row, a line each."""
    columns = COLUMNS[table]
    problems = [f"unknown key {key!r}" for key in row if key not in columns]
    problems += [f"{key} is missing" for key, kind in columns.items() if kind.endswith("!") and key not in row]
    for key, value in row.items():
        kind = columns.get(key, "json?")
        if not (value is None and kind.endswith("?")) and not _FITS[kind.rstrip("?!")](value):
            problems.append(f"{key} is {value!r:.60}; valid: {kind.rstrip('?!')}")
    return tuple(problems)


def mended(text: str) -> str:
    """The text with U+FFFD for what the database or its importer cannot take: NUL and lone surrogates.

    The importer also turns the six characters `\\u0000` into a space and so breaks the line that holds them.
    """
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # pairs of halves become one
    return whole.replace("\0", "\ufffd").replace("\\u0000", "\ufffd")


def finite(name: str, value: float | int) -> float:
    """The number; ValueError where it is NaN or infinite."""
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; Neuronpedia takes finite numbers")
    return float(value)


def rounded(name: str, values: Float[np.ndarray, "value"], digits: int = DIGITS) -> list[float | int]:
    """The numbers to `digits` significant digits, in the same order; an exact 0 is the shorter integer.

    Raises ValueError where one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        finite(name, float(values[~np.isfinite(values)][0]))
    return [float(f"{value:.{digits}g}") if value else 0 for value in values.tolist()]


def row_id(*content: Any) -> str:
    """An id made like the database's own (`c` and 24 of [0-9a-z]) from a hash of the content: the same in every run."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    number = int.from_bytes(hashlib.sha256(line(content).encode()).digest(), "big")
    text = ""
    for _ in range(24):
        number, digit = divmod(number, 36)
        text += digits[digit]
    return "c" + text


def line(value: Any) -> str:
    """The value as JSON in one line, the same for the same value. ValueError for a number that is not finite."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """The path, after the rows were written there, a line each; compressed where it ends in `.gz`, without a date."""
    content = "".join(f"{line(row)}\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, compresslevel=6, mtime=0) if path.suffix == ".gz" else content)
    return path


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of all batches in a folder in their order."""
    batches = sorted(path.glob("*.jsonl.gz"), key=lambda batch: (len(batch.name), batch.name))
    for file in batches if path.is_dir() else [path] if path.exists() else []:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for text in stream:
                yield json.loads(text)


def _is_list(value: Any, *types: type) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= set(types)


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


_NOT_STORED = re.compile("[\0\ud800-\udfff]")
_FITS: Mapping[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str) and not _NOT_STORED.search(value),
    "int": lambda value: type(value) is int and abs(value) < 2**31,
    "number": lambda value: type(value) in (int, float) and math.isfinite(value),
    # Of a whole list at once: an export has millions of tokens.
    "text[]": lambda value: _is_list(value, str) and not _NOT_STORED.search("".join(value)),
    "int[]": lambda value: _is_list(value, int) and all(abs(one) < 2**31 for one in value),
    "number[]": lambda value: _is_list(value, int, float) and all(map(math.isfinite, value)),
    "embedding": lambda value: (
        _is_list(value, int, float) and len(value) == EMBEDDING and all(map(math.isfinite, value))
    ),
    "date": lambda value: isinstance(value, str) and _is_date(value),
    "visibility": lambda value: value in ("PUBLIC", "UNLISTED", "PRIVATE"),
    "bool": lambda value: isinstance(value, bool),
    "json": lambda value: True,
    "null": lambda value: False,
}
"""Kind of a column to whether a value, not null, is of it."""
