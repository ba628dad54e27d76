"""The folder for Neuronpedia's bulk import: written aside, checked as a whole, and then there, or not at all."""

import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.dashboards.types import Dashboards
from sae_emotion_plugin.feature_labels import FeatureLabel, merge_labels
from sae_emotion_plugin.files import check_folder
from sae_emotion_plugin.publishing.neuronpedia_checks import MOST_FILES, SourceCounts, check_export
from sae_emotion_plugin.publishing.neuronpedia_rows import (
    activation_rows,
    config_rows,
    explanation_row,
    feature_row,
    metadata_rows,
    vector_row,
)
from sae_emotion_plugin.publishing.neuronpedia_source import NeuronpediaSource
from sae_emotion_plugin.publishing.neuronpedia_tables import CONFIG, write_rows

FEATURES_PER_FILE = 256
"""The importer reads a file as one text: of the activations of so many features, some 20 MB."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NeuronpediaExport:
    """A finished export."""

    folder: Path
    sources: tuple[SourceCounts, ...]
    """The dictionary's, then those of vectors."""
    n_bytes: int
    """Of all files, compressed as they are."""

    @property
    def bytes_per_feature(self) -> float:
        return self.n_bytes / max(sum(source.features for source in self.sources), 1)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "folder": str(self.folder),
            "sources": [vars(source) for source in self.sources],
            "n_bytes": self.n_bytes,
            "bytes_per_feature": round(self.bytes_per_feature, 1),
        }


def export_neuronpedia(
    dashboards: Dashboards,
    labels: Sequence[FeatureLabel],
    source: NeuronpediaSource,
    folder: str | Path,
    *,
    saelens_config: Mapping[str, Any] | None = None,
    vectors: Sequence[Mapping[str, Any]] = (),
    self_hosted: bool = False,
    overwrite: bool = False,
) -> NeuronpediaExport:
    """What was written: `folder/v1/<model>/<source>`, each check of `check_export` passed. The same for the same input.

    Vectors (`interventions.neuronpedia.neuronpedia_vectors`) make sources of their own, in the set `<set>-vectors`:
    one call of Neuronpedia's steers with features or with vectors, not with both.

    Args:
        labels: one or several for a feature; each becomes an explanation.
        saelens_config: what the page shows of the dictionary's configuration.
        self_hosted: name the labels' methods, and write their rows to `v1/config`. neuronpedia.org has no such rows.
        overwrite: put it in the place of an earlier export.

    Raises:
        FileNotFoundError: no folder to write `folder` in.
        ValueError: numbers that are not finite, labels of features that the dictionary lacks, a folder in the way.
    """
    folder = check_folder(folder)
    labels = merge_labels(list(labels))
    if wrong := [label.feature for label in labels if label.feature >= dashboards.d_sae]:
        raise ValueError(f"there is a label for feature {wrong[0]} (valid: 0 to {dashboards.d_sae - 1})")
    with _appearing(folder, overwrite) as partial:
        v1 = partial / "v1"
        config = config_rows(source, labels) if self_hosted else {}
        for table in CONFIG:
            write_rows(v1 / "config" / f"{table}.jsonl", config.get(table, []))
        path = v1 / source.model.id / source.id
        lengths = np.diff(dashboards.sequence_starts)
        _write_metadata(path, source, saelens_config, len(lengths), int(lengths.max(initial=1)))
        _write_features(path, source, dashboards)
        rows = [explanation_row(source, label, self_hosted=self_hosted) for label in labels]
        write_rows(path / "explanations" / "batch-0.jsonl.gz", rows)
        for own, part in _vector_sources(source, vectors):
            _write_metadata(v1 / own.model.id / own.id, own, None, 0, 0)
            rows = [vector_row(own, index, vector) for index, vector in enumerate(part)]
            write_rows(v1 / own.model.id / own.id / "features" / "batch-0.jsonl.gz", rows)
        checked = check_export(partial)
        if checked.problems:
            raise ValueError(f"the export would not be sound: {checked.problems[0]} ({len(checked.problems)} problems)")
        n_bytes = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    own_first = sorted(checked.sources, key=lambda counts: counts.source_id != source.id)
    return NeuronpediaExport(folder, tuple(own_first), n_bytes)


def _write_metadata(
    path: Path, source: NeuronpediaSource, config: Mapping[str, Any] | None, n_prompts: int, prompt_tokens: int
) -> None:
    for name, row in metadata_rows(source, config, n_prompts, prompt_tokens).items():
        write_rows(path / name, [row])


def _write_features(path: Path, source: NeuronpediaSource, dashboards: Dashboards) -> None:
    each = max(FEATURES_PER_FILE, math.ceil(dashboards.d_sae / MOST_FILES))
    for number, start in enumerate(range(0, dashboards.d_sae, each)):
        part = [dashboards.feature(index) for index in range(start, min(start + each, dashboards.d_sae))]
        write_rows(path / "features" / f"batch-{number}.jsonl.gz", [feature_row(source, one) for one in part])
        if rows := [row for one in part for row in activation_rows(source, one)]:  # the importer refuses an empty file
            write_rows(path / "activations" / f"batch-{number}.jsonl.gz", rows)
        _log.info("%d of %d features", min(start + each, dashboards.d_sae), dashboards.d_sae)


def _vector_sources(
    source: NeuronpediaSource, vectors: Iterable[Mapping[str, Any]]
) -> list[tuple[NeuronpediaSource, list[Mapping[str, Any]]]]:
    """The vectors by layer, each layer a source."""
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for vector in vectors:
        if len(vector["vector"]) != source.model.dimension:
            raise ValueError(
                f"a vector has {len(vector['vector'])} numbers; {source.model.id} has {source.model.dimension}"
            )
        by_layer.setdefault(vector["layer_num"], []).append(vector)
    own = replace(source, set_name=f"{source.set_name}-vectors", kind="Steering vectors")
    return [(replace(own, layer=layer), part) for layer, part in sorted(by_layer.items())]


@contextmanager
def _appearing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `folder` to write in; it takes the place of `folder` when all went well, and goes if not."""
    if folder.exists():
        entries = [path.name for path in folder.iterdir()] if folder.is_dir() else ["a file"]
        if not overwrite or entries != ["v1"]:
            hint = "give overwrite to replace it" if entries == ["v1"] else "it holds something else; choose another"
            raise ValueError(f"{folder} exists: {hint}")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    earlier = folder.with_name(f".{folder.name}.{os.getpid()}.earlier")
    try:
        partial.mkdir()
        yield partial
        if folder.exists():
            os.rename(folder, earlier)
        try:
            os.rename(partial, folder)
        except BaseException:
            if earlier.exists():
                os.rename(earlier, folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
