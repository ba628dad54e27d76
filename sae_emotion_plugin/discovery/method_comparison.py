"""SAE latents and their baselines in one table: same texts, same splits, every choice made inside the training texts.

The methods are those of `probes`. For each one, cross-validation inside the training texts (near-duplicates
together) chooses pooling, transform and strength by the mean AUROC over emotions; then it is fitted on all training
texts and scores the held-out texts once.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from sae_emotion_plugin.discovery.kept_methods import KeptMethods
from sae_emotion_plugin.discovery.method_table import MEAN, MethodDifference, MethodScore, MethodTable
from sae_emotion_plugin.discovery.probes import (
    METHODS,
    Family,
    Fitted,
    ProbeInputs,
    Rows,
    method_families,
    setting_name,
)
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import auroc, common_enough
from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval, compare_aurocs
from sae_emotion_plugin.evidence.resampling import check_resampling, group_numbers
from sae_emotion_plugin.evidence.selection import Choice, HeldOut, Ledger
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes
from sae_emotion_plugin.text_splits import stratified_folds, stratified_held_out

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

PAIRS = (
    ("latent", "difference-of-means"),
    ("latent", "dense-probe"),
    ("latents-16", "dense-probe"),
    ("latent", "neuron"),
    ("latents-16", "bag-of-words"),
    ("latent", "latents-16"),
)
FOLD_TEXTS = 12_000
"""At most so many training texts take part in cross-validation; the fit after it has them all."""
FEWEST_IN_FOLD = 2
TEXTS_POOLED_AT_ONCE = 8_192
LEVEL = 0.95


def compare_methods(
    codes: SparseCodes,
    dense: Mapping[Pooling, Float[np.ndarray, "text d_in"]],
    texts: LabelledTexts,
    held_out_codes: SparseCodes,
    held_out_dense: Mapping[Pooling, Float[np.ndarray, "held_out d_in"]],
    held_out: LabelledTexts,
    *,
    emotions: Sequence[str] | None = None,
    methods: Sequence[str] = METHODS,
    folds: int = 3,
    margin: float = 0.02,
    seed: int = 0,
    groups: np.ndarray | Sequence[Hashable] | None = None,
    resamples: int = 1_000,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[MethodTable, dict[str, Float[np.ndarray, "held_out emotion"]]]:
    """Returns the table of all methods, and each method's scores of the held-out texts, [text, emotion], for curves.

    Each emotion is one class against all other texts. Every choice is made by `folds`-fold cross-validation inside at
    most 12,000 of the training texts (stratified, near-duplicates together), by the mean AUROC over emotions; the fit
    that scores the held-out texts has all training texts. `meta` holds every candidate's cross-validated AUROC
    (the chosen one's is optimistic) and the ledger of looks at the held-out texts: one for each method.

    Args:
        dense: the residual vectors of the same texts at the dictionary's hook, by pooling.
        margin: what a method may lose against another and still count as not worse.
        groups: what varies independently, a name for each held-out text; by default groups of near-duplicates.
        cache: a folder that keeps what each method chose and scored: an interrupted comparison goes on behind the last
            method that was done, and a second one fits nothing.

    Raises:
        ValueError: codes or vectors of other texts, widths or poolings that differ, vectors that are not finite,
            unknown methods or emotions, emotions with fewer than 20 texts in or out of class on either side or too
            few for the folds.
    """
    check_resampling(LEVEL, resamples)
    methods = _known(methods, METHODS, "methods")
    if not margin >= 0:
        raise ValueError(f"margin must be 0 or more, got {margin}")
    _check_sides(codes, dense, texts, held_out_codes, held_out_dense, held_out)
    chosen = _known(texts.labels if emotions is None else emotions, texts.labels, "emotions")
    labels, held_out_labels = texts.label_matrix(chosen), held_out.label_matrix(chosen)
    for side in (labels, held_out_labels):
        common_enough(side, chosen)
    member = np.asarray(held_out.duplicate_groups) if groups is None else group_numbers(groups, len(groups))
    if len(member) != len(held_out):
        raise ValueError(f"{len(held_out)} held-out texts, but {len(member)} groups")

    inputs = ProbeInputs(
        labels=labels,
        pooled={name: _pooled((codes, held_out_codes), name) for name in get_args(Pooling)},
        dense={name: np.concatenate([dense[name], held_out_dense[name]]) for name in dense},
        texts=(*texts.texts, *held_out.texts),
    )
    parts = _folds(labels, np.asarray(texts.duplicate_groups), chosen, folds, seed)
    train_rows, held_out_rows = np.arange(len(texts)), np.arange(len(texts), len(inputs.texts))
    ledger, choices, fitted = Ledger(), {}, {}
    kept = None if cache is None else KeptMethods(cache, inputs, parts)
    for method in tqdm(methods, desc="methods", disable=not progress):
        done = kept.read(method) if kept else None
        if done is None:
            done = _fitted(method_families(method, inputs), labels, parts, train_rows, held_out_rows)
            if kept:
                kept.write(method, *done)
        choices[method], fitted[method] = done
        part = HeldOut(f"held-out texts, {method}", held_out_labels, ledger)
        part.score(f"{method}: {choices[method].name}", fitted[method].scores, _mean_auroc)
        ledger = part.ledger
        logger.info("%s: %s chosen, held-out AUROC %.3f", method, choices[method].name, ledger.looks[-1].score)
    drawing = {"groups": member, "level": LEVEL, "resamples": resamples, "seed": seed}
    scores = [
        row
        for method in methods
        for row in _scores(method, choices[method], fitted[method], held_out_labels, chosen, drawing)
    ]
    differences = [
        row
        for first, second in PAIRS
        if first in fitted and second in fitted
        for row in _differences(first, second, fitted, held_out_labels, chosen, margin, drawing)
    ]
    meta = {
        "hook_name": codes.hook_name,
        "d_sae": codes.d_sae,
        "emotions": list(chosen),
        "methods": list(methods),
        "folds": folds,
        "seed": seed,
        "margin": margin,
        "level": LEVEL,
        "resamples": resamples,
        "n_texts": {"train": len(texts), "cross_validation": sum(map(len, parts)), "held_out": len(held_out)},
        "n_groups": len(np.unique(member)),
        "texts_on_both_sides": len(set(texts.texts) & set(held_out.texts)),
        "cross_validation": {method: choice.means for method, choice in choices.items()},
        "ledger": ledger.to_dict(),
    }
    return MethodTable(meta, tuple(scores), tuple(differences)), {name: own.scores for name, own in fitted.items()}


def _fitted(
    families: Sequence[Family],
    labels: Bool[np.ndarray, "text emotion"],
    parts: Sequence[Rows],
    rows: Rows,
    scored: Rows,
) -> tuple[Choice, Fitted]:
    """What cross-validation chooses, and its fit on all `rows` with the scores of others."""
    choice = _choice(families, labels, parts)
    ((fit, value),) = (
        (family.fit, value)
        for family in families
        for setting, value in family.settings.items()
        if setting_name(family, setting) == choice.name
    )
    (fitted,) = fit(rows, scored, [value])
    return choice, fitted


def _choice(families: Sequence[Family], labels: Bool[np.ndarray, "text emotion"], parts: Sequence[Rows]) -> Choice:
    """Returns what cross-validation chooses; a family is fitted once in a fold, for all of its settings."""
    found: dict[str, list[float]] = {setting_name(family, one): [] for family in families for one in family.settings}
    for fold in parts:
        rest = np.setdiff1d(np.concatenate(parts), fold)
        for family in families:
            fitted = family.fit(rest, fold, list(family.settings.values()))
            for setting, one in zip(family.settings, fitted, strict=True):
                found[setting_name(family, setting)].append(_mean_auroc(one.scores, labels[fold]))
    best = max(found, key=lambda name: float(np.mean(found[name])))
    return Choice(best, {name: tuple(aurocs) for name, aurocs in found.items()})


def _folds(
    labels: Bool[np.ndarray, "text emotion"],
    groups: Int[np.ndarray, "text"],
    emotions: Sequence[str],
    folds: int,
    seed: int,
) -> list[Rows]:
    taken = np.arange(len(labels))
    if len(labels) > FOLD_TEXTS:
        taken = np.flatnonzero(stratified_held_out(labels, groups, FOLD_TEXTS / len(labels), seed))
    parts = [taken[part] for part in stratified_folds(labels[taken], groups[taken], folds, seed)]
    for part in parts:
        for side in (part, np.setdiff1d(taken, part)):
            common_enough(labels[side], emotions, fewest=FEWEST_IN_FOLD)
    return parts


def _pooled(sides: Sequence[SparseCodes], pooling: Pooling) -> scipy.sparse.csr_matrix:
    """The pooled codes of all sides below one another; a part of the texts at a time, because pooling sorts them."""
    blocks = [
        side.select_texts(range(first, min(first + TEXTS_POOLED_AT_ONCE, side.n_texts))).pooled(pooling)
        for side in sides
        for first in range(0, side.n_texts, TEXTS_POOLED_AT_ONCE)
    ]
    return scipy.sparse.csr_matrix(scipy.sparse.vstack(blocks, "csr"))


def _mean_auroc(scores: Float[np.ndarray, "text emotion"], labels: Bool[np.ndarray, "text emotion"]) -> float:
    return float(np.mean([auroc(own, positive) for own, positive in zip(scores.T, labels.T, strict=True)]))


def _scores(
    method: str,
    choice: Choice,
    fitted: Fitted,
    labels: Bool[np.ndarray, "text emotion"],
    emotions: Sequence[str],
    drawing: Mapping[str, Any],
) -> list[MethodScore]:
    # Constant scores have an AUROC of exactly one half, so that the difference from them has the mean's interval.
    over_chance = compare_aurocs(fitted.scores, np.zeros(fitted.scores.shape), labels, margin=0.0, **drawing)
    low, high = (float(np.clip(0.5 + end, 0, 1)) for end in (over_chance.low, over_chance.high))
    rows = [MethodScore(method, MEAN, over_chance.first, low, high, choice.name)]
    for column, (emotion, detail) in enumerate(zip(emotions, fitted.details, strict=True)):
        found = auroc_interval(fitted.scores[:, column], labels[:, column], **drawing)
        chosen = f"{choice.name}; {detail}" if detail else choice.name
        rows.append(MethodScore(method, emotion, found.mean, found.low, found.high, chosen))
    return rows


def _differences(
    first: str,
    second: str,
    fitted: Mapping[str, Fitted],
    labels: Bool[np.ndarray, "text emotion"],
    emotions: Sequence[str],
    margin: float,
    drawing: Mapping[str, Any],
) -> list[MethodDifference]:
    columns = [list(range(len(emotions))), *([column] for column in range(len(emotions)))]
    rows = []
    for emotion, column in zip((MEAN, *emotions), columns, strict=True):
        ours, theirs = (fitted[name].scores[:, column] for name in (first, second))
        found = compare_aurocs(ours, theirs, labels[:, column], margin=margin, **drawing)
        kept = found.low > -margin
        rows.append(MethodDifference(first, second, emotion, found.difference, found.low, found.high, margin, kept))
    return rows


def _known(asked: Sequence[str], valid: Sequence[str], what: str) -> tuple[str, ...]:
    """The names asked for, once each. ValueError for none and for unknown ones."""
    unknown = [name for name in asked if name not in valid]
    if unknown or not asked:
        raise ValueError(f"unknown {what}: {', '.join(unknown) or 'none given'} (valid: {', '.join(valid)})")
    return tuple(dict.fromkeys(asked))


def _check_sides(
    codes: SparseCodes,
    dense: Mapping[Pooling, np.ndarray],
    texts: LabelledTexts,
    held_out_codes: SparseCodes,
    held_out_dense: Mapping[Pooling, np.ndarray],
    held_out: LabelledTexts,
) -> None:
    sides = ((codes, dense, texts, "texts"), (held_out_codes, held_out_dense, held_out, "held-out texts"))
    for own_codes, own_dense, own_texts, side in sides:
        if own_codes.n_texts != len(own_texts):
            raise ValueError(f"the codes are of {own_codes.n_texts} texts, but there are {len(own_texts)} {side}")
        for pooling, vectors in own_dense.items():
            if len(vectors) != len(own_texts):
                raise ValueError(f"{len(vectors)} {pooling} vectors, but there are {len(own_texts)} {side}")
            if not np.isfinite(vectors).all():
                raise ValueError(f"the {pooling} vectors of the {side} are not all finite")
    ours, theirs = ((side.hook_name, side.d_sae) for side in (codes, held_out_codes))
    if ours != theirs:
        raise ValueError(f"the training codes are of {ours}, the held-out codes of {theirs}")
    widths, held_out_widths = ({name: own.shape[1] for name, own in side.items()} for side in (dense, held_out_dense))
    if not widths or widths != held_out_widths:
        raise ValueError(f"the vectors are {widths or 'of no pooling'}, the held-out ones {held_out_widths}")
