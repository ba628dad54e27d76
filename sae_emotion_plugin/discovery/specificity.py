"""Held-out codes and labels -> is a feature one emotion's, or valence's, a keyword's, swearing's? `Specificity`."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from sae_emotion_plugin.discovery.keywords import EmotionKeywords
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import sparse_auroc
from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval, compare_aurocs
from sae_emotion_plugin.evidence.resampling import check_resampling, checked_values, group_numbers
from sae_emotion_plugin.evidence.stratified import length_strata, stratified_mann_whitney
from sae_emotion_plugin.judges.judge import valence as vader_valence
from sae_emotion_plugin.judges.profanity import is_profane
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes

if TYPE_CHECKING:
    pass

FEWEST_GROUPS = 10
"""With fewer groups of texts in or out of class there is no AUROC."""
NEAREST_RIVALS = 3
"""How many of the largest other AUROCs the lower end of the margin has to hold against."""
VADER_COVERS = 0.5
"""Where VADER has a valence for fewer texts it does not know their language; of GoEmotions it has one for 79 %."""
_PLEASANT = (
    *("admiration", "amusement", "approval", "caring", "desire", "excitement"),
    *("gratitude", "joy", "love", "optimism", "pride", "relief"),
)
_UNPLEASANT = (
    *("anger", "annoyance", "disappointment", "disapproval", "disgust", "embarrassment"),
    *("fear", "grief", "nervousness", "remorse", "sadness"),
)
GOEMOTIONS_VALENCE: Mapping[str, int] = {**dict.fromkeys(_PLEASANT, 1), **dict.fromkeys(_UNPLEASANT, -1)}
"""The sign of GoEmotions' emotions as its authors group them (Demszky et al. 2020); the ambiguous ones have none."""


@dataclass(frozen=True)
class SpecificityRow:
    """An emotion's feature on held-out texts; an AUROC is of the emotion's texts over all others, or it says else."""

    emotion: str
    feature: int
    auroc: float
    rival: str
    """The emotion with the largest other AUROC of this feature."""
    rival_auroc: float
    """Of the rival's texts over all others."""
    margin: float
    """`auroc` minus `rival_auroc`; a text with both labels is a positive of both."""
    low: float
    """Lower end of the margin's interval, the lowest over the 3 largest rivals: no luck in who is the largest."""
    high: float
    """Upper end of the margin's interval, against `rival`."""
    valence_free: float | None
    """AUROC within strata of equal valence: over pairs of texts that valence cannot tell apart."""
    keyword_free: float | None
    """AUROC among the texts without a keyword of the emotion; None with fewer than 10 groups of texts in or out."""
    n_keyword_free: int
    """The emotion's texts without a keyword."""
    profanity_free: float | None
    """AUROC among the texts that do not swear; None as above."""
    n_profanity_free: int
    """The emotion's texts that do not swear."""
    keyword_free_low: float | None = None
    keyword_free_high: float | None = None
    profanity_free_low: float | None = None
    profanity_free_high: float | None = None
    n_valence_free: int = 0
    """The emotion's texts in strata that also hold others."""
    direct: float | None = None
    """AUROC of the emotion's texts over the rival's, without those that have both labels or neither."""
    direct_low: float | None = None
    direct_high: float | None = None


@dataclass(frozen=True, repr=False)
class Specificity(ResultTable):
    """One row for each emotion's feature, their AUROC for every emotion, and in `meta` how they were found."""

    row_type = SpecificityRow
    head = (
        *("emotion", "feature", "AUROC", "rival", "margin", "over the rival's texts"),
        *("valence-free", "keyword-free (texts)", "profanity-free (texts)"),
    )

    meta: dict[str, Any]
    rows: tuple[SpecificityRow, ...]
    matrix: Float[np.ndarray, "feature emotion"]
    """Held-out AUROC of each row's feature for each row's emotion, both in the order of `rows`."""

    @property
    def emotions(self) -> tuple[str, ...]:
        """The emotions, in the order of the rows."""
        return tuple(row.emotion for row in self.rows)

    @property
    def features(self) -> dict[str, int]:
        """Each emotion's feature."""
        return {row.emotion: row.feature for row in self.rows}

    def of(self, emotion: str) -> SpecificityRow:
        """Returns the emotion's row. ValueError if there is none."""
        if emotion not in self.emotions:
            raise ValueError(f"no specificity of {emotion!r} (valid: {', '.join(self.emotions)})")
        return self.rows[self.emotions.index(emotion)]

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: `{"meta": {...}, "rows": [{...}, ...], "matrix": [[...], ...]}`."""
        return {"meta": self.meta, "rows": [asdict(row) for row in self.rows], "matrix": self.matrix.tolist()}

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        left_out = f"; too few texts for {', '.join(self.meta['left_out'])}" if self.meta["left_out"] else ""
        summary = (
            f"held-out AUROC of each emotion's feature over {self.meta['n_texts']} texts, and its margin over the "
            f"emotion it tells next best, {self.meta['level']:.0%} intervals{left_out}"
        )
        return summary, [_table_cells(row) for row in self.rows]


def specificity(
    codes: SparseCodes,
    texts: LabelledTexts,
    features: FeatureScores | Mapping[str, int],
    *,
    keywords: Mapping[str, EmotionKeywords],
    pooling: Pooling | None = None,
    valence: Num[np.ndarray, "text"] | None = None,
    groups: np.ndarray | Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Specificity:
    """Returns what else than its emotion each emotion's feature tells, on texts that had no part in choosing it.

    Valence is removed by strata and not by regression. Of a rectified feature that reads valence alone, the residual
    of a linear fit kept a held-out AUROC between 0.41 and 0.61 in simulations where the strata left 0.50; of one that
    reads the emotion itself (AUROC 0.69) the residual kept 0.51, the strata 0.69. Strata remove what `valence` knows:
    VADER is blind to a text without words of its lexicon, so `label_valence` asks more.

    Args:
        codes: of `texts`, which are held out.
        features: the feature of each emotion, or scores whose best one is taken.
        keywords: those of each emotion, from training texts (`keywords.emotion_keywords`).
        pooling: that of the scores, or "max".
        valence: of each text, in any unit; by default VADER's, if it says something of half of the texts: there is no
            valence-free AUROC for other languages without it.
        groups: what varies independently, a name for each text; by default groups of near-duplicates.

    An emotion with fewer than 10 groups of texts in or out of class gets no row (`meta["left_out"]`). ValueError when
    fewer than two are left, and for codes of other texts or another dictionary and features that it does not have.
    """
    check_resampling(level, resamples)
    chosen, pooling = _checked(codes, texts, features, keywords, pooling)
    member = np.asarray(texts.duplicate_groups) if groups is None else group_numbers(groups, len(texts))
    all_labels = texts.label_matrix(chosen)
    kept = [i for i, positive in enumerate(all_labels.T) if _enough(positive, np.ones(len(texts), dtype=bool), member)]
    emotions = [list(chosen)[i] for i in kept]
    if len(emotions) < 2:
        few = f"{FEWEST_GROUPS} groups of held-out texts in and out of class"
        raise ValueError(f"specificity needs two emotions with {few}, of {', '.join(chosen)} there are {len(emotions)}")
    labels = all_labels[:, kept]
    columns = codes.pooled(pooling).tocsc()[:, [chosen[emotion] for emotion in emotions]]
    values = columns.toarray()
    matrix = sparse_auroc(columns, labels).auroc.T
    clean = np.array([not is_profane(text) for text in texts.texts])
    source, strata = _valence_strata(texts, valence)
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    rows = []
    for i, emotion in enumerate(emotions):
        scores, positive = values[:, i], labels[:, i]
        rivals = [j for j in np.argsort(-matrix[i], kind="stable").tolist() if j != i][:NEAREST_RIVALS]
        ends = [_margin_ends(scores, positive, labels[:, j], member, options) for j in rivals]
        rival = labels[:, rivals[0]]
        free, n_free = _within(keywords[emotion].free(texts.texts), scores, positive, member, options)
        polite, n_polite = _within(clean, scores, positive, member, options)
        direct, _ = _within(positive != rival, scores, positive, member, options)
        valence_free, n_valence_free = _within_strata(columns[:, [i]], positive, strata)
        rows.append(
            SpecificityRow(
                emotion=emotion,
                feature=chosen[emotion],
                auroc=float(matrix[i, i]),
                rival=emotions[rivals[0]],
                rival_auroc=float(matrix[i, rivals[0]]),
                margin=float(matrix[i, i] - matrix[i, rivals[0]]),
                low=min(low for low, _ in ends),
                high=ends[0][1],
                valence_free=valence_free,
                keyword_free=free[0],
                n_keyword_free=n_free,
                profanity_free=polite[0],
                n_profanity_free=n_polite,
                keyword_free_low=free[1],
                keyword_free_high=free[2],
                profanity_free_low=polite[1],
                profanity_free_high=polite[2],
                n_valence_free=n_valence_free,
                direct=direct[0],
                direct_low=direct[1],
                direct_high=direct[2],
            )
        )
    meta = {
        "hook_name": codes.hook_name,
        "d_sae": codes.d_sae,
        "pooling": pooling,
        **options,
        "n_texts": len(texts),
        "n_groups": len(np.unique(member)),
        "class_counts": dict(zip(emotions, labels.sum(axis=0).tolist(), strict=True)),
        "left_out": [emotion for emotion in chosen if emotion not in emotions],
        "valence": source,
        "valence_strata": 0 if strata is None else int(strata.max()) + 1,
        "keywords": {emotion: keywords[emotion].to_dict() for emotion in emotions},
    }
    return Specificity(meta, tuple(rows), matrix)


def label_valence(texts: LabelledTexts, signs: Mapping[str, int] = GOEMOTIONS_VALENCE) -> Float[np.ndarray, "text"]:
    """Returns 1 for texts whose labels are pleasant, -1 for unpleasant, 0 for both or neither, by the labels' `signs`.

    As `valence` of `specificity` it compares anger with the other unpleasant emotions only.
    """
    sides = [{np.sign(signs[label]) for label in labels if signs.get(label)} for labels in texts.emotions]
    return np.array([float(side.pop()) if len(side) == 1 else 0.0 for side in sides])


def _checked(
    codes: SparseCodes,
    texts: LabelledTexts,
    features: FeatureScores | Mapping[str, int],
    keywords: Mapping[str, EmotionKeywords],
    pooling: Pooling | None,
) -> tuple[dict[str, int], Pooling]:
    if codes.n_texts != len(texts):
        raise ValueError(f"the codes are of {codes.n_texts} texts, but there are {len(texts)} held-out texts")
    if isinstance(features, FeatureScores):
        ours = {name: features.meta.get(name, getattr(codes, name)) for name in ("hook_name", "d_sae")}
        theirs = {name: getattr(codes, name) for name in ours}
        if ours != theirs:
            raise ValueError(f"the scores are of {ours}, the codes of {theirs}")
        pooling = pooling or features.meta.get("pooling")
        features = {emotion: features.top(emotion, 1)[0].feature for emotion in features.emotions}
    wrong = [f"{feature} ({emotion})" for emotion, feature in features.items() if not 0 <= feature < codes.d_sae]
    if wrong:
        raise ValueError(f"no such features: {', '.join(wrong)} (valid: 0 to {codes.d_sae - 1})")
    missing = [emotion for emotion in features if emotion not in keywords]
    if missing:
        raise ValueError(f"no keywords of {', '.join(missing)} (there are those of {', '.join(keywords)})")
    return dict(features), pooling or "max"


def _enough(
    positive: Bool[np.ndarray, "text"], kept: Bool[np.ndarray, "text"], member: Int[np.ndarray, "text"]
) -> bool:
    return all(len(np.unique(member[kept & side])) >= FEWEST_GROUPS for side in (positive, ~positive))


def _margin_ends(
    scores: Num[np.ndarray, "text"],
    positive: Bool[np.ndarray, "text"],
    rival: Bool[np.ndarray, "text"],
    member: Int[np.ndarray, "text"],
    options: Mapping[str, Any],
) -> tuple[float, float]:
    """Returns the ends of the interval of one score's AUROC for one label minus that for another."""
    # compare_aurocs averages over labels that both methods score. A constant has AUROC 0.5 in every resample, so this
    # pair differs by half of what is asked: (AUROC + 0.5) / 2 - (0.5 + rival's AUROC) / 2.
    nothing = np.zeros_like(scores)
    found = compare_aurocs(
        np.column_stack([scores, nothing]),
        np.column_stack([nothing, scores]),
        np.column_stack([positive, rival]),
        margin=0.0,
        groups=member,
        **options,
    )
    return 2 * found.low, 2 * found.high


def _within(
    kept: Bool[np.ndarray, "text"],
    scores: Num[np.ndarray, "text"],
    positive: Bool[np.ndarray, "text"],
    member: Int[np.ndarray, "text"],
    options: Mapping[str, Any],
) -> tuple[tuple[float | None, float | None, float | None], int]:
    """Returns AUROC and ends of its interval among some texts (None where too few), and how many are positive."""
    n_in = int((positive & kept).sum())
    if not _enough(positive, kept, member):
        return (None, None, None), n_in
    found = auroc_interval(scores[kept], positive[kept], groups=member[kept], **options)
    return (found.mean, found.low, found.high), n_in


def _within_strata(
    column: Any, positive: Bool[np.ndarray, "text"], strata: Int[np.ndarray, "text"] | None
) -> tuple[float | None, int]:
    if strata is None:
        return None, 0
    sides = [set(strata[side].tolist()) for side in (positive, ~positive)]
    used = np.isin(strata, list(sides[0] & sides[1]))
    n_in = int((positive & used).sum())
    if min(n_in, int((~positive & used).sum())) < FEWEST_GROUPS:
        return None, n_in
    return float(stratified_mann_whitney(column, positive[:, None], strata).auroc[0, 0]), n_in


def _valence_strata(
    texts: LabelledTexts, valence: Num[np.ndarray, "text"] | None
) -> tuple[str, Int[np.ndarray, "text"] | None]:
    """Returns where the valence comes from, and about 20 strata of it."""
    source = "given"
    if valence is None:
        valence = np.array([vader_valence(text) for text in texts.texts])
        source = f"VADER, not 0 in {np.mean(valence != 0):.0%} of the texts"
        if np.mean(valence != 0) < VADER_COVERS:
            return f"none ({source})", None
    if len(valence) != len(texts):
        raise ValueError(f"{len(texts)} held-out texts, but {len(valence)} valences")
    values = checked_values(valence, "valences")
    # Valence may be below 0, which the strata of lengths may not.
    return source, length_strata(values - values.min())


def _table_cells(row: SpecificityRow) -> tuple[str, ...]:
    keyword_free = _cell(row.keyword_free, row.keyword_free_low, row.keyword_free_high)
    profanity_free = _cell(row.profanity_free, row.profanity_free_low, row.profanity_free_high)
    return (
        row.emotion,
        str(row.feature),
        f"{row.auroc:.3f}",
        f"{row.rival} {row.rival_auroc:.3f}",
        f"{row.margin:+.3f} [{row.low:+.3f}, {row.high:+.3f}]",
        _cell(row.direct, row.direct_low, row.direct_high),
        _cell(row.valence_free),
        f"{keyword_free} ({row.n_keyword_free})",
        f"{profanity_free} ({row.n_profanity_free})",
    )


def _cell(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
