"""How well calibrated sets tell labelled texts from others, beside a bag of words and a list of keywords."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sae_emotion_plugin.discovery.keywords import emotion_keywords
from sae_emotion_plugin.discovery.probes import ProbeInputs, method_families
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.evidence.auroc_intervals import auroc_interval, compare_aurocs
from sae_emotion_plugin.evidence.resampling import check_resampling
from sae_emotion_plugin.monitoring.thresholds import Thresholds, binomial_rate, conformal_threshold
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import SparseCodes

FEATURES, WORDS, KEYWORDS = "features", "bag-of-words", "keywords"
WORD_STRENGTH = 3.0
"""Inverse regularisation of the bag of words (`probes`); fixed: nothing is chosen on held-out texts."""


@dataclass(frozen=True)
class MethodQuality:
    """One way to tell one set's texts, on held-out texts. Chance is an AUROC of 0.5."""

    set: str
    method: str
    auroc: float
    low: float
    high: float
    true_positive_rate: float
    """Share of the set's texts above the threshold that the neutral calibration texts gave this method."""
    true_positive_low: float
    true_positive_high: float
    false_positive_rate: float
    """The same share of the other held-out texts, which may have emotions of their own: no neutral texts."""
    n_positive: int
    n: int
    advantage: float | None
    """AUROC of the features less this baseline's; None for the features themselves."""
    advantage_low: float | None
    advantage_high: float | None


@dataclass(frozen=True, repr=False)
class MonitorQuality(ResultTable):
    """For each set its features and the baselines, and in `meta` how they were compared."""

    row_type = MethodQuality
    head = ("set", "method", "AUROC", "true positives", "others flagged", "features' AUROC less this one's")

    meta: dict[str, Any]
    rows: tuple[MethodQuality, ...]

    def of(self, name: str, method: str = FEATURES) -> MethodQuality:
        """Returns the row of a set and a method. ValueError if there is none."""
        for row in self.rows:
            if (row.set, row.method) == (name, method):
                return row
        sets, methods = (dict.fromkeys(getattr(row, key) for row in self.rows) for key in ("set", "method"))
        raise ValueError(f"no quality of {name!r} by {method!r} (valid: {', '.join(sets)}; {', '.join(methods)})")

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        summary = (
            f"quality on {self.meta['n_texts']} held-out texts, thresholds for {self.meta['false_positive_rate']:.3g} "
            f"of neutral texts; {self.meta['level']:.0%} intervals; chance is 0.5. A list of keywords has no threshold "
            "to set: its alarms are what they are"
        )
        return summary, [
            (
                row.set,
                row.method,
                f"{row.auroc:.3f} [{row.low:.3f}, {row.high:.3f}]",
                f"{row.true_positive_rate:.3f} [{row.true_positive_low:.3f}, {row.true_positive_high:.3f}]",
                f"{row.false_positive_rate:.3f}",
                ""
                if row.advantage is None
                else f"{row.advantage:+.3f} [{row.advantage_low:+.3f}, {row.advantage_high:+.3f}]",
            )
            for row in self.rows
        ]


