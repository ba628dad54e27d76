"""Labelled texts -> how well each layer's residual tells an emotion, by a linear probe and by a single SAE feature."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, Pooling, canonical_hook
from sae_emotion_plugin.discovery.scoring import score_features
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import auroc, common_enough
from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval, compare_aurocs
from sae_emotion_plugin.evidence.logistic import fit_logistics, standardised
from sae_emotion_plugin.evidence.resampling import check_resampling
from sae_emotion_plugin.pooled_activations import pooled_activations
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import encode_texts
from sae_emotion_plugin.text_splits import stratified_folds

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

MEAN = "mean"
"""What stands for the emotion in the rows of the mean over emotions."""
STRENGTHS = (0.0003, 0.003, 0.03, 0.3)
"""Inverse regularisation strengths to choose from, beside the summed losses on standardised dimensions."""
FOLDS = 3
FEWEST_GROUPS = 5
"""Of near-duplicates in and out of an emotion, on either side; with fewer, folds and resamples lack a class."""


@dataclass(frozen=True)
class LayerScore:
    """How well one layer's residual, pooled over a text, tells one emotion from the rest."""

    layer: int
    hook_name: str
    pooling: str
    emotion: str
    """`mean` in the row of the mean over emotions."""
    probe: float
    """Held-out AUROC of the logistic probe."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    latent: float | None = None
    """Held-out AUROC of the SAE feature that is best on the training texts, where there is a dictionary."""
    latent_feature: int | None = None
    """That feature; None in the row of the mean."""
    cross_validated: float | None = None
    """The probe's AUROC by cross-validation inside the training texts: what layers and strengths are chosen by."""


@dataclass(frozen=True, repr=False)
class LayerScan(ResultTable):
    """For each layer and pooling the score of the emotions' mean and of each emotion; in `meta` how it was found."""

    row_type = LayerScore
    head = ("layer", "pooling", "inside training", "probe, held out", "best feature, held out")

    meta: dict[str, Any]
    rows: tuple[LayerScore, ...]

    def best_layer(self, emotion: str = MEAN, pooling: str | None = None) -> LayerScore:
        """Returns the row whose probe is best by cross-validation inside the training texts; the first on a tie.

        The held-out texts had no part in this choice, so that the row's `probe` is an honest figure of it.
        ValueError if there is no row for the emotion (and the pooling).
        """
        rows = [row for row in self.rows if row.emotion == emotion and pooling in (None, row.pooling)]
        known = [row for row in rows if row.cross_validated is not None]
        if not known:
            emotions, poolings = ({getattr(row, name): 0 for row in self.rows} for name in ("emotion", "pooling"))
            raise ValueError(
                f"no cross-validated row for {emotion!r}, pooling {pooling!r} "
                f"(valid: {', '.join(emotions)}; {', '.join(poolings)})"
            )
        return max(known, key=lambda row: row.cross_validated or 0.0)

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        best = self.best_layer()
        summary = (
            f"mean AUROC over {len(self.meta['emotions'])} emotions, with the {self.meta['level']:.0%} interval over "
            f"{self.meta['n_groups']} groups of held-out texts. Best: layer {best.layer}, {best.pooling}, chosen by "
            "cross-validation inside the training texts, not by the held-out column"
        )
        return summary, [
            (
                str(row.layer),
                row.pooling,
                "-" if row.cross_validated is None else f"{row.cross_validated:.3f}",
                f"{row.probe:.3f} [{row.low:.3f}, {row.high:.3f}]",
                "-" if row.latent is None else f"{row.latent:.3f}",
            )
            for row in self.rows
            if row.emotion == MEAN
        ]


