"""Features chosen on one corpus -> how well they tell the emotions of another: other texts, labels or language.

What is lost against the first corpus may be the second one's labels and not the feature. So beside each AUROC stands
the ceiling: the best feature that the second corpus chooses for itself, on texts of its own that neither is scored on.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from sae_emotion_plugin.discovery.keywords import EmotionKeywords, emotion_keywords
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.evidence.association import sparse_auroc
from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval, compare_aurocs
from sae_emotion_plugin.evidence.resampling import check_resampling, group_numbers
from sae_emotion_plugin.judges.corpora import BASIC_EMOTIONS, KOTE_LABELS
from sae_emotion_plugin.judges.profanity import is_profane
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes
from sae_emotion_plugin.text_splits import stratified_held_out

if TYPE_CHECKING:
    pass

Names = Mapping[str, str | tuple[str, ...]]
"""Label of the first corpus -> the second one's label, or several of which any counts."""
SUBSETS = ("all", "keyword-free", "profanity-free")
GOEMOTIONS_TO_XED: Names = {emotion: emotion for emotion in BASIC_EMOTIONS}
GOEMOTIONS_TO_KOTE: Names = {emotion: tuple(labels) for emotion, labels in KOTE_LABELS.items()}
FEWEST_GROUPS = 10
"""With fewer groups of texts in or out of class, on either half, there is no AUROC."""


@dataclass(frozen=True)
class TransferRow:
    """One emotion's feature on one subset of the second corpus; None where it has too few texts."""

    emotion: str
    """By its label in the first corpus."""
    labels: tuple[str, ...]
    """Those of the second corpus that count as it."""
    subset: str
    feature: int
    source_auroc: float | None
    """Held-out AUROC on the first corpus, all texts."""
    auroc: float | None
    """On the scoring half of the second corpus."""
    low: float | None
    high: float | None
    ceiling: float | None
    """AUROC on the same half of the feature that the choosing half of the second corpus likes best."""
    ceiling_feature: int | None
    gap: float | None
    """`ceiling` minus `auroc`."""
    gap_low: float | None
    gap_high: float | None
    rank: int | None
    """Place of the feature among all of the dictionary, by AUROC on the choosing half; 1 is the ceiling's."""
    n_in: int
    """Texts of the emotion in the scoring half."""
    n_out: int


@dataclass(frozen=True, repr=False)
class TransferTable(ResultTable):
    """One row for each emotion and subset, and in `meta` how they were found."""

    row_type = TransferRow
    head = ("emotion", "texts", "feature", "source", "AUROC", "ceiling (feature)", "gap", "rank", "in / out")

    meta: dict[str, Any]
    rows: tuple[TransferRow, ...]

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        n_texts = self.meta["n_texts"]
        summary = (
            f"features chosen on another corpus, on {n_texts['scoring']} texts, beside the best features that "
            f"{n_texts['choosing']} other texts of this corpus choose; {self.meta['level']:.0%} intervals"
        )
        return summary, [
            (
                row.emotion,
                row.subset,
                str(row.feature),
                "-" if row.source_auroc is None else f"{row.source_auroc:.3f}",
                _cell(row.auroc, row.low, row.high),
                "-" if row.ceiling is None else f"{row.ceiling:.3f} ({row.ceiling_feature})",
                _cell(row.gap, row.gap_low, row.gap_high, "+"),
                "-" if row.rank is None else str(row.rank),
                f"{row.n_in} / {row.n_out}",
            )
            for row in self.rows
        ]


