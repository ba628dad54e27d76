"""Methods that score texts for emotions: SAE latents, k-sparse probes, directions and probes of the residual, words.

A method is a list of families, each a way to prepare its inputs (pooling, transform) with the settings to try (strength
of regularisation, way to select features). A family fits on some rows and scores others; which family and setting are
used is decided by cross-validation in `method_comparison`, so that every method gets the same treatment.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from sae_emotion_plugin.evidence.association import sparse_auroc
from sae_emotion_plugin.evidence.logistic import Design, fit_logistics, standardised
from sae_emotion_plugin.judges.fitting import MOST_FEATURES, learn_vocabulary, tfidf_matrix
from sae_emotion_plugin.judges.fitting import STRENGTHS as WORD_STRENGTHS
from sae_emotion_plugin.judges.linear import NgramSettings
from sae_emotion_plugin.sparse_codes import Pooling
from sae_emotion_plugin.text_splits import stratified_folds

DENSE_STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.03)
"""Inverse regularisation strengths (C) of the dense probe, on standardised dimensions."""
SPARSE_STRENGTHS = (0.001, 0.01, 0.1)
"""Those of the k-sparse probes, on standardised features."""
CANDIDATES = 128
"""How many features a k-sparse probe selects its own from: those whose means differ most clearly."""
ELIMINATION_STRENGTH = 0.001
WORDS = NgramSettings("word", 1, 2)
COLUMNS_RANKED_AT_ONCE = 64

Rows: TypeAlias = Int[np.ndarray, "_"]


@dataclass(frozen=True)
class ProbeInputs:
    """What the methods see: the training texts in the first rows, after them the held-out texts without labels."""

    labels: Bool[np.ndarray, "train emotion"]
    pooled: Mapping[Pooling, scipy.sparse.csr_matrix]
    """SAE features, [text, feature]."""
    dense: Mapping[Pooling, Float[np.ndarray, "text d_in"]]
    """Residual vectors."""
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Fitted:
    """Scores of some texts, higher where an emotion is likelier, and what was fitted for each emotion."""

    scores: Float[np.ndarray, "row emotion"]
    details: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One way to prepare a method's inputs, to be tried with each of its settings."""

    name: str
    fit: Callable[[Rows, Rows, Sequence[Any]], list[Fitted]]
    """(rows to fit on, rows to score, values of settings) -> one `Fitted` for each setting."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"": None})
    """By name; the name is empty where there is nothing to set."""


def method_families(method: str, inputs: ProbeInputs) -> list[Family]:
    """Returns the families of a method. ValueError for an unknown one."""
    if method not in _FAMILIES:
        raise ValueError(f"unknown method {method!r} (valid: {', '.join(METHODS)})")
    return list(_FAMILIES[method](inputs))


def setting_name(family: Family, setting: str) -> str:
    """Returns how a family with a setting is called where it is chosen and shown."""
    return f"{family.name}, {setting}" if setting else family.name


def cross_fitted_scores(
    method: str, choice: str, inputs: ProbeInputs, groups: Int[np.ndarray, "train"], *, folds: int = 3, seed: int = 0
) -> Float[np.ndarray, "train emotion"]:
    """Returns each training text's scores from a fit that saw neither it nor its near-duplicates (`groups`).

    `choice` is a setting's name, as chosen by cross-validation. ValueError for an unknown method or choice.
    """
    found = {
        setting_name(family, setting): (family.fit, value)
        for family in method_families(method, inputs)
        for setting, value in family.settings.items()
    }
    if choice not in found:
        raise ValueError(f"unknown choice {choice!r} of {method} (valid: {', '.join(found)})")
    fit, value = found[choice]
    scores = np.empty(inputs.labels.shape)
    for fold in stratified_folds(inputs.labels, groups, folds, seed):
        (fitted,) = fit(np.setdiff1d(np.arange(len(scores)), fold), fold, [value])
        scores[fold] = fitted.scores
    return scores


def _latents(inputs: ProbeInputs) -> Iterator[Family]:
    """The feature with the highest AUROC of each emotion; its pooled activation is the score."""
    for pooling, matrix in inputs.pooled.items():

        def fit(
            rows: Rows, scored: Rows, settings: Sequence[Any], matrix: scipy.sparse.csr_matrix = matrix
        ) -> list[Fitted]:
            best = sparse_auroc(matrix[rows], inputs.labels[rows]).auroc.argmax(axis=1)
            scores = matrix[scored].tocsc()[:, best].toarray().astype(np.float64)
            return [Fitted(scores, tuple(f"feature {feature}" for feature in best))]

        yield Family(pooling, fit)


def _k_sparse(k: int) -> Callable[[ProbeInputs], Iterator[Family]]:
    """Logistic regression on k features, chosen among those that differ most between an emotion and the rest."""

    def families(inputs: ProbeInputs) -> Iterator[Family]:
        for pooling, matrix in inputs.pooled.items():
            for name, transform in TRANSFORMS.items():
                if name == "fires" and pooling in ("mean", "sum"):
                    continue  # as under max

                def fit(
                    rows: Rows,
                    scored: Rows,
                    settings: Sequence[Any],
                    matrix: scipy.sparse.csr_matrix = matrix,
                    transform: Callable[[np.ndarray], np.ndarray] = transform,
                ) -> list[Fitted]:
                    parts = (matrix[rows].tocsc(), matrix[scored].tocsc())
                    for part in parts:
                        part.data = transform(part.data)
                    return _fit_k_sparse(*parts, inputs.labels[rows], settings, k)

                yield Family(f"{pooling}, {name}", fit, SPARSE_SETTINGS)

    return families


def eliminated(
    design: Float[np.ndarray, "row candidate"], target: Bool[np.ndarray, "row"], k: int
) -> Int[np.ndarray, "kept"]:
    """Returns k columns of a standardised design, by recursive feature elimination (Guyon et al. 2002).

    A logistic regression is fitted and the half of the columns with the smaller weights left out, until k remain. It is
    strongly regularised, so that weak columns which repeat one another share the weight and average their noise.
    Adding columns one after the other by their score statistic does worse: with about a hundred texts of an emotion,
    later columns are chosen by chance (mean AUROC of k = 16 over 12 emotions of GoEmotions, 3,300 texts, three folds:
    0.906 against 0.918).
    """
    left = np.arange(design.shape[1])
    while len(left) > k:
        weights, _ = fit_logistics(design[:, left], target[:, None], ELIMINATION_STRENGTH)
        left = left[np.argsort(-np.abs(weights[:, 0]), kind="stable")[: max(k, len(left) // 2)]]
    return left


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": np.asarray,
    "square root": np.sqrt,
    "fires": lambda values: (values > 0).astype(np.float32),
}


SELECTIONS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "strongest": lambda design, target, k: np.arange(min(k, design.shape[1])),
    "eliminated": eliminated,
}
"""Candidates stand in the order of their strength."""
SPARSE_SETTINGS = {
    f"{selection}, C {strength:g}": (selection, strength) for selection in SELECTIONS for strength in SPARSE_STRENGTHS
}


def _fit_k_sparse(
    columns: scipy.sparse.csc_matrix,
    scored_columns: scipy.sparse.csc_matrix,
    labels: Bool[np.ndarray, "row emotion"],
    settings: Sequence[tuple[str, float]],
    k: int,
) -> list[Fitted]:
    candidates = _strongest(columns, labels)
    scores = np.zeros((len(settings), scored_columns.get_shape()[0], labels.shape[1]))
    details: list[list[str]] = [[] for _ in settings]
    for emotion, (target, features) in enumerate(zip(labels.T, candidates, strict=True)):
        design, unseen = standardised(columns[:, features].toarray(), scored_columns[:, features].toarray())
        kept = {
            selection: SELECTIONS[selection](design, target, k)
            for selection in dict.fromkeys(one[0] for one in settings)
        }
        for place, (selection, strength) in enumerate(settings):
            chosen = kept[selection]
            weights, bias = fit_logistics(design[:, chosen], target[:, None], strength)
            scores[place, :, emotion] = unseen[:, chosen] @ weights[:, 0] + bias
            details[place].append(f"features {', '.join(map(str, features[chosen]))}")
    return [Fitted(own, tuple(detail)) for own, detail in zip(scores, details, strict=True)]


def _strongest(
    columns: scipy.sparse.csc_matrix, labels: Bool[np.ndarray, "row emotion"]
) -> Int[np.ndarray, "emotion candidate"]:
    """Returns the features whose means in and out of class differ most, counted in standard errors, of either sign.

    The error is the larger one of the pooled and the unpooled: with the pooled one alone, a feature that fires on two
    texts, both in class, comes first.
    """
    n_in = labels.sum(axis=0)[:, None].astype(np.float64)
    n_out = len(labels) - n_in
    positives = scipy.sparse.csr_matrix(labels.T, dtype=np.float64)
    squares = columns.multiply(columns)
    sum_in, square_in = (scipy.sparse.csr_matrix(positives @ part).toarray() for part in (columns, squares))
    total, square = (np.asarray(part.sum(axis=0, dtype=np.float64)) for part in (columns, squares))
    mean_in, mean_out = sum_in / n_in, (total - sum_in) / n_out
    variance_in, variance_out = square_in / n_in - mean_in**2, (square - square_in) / n_out - mean_out**2
    variance = square / len(labels) - (total / len(labels)) ** 2
    error = np.maximum(variance_in / n_in + variance_out / n_out, variance * (1 / n_in + 1 / n_out))
    usable = variance > 1e-6 * square / len(labels)
    strength = np.where(usable, np.abs(mean_in - mean_out) / np.sqrt(np.where(usable, error, 1)), -1.0)
    return np.argsort(-strength, axis=1, kind="stable")[:, : min(CANDIDATES, int(usable.sum()))]


def _differences(standardise: bool) -> Callable[[ProbeInputs], Iterator[Family]]:
    """The projection on the mean of an emotion's texts minus the mean of all others."""

    def families(inputs: ProbeInputs) -> Iterator[Family]:
        for pooling, values in inputs.dense.items():

            def fit(rows: Rows, scored: Rows, settings: Sequence[Any], values: np.ndarray = values) -> list[Fitted]:
                ours, theirs = values[rows], values[scored]
                if standardise:
                    ours, theirs = standardised(ours, theirs)
                labels = inputs.labels[rows]
                n_in = labels.sum(axis=0)
                contrast = np.where(labels, 1 / n_in, -1 / (len(labels) - n_in)).astype(ours.dtype)
                return [_without_details((theirs @ (ours.T @ contrast)).astype(np.float64))]

            yield Family(pooling, fit)

    return families


def _dense_probes(inputs: ProbeInputs) -> Iterator[Family]:
    """Logistic regression on all standardised dimensions."""
    for pooling, values in inputs.dense.items():

        def fit(rows: Rows, scored: Rows, settings: Sequence[Any], values: np.ndarray = values) -> list[Fitted]:
            design, unseen = standardised(values[rows], values[scored])
            return list(map(_without_details, _logistic_path(design, unseen, inputs.labels[rows], settings)))

        yield Family(pooling, fit, _strengths(DENSE_STRENGTHS))


def _neurons(inputs: ProbeInputs) -> Iterator[Family]:
    """The dimension with the AUROC farthest from one half, turned round where it is below."""
    for pooling, values in inputs.dense.items():

        def fit(rows: Rows, scored: Rows, settings: Sequence[Any], values: np.ndarray = values) -> list[Fitted]:
            aurocs = _dense_aurocs(values[rows], inputs.labels[rows])
            best = np.abs(aurocs - 0.5).argmax(axis=1)
            signs = np.where(aurocs[np.arange(len(best)), best] < 0.5, -1.0, 1.0)
            details = tuple(f"{'-' if sign < 0 else ''}dimension {at}" for sign, at in zip(signs, best, strict=True))
            return [Fitted(values[scored][:, best] * signs, details)]

        yield Family(pooling, fit)


def _dense_aurocs(
    values: Float[np.ndarray, "row column"], labels: Bool[np.ndarray, "row emotion"]
) -> Float[np.ndarray, "emotion column"]:
    n_in = labels.sum(axis=0)[:, None]
    positives = labels.T.astype(np.float64)
    rank_sums = [
        positives @ rankdata(values[:, first : first + COLUMNS_RANKED_AT_ONCE], axis=0)
        for first in range(0, values.shape[1], COLUMNS_RANKED_AT_ONCE)
    ]
    return (np.hstack(rank_sums) - n_in * (n_in + 1) / 2) / (n_in * (len(labels) - n_in))


def _words(inputs: ProbeInputs) -> Iterator[Family]:
    """Logistic regression on TF-IDF of single words and pairs, the vocabulary learned where it is fitted."""

    def fit(rows: Rows, scored: Rows, settings: Sequence[Any]) -> list[Fitted]:
        ours, theirs = ([inputs.texts[row] for row in part] for part in (rows, scored))
        vocabulary, idf = learn_vocabulary(ours, WORDS, MOST_FEATURES)
        design, unseen = (tfidf_matrix(part, WORDS, vocabulary, idf) for part in (ours, theirs))
        return list(map(_without_details, _logistic_path(design, unseen, inputs.labels[rows], settings)))

    yield Family("words and pairs", fit, _strengths(WORD_STRENGTHS))


def _logistic_path(
    design: Design,
    unseen: scipy.sparse.csr_matrix | Float[np.ndarray, "scored feature"],
    labels: Bool[np.ndarray, "text emotion"],
    strengths: Sequence[float],
) -> Iterator[Float[np.ndarray, "scored emotion"]]:
    """Yields the unseen texts' log-odds for each strength, each fit begun where the one before it ended."""
    start = None
    for strength in strengths:
        start = fit_logistics(design, labels, strength, start)
        yield np.asarray(unseen @ start[0].astype(design.dtype) + start[1], dtype=np.float64)


def _strengths(strengths: Sequence[float]) -> dict[str, float]:
    return {f"C {strength:g}": strength for strength in strengths}


def _without_details(scores: Float[np.ndarray, "row emotion"]) -> Fitted:
    return Fitted(scores, ("",) * scores.shape[1])


_FAMILIES: dict[str, Callable[[ProbeInputs], Iterator[Family]]] = {
    "latent": _latents,
    "latents-2": _k_sparse(2),
    "latents-5": _k_sparse(5),
    "latents-16": _k_sparse(16),
    "difference-of-means": _differences(standardise=True),
    "difference-of-means-raw": _differences(standardise=False),
    "dense-probe": _dense_probes,
    "bag-of-words": _words,
    "neuron": _neurons,
}
METHODS = tuple(_FAMILIES)