def monitor_quality(
    thresholds: Thresholds,
    codes: SparseCodes,
    held_out: LabelledTexts,
    labels: Mapping[str, Sequence[str]],
    *,
    train: LabelledTexts,
    neutral_texts: Sequence[str],
    groups: Sequence[Hashable] | np.ndarray | None = None,
    resamples: int = 2_000,
    level: float = 0.95,
    seed: int = 0,
) -> MonitorQuality:
    """Returns how well the risks tell the texts of each set, and how well words do on the same texts.

    A bag of words (logistic regression on TF-IDF of words and pairs) and the keywords of each label are learned on
    `train`, which should be the texts that chose the features. The bag's threshold is set on `neutral_texts` exactly as
    the features' was on theirs; a text is flagged by keywords when it holds one.

    Args:
        thresholds: what is judged; each set in `labels` must be in it.
        codes: of `held_out`.
        labels: the labels whose texts a set should find, by the set's name.
        groups: what varies independently, a name for each held-out text; by default groups of near-duplicates.

    Raises:
        ValueError: an unknown set or label, codes of other texts, texts of one class, too few neutral texts.
    """
    check_resampling(level, resamples)
    chosen = thresholds.select(list(labels))
    if codes.n_texts != len(held_out):
        raise ValueError(f"codes of {codes.n_texts} texts for {len(held_out)} held-out texts")
    train, dropped = without_overlap(train, held_out)
    targets, own_targets = (_targets(texts, labels) for texts in (held_out, train))
    member = held_out.duplicate_groups if groups is None else groups
    rate = float(thresholds.meta["false_positive_rate"])

    learned = _words(train, own_targets, [*held_out.texts, *neutral_texts])
    words, neutral_words = learned[: len(held_out)], learned[len(held_out) :]
    every = emotion_keywords(train, list(dict.fromkeys(label for names in labels.values() for label in names)))
    free = {label: found.free(held_out.texts) for label, found in every.items()}
    keywords = np.column_stack([~np.all([free[label] for label in names], axis=0) for names in labels.values()])
    bars = {
        FEATURES: np.array([row.text_threshold for row in chosen.rows]),
        WORDS: np.array([conformal_threshold(column, rate) for column in neutral_words.T]),
        KEYWORDS: np.full(len(labels), 0.5),
    }
    scores = {FEATURES: chosen.text_risks(codes), WORDS: words, KEYWORDS: keywords.astype(np.float64)}
    sampled: dict[str, Any] = {"groups": member, "level": level, "resamples": resamples, "seed": seed}
    rows = []
    for column, name in enumerate(labels):
        positive = targets[:, column]
        for method, values in scores.items():
            found = auroc_interval(values[:, column], positive, **sampled)
            flagged = values[:, column] > bars[method][column]
            hits = binomial_rate(int(flagged[positive].sum()), int(positive.sum()))
            others = float(flagged[~positive].mean())
            gain: tuple[float | None, ...] = (None, None, None)
            if method != FEATURES:
                pair = compare_aurocs(scores[FEATURES][:, column], values[:, column], positive, margin=0.0, **sampled)
                gain = (pair.difference, pair.low, pair.high)
            ends = (found.mean, found.low, found.high, hits.rate, hits.low, hits.high)
            rows.append(MethodQuality(name, method, *ends, others, hits.of, len(positive), *gain))
    meta = {
        "labels": {name: list(names) for name, names in labels.items()},
        "false_positive_rate": rate,
        "pooling": thresholds.pooling,
        "n_texts": len(held_out),
        "n_train": len(train),
        "dropped_near_duplicates": dropped,
        "n_neutral": len(neutral_texts),
        "level": level,
        "resamples": resamples,
        "seed": seed,
    }
    return MonitorQuality(meta, tuple(rows))


def _targets(texts: LabelledTexts, labels: Mapping[str, Sequence[str]]) -> Bool[np.ndarray, "text set"]:
    """Which texts have a label of each set. ValueError for labels that the texts lack."""
    wanted = {label for names in labels.values() for label in names}
    if unknown := sorted(wanted - {*texts.labels}):
        raise ValueError(f"no text has the label {unknown[0]!r} (valid: {', '.join(texts.labels)})")
    return np.column_stack([texts.label_matrix(names).any(axis=1) for names in labels.values()])


def _words(
    train: LabelledTexts, targets: Bool[np.ndarray, "train set"], others: Sequence[str]
) -> Float[np.ndarray, "other set"]:
    inputs = ProbeInputs(targets, {}, {}, (*train.texts, *others))
    (family,) = method_families(WORDS, inputs)
    n = len(train)
    (fitted,) = family.fit(np.arange(n), np.arange(n, n + len(others)), [WORD_STRENGTH])
    return fitted.scores
