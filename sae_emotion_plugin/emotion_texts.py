"""Texts with emotion labels: the bundled corpus, readers for the user's own, and leak-free splits."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from sae_emotion_plugin.files import replacing
from sae_emotion_plugin.tables import html_table
from sae_emotion_plugin.text_rows import (
    LABEL_COLUMNS,
    Columns,
    Row,
    check_text,
    decoded_lines,
    file_rows,
    json_rows,
    labelled_rows,
)
from sae_emotion_plugin.text_splits import near_duplicate_groups, stratified_held_out

if TYPE_CHECKING:
    import pandas

BUNDLED_LANGUAGES = ("en", "ko", "ja")
OPENING_KINDS = ("neutral", "unpleasant", "everyday", "anger", "disgust", "fear", "joy", "sadness", "surprise")
"""Kinds of openings in English; Korean and Japanese have no "unpleasant" and no "everyday" ones."""
_BUNDLED = files("sae_emotion_plugin") / "data"


@dataclass(frozen=True, repr=False)
class LabelledTexts:
    """Texts with any number of labels each; never empty, ids unique, every text valid non-blank Unicode.

    Making one that breaks these rules is a ValueError, also when nothing is left after selecting.
    """

    texts: tuple[str, ...]
    emotions: tuple[tuple[str, ...], ...]
    """The labels of each text: none, one or several."""
    ids: tuple[str, ...]
    language: str = "und"
    """A language tag such as "en"; "mixed" when texts differ, "und" when unknown."""

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.emotions) == len(self.ids):
            sizes = f"{len(self.texts)} texts, {len(self.emotions)} label tuples and {len(self.ids)} ids"
            raise ValueError(f"texts, emotions and ids must be equally long, got {sizes}")
        if not self.texts:
            raise ValueError("no texts: a corpus needs at least one")
        for name, text, labels in zip(self.ids, self.texts, self.emotions, strict=True):
            check_text(text, f"text {name!r}")
            if len(set(labels)) != len(labels) or not all(isinstance(x, str) and x.strip() for x in labels):
                raise ValueError(f"text {name!r}: labels must be different, non-empty strings, got {labels!r}")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"ids must be unique, {Counter(self.ids).most_common(1)[0][0]!r} occurs more than once")
        if not self.language.strip():
            raise ValueError('language is empty; use a tag such as "en", "mixed" or "und"')

    @classmethod
    def bundled(cls, language: str = "en", keyword_free_only: bool = False) -> "LabelledTexts":
        """The corpus written for this package, in "en", "ko", "ja" or "all" of them.

        `keyword_free_only` keeps the texts in which no word names the emotion.
        """
        if language not in (*BUNDLED_LANGUAGES, "all"):
            raise ValueError(f"no bundled texts in {language!r}; choose from {', '.join(BUNDLED_LANGUAGES)} or all")
        wanted = BUNDLED_LANGUAGES if language == "all" else (language,)
        rows = [row for code in wanted for row in _bundled_rows(f"corpus_{code}.jsonl")]
        kept = [row for row in rows if row[1]["keyword_free"] or not keyword_free_only]
        return cls(*labelled_rows(kept, f"the bundled corpus ({language})", Columns()))

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        text_column: str = "text",
        label_column: str | None = None,
        *,
        name: str | None = None,
        label_names: Sequence[str] | None = None,
        label_delimiter: str | None = None,
        language: str | None = None,
        unlabelled: bool = False,
    ) -> "LabelledTexts":
        """The texts of a .jsonl, .csv or .tsv file (with a header line), or one of these gzipped (.gz).

        Labels stand in `label_column`, by default the first of "emotions", "label", "labels", "emotion" that
        exists: a name, a list of names, a number to be named by `label_names`, or a 0/1 flag for the label
        `name` (by default the name of the `label_column` you gave). A .csv or .tsv cell may hold several labels,
        with `label_delimiter` (by default any of ; | ,) between them, or a list in brackets. A null or an empty
        cell means no label. The column "id" is used where it is unique; `language` overrides the column
        "language"; `unlabelled` reads the texts alone. A broken row is a ValueError with file, line and reason.
        """
        rows, cells = file_rows(path)
        columns = Columns(text_column, label_column, name, label_names, label_delimiter, language, unlabelled, cells)
        return cls(*labelled_rows(rows, str(path), columns))

    @classmethod
    def from_pandas(
        cls,
        frame: "pandas.DataFrame",
        text_column: str = "text",
        label_column: str | None = None,
        *,
        name: str | None = None,
        label_names: Sequence[str] | None = None,
        label_delimiter: str | None = None,
        language: str | None = None,
        unlabelled: bool = False,
    ) -> "LabelledTexts":
        """The texts of a data frame; columns as in `read`, but strings are split at a given delimiter only."""
        if repeated := frame.columns[frame.columns.duplicated()].tolist():
            raise ValueError(f"the frame has the column {repeated[0]!r} more than once")
        frame = frame.astype(object).where(frame.notna(), None)
        rows = (
            (f"frame, row {index}", {str(key): value for key, value in row.items()})
            for index, row in zip(frame.index, frame.to_dict("records"), strict=True)
        )
        columns = Columns(text_column, label_column, name, label_names, label_delimiter, language, unlabelled)
        return cls(*labelled_rows(rows, "the frame", columns))

    @classmethod
    def from_hugging_face(
        cls,
        dataset: str,
        split: str | None = None,
        text_column: str = "text",
        label_column: str | None = None,
        *,
        config: str | None = None,
        revision: str | None = None,
        name: str | None = None,
        label_names: Sequence[str] | None = None,
        language: str | None = None,
        unlabelled: bool = False,
    ) -> "LabelledTexts":
        """The texts of one split (None: its only one) of a data set on the Hugging Face Hub, or saved to disk.

        Columns as in `read`; the numbers of a ClassLabel column, alone or in lists, become its names. Code that
        comes with a data set is never run.
        """
        loaded = _hugging_face_split(dataset, split, config, revision)
        place = dataset if split is None else f"{dataset} ({split})"
        label = label_column or next((name for name in LABEL_COLUMNS if name in loaded.column_names), None)
        feature = loaded.features.get(label)
        if label_names is None and name is None:
            label_names = getattr(getattr(feature, "feature", feature), "names", None)
        kept = [c for c in (text_column, label, "id", "language") if c in loaded.column_names]
        if {text_column, *(() if unlabelled else (label,))} <= set(kept):  # or the message names all columns
            loaded = loaded.select_columns(kept)
        rows = ((f"{place}, row {number}", row) for number, row in enumerate(loaded))
        columns = Columns(text_column, label_column, name, label_names, None, language, unlabelled)
        return cls(*labelled_rows(rows, place, columns))

    @classmethod
    def from_binary(
        cls, texts: Sequence[str], flags: Sequence[Any] | np.ndarray, name: str, language: str = "und"
    ) -> "LabelledTexts":
        """The texts, labelled `name` where the flag is 1 or True and unlabelled where it is 0 or False."""
        if len(texts) != len(flags):
            raise ValueError(f"texts and flags must be equally long, got {len(texts)} and {len(flags)}")
        rows = [(f"text {n}", {"text": t, "label": f}) for n, (t, f) in enumerate(zip(texts, flags, strict=True))]
        return cls(*labelled_rows(rows, "the list of texts", Columns(name=name, language=language)))

    @classmethod
    def from_contrast_pairs(cls, pairs: Sequence[Sequence[str]], name: str, language: str = "und") -> "LabelledTexts":
        """The texts of (with, without) pairs, in order: the first of each is labelled `name`, the second not."""
        for n, pair in enumerate(pairs):
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"pair {n} is not (with, without): got {pair!r}")
        rows = [
            (f"pair {n} ({kind})", {"text": text, "label": kind == "with", "id": f"pair-{n:05d}-{kind}"})
            for n, pair in enumerate(pairs)
            for kind, text in zip(("with", "without"), pair, strict=True)
        ]
        return cls(*labelled_rows(rows, "the list of pairs", Columns(name=name, language=language)))

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All label names, sorted."""
        return tuple(sorted({label for labels in self.emotions for label in labels}))

    @cached_property
    def duplicate_groups(self) -> Int[np.ndarray, "text"]:
        """The group number of each text; near-duplicates share one (`text_splits.near_duplicate_groups`)."""
        return near_duplicate_groups(self.texts)

    def label_matrix(self, labels: Iterable[str] | None = None) -> Bool[np.ndarray, "text label"]:
        """True where a text has a label; columns in the order of `labels`, by default our own."""
        column = {label: number for number, label in enumerate(self.labels if labels is None else labels)}
        matrix = np.zeros((len(self), len(column)), dtype=bool)
        for row, own in enumerate(self.emotions):
            matrix[row, [column[label] for label in own if label in column]] = True
        return matrix

    def select(self, indices: Sequence[int] | np.ndarray) -> "LabelledTexts":
        """The texts at these positions, in this order, or those where an array of one boolean a text is True."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"a boolean selection needs {len(self)} entries, got shape {chosen.shape}")
            chosen = np.flatnonzero(chosen)
        wrong = [index for index in chosen.tolist() if not (isinstance(index, int) and 0 <= index < len(self))]
        if wrong:
            raise ValueError(f"text index {wrong[0]} is not one of 0 to {len(self) - 1}")
        kept = [(self.texts[i], self.emotions[i], self.ids[i]) for i in chosen.tolist()]
        texts, emotions, ids = zip(*kept, strict=True) if kept else ((), (), ())
        return LabelledTexts(texts, emotions, ids, self.language)

    def only_single_label(self) -> "LabelledTexts":
        """The texts that have exactly one label."""
        return self.select(np.array([len(labels) == 1 for labels in self.emotions]))

    def only_labels(self, labels: Sequence[str]) -> "LabelledTexts":
        """The texts that have at least one of these labels, and of their labels only these."""
        if unknown := [label for label in labels if label not in self.labels]:
            raise ValueError(f"unknown label {unknown[0]!r}; the labels are {', '.join(self.labels)}")
        kept = self.select(np.array([any(label in labels for label in own) for own in self.emotions]))
        emotions = tuple(tuple(label for label in own if label in labels) for own in kept.emotions)
        return LabelledTexts(kept.texts, emotions, kept.ids, self.language)

    def split(self, held_out: float = 0.5, seed: int = 0) -> tuple["LabelledTexts", "LabelledTexts"]:
        """(train, held out), stratified by label; near-duplicates stay together on one side."""
        mask = stratified_held_out(self.label_matrix(), self.duplicate_groups, held_out, seed)
        return self.select(~mask), self.select(mask)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each text, with the columns id, text, emotions (a list) and language."""
        import pandas

        columns = {"id": self.ids, "text": self.texts, "emotions": [list(labels) for labels in self.emotions]}
        return pandas.DataFrame({**columns, "language": self.language})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """The path, with the texts written there for `read`, whole or not at all: .jsonl or .jsonl.gz."""
        path = Path(path)
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(f"cannot save to {path}: the name must end in .jsonl or .jsonl.gz")
        rows = zip(self.ids, self.texts, self.emotions, strict=True)
        records = ({"id": i, "text": t, "emotions": e, "language": self.language} for i, t, e in rows)
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        with replacing(path) as unfinished:
            unfinished.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
        return path

    def __repr__(self) -> str:
        counts = Counter(label for labels in self.emotions for label in labels)
        shown = [f"{label} {number}" for label, number in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
        if len(shown) > 10:
            shown = [*shown[:10], f"{len(shown) - 10} more"]
        several, none = (sum(len(e) > 1 for e in self.emotions), sum(not e for e in self.emotions))
        unusual = [f"{n} with {what}" for n, what in ((several, "several labels"), (none, "no label")) if n]
        details = "; ".join([", ".join(shown) or "no labels", *unusual])
        return f"LabelledTexts({len(self)} texts, language {self.language!r}: {details})"

    def _repr_html_(self) -> str:
        cells = [
            (self.ids[n], ", ".join(self.emotions[n]), self.texts[n][:200] + "…" * (len(self.texts[n]) > 200))
            for n in range(min(5, len(self)))
        ]
        return html_table(repr(self), ("id", "labels", "text"), cells)


def without_overlap(train: LabelledTexts, held_out: LabelledTexts) -> tuple[LabelledTexts, int]:
    """(`train` without the near-duplicates of texts in `held_out`, chains included; how many were dropped)."""
    groups = near_duplicate_groups([*train.texts, *held_out.texts])
    kept = ~np.isin(groups[: len(train)], groups[len(train) :])
    if not kept.any():
        raise ValueError(f"all {len(train)} training texts are near-duplicates of held-out texts")
    return (train if kept.all() else train.select(kept)), int((~kept).sum())


def openings(kind: str = "neutral", language: str = "en") -> tuple[str, ...]:
    """The bundled sentence openings to be continued by a model: those of one kind in "en", "ko" or "ja", or "all".

    An opening of an emotion's kind tells of a situation that suggests the emotion, and names none; "everyday" ones are
    further neutral ones. All are free of profanity, and no two are near-duplicates. ValueError for a kind or language
    that there is not.
    """
    if language not in BUNDLED_LANGUAGES:
        raise ValueError(f"no openings in {language!r}; choose from {', '.join(BUNDLED_LANGUAGES)}")
    of_kind: dict[str, list[str]] = {}
    for _, row in _bundled_rows("openings.jsonl"):
        if row.get("language", "en") == language:
            of_kind.setdefault(row["kind"], []).append(row["text"])
    if kind == "all":
        return tuple(text for texts in of_kind.values() for text in texts)
    if kind not in of_kind:
        raise ValueError(f"no openings of kind {kind!r} in {language!r}; choose from {', '.join(of_kind)} or all")
    return tuple(of_kind[kind])


def study_openings(language: str = "en") -> tuple[str, ...]:
    """The bundled openings of a language, neutral and of every emotion alike: 100 in English.

    The "unpleasant" ones are left out: they belong to no emotion, and lean to one side.
    """
    unpleasant = set(openings("unpleasant")) if language == "en" else set()
    return tuple(text for text in openings("all", language) if text not in unpleasant)


def _bundled_rows(file_name: str) -> Iterator[Row]:
    with (_BUNDLED / file_name).open("rb") as stream:
        yield from json_rows(decoded_lines(stream, file_name), file_name)


def _hugging_face_split(dataset: str, split: str | None, config: str | None, revision: str | None) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ImportError("reading Hugging Face data sets needs the package datasets: pip install datasets") from None
    folder = Path(dataset)
    splits: dict[str, Any]
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = {str(key): value for key, value in datasets.DatasetDict.load_from_disk(dataset).items()}
        elif (folder / "state.json").is_file():
            saved = datasets.Dataset.load_from_disk(dataset)
            splits = {str(saved.split or split): saved}
        else:
            loaded: Any = datasets.load_dataset(dataset, config, split=split, revision=revision)
            several = isinstance(loaded, dict)
            splits = {str(key): value for key, value in loaded.items()} if several else {str(split): loaded}
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load the data set {dataset!r}: {reason}") from None
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if str(split) not in splits:
        raise ValueError(f"{dataset!r} has no split {split!r}; choose from {', '.join(splits)}")
    return splits[str(split)]