def transfer(
    scores: FeatureScores,
    codes_b: SparseCodes,
    texts_b: LabelledTexts,
    *,
    names: Names,
    pooling: Pooling | None = None,
    subsets: Sequence[str] = ("all", "keyword-free"),
    keywords: Mapping[str, EmotionKeywords] | None = None,
    groups: np.ndarray | Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> TransferTable:
    """Returns how well the best features in `scores` tell the emotions of a second corpus.

    Half of the second corpus (whole groups, stratified by label) chooses its own best feature of each emotion and
    ranks the transferred one; both are scored on the other half with the same bootstrap draws, `gap` as a paired
    difference. On a subset, choosing and scoring both see the subset only.

    Between languages give translations of texts that had no part in choosing: a translated training text is one.

    Args:
        names: the emotions to transfer, and which labels of the second corpus count as each (`GOEMOTIONS_TO_XED`,
            `GOEMOTIONS_TO_KOTE`); a text counts that has any of them.
        pooling: that of the scores, or "max".
        keywords: of each emotion in the language of the second corpus; by default learned on its choosing half.
        groups: what varies independently, a name for each text (film, document); by default groups of near-duplicates.

    ValueError for codes of other texts or another dictionary, labels that a corpus lacks, and an unknown subset.
    """
    check_resampling(level, resamples)
    unknown = [subset for subset in subsets if subset not in SUBSETS]
    if unknown:
        raise ValueError(f"unknown subset {unknown[0]!r} (valid: {', '.join(SUBSETS)})")
    wanted = _checked(scores, codes_b, texts_b, names)
    found_pooling: Pooling = pooling or scores.meta.get("pooling") or "max"
    renamed = merged_labels(texts_b, wanted)
    labels = renamed.label_matrix(wanted)
    member = np.asarray(texts_b.duplicate_groups) if groups is None else group_numbers(groups, len(texts_b))
    scoring = stratified_held_out(labels, member, 0.5, seed)
    usable = [
        one
        for one, positive in zip(wanted, labels.T, strict=True)
        if all(_enough(positive[side], member[side]) for side in (scoring, ~scoring))
    ]
    if "keyword-free" not in subsets:
        keywords = {}
    elif keywords is None:
        keywords = emotion_keywords(renamed.select(~scoring), usable)
    elif missing := [one for one in wanted if one not in keywords]:
        raise ValueError(f"no keywords of {', '.join(missing)} (there are those of {', '.join(keywords)})")
    clean = np.array([not is_profane(text) for text in texts_b.texts])
    pooled = codes_b.pooled(found_pooling)
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    rows = []
    for i, (emotion, names_b) in enumerate(wanted.items()):
        best = scores.top(emotion, 1)[0]
        for subset in subsets:
            kept = np.ones(len(texts_b), dtype=bool)
            if subset == "profanity-free":
                kept = clean
            elif subset == "keyword-free" and emotion in usable:
                kept = keywords[emotion].free(texts_b.texts)
            choose, score = np.flatnonzero(kept & ~scoring), np.flatnonzero(kept & scoring)
            positive = labels[:, i]
            figures: dict[str, Any] = dict.fromkeys(_FIGURES)
            if _enough(positive[choose], member[choose]) and _enough(positive[score], member[score]):
                on_choosing = sparse_auroc(pooled[choose], positive[choose, None]).auroc[0]
                rival = int(on_choosing.argmax())
                values = pooled[score].tocsc()[:, [best.feature, rival]].toarray()
                ours = auroc_interval(values[:, 0], positive[score], groups=member[score], **options)
                gap = compare_aurocs(
                    values[:, 1], values[:, 0], positive[score], margin=0.0, groups=member[score], **options
                )
                figures = {
                    "auroc": ours.mean,
                    "low": ours.low,
                    "high": ours.high,
                    "ceiling": gap.first,
                    "ceiling_feature": rival,
                    "gap": gap.difference,
                    "gap_low": gap.low,
                    "gap_high": gap.high,
                    "rank": int((on_choosing > on_choosing[best.feature]).sum()) + 1,
                }
            n_in = int(positive[score].sum())
            source = best.held_out_auroc
            head = (emotion, names_b, subset, best.feature, source)
            rows.append(TransferRow(*head, **figures, n_in=n_in, n_out=len(score) - n_in))
    meta = {
        "hook_name": codes_b.hook_name,
        "d_sae": codes_b.d_sae,
        "pooling": found_pooling,
        **options,
        "names": {emotion: list(names_b) for emotion, names_b in wanted.items()},
        "subsets": list(subsets),
        "language": texts_b.language,
        "n_texts": {"choosing": int((~scoring).sum()), "scoring": int(scoring.sum())},
        "n_groups": len(np.unique(member)),
        "keywords": {emotion: own.to_dict() for emotion, own in keywords.items()},
    }
    return TransferTable(meta, tuple(rows))


def merged_labels(texts: LabelledTexts, names: Names) -> LabelledTexts:
    """Returns the texts with only the emotions in `names`, each where a text has any of the labels it stands for.

    So a corpus can choose features under another's label names (KOTE's for GoEmotions: `GOEMOTIONS_TO_KOTE`).
    """
    sets = {emotion: {labels} if isinstance(labels, str) else set(labels) for emotion, labels in names.items()}
    emotions = tuple(tuple(name for name, labels in sets.items() if labels & set(own)) for own in texts.emotions)
    return LabelledTexts(texts.texts, emotions, texts.ids, texts.language)


def shared_names(emotions: Sequence[str], labels: Sequence[str]) -> dict[str, str | tuple[str, ...]]:
    """Returns which of `labels` count as each of `emotions`: the one of the same name, or KOTE's names for it."""
    found: dict[str, str | tuple[str, ...]] = {emotion: emotion for emotion in emotions if emotion in labels}
    for emotion, theirs in GOEMOTIONS_TO_KOTE.items():
        if emotion in emotions and emotion not in found and set(theirs) <= set(labels):
            found[emotion] = theirs
    return found


_FIGURES = ("auroc", "low", "high", "ceiling", "ceiling_feature", "gap", "gap_low", "gap_high", "rank")


def _checked(
    scores: FeatureScores, codes_b: SparseCodes, texts_b: LabelledTexts, names: Names
) -> dict[str, tuple[str, ...]]:
    if codes_b.n_texts != len(texts_b):
        raise ValueError(f"the codes are of {codes_b.n_texts} texts, but there are {len(texts_b)} texts")
    theirs = {"hook_name": codes_b.hook_name, "d_sae": codes_b.d_sae}
    ours = {name: scores.meta.get(name, value) for name, value in theirs.items()}
    if ours != theirs:
        raise ValueError(f"the scores are of {ours}, the codes of {theirs}")
    if not names:
        raise ValueError(f"no emotion to transfer; the scores have: {', '.join(scores.emotions)}")
    if unknown := [emotion for emotion in names if emotion not in scores.emotions]:
        raise ValueError(f"unknown emotions: {', '.join(unknown)}; the scores have: {', '.join(scores.emotions)}")
    wanted = {emotion: (labels,) if isinstance(labels, str) else tuple(labels) for emotion, labels in names.items()}
    if lacking := [label for labels in wanted.values() for label in labels if label not in texts_b.labels]:
        raise ValueError(f"unknown labels: {', '.join(lacking)}; the texts have: {', '.join(texts_b.labels)}")
    return wanted


def _enough(positive: Bool[np.ndarray, "text"], member: Int[np.ndarray, "text"]) -> bool:
    return all(len(np.unique(member[side])) >= FEWEST_GROUPS for side in (positive, ~positive))


def _cell(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
