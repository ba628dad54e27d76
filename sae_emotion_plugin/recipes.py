"""`TrainingRecipe`: one YAML file that decides a dictionary's weights, and the documents that it names. No torch."""

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

REFERENCES = ("frozen-decoder", "frozen-encoder", "random-directions", "shuffled-weights")
"""Kinds of reference dictionary; `reference_saes` makes them."""


@dataclass(frozen=True)
class TextSource:
    """One file of training texts."""

    path: str
    """Relative to the folder given beside the recipe."""
    tokens: int | None = None
    """Take documents until about this many tokens; all when absent."""
    document: str | None = None
    """The column whose value makes rows one document (a novel's title); a row is a document when absent."""
    licence: str = ""
    """Licence of the texts, repeated in the dictionary's provenance."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"texts: tokens is {self.tokens} of {self.path} (valid: a whole number from 1)")


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that decides a dictionary's weights, apart from the texts' bytes."""

    name: str
    """Release name in the registry."""
    sae_id: str
    """Name of this dictionary within the release."""
    model: str
    """What `load_model` takes."""
    hook_name: str
    """Where the activations are read."""
    texts: tuple[TextSource, ...]
    """Files of texts, in order."""
    d_sae: int
    """Number of features."""
    k: int
    """Features that fire on a token."""
    epochs: float
    """Passes over the collected activations."""
    lr: float
    """Peak learning rate of Adam."""
    architecture: str = "topk"
    """Only `topk` so far."""
    context_size: int = 128
    """Tokens of a window, BOS included."""
    held_out_share: float = 0.03
    """Share of each source's documents, at least one, that is kept for the report."""
    batch_size: int = 2048
    """Tokens of a training step."""
    lr_warm_up_steps: int = 50
    """Steps of linear warm-up."""
    lr_decay_share: float = 0.25
    """Share of the steps, at the end, with linear decay to zero."""
    aux_loss_coefficient: float = 1 / 32
    """Weight of the loss that revives dead features (AuxK, arXiv 2406.04093, A.2)."""
    dead_token_window: int = 200_000
    """A feature silent for this many tokens counts as dead for AuxK."""
    seed: int = 0
    """Seeds weights and order."""
    licence: str = ""
    """Licence of the dictionary."""
    reference: str | None = None
    """Kind of reference dictionary that this is (one of `REFERENCES`); absent for one that is trained in earnest."""

    def __post_init__(self) -> None:
        if self.architecture != "topk":
            raise ValueError(f"unknown architecture {self.architecture!r} (valid: topk)")
        if self.reference is not None and self.reference not in REFERENCES:
            raise ValueError(f"unknown reference {self.reference!r} (valid: {', '.join(REFERENCES)}, or none)")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k {self.k} is not between 1 and d_sae {self.d_sae}")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share {self.held_out_share} is not between 0 and 1")
        if not self.texts:
            raise ValueError("a recipe needs at least one file under texts")
        for name in ("epochs", "lr", "batch_size", "context_size", "dead_token_window"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        for name in ("lr_warm_up_steps", "lr_decay_share", "aux_loss_coefficient", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative")
        if self.lr_decay_share > 1:
            raise ValueError(f"lr_decay_share {self.lr_decay_share} is above 1")

    @classmethod
    def read(cls, path: str | Path) -> "TrainingRecipe":
        """The recipe of a YAML file; unknown and missing keys are errors."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such recipe: {path}")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no readable YAML: {str(error).splitlines()[0]}") from error
        recipe = checked_fields(cls, data, str(path))
        if not isinstance(recipe["texts"], list):
            raise ValueError(f"{path}: texts is {recipe['texts']!r} (valid: a list of files)")
        texts = [checked_fields(TextSource, source, f"{path}, texts") for source in recipe["texts"]]
        try:
            sources = tuple(TextSource(**source) for source in texts)
            return cls(**{**recipe, "texts": sources})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_yaml(self) -> str:
        data = asdict(self)
        if self.reference is None:
            del data["reference"]
        data["texts"] = [{k: v for k, v in source.items() if v not in (None, "")} for source in data["texts"]]
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def read_documents(path: Path, document_column: str | None = None) -> dict[str, list[str]]:
    """The texts of a `.jsonl` (column `text`) or plain `.txt` file (blank lines part texts), also `.gz`, by document.

    Without a document column every text is a document of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a broken row, no text in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {path}")
    documents: dict[str, list[str]] = {}
    for number, (name, text) in enumerate(_texts(path, document_column), start=1):
        if text.strip():
            documents.setdefault(name or str(number), []).append(text.strip())
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def _texts(path: Path, document_column: str | None) -> Iterator[tuple[str, str]]:
    plain = path.name.removesuffix(".gz")
    if not plain.endswith((".jsonl", ".txt")):
        raise ValueError(f"{path.name}: unknown kind of text file (valid: .jsonl, .txt, either with .gz)")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if plain.endswith(".txt"):
                yield from (("", text) for text in file.read().split("\n\n"))
                return
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    if not isinstance(row["text"], str):
                        raise TypeError(f"text is {row['text']!r}")
                    yield str(row[document_column]) if document_column else "", row["text"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path.name}, line {number}: no JSON object with its columns ({error!r})"
                    ) from error
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path.name} is no readable UTF-8 text: {error}") from error


def checked_fields(kind: type, data: Any, where: str) -> dict[str, Any]:
    """The keys and values of `data`, which has those of the dataclass `kind`."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected keys and values, found {type(data).__name__}")
    valid = [item.name for item in fields(kind)]
    unknown = [str(key) for key in data if key not in valid]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r} (valid: {', '.join(valid)})")
    required = [item.name for item in fields(kind) if item.name not in data and _has_no_default(item)]
    if required:
        raise ValueError(f"{where}: missing key {required[0]!r}")
    types = {item.name: item.type for item in fields(kind)}
    return {key: _checked_value(value, types[key], f"{where}: {key}") for key, value in data.items()}


def _checked_value(value: Any, kind: Any, where: str) -> Any:
    """The value, if it is of its field's kind: YAML reads `4e-4` as text and `k: 32.0` as a fraction."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    valid = {
        float: ("a number, such as 0.001 or 1.0e-3", False),
        int: ("a whole number", number and isinstance(value, int)),
        int | None: ("a whole number", value is None or (number and isinstance(value, int))),
        str: ("text", isinstance(value, str)),
        str | None: ("text", isinstance(value, str | None)),
    }
    if kind in valid and not valid[kind][1]:
        raise ValueError(f"{where} is {value!r} (valid: {valid[kind][0]})")
    return value


def _has_no_default(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING
