"""`MethodTable`: held-out AUROC of methods beside each other, with their paired differences."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.tables import html_table, text_table

if TYPE_CHECKING:
    import pandas as pd

MEAN = "mean"
"""What stands for the emotion in the rows of the mean over emotions."""


@dataclass(frozen=True)
class MethodScore:
    """How well one method tells one emotion from the rest on the held-out texts."""

    method: str
    emotion: str
    """`mean` in the row of the mean over emotions."""
    auroc: float
    """Held out."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    choice: str
    """What cross-validation inside the training texts chose, and the features or dimension that were fitted."""


@dataclass(frozen=True)
class MethodDifference:
    """By how much one method's held-out AUROC exceeds another's, in pairs."""

    first: str
    second: str
    emotion: str
    """`mean` in the row of the mean over emotions."""
    difference: float
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    margin: float
    not_worse: bool
    """Whether the interval lies above -margin."""


@dataclass(frozen=True, repr=False)
class MethodTable:
    """The methods' scores and differences, emotion by emotion and on average, and in `meta` how they were found."""

    meta: dict[str, Any]
    scores: tuple[MethodScore, ...]
    differences: tuple[MethodDifference, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in order."""
        return tuple(dict.fromkeys(row.method for row in self.scores))

    @property
    def emotions(self) -> tuple[str, ...]:
        """The emotions, in order, without the mean."""
        return tuple(dict.fromkeys(row.emotion for row in self.scores if row.emotion != MEAN))

    def of(self, method: str, emotion: str = MEAN) -> MethodScore:
        """Returns the score of a method for an emotion or on average. ValueError if there is none."""
        for row in self.scores:
            if (row.method, row.emotion) == (method, emotion):
                return row
        valid = f"{', '.join(self.methods)}; {', '.join((MEAN, *self.emotions))}"
        raise ValueError(f"no score of {method!r} for {emotion!r} (valid: {valid})")

    def difference(self, first: str, second: str, emotion: str = MEAN) -> MethodDifference:
        """Returns the difference of two methods for an emotion or on average. ValueError if there is none."""
        for row in self.differences:
            if (row.first, row.second, row.emotion) == (first, second, emotion):
                return row
        pairs = dict.fromkeys(f"{row.first} - {row.second}" for row in self.differences)
        raise ValueError(f"no difference {first} - {second} for {emotion!r} (valid: {', '.join(pairs)})")

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: `{"meta": {...}, "scores": [{...}, ...], "differences": [{...}, ...]}`."""
        rows = {"scores": self.scores, "differences": self.differences}
        return {"meta": self.meta, **{name: [asdict(row) for row in own] for name, own in rows.items()}}

    def to_pandas(self) -> "pd.DataFrame":
        """Returns one line for each score, columns named as the fields of `MethodScore`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.scores], columns=[f.name for f in fields(MethodScore)])

    def save(self, path: str | Path) -> Path:
        """Returns `path` after writing `to_dict()` there as JSON. FileNotFoundError when its folder does not exist."""
        return write_whole(path, json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=1) + "\n")

    def _tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Caption, head and lines of the scores and of the differences."""
        groups = f"{self.meta['level']:.0%} interval over {self.meta['n_groups']} groups of held-out texts"
        methods = [
            (
                *(method, f"{mean.auroc:.3f} [{mean.low:.3f}, {mean.high:.3f}]"),
                *(f"{self.of(method, emotion).auroc:.3f}" for emotion in self.emotions),
                mean.choice,
            )
            for method in self.methods
            for mean in [self.of(method)]
        ]
        differences = [
            (
                f"{row.first} - {row.second}",
                f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]",
                "yes" if row.not_worse else "not shown",
            )
            for row in self.differences
            if row.emotion == MEAN
        ]
        margin = self.meta["margin"]
        return [
            (f"held-out AUROC; mean with its {groups}", ("method", MEAN, *self.emotions, "chosen on train"), methods),
            (
                f"paired differences of the mean; not worse: interval above -{margin:g}",
                ("methods", "difference", "not worse"),
                differences,
            ),
        ]

    def __repr__(self) -> str:
        return "\n\n".join(f"{caption}\n{text_table(head, lines)}" for caption, head, lines in self._tables() if lines)

    def _repr_html_(self) -> str:
        return "".join(html_table(*table) for table in self._tables() if table[2])