def scan_layers(
    model: HookedModel,
    texts: LabelledTexts,
    held_out: LabelledTexts,
    *,
    layers: Sequence[int] | None = None,
    dictionaries: Mapping[int, Any] | None = None,
    poolings: Sequence[Pooling] = ("mean", "last"),
    emotions: Sequence[str] | None = None,
    skip_rare: bool = False,
    context_size: int = 128,
    prepend_bos: bool = True,
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> LayerScan:
    """Returns the held-out AUROC of a linear probe, and of the best single SAE feature, of each emotion and layer.

    The probe is an L2-regularised logistic regression of one emotion against the rest on the residual behind the block,
    pooled over a text and standardised by the training texts. Its strength is chosen for each layer and pooling by
    3-fold cross-validation inside `texts`, near-duplicates in one fold, the same strength for all emotions; they are
    tried from strong to weak for as long as the first fold's mean AUROC rises. The best feature of a dictionary is the
    one with the highest AUROC on `texts` under the row's pooling (`score_features`). Intervals are studentised
    bootstraps over groups of near-duplicates in `held_out`; a layer that is best on `held_out` is no honest choice, see
    `LayerScan.best_layer`. The pooled residuals are all held at once, layers x poolings x texts x width float32.

    Args:
        layers: numbers of blocks; by default all.
        dictionaries: for each layer that has one, an SAE that reads and writes `blocks.<layer>.hook_resid_post`.
        skip_rare: leave out emotions with fewer than 20 training texts instead of refusing them.
        cache: a folder that keeps pooled residuals and codes between runs.

    Raises:
        ValueError: a layer that the model lacks, a dictionary of another hook or of a layer that is not scanned,
            unknown or too rare emotions, and what `pooled_activations` and `score_features` refuse.
    """
    check_resampling(level, resamples)
    chosen_layers = _checked_layers(model, layers)
    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in chosen_layers}
    saes = dict(dictionaries or {})
    _check_dictionaries(model, saes, hooks)
    chosen, labels, held_out_labels = _labels(texts, held_out, emotions, skip_rare)
    folds = stratified_folds(labels, texts.duplicate_groups, FOLDS, seed)
    settings: dict[str, Any] = {"context_size": context_size, "prepend_bos": prepend_bos}
    names = list(hooks.values())
    ours, theirs = (
        pooled_activations(model, part, names, poolings=poolings, cache=cache, progress=progress, **settings)
        for part in (texts, held_out)
    )
    bootstrap: dict[str, Any] = {
        "groups": held_out.duplicate_groups, "level": level, "resamples": resamples, "seed": seed
    }  # fmt: skip
    rows: list[LayerScore] = []
    strengths: dict[str, dict[str, float]] = {}
    for layer, hook in tqdm(hooks.items(), desc="probing layers", unit="layer", disable=not progress):
        latents = _latents(model, saes.get(layer), texts, held_out, chosen, poolings, cache, progress)
        for pooling in dict.fromkeys(poolings):
            design, unseen = standardised(ours[hook][pooling], theirs[hook][pooling])
            scores, inside, strength = _probe(design, unseen, labels, folds)
            strengths.setdefault(str(layer), {})[pooling] = strength
            intervals = _intervals(scores, held_out_labels, bootstrap)
            found = latents.get(pooling, [(None, None)] * (1 + len(chosen)))
            rows += [
                LayerScore(layer, hook, pooling, emotion, *interval, *latent, cross_validated=float(own))
                for emotion, interval, latent, own in zip(
                    (MEAN, *chosen), intervals, found, (inside.mean(), *inside), strict=True
                )
            ]
    meta = {
        "emotions": list(chosen),
        "layers": list(hooks),
        "poolings": list(dict.fromkeys(poolings)),
        "dictionaries": {str(layer): int(sae.cfg.d_sae) for layer, sae in saes.items()},
        **settings,
        "folds": FOLDS,
        "strengths_tried": list(STRENGTHS),
        "strengths": strengths,
        "level": level,
        "resamples": resamples,
        "seed": seed,
        "n_texts": {"train": len(texts), "held_out": len(held_out)},
        "n_groups": len(np.unique(held_out.duplicate_groups)),
        "class_counts": {
            side: dict(zip(chosen, matrix.sum(axis=0).tolist(), strict=True))
            for side, matrix in (("train", labels), ("held_out", held_out_labels))
        },
        "texts_on_both_sides": len(set(texts.texts) & set(held_out.texts)),
    }
    if meta["texts_on_both_sides"]:
        logger.warning(
            "%d distinct texts are both among the training and the held-out texts", meta["texts_on_both_sides"]
        )
    return LayerScan(meta, tuple(rows))


def _probe(
    design: Float[np.ndarray, "text d_in"],
    unseen: Float[np.ndarray, "held_out d_in"],
    labels: Bool[np.ndarray, "text emotion"],
    folds: Sequence[Int[np.ndarray, "_fold_text"]],
) -> tuple[Float[np.ndarray, "held_out emotion"], Float[np.ndarray, "emotion"], float]:
    """The unseen texts' scores, the AUROC of each emotion inside the training texts, and the strength chosen."""
    rests = [np.setdiff1d(np.arange(len(labels)), fold) for fold in folds]
    fits: list[Any] = [None] * len(folds)
    tried: dict[float, tuple[Float[np.ndarray, "emotion"], Any]] = {}

    def aurocs(number: int, strength: float) -> Float[np.ndarray, "emotion"]:
        rest, fold = rests[number], folds[number]
        fits[number] = fit_logistics(design[rest], labels[rest], strength, fits[number])
        return _aurocs(_scores(design[fold], fits[number]), labels[fold])

    highest = 0.0
    for strength in STRENGTHS:
        first = aurocs(0, strength)
        # The weakest regularisation takes most of the time, and beyond the best strength it only gets worse.
        if first.mean() <= highest:
            break
        highest = first.mean()
        others = [aurocs(number, strength) for number in range(1, len(folds))]
        tried[strength] = np.mean([first, *others], axis=0), fits[0]
    strength = max(tried, key=lambda one: tried[one][0].mean())
    inside, start = tried[strength]
    return _scores(unseen, fit_logistics(design, labels, strength, start)), inside, strength


def _scores(
    design: Float[np.ndarray, "text d_in"], fitted: tuple[Float[np.ndarray, "d_in target"], Float[np.ndarray, "target"]]
) -> Float[np.ndarray, "text target"]:
    return design.astype(np.float64) @ fitted[0] + fitted[1]


def _aurocs(
    scores: Float[np.ndarray, "text emotion"], labels: Bool[np.ndarray, "text emotion"]
) -> Float[np.ndarray, "emotion"]:
    return np.array([auroc(own, wanted) for own, wanted in zip(scores.T, labels.T, strict=True)])


def _intervals(
    scores: Float[np.ndarray, "text emotion"], labels: Bool[np.ndarray, "text emotion"], bootstrap: dict[str, Any]
) -> Iterator[tuple[float, float, float]]:
    """AUROC, low and high: of the mean over emotions, then of each emotion."""
    # Beside a score that is the same for all texts, whose AUROC is one half.
    mean = compare_aurocs(scores, np.zeros_like(scores), labels, margin=0.0, **bootstrap)
    yield mean.first, max(0.0, 0.5 + mean.low), min(1.0, 0.5 + mean.high)
    for own, wanted in zip(scores.T, labels.T, strict=True):
        found = auroc_interval(own, wanted, **bootstrap)
        yield found.mean, found.low, found.high


def _latents(
    model: HookedModel,
    sae: Any,
    texts: LabelledTexts,
    held_out: LabelledTexts,
    emotions: Sequence[str],
    poolings: Sequence[Pooling],
    cache: str | Path | None,
    progress: bool,
) -> dict[str, list[tuple[float | None, int | None]]]:
    """For each pooling the held-out AUROC of the best feature, and the feature: of the mean, then of each emotion."""
    if sae is None:
        return {}
    codes, held_out_codes = (
        encode_texts(model, sae, part, cache=cache, progress=progress) for part in (texts, held_out)
    )
    found = {}
    for pooling in poolings:
        best = score_features(
            codes, texts, held_out=(held_out_codes, held_out), pooling=pooling, top=1, emotions=emotions
        )
        own = {row.emotion: (row.held_out_auroc, row.feature) for row in best.rows}
        mean = best.meta["mean_best_held_out_auroc"]
        found[pooling] = [(mean, None), *(own[emotion] for emotion in emotions)]
    return found


def _labels(
    texts: LabelledTexts, held_out: LabelledTexts, emotions: Sequence[str] | None, skip_rare: bool
) -> tuple[tuple[str, ...], Bool[np.ndarray, "text emotion"], Bool[np.ndarray, "held_out emotion"]]:
    """The emotions to scan, and which texts have them."""
    wanted = tuple(dict.fromkeys(texts.labels if emotions is None else emotions))
    if unknown := [emotion for emotion in wanted if emotion not in texts.labels]:
        raise ValueError(f"unknown emotions: {', '.join(unknown)}; the texts have: {', '.join(texts.labels)}")
    if not wanted:
        raise ValueError(f"no emotion to scan for; the texts have: {', '.join(texts.labels) or 'none'}")
    ours, theirs = texts.label_matrix(wanted), held_out.label_matrix(wanted)
    kept = common_enough(ours, wanted, skip_rare=skip_rare)
    chosen, ours, theirs = tuple(wanted[place] for place in kept), ours[:, kept], theirs[:, kept]
    for side, part, matrix in (("training", texts, ours), ("held-out", held_out, theirs)):
        few = []
        for emotion, positive in zip(chosen, matrix.T, strict=True):
            n_in, n_out = (len(np.unique(part.duplicate_groups[members])) for members in (positive, ~positive))
            if min(n_in, n_out) < FEWEST_GROUPS:
                few.append(f"{emotion} ({n_in} in, {n_out} out)")
        if few:
            raise ValueError(f"too few groups of {side} texts for {', '.join(few)}: at least {FEWEST_GROUPS} needed")
    return chosen, ours, theirs


def _checked_layers(model: HookedModel, layers: Sequence[int] | None) -> list[int]:
    n_layers = int(model.cfg.n_layers)
    chosen = sorted(set(range(n_layers) if layers is None else layers))
    if not chosen:
        raise ValueError(f"no layer to scan (valid: 0 to {n_layers - 1})")
    if wrong := [layer for layer in chosen if not 0 <= layer < n_layers]:
        raise ValueError(f"the model has no layer {wrong[0]} (valid: 0 to {n_layers - 1})")
    return chosen


def _check_dictionaries(model: HookedModel, saes: Mapping[int, Any], hooks: Mapping[int, str]) -> None:
    for layer, sae in saes.items():
        if layer not in hooks:
            raise ValueError(f"a dictionary is given for layer {layer}, which is not scanned ({list(hooks)})")
        own = sae.cfg.metadata.hook_name
        if own is None or canonical_hook(model, own) != canonical_hook(model, hooks[layer]):
            raise ValueError(f"the dictionary given for layer {layer} reads {own}, not {hooks[layer]}")
