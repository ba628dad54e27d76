"""A model, a dictionary and labelled texts -> features, baselines and controls, all that a discovery's page shows."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float

from sae_emotion_plugin.activations import HookedModel, hook_layer
from sae_emotion_plugin.discovery.absorption import Absorption, absorption
from sae_emotion_plugin.discovery.emotion_features import Discovery, discover
from sae_emotion_plugin.discovery.keywords import emotion_keywords
from sae_emotion_plugin.discovery.layer_scan import LayerScan, scan_layers
from sae_emotion_plugin.discovery.method_comparison import compare_methods
from sae_emotion_plugin.discovery.method_table import MethodTable
from sae_emotion_plugin.discovery.probe_losses import LatentProbes, latent_probes
from sae_emotion_plugin.discovery.probes import METHODS, ProbeInputs, cross_fitted_scores
from sae_emotion_plugin.discovery.rating_correlations import RatingCorrelations, rating_correlations
from sae_emotion_plugin.discovery.reference_margins import ReferenceMargins
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.discovery.scoring import null_runs
from sae_emotion_plugin.discovery.specificity import Specificity, specificity
from sae_emotion_plugin.discovery.transfer import SUBSETS, TransferTable, shared_names, transfer
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.evidence.association import auroc
from sae_emotion_plugin.evidence.calibration import Calibration
from sae_emotion_plugin.evidence.roc import roc_points
from sae_emotion_plugin.feature_roles.output_scores import CANDIDATES
from sae_emotion_plugin.feature_roles.steering_ranks import SteeringRanks, steering_ranks
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages.discovery_charts import RocCurve
from sae_emotion_plugin.pages.discovery_content import DiscoveryContent
from sae_emotion_plugin.pages.report_sections import highlighted_texts, score_distributions
from sae_emotion_plugin.pooled_activations import pooled_activations
from sae_emotion_plugin.rated_texts import RatedTexts
from sae_emotion_plugin.registry import feature_url
from sae_emotion_plugin.sparse_codes import Pooling, encode_texts, token_settings

logger = logging.getLogger(__name__)
Part = TypeVar("Part")

DENSE_POOLINGS: tuple[Pooling, ...] = ("mean", "last", "max", "sum")
DENSE = "dense-probe"
SCAN_TEXTS = 4_000
"""Training texts of the layer scan at most, and half as many held-out ones: it reads every layer of the model."""
TEXTS_SHOWN = 4
"""Held-out texts shown for each emotion."""


@dataclass(frozen=True)
class Study:
    """Features with their baselines and controls; what was not asked for, or could not be computed, is None."""

    scores: FeatureScores
    methods: MethodTable | None
    specificity: Specificity | None
    absorption: Absorption | None
    layers: LayerScan | None
    calibration: Calibration | None
    margins: ReferenceMargins | None
    probes: LatentProbes | None
    ranks: SteeringRanks | None
    ratings: RatingCorrelations | None
    transfers: dict[str, TransferTable]
    """By the name of the other corpus."""
    left_out: dict[str, str]
    """Why a part is missing, by its name."""
    content: DiscoveryContent
    """The page of all this."""

    def save(self, path: str | Path) -> Path:
        """Returns `path` after writing everything beside the scores there as JSON."""
        parts = {"methods": self.methods, "specificity": self.specificity, "absorption": self.absorption}
        parts |= {"layers": self.layers, "margins": self.margins, "probes": self.probes}
        parts |= {"steering_ranks": self.ranks, "ratings": self.ratings}
        document: dict[str, Any] = {name: None if part is None else part.to_dict() for name, part in parts.items()}
        document["transfers"] = {name: table.to_dict() for name, table in self.transfers.items()}
        found = self.calibration
        document["calibration"] = None if found is None else {**asdict(found), "holds": found.holds}
        document["left_out"] = self.left_out
        return write_whole(path, json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def study(
    model: HookedModel,
    sae: Any,
    texts: LabelledTexts,
    held_out: LabelledTexts | None = None,
    *,
    pooling: Pooling | Literal["choose"] = "max",
    emotions: Sequence[str] | None = None,
    top: int = 50,
    skip_rare: bool = False,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Study:
    """Returns what `discover` finds, compared with baselines, and what else the features could be reading.

    `options` are those of `examine`; the rest are those of `discover`.
    """
    shared: dict[str, Any] = {"skip_rare": skip_rare, "seed": seed, "cache": cache, "progress": progress}
    found = discover(model, sae, texts, held_out, pooling=pooling, emotions=emotions, top=top, **shared)
    return examine(model, sae, found, **shared, **options)


def examine(
    model: HookedModel,
    sae: Any,
    found: Discovery,
    *,
    title: str = "Emotion features",
    methods: Sequence[str] = METHODS,
    permutations: int = 20,
    candidates: int = CANDIDATES,
    scan: bool = True,
    margins: ReferenceMargins | None = None,
    ratings: RatedTexts | None = None,
    others: Mapping[str, LabelledTexts] | None = None,
    skip_rare: bool = False,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Study:
    """Returns a discovery compared with baselines, and what else its features could be reading.

    The baselines (`method_comparison`), specificity and absorption are measured on the held-out texts with choices
    made inside the training texts; a part for which the texts are too few is left out, and `left_out` says why.

    Args:
        methods: the baselines, and the latents beside them; the dense probe, by which absorption is measured, always is
            among them.
        permutations: how often the training labels are permuted to see whether the tests keep their promise; 0: never.
        candidates: how many of an emotion's best features are asked what adding them does (`steering_ranks`); 0: none.
        scan: whether every layer is probed, on at most 4,000 training texts.
        margins: over reference dictionaries, measured before (`reference_margins`).
        ratings: texts with ratings, with which the best features are correlated (`rating_correlations`).
        others: other corpora by name, on which the best features are scored (`transfer`).
        cache: a folder that keeps codes, pooled activations and fitted methods: an interrupted run goes on, and a
            second one only reads them.
    """
    scores, chosen = found.scores, found.scores.emotions
    pooling: Pooling = scores.meta["pooling"]
    best = {emotion: scores.top(emotion, 1)[0].feature for emotion in chosen}
    left_out: dict[str, str] = {}

    def tried(name: str, compute: Callable[[], Part]) -> Part | None:
        try:
            return compute()
        except ValueError as error:
            left_out[name] = str(error)
            logger.warning("no %s: %s", name, error)
            return None

    asked = tuple(dict.fromkeys((*methods, DENSE)))
    compared = tried("methods", lambda: _compared(model, sae, found, asked, seed, cache, progress))
    table, method_scores, absorbed = compared or (None, {}, None)
    sides = (found.train_codes, found.train, found.held_out_codes, found.held_out)
    probes = tried("probes", lambda: latent_probes(*sides, emotions=chosen, pooling=pooling))
    specific = tried(
        "specificity",
        lambda: specificity(
            *(found.held_out_codes, found.held_out, scores),
            keywords=emotion_keywords(found.train, chosen),
            seed=seed,
        ),
    )
    layers = calibration = ranks = correlations = None
    if scan:
        layers = tried("layers", lambda: _scanned(model, sae, found, skip_rare, seed, cache, progress))
    if permutations:
        calibration = tried(
            "calibration",
            lambda: null_runs(
                *(found.train_codes, found.train),
                pooling=pooling,
                emotions=chosen,
                permutations=permutations,
                skip_rare=True,
                seed=seed,
                progress=progress,
            ),
        )
    if candidates:
        ranks = tried(
            "steering_ranks",
            lambda: steering_ranks(model, sae, scores, candidates=candidates, progress=progress),
        )
    if ratings is not None:
        correlations = tried(
            "ratings",
            lambda: rating_correlations(
                encode_texts(model, sae, ratings.texts, cache=cache, progress=progress),
                *(best, ratings.ratings),
                pooling=pooling,
                groups=ratings.documents,
                seed=seed,
            ),
        )
    transferred = {
        name: tried(f"transfer to {name}", lambda: _transferred(model, sae, found, texts, seed, cache, progress))  # noqa: B023
        for name, texts in (others or {}).items()
    }
    transfers = {name: one for name, one in transferred.items() if one is not None}
    labels = found.held_out.label_matrix(chosen)
    named = {row.feature for row in scores.rows} | {row.feature for row in (probes.rows if probes else ())}
    named |= {one.feature for row in (absorbed.rows if absorbed else ()) for one in row.absorbers}
    named |= {
        row.ceiling_feature for table in transfers.values() for row in table.rows if row.ceiling_feature is not None
    }
    links = {feature: feature_url(sae.cfg.metadata.neuronpedia_id, feature) for feature in sorted(named)}
    content = DiscoveryContent(
        title=title,
        meta={**scores.meta, "left_out": left_out},
        scores=scores,
        methods=table,
        rocs=_curves(method_scores, labels, chosen) or None,
        specificity=specific,
        absorption=absorbed,
        activations=score_distributions(scores, found.held_out_codes, found.held_out),
        examples=highlighted_texts(model, scores, found.held_out_codes, found.held_out, TEXTS_SHOWN),
        layers=layers,
        calibration=calibration,
        margins=margins,
        links={feature: link for feature, link in links.items() if link},
        probes=probes,
        ranks=ranks,
        ratings=correlations,
        transfers=transfers,
    )
    return Study(
        *(scores, table, specific, absorbed, layers, calibration, margins, probes, ranks, correlations),
        transfers=transfers,
        left_out=left_out,
        content=content,
    )


def _transferred(
    model: HookedModel,
    sae: Any,
    found: Discovery,
    texts: LabelledTexts,
    seed: int,
    cache: str | Path | None,
    progress: bool,
) -> TransferTable:
    """The best features on other texts; those that are near-duplicates of training texts are left out."""
    names = shared_names(found.scores.emotions, texts.labels)
    if not names:
        ours, theirs = ", ".join(found.scores.emotions), ", ".join(texts.labels)
        raise ValueError(f"the texts share no label with the scores: they have {theirs}; the scores {ours}")
    new, _ = without_overlap(texts, found.train)
    codes = encode_texts(model, sae, new, cache=cache, progress=progress)
    return transfer(found.scores, codes, new, names=names, subsets=SUBSETS, seed=seed)


def _compared(
    model: HookedModel,
    sae: Any,
    found: Discovery,
    asked: Sequence[str],
    seed: int,
    cache: str | Path | None,
    progress: bool,
) -> tuple[MethodTable, dict[str, Float[np.ndarray, "held_out emotion"]], Absorption]:
    """The method table, each method's held-out scores, and where the dense probe is sure and the feature silent."""
    hook_name, emotions = found.train_codes.hook_name, found.scores.emotions
    dense, held_out_dense = (
        pooled_activations(
            model, part, [hook_name], poolings=DENSE_POOLINGS, cache=cache, progress=progress, **token_settings(sae)
        )[hook_name]
        for part in (found.train, found.held_out)
    )
    methods, scores = compare_methods(
        *(found.train_codes, dense, found.train, found.held_out_codes, held_out_dense, found.held_out),
        emotions=emotions,
        methods=asked,
        seed=seed,
        cache=cache,
        progress=progress,
    )
    inputs = ProbeInputs(labels=found.train.label_matrix(emotions), pooled={}, dense=dense, texts=found.train.texts)
    inside = cross_fitted_scores(
        DENSE, methods.of(DENSE).choice, inputs, np.asarray(found.train.duplicate_groups), seed=seed
    )
    absorbed = absorption(
        *(found.held_out_codes, found.held_out),
        {emotion: found.scores.top(emotion, 1)[0].feature for emotion in emotions},
        dict(zip(emotions, scores[DENSE].T, strict=True)),
        train=found.train,
        train_scores=dict(zip(emotions, inside.T, strict=True)),
    )
    return methods, scores, absorbed


def _scanned(
    model: HookedModel,
    sae: Any,
    found: Discovery,
    skip_rare: bool,
    seed: int,
    cache: str | Path | None,
    progress: bool,
) -> LayerScan:
    rng = np.random.default_rng(seed)
    texts, held_out = (
        part.select(np.sort(rng.permutation(len(part))[:most]))
        for part, most in ((found.train, SCAN_TEXTS), (found.held_out, SCAN_TEXTS // 2))
    )
    layer = hook_layer(found.train_codes.hook_name)
    ours = {layer: sae} if layer is not None and found.train_codes.hook_name.endswith("hook_resid_post") else {}
    return scan_layers(
        *(model, texts, held_out),
        dictionaries=ours,
        emotions=found.scores.emotions,
        skip_rare=skip_rare,
        seed=seed,
        cache=cache,
        progress=progress,
        **token_settings(sae),
    )


def _curves(
    scores: Mapping[str, Float[np.ndarray, "text emotion"]],
    labels: Bool[np.ndarray, "text emotion"],
    emotions: Sequence[str],
) -> list[RocCurve]:
    """The held-out ROC curve of the best feature and of the baselines that it has to stand beside."""
    return [
        RocCurve(emotion, method, roc_points(own, positive), auroc(own, positive))
        for method in ("latent", "difference-of-means", DENSE)
        if method in scores
        for emotion, own, positive in zip(emotions, scores[method].T, labels.T, strict=True)
    ]
