"""Feature scores as they are kept, shown and read: `FeatureScores`."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_emotion_plugin.files import replacing, write_whole
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.result_table import ResultTable

if TYPE_CHECKING:
    pass

ROWS_SHOWN_PER_EMOTION = 3


@dataclass(frozen=True)
class FeatureScore:
    """How well one feature tells the texts of one emotion from all others."""

    emotion: str
    feature: int
    auroc: float
    """On the training texts, which chose the feature: optimistic."""
    held_out_auroc: float | None
    """On texts that had no part in the choice; None when there were none."""
    p: float
    """Two-sided p on the training texts, of the Mann-Whitney test within strata of length; 1 for a feature too rare."""
    q: float
    """Benjamini-Hochberg over every tested (feature, emotion) pair."""
    rate_in: float
    """Share of the emotion's training texts in which the feature is active."""
    rate_out: float
    """Share of the other training texts in which the feature is active."""
    promotes: tuple[str, ...] = ()
    """Tokens whose logits the decoder direction raises most, strongest first."""
    suppresses: tuple[str, ...] = ()
    """Tokens whose logits the decoder direction lowers most, strongest first."""
    q_above: float | None = None
    """Benjamini-Hochberg q of the one-sided test that the training AUROC exceeds 0.60, over every tested pair."""
    average_precision: float | None = None
    """On the training texts; chance is the emotion's share of them."""
    held_out_average_precision: float | None = None
    mean_in: float | None = None
    """Mean pooled activation of the emotion's training texts, silent ones counted as 0."""
    mean_out: float | None = None
    """The same of the other training texts."""
    threshold: float | None = None
    """The pooled activation from which on a text is best called the emotion's: largest F1 on the training texts."""
    f1: float | None = None
    held_out_f1: float | None = None
    """F1 of the same threshold on the held-out texts."""


@dataclass(frozen=True, repr=False)
class FeatureScores(ResultTable):
    """The best features of each emotion, best first, and in `meta` how they were found."""

    row_type = FeatureScore
    head = ("emotion", "feature", "AUROC", "held out", "q", "q > 0.6", "fires in", "fires out", "promotes")

    meta: dict[str, Any]
    rows: tuple[FeatureScore, ...]

    @property
    def emotions(self) -> tuple[str, ...]:
        """The emotions that have rows, in the order of the rows."""
        return tuple(dict.fromkeys(row.emotion for row in self.rows))

    def top(self, emotion: str, n: int = 10) -> tuple[FeatureScore, ...]:
        """Returns the `n` best rows of `emotion` (fewer if fewer were kept), best training AUROC first."""
        if emotion not in self.emotions:
            raise ValueError(f"unknown emotion {emotion!r}; the scores have: {', '.join(self.emotions)}")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return tuple(row for row in self.rows if row.emotion == emotion)[:n]

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        """Returns a line on the whole, and the cells of the best rows of each emotion."""
        shown = [row for emotion in self.emotions for row in self.top(emotion, ROWS_SHOWN_PER_EMOTION)]
        summary = (
            f"FeatureScores: {len(self.rows)} rows for {len(self.emotions)} emotions, {len(shown)} shown; "
            f"hook {self.meta.get('hook_name')}, pooling {self.meta.get('pooling')}"
        )
        return summary, [_table_cells(row) for row in shown]

    def save(self, path: str | Path) -> Path:
        """Returns `path` after writing the scores there, whole or not at all: as Parquet if it ends so, else as JSON.

        JSON is `{"meta": {...}, "rows": [{...}, ...]}`; Parquet has a column a field, and `meta` as JSON in its schema.
        FileNotFoundError when the folder does not exist.
        """
        meta = json.dumps(self.meta, ensure_ascii=False, allow_nan=False, indent=1)
        if Path(path).suffix == PARQUET:
            return self._save_parquet(Path(path), meta)
        rows = (json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) for row in self.rows)
        text = f'{{"meta": {meta},\n"rows": [\n' + ",\n".join(rows) + "\n]}\n"
        return write_whole(path, text)

    def _save_parquet(self, path: Path, meta: str) -> Path:
        import pyarrow
        import pyarrow.parquet

        kinds = {int: pyarrow.int64(), str: pyarrow.string(), tuple[str, ...]: pyarrow.list_(pyarrow.string())}
        columns = [(field.name, kinds.get(field.type, pyarrow.float64())) for field in fields(FeatureScore)]
        schema = pyarrow.schema(columns, metadata={_META: meta})
        table = pyarrow.Table.from_pylist([asdict(row) for row in self.rows], schema=schema)
        with replacing(path) as partial:
            pyarrow.parquet.write_table(table, partial)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "FeatureScores":
        """Returns the scores that `save` wrote; fields that this version does not know are left out.

        FileNotFoundError for a missing file, ValueError for one that is not a scores file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no scores file {path}")
        try:
            content = _parquet_content(path) if path.suffix == PARQUET else json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            kind = "Parquet" if path.suffix == PARQUET else "JSON"
            raise ValueError(f"{path} is not {kind}: {first_line(error)}") from None
        meta, rows = (content.get(key) if isinstance(content, dict) else None for key in ("meta", "rows"))
        if not isinstance(meta, dict) or not isinstance(rows, list):
            raise ValueError(f"{path} is not a scores file: it needs an object 'meta' and a list 'rows'")
        return cls(meta, tuple(_row_from_json(row, f"{path}, row {i}") for i, row in enumerate(rows)))


PARQUET = ".parquet"
_META = b"sae_emotion_plugin"
LATER_FIELDS = (
    *("q_above", "average_precision", "held_out_average_precision"),
    *("mean_in", "mean_out", "threshold", "f1", "held_out_f1"),
)
"""What files of an earlier version lack."""


def _table_cells(row: FeatureScore) -> tuple[str, ...]:
    held_out = "-" if row.held_out_auroc is None else f"{row.held_out_auroc:.3f}"
    tokens = " ".join(repr(token) for token in row.promotes[:5])
    rates = (f"{row.rate_in:.1%}", f"{row.rate_out:.1%}")
    above = "-" if row.q_above is None else f"{row.q_above:.2g}"
    return (row.emotion, str(row.feature), f"{row.auroc:.3f}", held_out, f"{row.q:.2g}", above, *rates, tokens)


def _parquet_content(path: Path) -> dict[str, Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {"meta": json.loads((table.schema.metadata or {}).get(_META, b"null")), "rows": table.to_pylist()}


def _row_from_json(row: object, where: str) -> FeatureScore:
    names = [field.name for field in fields(FeatureScore)]
    needed = [name for name in names if name not in LATER_FIELDS]
    if not isinstance(row, dict) or not row.keys() >= set(needed):
        raise ValueError(f"{where}: must be an object with {', '.join(needed)}, got {row!r:.200}")
    read: dict[str, Any] = {name: row.get(name) for name in names}
    for name in ("promotes", "suppresses"):
        if isinstance(read[name], list) and all(isinstance(token, str) for token in read[name]):
            read[name] = tuple(read[name])
    for name, value in read.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "emotion":
            good = isinstance(value, str)
        elif name == "feature":
            good = is_number and isinstance(value, int) and value >= 0
        elif name in ("promotes", "suppresses"):
            good = isinstance(value, tuple)
        elif name in ("mean_in", "mean_out", "threshold"):
            good = is_number or value is None
        else:
            good = (is_number and 0 <= value <= 1) or (value is None and name in ("held_out_auroc", *LATER_FIELDS))
        if not good:
            raise ValueError(f"{where}: {name} is {value!r}")
    return FeatureScore(**read)
