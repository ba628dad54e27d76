"""`TrainingRecipe`: one YAML file that decides a dictionary's weights, and the documents that it names. No torch."""

import gzip
import importlib.resources
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

REFERENCES = ("frozen-decoder", "frozen-encoder", "random-directions", "shuffled-weights")
"""Kinds of reference dictionary; `reference_saes` makes them."""
NEEDED = object()
"""Stands for the default of a key that has none."""
_LOOP: dict[str, Any] = {"clip_norm": 1.0, "adam_eps": 1e-8, "ema_decay": 0.0, "lr_reference_width": None}
_RESAMPLING: dict[str, Any] = {"resampling": "none", "resample_every": None, "resample_below": 1e-5}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": NEEDED, "aux_loss_coefficient": 1 / 32, **_LOOP},
    "openai-topk": {
        "k": NEEDED,
        "aux_loss_coefficient": 1 / 32,
        "k_aux": None,
        "multi_topk": 4,
        "multi_topk_weight": 1 / 8,
        "tied_init": True,
        **_LOOP,
        "adam_eps": 6.25e-10,
        "ema_decay": 0.999,
    },
    "relu-l1": {"l1_coefficient": NEEDED, "l1_warm_up_steps": 0, "tied_init": True, **_RESAMPLING, **_LOOP},
    "batchtopk": {"k": NEEDED, "aux_loss_coefficient": 1 / 32, **_LOOP},
    "jumprelu": {
        "l0_coefficient": NEEDED,
        "l0_warm_up_steps": 0,
        "jumprelu_bandwidth": 0.05,
        "jumprelu_init_threshold": 0.01,
        **_LOOP,
    },
}
"""The keys that an architecture uses beside those that all do, with their defaults; others are refused."""
_POSITIVE = (
    *("epochs", "steps", "lr", "batch_size", "context_size", "dead_token_window", "k_aux", "multi_topk"),
    *("resample_every", "resample_below", "clip_norm", "adam_eps", "lr_reference_width", "jumprelu_bandwidth"),
)
_NOT_NEGATIVE = (
    *("lr_warm_up_steps", "lr_decay_share", "aux_loss_coefficient", "seed", "multi_topk_weight", "l1_coefficient"),
    *("l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps", "jumprelu_init_threshold", "ema_decay"),
)
RESAMPLINGS = ("none", "plain", "anthropic")


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
    dataset: str | None = None
    """Name on the Hugging Face Hub; where `path` is missing, it is written from there, once."""
    revision: str | None = None
    """Of the data set: a commit, a tag or a branch; its newest when absent."""
    split: str = "train"
    """Of the data set."""
    columns: tuple[str, ...] = ("text",)
    """Of the data set; their texts, a line each, are one document."""
    rows: int | None = None
    """Of the data set, from its beginning; all when absent."""

    def __post_init__(self) -> None:
        for name in ("tokens", "rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"texts: {name} is {getattr(self, name)} of {self.path} (valid: a whole number from 1)"
                )
        if not self.columns:
            raise ValueError(f"texts: columns of {self.path} are none (valid: names of columns)")
        usual = {one.name: one.default for one in fields(self)}
        unused = [name for name in ("revision", "split", "columns", "rows") if getattr(self, name) != usual[name]]
        if self.dataset is None and unused:
            raise ValueError(f"texts: {unused[0]} of {self.path} is for a data set, and there is none")


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
    k: int | None = None
    """Features that fire on a token (`batchtopk`: on average)."""
    epochs: float | None = None
    """Passes over the collected activations; either this or `steps`."""
    lr: float = math.nan
    """Peak learning rate of Adam; there is no default."""
    steps: int | None = None
    """Training steps; either this or `epochs`."""
    architecture: str = "topk"
    """One of `ARCHITECTURES`, which says what keys it uses."""
    context_size: int = 128
    """Tokens of a window, BOS included."""
    held_out_share: float = 0.03
    """Share of each source's documents, at least one, that is kept for the report."""
    batch_size: int = 2048
    """Tokens of a training step."""
    lr_warm_up_steps: int = 50
    """Steps of linear warm-up, a tenth of all at most."""
    lr_decay_share: float = 0.25
    """Share of the steps, at the end, with linear decay to zero."""
    dead_token_window: int = 200_000
    """A feature silent for this many tokens counts as dead."""
    aux_loss_coefficient: float | None = None
    """Weight of the loss that revives dead features (AuxK, arXiv 2406.04093, A.2)."""
    k_aux: int | None = None
    """Dead features that AuxK uses on a token; a power of two near half the input's width when absent."""
    multi_topk: int | None = None
    """Multi-TopK rebuilds from this many times k features as well."""
    multi_topk_weight: float | None = None
    """Weight of Multi-TopK; 0 turns it off."""
    tied_init: bool | None = None
    """Start the encoder as the decoder's transpose; at random directions of its own otherwise."""
    l1_coefficient: float | None = None
    """Weight of the sum of a token's codes."""
    l1_warm_up_steps: int | None = None
    """Steps in which that weight rises from 0."""
    resampling: str | None = None
    """What becomes of features that hardly fire: none, plain or anthropic (`training.resampling`)."""
    resample_every: int | None = None
    """Steps from one resampling to the next."""
    resample_below: float | None = None
    """A feature is resampled that fired on a smaller share of the tokens since."""
    l0_coefficient: float | None = None
    """Weight of the number of features that fire."""
    l0_warm_up_steps: int | None = None
    """Steps in which that weight rises from 0."""
    jumprelu_bandwidth: float | None = None
    """Width of the kernel that gives thresholds a gradient, in units of the normalised activations."""
    jumprelu_init_threshold: float | None = None
    """Thresholds at the start, in the same units."""
    clip_norm: float | None = None
    """Longest gradient of a step."""
    adam_eps: float | None = None
    """Adam's epsilon; OpenAI's is smaller than torch's, for the small gradients of features that hardly fire."""
    ema_decay: float | None = None
    """The saved weights are a running mean with this decay; 0 saves the last ones."""
    lr_reference_width: int | None = None
    """`lr` is meant for this many features: with n it is scaled by the square root of this over n."""
    seed: int = 0
    """Seeds weights and order."""
    licence: str = ""
    """Licence of the dictionary."""
    reference: str | None = None
    """Kind of reference dictionary that this is (one of `REFERENCES`); absent for one that is trained in earnest."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r} (valid: {', '.join(ARCHITECTURES)})")
        self._fill_in()
        if math.isnan(self.lr):
            raise ValueError("missing key 'lr'")
        if self.reference is not None and self.reference not in REFERENCES:
            raise ValueError(f"unknown reference {self.reference!r} (valid: {', '.join(REFERENCES)}, or none)")
        if self.reference is not None and self.architecture != "topk":
            raise ValueError(f"architecture {self.architecture!r} has no references (valid: topk)")
        if self.d_sae < 2:
            raise ValueError(f"d_sae {self.d_sae} is below 2")
        if self.k is not None and not 0 < self.k <= self.d_sae:
            raise ValueError(f"k {self.k} is not between 1 and d_sae {self.d_sae}")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share {self.held_out_share} is not between 0 and 1")
        if not self.texts:
            raise ValueError("a recipe needs at least one file under texts")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("missing key 'epochs'; give it or 'steps', and not both")
        if self.resampling not in (None, *RESAMPLINGS):
            raise ValueError(f"unknown resampling {self.resampling!r} (valid: {', '.join(RESAMPLINGS)})")
        if (self.resampling in (None, "none")) != (self.resample_every is None):
            raise ValueError(f"resample_every is {self.resample_every} with resampling {self.resampling}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} is not positive")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} {value} is negative")
        for name in ("lr_decay_share", "resample_below", "ema_decay"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise ValueError(f"{name} {value} is above 1")
        if self.ema_decay == 1:
            raise ValueError("ema_decay 1.0 would keep the first weights for ever (valid: below 1)")

    def _fill_in(self) -> None:
        """The architecture's defaults where a key is absent. ValueError for a key of another, or one that is needed."""
        used = ARCHITECTURES[self.architecture]
        for name in dict.fromkeys(name for keys in ARCHITECTURES.values() for name in keys):
            given = getattr(self, name) is not None
            if given and name not in used:
                raise ValueError(
                    f"{name} is not used by architecture {self.architecture!r} (it uses: {', '.join(used)})"
                )
            if not given and used.get(name) is NEEDED:
                raise ValueError(f"missing key {name!r}; architecture {self.architecture!r} needs it")
            if not given and name in used:
                object.__setattr__(self, name, used[name])

    def values(self, *names: str) -> dict[str, Any]:
        """The values of some keys that the architecture uses, by name."""
        return {name: getattr(self, name) for name in names}

    def number_of_steps(self, tokens: int) -> int:
        """How many steps the recipe makes of so many collected tokens."""
        if self.epochs is not None:
            return max(1, int(tokens * self.epochs) // self.batch_size)
        return self.steps or 1

    @classmethod
    def read(cls, path: str | Path) -> "TrainingRecipe":
        """The recipe of a YAML file, or of the name of one that comes with the package, such as `openai-topk`.

        Raises:
            FileNotFoundError: neither a file nor such a name.
            ValueError: no YAML, unknown or missing keys, values of the wrong kind.
        """
        # Studies lie beside the training recipes; a dictionary's width tells them apart.
        path = recipe_file(path, lambda text: "\nd_sae:" in text)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no readable YAML: {str(error).splitlines()[0]}") from error
        recipe = checked_fields(cls, data, str(path))
        if not isinstance(recipe["texts"], list):
            raise ValueError(f"{path}: texts is {recipe['texts']!r} (valid: a list of files)")
        texts = [checked_fields(TextSource, source, f"{path}, texts") for source in recipe["texts"]]
        try:
            sources = tuple(_source(given) for given in texts)
            return cls(**{**recipe, "texts": sources})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_yaml(self) -> str:
        data = {name: value for name, value in asdict(self).items() if value is not None}
        data["texts"] = [_short(source) for source in self.texts]
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def recipe_file(source: str | Path, is_kind: Callable[[str], bool]) -> Path:
    """The file itself, or the packaged recipe of that name whose text is of the kind. FileNotFoundError for neither."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    try:
        folder = Path(str(importlib.resources.files("sae_emotion_plugin._recipes")))
    except ModuleNotFoundError:
        folder = Path(__file__).parents[1] / "recipes"  # run from a checkout that is not installed
    shipped = {one.stem: one for one in sorted(folder.glob("*.yaml")) if is_kind(one.read_text(encoding="utf-8"))}
    if str(source) not in shipped:
        raise FileNotFoundError(f"no such recipe: {source} (valid: a YAML file, or {', '.join(shipped)})")
    return shipped[str(source)]


def _source(given: dict[str, Any]) -> TextSource:
    columns = given.get("columns", ["text"])
    if not isinstance(columns, list) or not all(isinstance(one, str) for one in columns):
        raise ValueError(f"texts: columns is {columns!r} (valid: a list of texts)")
    return TextSource(**{**given, "columns": tuple(columns)})


def _short(source: TextSource) -> dict[str, Any]:
    """The keys of a source that say something."""
    given = {one.name: getattr(source, one.name) for one in fields(source) if getattr(source, one.name) != one.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


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
                    row["text"].encode()
                    yield str(row[document_column]) if document_column else "", row["text"]
                except UnicodeEncodeError as error:
                    # JSON can hold what no tokenizer takes.
                    where = f"{path.name}, line {number}"
                    raise ValueError(f"{where}: half a surrogate pair at character {error.start} of text") from error
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
    if kind in (float, float | None) and number and math.isfinite(value):
        return float(value)
    valid = {
        float: ("a number, such as 0.001 or 1.0e-3", False),
        float | None: ("a number, such as 0.001 or 1.0e-3", value is None),
        int: ("a whole number", number and isinstance(value, int)),
        int | None: ("a whole number", value is None or (number and isinstance(value, int))),
        str: ("text", isinstance(value, str)),
        str | None: ("text", isinstance(value, str | None)),
        bool | None: ("true or false", isinstance(value, bool | None)),
    }
    if kind in valid and not valid[kind][1]:
        raise ValueError(f"{where} is {value!r} (valid: {valid[kind][0]})")
    return value


def _has_no_default(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING
