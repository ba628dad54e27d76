"""SparseCodes and labelled texts -> FeatureScores: which features tell an emotion from the rest."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Num
from scipy.sparse import csc_matrix, csr_matrix

from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import (
    FEWEST_POSITIVES,
    benjamini_hochberg,
    common_enough,
    sparse_auroc,
    sparse_average_precision,
)
from sae_emotion_plugin.evidence.calibration import Calibration, calibrate
from sae_emotion_plugin.evidence.placements import auroc_above
from sae_emotion_plugin.evidence.stratified import length_strata, stratified_mann_whitney
from sae_emotion_plugin.evidence.thresholds import best_threshold, f1_at
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes
from sae_emotion_plugin.text_splits import stratified_folds

logger = logging.getLogger(__name__)

CANDIDATE_POOLINGS: tuple[Pooling, ...] = ("max", "mean", "last", "sum")
FEWEST_PER_CLASS = 2


def score_features(
    codes: SparseCodes,
    texts: LabelledTexts,
    *,
    held_out: tuple[SparseCodes, LabelledTexts] | None = None,
    pooling: Pooling = "max",
    top: int = 50,
    emotions: Sequence[str] | None = None,
    fewest_positives: int = FEWEST_POSITIVES,
    skip_rare: bool = False,
    seed: int = 0,
) -> FeatureScores:
    """Returns the `top` features of each emotion by training AUROC, with their held-out AUROC beside it.

    Each label is one class against all other texts; a text with several labels counts for each. `pooling`
    makes one number of a feature's activations in a text: the largest, the mean or sum over its tokens, or
    the last token's. Without `held_out`, half of the texts are held out (`texts.split(0.5, seed)`, which
    keeps near-duplicates together). The choice of features, `auroc`, `p`, `q`, `rate_in` and `rate_out` use
    the training texts only, `held_out_auroc` the held-out texts only. p and q are those of
    `evidence.stratified`: within strata of equal length, so that length cannot pass for an emotion, and over
    every emotion x every feature that fires in enough training texts. Features without any get no row.

    ValueError for texts of a single class, emotions that are unknown or have fewer than `fewest_positives`
    training texts in or out of class (left out instead with `skip_rare`) or fewer than 2 held-out ones, codes
    of other texts or of another dictionary, and an unknown pooling.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    _check_pair(codes, texts, "texts")
    if held_out is None:
        train_texts, held_out_texts = texts.split(0.5, seed)
        train_codes = codes.select_texts(_positions(train_texts, texts))
        held_out_codes = codes.select_texts(_positions(held_out_texts, texts))
    else:
        train_codes, train_texts = codes, texts
        held_out_codes, held_out_texts = held_out
        _check_pair(held_out_codes, held_out_texts, "held-out texts")
        ours, theirs = ((side.hook_name, side.d_sae) for side in (codes, held_out_codes))
        if ours != theirs:
            raise ValueError(f"the training codes are of {ours}, the held-out codes of {theirs}")
    chosen = _checked_emotions(emotions, texts)
    labels = train_texts.label_matrix(chosen)
    if labels.all():
        raise ValueError(f"all {len(labels)} training texts are of a single class: {', '.join(chosen)}")
    common = common_enough(labels, chosen, fewest=fewest_positives, skip_rare=skip_rare)
    skipped = [emotion for i, emotion in enumerate(chosen) if i not in common]
    chosen, labels = tuple(chosen[i] for i in common), labels[:, common]
    held_out_labels = held_out_texts.label_matrix(chosen)
    _check_enough(held_out_labels, chosen, "held-out")

    pooled = train_codes.pooled(pooling)
    found = sparse_auroc(pooled, labels)
    active = np.flatnonzero(found.rate_in[0] + found.rate_out[0])
    if len(active) == 0:
        raise ValueError("no feature is active in any training text")
    strata = length_strata(train_codes.text_lengths)
    tested = stratified_mann_whitney(pooled, labels, strata)
    q_above = np.ones(tested.p.shape)
    q_above[:, tested.tested] = benjamini_hochberg(auroc_above(pooled, labels, found=found).p[:, tested.tested])
    best = active[np.argsort(-found.auroc[:, active], axis=1, kind="stable")[:, :top]]
    train_matrix, held_out_matrix = pooled.tocsc(), held_out_codes.pooled(pooling).tocsc()
    rows, firsts = [], []
    for i, emotion in enumerate(chosen):
        ours, theirs = train_matrix[:, best[i]], held_out_matrix[:, best[i]]
        positives, held_out_positives = labels[:, i], held_out_labels[:, i]
        on_held_out = sparse_auroc(theirs, held_out_positives[:, None])
        precisions, held_out_precisions = (
            sparse_average_precision(matrix, wanted[:, None])[0]
            for matrix, wanted in ((ours, positives), (theirs, held_out_positives))
        )
        means = [np.asarray(ours[side].mean(axis=0)).ravel() for side in (positives, ~positives)]
        firsts.append(on_held_out.auroc[0, 0])
        rows += [
            FeatureScore(
                emotion=emotion,
                feature=int(feature),
                auroc=float(found.auroc[i, feature]),
                held_out_auroc=float(on_held_out.auroc[0, rank]),
                p=float(tested.p[i, feature]),
                q=float(tested.q[i, feature]),
                rate_in=float(found.rate_in[i, feature]),
                rate_out=float(found.rate_out[i, feature]),
                q_above=float(q_above[i, feature]),
                average_precision=float(precisions[rank]),
                held_out_average_precision=float(held_out_precisions[rank]),
                mean_in=float(means[0][rank]),
                mean_out=float(means[1][rank]),
                threshold=threshold,
                f1=f1,
                held_out_f1=None if threshold is None else f1_at(_dense(theirs, rank), held_out_positives, threshold),
            )
            for rank, feature in enumerate(best[i])
            for threshold, f1 in [best_threshold(_dense(ours, rank), positives)]
        ]
    shared_texts = len(set(train_texts.texts) & set(held_out_texts.texts))
    if shared_texts:
        logger.warning("%d distinct texts are both among the training and the held-out texts", shared_texts)
    meta: dict[str, Any] = {
        "hook_name": codes.hook_name,
        "d_sae": codes.d_sae,
        "pooling": pooling,
        "seed": seed,
        "split": "half of the texts held out" if held_out is None else "held-out texts given",
        "n_texts": {"train": len(train_texts), "held_out": len(held_out_texts)},
        "class_counts": {
            "train": dict(zip(chosen, labels.sum(axis=0).tolist(), strict=True)),
            "held_out": dict(zip(chosen, held_out_labels.sum(axis=0).tolist(), strict=True)),
        },
        "texts_on_both_sides": shared_texts,
        "skipped_rare": skipped,
        "length_strata": int(strata.max()) + 1,
        "n_tests": int(tested.tested.sum()) * len(chosen),
        "n_active_features": len(active),
        "mean_best_held_out_auroc": float(np.mean(firsts)),
    }
    return FeatureScores(meta=meta, rows=tuple(rows))


def choose_pooling(
    codes: SparseCodes,
    texts: LabelledTexts,
    seed: int = 0,
    folds: int = 3,
    *,
    emotions: Sequence[str] | None = None,
) -> Pooling:
    """Returns the pooling whose best single features separate the emotions best, by cross-validation.

    Give it training texts only. In each fold the best feature of each emotion is chosen on the other folds
    and scored on this one; the mean AUROC over folds and emotions decides, and an exact tie goes to the first
    of max, mean, last, sum. Near-duplicates share a fold. An emotion too rare for a fold is left out there.
    """
    _check_pair(codes, texts, "texts")
    chosen = _checked_emotions(emotions, texts)
    labels = texts.label_matrix(chosen)
    parts = stratified_folds(texts.label_matrix(), texts.duplicate_groups, folds, seed)
    pooled: dict[Pooling, csr_matrix] = {pooling: codes.pooled(pooling) for pooling in CANDIDATE_POOLINGS}
    found: dict[Pooling, list[float]] = {pooling: [] for pooling in CANDIDATE_POOLINGS}
    for part in parts:
        rest = np.setdiff1d(np.arange(len(texts)), part)
        usable = np.flatnonzero(_enough(labels[part]) & _enough(labels[rest]))
        for pooling, matrix in pooled.items():
            fitted = sparse_auroc(matrix[rest], labels[np.ix_(rest, usable)])
            best = fitted.auroc.argmax(axis=1)
            scored = sparse_auroc(matrix[part][:, best], labels[np.ix_(part, usable)])
            found[pooling].extend(scored.auroc.diagonal().tolist())
    if not found["max"]:
        raise ValueError(f"{len(texts)} texts are too few for {folds} folds: no emotion is in and out of each")
    means = {pooling: float(np.mean(aurocs)) for pooling, aurocs in found.items()}
    logger.info("cross-validated AUROC of the best features: %s", means)
    return max(CANDIDATE_POOLINGS, key=lambda pooling: means[pooling])


def null_runs(
    codes: SparseCodes,
    texts: LabelledTexts,
    *,
    pooling: Pooling = "max",
    emotions: Sequence[str] | None = None,
    permutations: int = 200,
    skip_rare: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Returns how often the tests of `score_features` find something when the labels are permuted and mean nothing.

    See `evidence.calibration.calibrate`. ValueError for labels with fewer than 20 texts, unless they are skipped.
    """
    _check_pair(codes, texts, "texts")
    chosen = _checked_emotions(emotions, texts)
    return calibrate(
        codes.pooled(pooling),
        texts.label_matrix(chosen),
        length_strata(codes.text_lengths),
        label_names=chosen,
        permutations=permutations,
        skip_rare=skip_rare,
        seed=seed,
        progress=progress,
    )


def _dense(matrix: csc_matrix, column: int) -> Num[np.ndarray, "text"]:
    return matrix[:, [column]].toarray()[:, 0]


def _positions(part: LabelledTexts, whole: LabelledTexts) -> Int[np.ndarray, "text"]:
    position = {text_id: i for i, text_id in enumerate(whole.ids)}
    return np.array([position[text_id] for text_id in part.ids], dtype=np.int64)


def _checked_emotions(emotions: Sequence[str] | None, texts: LabelledTexts) -> tuple[str, ...]:
    valid = tuple(texts.labels)
    if not valid:
        raise ValueError(f"none of the {len(texts)} texts has a label")
    if emotions is None:
        return valid
    unknown = [emotion for emotion in dict.fromkeys(emotions) if emotion not in valid]
    if unknown:
        raise ValueError(f"unknown emotions: {', '.join(unknown)}; the texts have: {', '.join(valid)}")
    if not emotions:
        raise ValueError(f"no emotion was asked for; the texts have: {', '.join(valid)}")
    return tuple(dict.fromkeys(emotions))


def _enough(labels: Bool[np.ndarray, "text emotion"]) -> Bool[np.ndarray, "emotion"]:
    n_in = labels.sum(axis=0)
    return np.minimum(n_in, len(labels) - n_in) >= FEWEST_PER_CLASS


def _check_enough(labels: Bool[np.ndarray, "text emotion"], emotions: Sequence[str], side: str) -> None:
    if labels.all():
        raise ValueError(f"all {len(labels)} {side} texts are of a single class: {', '.join(emotions)}")
    n_in = labels.sum(axis=0)
    too_few = np.flatnonzero(~_enough(labels))
    if len(too_few):
        few = [f"{emotions[i]} ({n_in[i]} in, {len(labels) - n_in[i]} out)" for i in too_few.tolist()]
        needed = f"each emotion needs {FEWEST_PER_CLASS} in and {FEWEST_PER_CLASS} out of class"
        raise ValueError(f"too few {side} texts for {', '.join(few)}: {needed}")


def _check_pair(codes: SparseCodes, texts: LabelledTexts, side: str) -> None:
    if codes.n_texts != len(texts):
        raise ValueError(f"the codes are of {codes.n_texts} texts, but there are {len(texts)} {side}")
