"""A recipe's texts: fetched where they are missing, split into training and held-out documents, shuffled."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from sae_emotion_plugin.files import replacing
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.recipes import TextSource, TrainingRecipe, read_documents
from sae_emotion_plugin.registry import check_path

BLOCK = 512
"""Texts that are tokenised at a time: of a large corpus a recipe may want the first few."""


def recipe_documents(
    recipe: TrainingRecipe, model: Any, root: Path
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Training texts, held-out texts and the record of every file; whole documents on one side.

    Raises:
        FileNotFoundError, ValueError: a file is missing, too small or no text, or its path leads out of `root`.
    """
    for source in recipe.texts:
        check_path("texts: path", source.path)
    rng = np.random.default_rng(recipe.seed)
    training: list[str] = []
    held_out: list[str] = []
    record: list[dict[str, Any]] = []
    for source in recipe.texts:
        path = root / source.path
        if source.dataset is not None and not path.is_file():
            fetch(source, path)
        documents = read_documents(path, source.document)
        names = list(documents)
        rng.shuffle(names)
        n_held_out = max(1, round(len(names) * recipe.held_out_share))
        if len(names) <= n_held_out:
            raise ValueError(f"{path} has {len(names)} documents, too few to keep one for the report")
        reserved, names = names[:n_held_out], names[n_held_out:]
        # A novel held out as a whole would drown the other sources' documents: at most 200 of its paragraphs count.
        held_out += [text for name in reserved for text in documents[name][:200]]
        texts = [text for name in names for text in documents[name]]
        if source.document:
            rng.shuffle(texts)
        if source.tokens is not None:
            texts = first_tokens(model, texts, source.tokens)
        training += texts
        record.append(
            {
                "path": source.path,
                **({"dataset": source.dataset, "revision": source.revision} if source.dataset else {}),
                "licence": source.licence,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "training_texts": len(texts),
                "held_out_documents": n_held_out,
            }
        )
    rng.shuffle(training)
    return training, held_out, record


def first_tokens(model: Any, texts: list[str], tokens: int) -> list[str]:
    """The texts up to the one with which they have so many tokens; all where they have fewer."""
    total = 0
    for first in range(0, len(texts), BLOCK):
        for index, ids in enumerate(
            model.tokenizer(texts[first : first + BLOCK], add_special_tokens=False)["input_ids"]
        ):
            total += len(ids)
            if total >= tokens:
                return texts[: first + index + 1]
    return texts


def fetch(source: TextSource, path: Path) -> None:
    """Write the rows of a data set of the Hugging Face Hub to `path`, a text a line, whole or not at all.

    Raises:
        ValueError: the data set cannot be reached, lacks a column, its name is none of the Hub, or `path` is no JSON
            Lines file.
    """
    from datasets import load_dataset

    local = f"put its texts at {path} (a JSON object with `text` a line), or name local files under texts"
    # A folder of that name would be read in place of the data set.
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source.dataset)) or Path(str(source.dataset)).exists():
        raise ValueError(f"dataset {source.dataset!r} is no data set of the Hub (valid: owner/name): {local}")
    if path.suffix != ".jsonl":
        raise ValueError(f"texts: {source.path} is to hold a data set (valid: a name that ends in .jsonl)")
    try:
        where: dict[str, Any] = {"split": source.split, "revision": source.revision}
        rows = itertools.islice(load_dataset(str(source.dataset), **where, streaming=True), source.rows)
        # What a data set's host, its name and its files can do wrong has no common class.
        found = [_document(dict(row), source) for row in rows]
    except KeyError as error:
        raise ValueError(f"the data set {source.dataset!r} has no column {error}: {local}") from error
    except Exception as error:
        raise ValueError(
            f"the data set {source.dataset!r} cannot be reached ({type(error).__name__}: {first_line(error)}): {local}"
        ) from error
    if not any(found):
        raise ValueError(f"the data set {source.dataset!r} has no text in {', '.join(source.columns)}: {local}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found if text)
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")


def _document(row: dict[str, Any], source: TextSource) -> str:
    return "\n".join(text for column in source.columns if (text := str(row[column] or "").strip()))
