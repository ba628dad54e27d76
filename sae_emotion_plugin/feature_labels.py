"""What features stand for: `FeatureLabel`s, by one author or several, and their file of JSON Lines beside a dictionary.

The labels of the dictionary in folder `path` of a release lie at `labels_file(path)` in it, here and on the Hub.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sae_emotion_plugin.files import write_whole

METHOD = "sae-emotion discover"
VERSION = "1"
MAX_Q = 0.05
MIN_AUROC = 0.6


@dataclass(frozen=True)
class FeatureLabel:
    """What one author says that a feature stands for, and the evidence for it."""

    feature: int
    emotions: tuple[str, ...]
    """The strongest first; empty for a label that is about something else."""
    text: str
    """The label itself, for people."""
    statistics: Mapping[str, float | int | str | None] = field(default_factory=dict)
    """Such as `auroc`, `held_out_auroc`, `q`, `output_score`, `corpus`; numbers are finite."""
    method: str = ""
    """What found it."""
    version: str = ""
    """Version of the method."""
    author: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.feature, bool) or not isinstance(self.feature, int) or self.feature < 0:
            raise ValueError(f"feature is {self.feature!r}; valid: a whole number from 0")
        if not self.text.strip():
            raise ValueError(f"text of feature {self.feature} is empty; valid: the label")
        for emotion in self.emotions:
            if not emotion.strip():
                raise ValueError(f"an emotion of feature {self.feature} is {emotion!r}; valid: its name")
        _check_statistics(self.statistics)
        statistics = [part for pair in self.statistics.items() for part in pair if isinstance(part, str)]
        for value in (self.text, self.method, self.version, self.author, *self.emotions, *statistics):
            if not storable(value):
                raise ValueError(
                    f"feature {self.feature} has {value!r:.80}; valid: text without NUL and lone surrogates"
                )

    def to_dict(self) -> dict[str, Any]:
        """What a line of the file holds: the fields, statistics in the order of their names."""
        row = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**row, "emotions": list(self.emotions), "statistics": dict(sorted(self.statistics.items()))}


@runtime_checkable
class EmotionScore(Protocol):
    """What a row of `FeatureScores` says, as far as labels need it: dictionaries are read without discovery."""

    @property
    def emotion(self) -> str: ...
    @property
    def feature(self) -> int: ...
    @property
    def auroc(self) -> float: ...
    @property
    def held_out_auroc(self) -> float | None: ...
    @property
    def q(self) -> float: ...
    @property
    def rate_in(self) -> float: ...
    @property
    def rate_out(self) -> float: ...
    @property
    def promotes(self) -> tuple[str, ...]: ...


@runtime_checkable
class EmotionScores(Protocol):
    """`FeatureScores`, as far as labels need them."""

    @property
    def rows(self) -> Sequence[EmotionScore]: ...


def labels_file(path: str) -> str:
    """Where the labels of the dictionary in folder `path` of a release lie, relative to the release."""
    return f"labels/{path}.jsonl"


def storable(text: str) -> bool:
    """Whether a database and UTF-8 take the text: it has neither NUL nor half a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def read_labels(path: str | Path, d_sae: int | None = None) -> tuple[FeatureLabel, ...]:
    """The labels of a file of JSON Lines, in the order of `write_labels`.

    Args:
        d_sae: the dictionary's number of features; a label of any other feature is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line that is no label.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of labels {path}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: labels may hold other separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    labels = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                label = _label_from(json.loads(line, parse_constant=_refused_constant, object_pairs_hook=_unique_keys))
                labels.append(_within(label, d_sae))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return merge_labels(labels)


def write_labels(path: str | Path, labels: "Labels") -> Path:
    """The path, after the labels were written there, whole or not at all: a JSON object a line, by feature and author.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    return write_whole(path, "".join(f"{_line(label)}\n" for label in merge_labels(labels)))


def merge_labels(*sets: "Labels") -> tuple[FeatureLabel, ...]:
    """The labels of all sets by feature, author, method and version; those that agree in everything stand there once.

    Nothing is decided between authors: who says what stays in each label.
    """
    merged = {_line(label): label for labels in sets for label in labels}
    order = {
        line: (label.feature, label.author, label.method, label.version, label.text, line)
        for line, label in merged.items()
    }
    return tuple(merged[line] for line in sorted(merged, key=lambda line: order[line]))


def labels_from_scores(
    scores: EmotionScores,
    *,
    author: str,
    corpus: str | None = None,
    texts: Mapping[int, str] | None = None,
    output_scores: Mapping[int, float] | None = None,
    max_q: float = MAX_Q,
    min_auroc: float = MIN_AUROC,
) -> tuple[FeatureLabel, ...]:
    """A label for each feature that tells an emotion, with the statistics of the emotion that it tells best.

    A row counts when its q is at most `max_q` and its AUROC at least `min_auroc`, on the held-out texts too where
    there were some. A feature that tells several emotions has one label with all of them, best held-out AUROC first
    (training AUROC where nothing was held out).

    Args:
        corpus: what the texts were, for the statistics.
        texts: a line on each feature, such as `{role.feature: role.label for role in roles.rows}`; features without
            one are described by their emotions and the tokens that they promote.
        output_scores: how strongly each feature acts on what the model says.
    """
    by_feature: dict[int, list[EmotionScore]] = {}
    for row in scores.rows:
        if row.q <= max_q and min(row.auroc, 1 if row.held_out_auroc is None else row.held_out_auroc) >= min_auroc:
            by_feature.setdefault(row.feature, []).append(row)
    found = []
    for feature, rows in by_feature.items():
        rows = sorted(rows, key=lambda row: (-_judged(row), row.emotion))
        best, emotions = rows[0], tuple(dict.fromkeys(row.emotion for row in rows))
        statistics: dict[str, float | int | str | None] = {
            "auroc": best.auroc,
            "held_out_auroc": best.held_out_auroc,
            "q": best.q,
            "rate_in": best.rate_in,
            "rate_out": best.rate_out,
        }
        statistics |= {f"held_out_auroc:{row.emotion}": row.held_out_auroc for row in rows[1:]}
        if output_scores is not None:
            statistics["output_score"] = output_scores.get(feature)
        if corpus is not None:
            statistics["corpus"] = corpus
        text = (texts or {}).get(feature) or _described(emotions, best)
        found.append(FeatureLabel(feature, emotions, text, statistics, METHOD, VERSION, author))
    return merge_labels(found)


Labels = tuple[FeatureLabel, ...] | list[FeatureLabel]


def _check_statistics(statistics: Mapping[str, Any]) -> None:
    for name, value in statistics.items():
        number = isinstance(value, float | int) and not isinstance(value, bool)
        # The comparison fails for NaN, and holds for a whole number that is too large for a float.
        if not (-sys.float_info.max <= value <= sys.float_info.max if number else isinstance(value, str | None)):
            raise ValueError(f"statistics: {name} is {value!r:.80}; valid: a finite number, text or null")


def _judged(row: EmotionScore) -> float:
    return row.auroc if row.held_out_auroc is None else row.held_out_auroc


def _described(emotions: tuple[str, ...], best: EmotionScore) -> str:
    """The emotions, and in brackets up to five promoted tokens that can be read."""
    shown = dict.fromkeys(token.strip() for token in best.promotes if token.strip() and token.strip().isprintable())
    promoted = f" (promotes: {', '.join(list(shown)[:5])})" if shown else ""
    return ", ".join(emotions) + promoted


def _line(label: FeatureLabel) -> str:
    return json.dumps(label.to_dict(), ensure_ascii=False, allow_nan=False)


_TEXT: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, str), "text")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "feature": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number from 0"),
    "emotions": (
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
        "a list of text",
    ),
    "text": _TEXT,
    "statistics": (lambda value: isinstance(value, dict), "an object of numbers and text"),
    "method": _TEXT,
    "version": _TEXT,
    "author": _TEXT,
}


def _label_from(row: object) -> FeatureLabel:
    names = [one.name for one in fields(FeatureLabel)]
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.80} is no label; valid: an object with {', '.join(names)}")
    if unknown := [key for key in row if key not in names]:
        raise ValueError(f"unknown key {unknown[0]!r:.80}; valid: {', '.join(names)}")
    if missing := [name for name in names if name not in row]:
        raise ValueError(f"{', '.join(missing)} missing; valid: an object with {', '.join(names)}")
    for name, value in row.items():
        good, valid = _KINDS[name]
        if not good(value):
            raise ValueError(f"{name} is {value!r:.80}; valid: {valid}")
    _check_statistics(row["statistics"])
    return FeatureLabel(**{**row, "emotions": tuple(row["emotions"])})


def _within(label: FeatureLabel, d_sae: int | None) -> FeatureLabel:
    if d_sae is not None and label.feature >= d_sae:
        raise ValueError(f"feature is {label.feature}; valid: 0 to {d_sae - 1}")
    return label


def _refused_constant(name: str) -> None:
    raise ValueError(f"{name} is no finite number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if doubled := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the key {doubled[0]!r:.80} stands twice")
    return dict(pairs)
