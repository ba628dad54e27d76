"""From which risk on a set of features fires: calibrated to a false-positive rate on neutral text.

The risk of a set on a token is the weighted sum of its features' activations there, each in units of what that feature
usually has where it fires on the calibration texts: a risk of 1 is one feature of weight 1 at its usual strength. The
risk of a text is the largest, or the mean, over its tokens.
"""

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.evidence.resampling import bootstrap_mean_interval, group_numbers
from sae_emotion_plugin.interventions.plans import dictionary_sha256, model_sha256
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.monitoring.feature_sets import FeatureSet
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import SparseCodes, encode_texts
from sae_emotion_plugin.text_rows import check_text
from sae_emotion_plugin.text_splits import joined_groups, near_duplicate_groups, stratified_held_out

TextPooling = Literal["max", "mean"]
_NEEDED = ("dictionary", "model", "longest_text")
FEWEST_EXPECTED = 5
"""A rate is calibrated on at least so many times its inverse: 0.05 on 100 texts, 0.01 on 500."""


@dataclass(frozen=True)
class SetThreshold:
    """A set, the scales of its features, and the risks above which it fires.

    The rates are those achieved on neutral texts which had no part in the thresholds; their 95 % intervals are exact
    (Clopper-Pearson) for texts, and bootstraps by whole texts for tokens.
    """

    name: str
    features: tuple[int, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...]
    """Each feature's mean activation where it fires on the calibration texts; all features' where it never does."""
    text_threshold: float
    text_rate: float
    text_low: float
    text_high: float
    token_threshold: float
    token_rate: float
    token_low: float
    token_high: float


@dataclass(frozen=True, repr=False)
class Thresholds(ResultTable):
    """The calibrated sets, and in `meta` on what: dictionary, model, rates asked for, pooling, numbers of texts."""

    row_type = SetThreshold
    head = ("set", "features", "text threshold", "false positives", "token threshold", "of tokens")

    meta: dict[str, Any]
    rows: tuple[SetThreshold, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.rows)

    @property
    def pooling(self) -> TextPooling:
        """How the risks of a text's tokens make the text's."""
        return self.meta["pooling"]

    def of(self, chosen: FeatureSet | str) -> SetThreshold:
        """Returns the row of a set. ValueError for a name that was not calibrated, or whose features were others."""
        name = chosen if isinstance(chosen, str) else chosen.name
        if name not in self.names:
            raise ValueError(f"no thresholds for the set {name!r} (valid: {', '.join(self.names)})")
        row = self.rows[self.names.index(name)]
        if isinstance(chosen, FeatureSet) and (chosen.features, chosen.each_weight) != (row.features, row.weights):
            raise ValueError(f"the set {name!r} has other features or weights than the thresholds were calibrated for")
        return row

    def select(self, sets: Sequence[FeatureSet | str] | None) -> "Thresholds":
        """Returns the thresholds of some sets, in that order; None: all of them. ValueError as `of`."""
        if sets is None:
            return self
        if isinstance(sets, str) or not sets:
            raise ValueError(f"sets must be a list of at least one set or name, got {sets!r}")
        return Thresholds(self.meta, tuple(self.of(one) for one in sets))

    def check(self, model: Any, sae: Any) -> None:
        """Refuse another dictionary or model than those of the calibration (ValueError)."""
        for kind, own in (("dictionary", dictionary_sha256(sae)), ("model", model_sha256(model))):
            if self.meta[kind] != own:
                made = str(self.meta[kind])[:12]
                raise ValueError(f"the thresholds were calibrated with the {kind} {made}, this one is {own[:12]}")

    def token_risks(self, codes: SparseCodes) -> Float[np.ndarray, "token set"]:
        """Returns each set's risk on every token."""
        weights = np.zeros((codes.d_sae, len(self.rows)))
        for column, row in enumerate(self.rows):
            weights[list(row.features), column] = np.array(row.weights) / np.array(row.scales)
        return np.asarray(codes.matrix() @ weights)

    def text_risks(self, codes: SparseCodes) -> Float[np.ndarray, "text set"]:
        """Returns each set's risk of every text. ValueError for a text without tokens."""
        return pooled_risks(self.token_risks(codes), codes.text_lengths, self.pooling)

    def false_positives(self, codes: SparseCodes) -> dict[str, "Rate"]:
        """Returns the share of texts on which each set fires, with its interval: of neutral texts, a false alarm."""
        fires = self.text_risks(codes) > np.array([row.text_threshold for row in self.rows])
        return {
            name: binomial_rate(int(column.sum()), len(column))
            for name, column in zip(self.names, fires.T, strict=True)
        }

    @classmethod
    def load(cls, path: str | Path) -> "Thresholds":
        """Returns the thresholds that `save` wrote. ValueError for a file that holds something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            meta, rows = dict(content["meta"]), [dict(row) for row in content["rows"]]
            for row in rows:
                row |= {name: tuple(row[name]) for name in ("features", "weights", "scales")}
            read = cls(meta, tuple(SetThreshold(**row) for row in rows))
            if read.pooling not in get_args(TextPooling) or not rows or not {*_NEEDED} <= meta.keys():
                raise ValueError(f"{len(rows)} sets, pooling {read.pooling!r}; needed are {', '.join(_NEEDED)}")
            repr(read)  # reads the numbers that are needed
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no thresholds: {first_line(error)}") from None
        return read

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        meta = self.meta
        summary = (
            f"Thresholds for {meta['false_positive_rate']:.3g} of neutral texts and "
            f"{meta['token_false_positive_rate']:.3g} of tokens: {meta['n_texts']['calibration']} texts calibrate, "
            f"{meta['n_texts']['check']} others say what is achieved; risk of a text: {self.pooling} over tokens"
        )
        return summary, [
            (
                row.name,
                str(len(row.features)),
                f"{row.text_threshold:.3f}",
                f"{row.text_rate:.3f} [{row.text_low:.3f}, {row.text_high:.3f}]",
                f"{row.token_threshold:.3f}",
                f"{row.token_rate:.4f} [{row.token_low:.4f}, {row.token_high:.4f}]",
            )
            for row in self.rows
        ]


@dataclass(frozen=True)
class Rate:
    """How many of how many, and the ends of the 95 % interval of the share."""

    n: int
    of: int
    rate: float
    low: float
    high: float


def binomial_rate(n: int, of: int) -> Rate:
    """Returns the share with its exact interval (Clopper & Pearson 1934), for trials that are independent."""
    interval = binomtest(n, of).proportion_ci(0.95, method="exact")
    return Rate(n, of, n / of, float(interval.low), float(interval.high))


def calibrate_monitor(
    model: HookedModel,
    sae: Any,
    sets: Sequence[FeatureSet],
    neutral_texts: Sequence[str],
    *,
    false_positive_rate: float = 0.05,
    token_false_positive_rate: float = 0.01,
    pooling: TextPooling = "max",
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Thresholds:
    """Returns from which risk on each set fires, so that it does on `false_positive_rate` of neutral texts.

    Half of the texts calibrate, the others tell the rate that is achieved. With n calibration risks the threshold is
    the k-th smallest, k = n + 1 - floor((n + 1) x rate), and a set fires above it: a new text of the same kind is
    flagged with probability floor((n + 1) x rate) / (n + 1) over both draws, less where risks tie (split conformal
    prediction, Vovk et al. 2005). The same is done for single tokens with their own rate; they are not independent, so
    for them it holds approximately. Neither says anything of texts of another kind, nor, with pooling `max`, of longer
    ones: calibrate on texts like those that will be watched.

    Args:
        groups: the document of each text; a document, like near-duplicates, is never on both sides. The binomial
            intervals still count texts, and are too short where those of a document are alike.
        cache: folder that keeps the codes (`encode_texts`).

    Raises:
        ValueError: no sets, a name twice, a feature that the SAE lacks, an empty text, a rate outside (0, 0.5], or
            fewer calibration texts (tokens) than 5 over the rate.
    """
    _check_sets(sets, int(sae.cfg.d_sae))
    if pooling not in get_args(TextPooling):
        raise ValueError(f"unknown pooling {pooling!r} (valid: {', '.join(get_args(TextPooling))})")
    check_texts(neutral_texts)
    rates = {"false_positive_rate": false_positive_rate, "token_false_positive_rate": token_false_positive_rate}
    for name, rate in rates.items():
        if not 0 < rate <= 0.5:
            raise ValueError(f"{name} is {rate}; it must be above 0 and at most 0.5")
    checks = _checks(neutral_texts, groups, seed)
    halves = [np.flatnonzero(side) for side in (~checks, checks)]
    _check_enough(false_positive_rate, len(halves[0]), "texts", f"half of {len(neutral_texts)} neutral texts")
    codes = encode_texts(model, sae, neutral_texts, cache=cache, progress=progress)
    calibration, others = (codes.select_texts(half) for half in halves)
    _check_enough(token_false_positive_rate, calibration.n_tokens, "tokens", f"of {calibration.n_texts} texts")
    meta = {
        "hook_name": codes.hook_name,
        "dictionary": dictionary_sha256(sae),
        "model": model_sha256(model),
        "model_name": model_identity(model)["name"],
        **rates,
        "pooling": pooling,
        "seed": seed,
        "n_texts": {"calibration": calibration.n_texts, "check": others.n_texts},
        "n_tokens": {"calibration": calibration.n_tokens, "check": others.n_tokens},
        "longest_text": int(calibration.text_lengths.max()),
        "median_text": float(np.median(calibration.text_lengths)),
    }
    scales = _scales(calibration)
    unset = [math.nan] * 8
    rows = (
        SetThreshold(one.name, one.features, one.each_weight, tuple(scales[list(one.features)].tolist()), *unset)
        for one in sets
    )
    return _calibrated(Thresholds(meta, tuple(rows)), calibration, others)


def _calibrated(uncalibrated: Thresholds, calibration: SparseCodes, others: SparseCodes) -> Thresholds:
    meta, pooling = uncalibrated.meta, uncalibrated.pooling
    own, other = (uncalibrated.token_risks(codes) for codes in (calibration, others))
    own_texts, other_texts = (
        pooled_risks(risks, codes.text_lengths, pooling) for risks, codes in ((own, calibration), (other, others))
    )
    rows = []
    for column, row in enumerate(uncalibrated.rows):
        text_threshold = conformal_threshold(own_texts[:, column], meta["false_positive_rate"])
        token_threshold = conformal_threshold(own[:, column], meta["token_false_positive_rate"])
        of_texts = binomial_rate(int((other_texts[:, column] > text_threshold).sum()), len(other_texts))
        of_tokens = _token_rate(other[:, column] > token_threshold, others.text_index, meta["seed"])
        found = {
            "text_threshold": text_threshold,
            **{f"text_{name}": getattr(of_texts, name) for name in ("rate", "low", "high")},
            "token_threshold": token_threshold,
            **{f"token_{name}": getattr(of_tokens, name) for name in ("rate", "low", "high")},
        }
        rows.append(SetThreshold(**{**asdict(row), **found}))
    return Thresholds(meta, tuple(rows))


def conformal_threshold(risks: Float[np.ndarray, "n"], rate: float) -> float:
    """Returns the k-th smallest of the n risks, k = n + 1 - floor((n + 1) x rate). ValueError where k exceeds n."""
    above = math.floor((len(risks) + 1) * rate + 1e-9)
    if above < 1:
        raise ValueError(f"a rate of {rate} needs at least {math.ceil(1 / rate) - 1} values, got {len(risks)}")
    return float(np.partition(risks, len(risks) - above)[len(risks) - above])


def pooled_risks(
    risks: Float[np.ndarray, "token set"], lengths: Int[np.ndarray, "text"], pooling: TextPooling
) -> Float[np.ndarray, "text set"]:
    """Returns the largest or mean risk of the tokens of each text. ValueError for a text without tokens."""
    if not lengths.all():
        raise ValueError(f"text {int(np.argmin(lengths))} has no tokens: there is no risk to tell")
    starts = np.cumsum(lengths) - lengths
    if pooling == "max":
        return np.maximum.reduceat(risks, starts)
    return np.add.reduceat(risks, starts) / lengths[:, None]


def check_texts(texts: Sequence[str]) -> None:
    """ValueError for no texts, one string instead of a list, and an empty text, which is named by its place."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts must be a list of at least one string, got {texts!r:.40}")
    for place, text in enumerate(texts):
        check_text(text, f"text {place}")


def _scales(codes: SparseCodes) -> Float[np.ndarray, " feature"]:
    fired = np.bincount(codes.features, minlength=codes.d_sae)
    total = np.bincount(codes.features, weights=codes.values, minlength=codes.d_sae)
    if not total.sum() > 0:
        raise ValueError("no feature fires on the calibration texts, so there is no scale to measure risks in")
    return np.where(fired > 0, total / np.maximum(fired, 1), total.sum() / fired.sum())


def _token_rate(flagged: Bool[np.ndarray, "token"], text_index: Int[np.ndarray, "token"], seed: int) -> Rate:
    n, of = int(flagged.sum()), len(flagged)
    n_texts = len(np.unique(text_index))
    if n == 0 or n_texts < 2:
        # A bootstrap of nothing has no width. As if each text were a single token.
        bound = binomial_rate(0, n_texts).high
        return Rate(n, of, n / of, 0.0, bound if n == 0 else 1.0)
    found = bootstrap_mean_interval(flagged.astype(np.float64), groups=text_index, resamples=2_000, seed=seed)
    return Rate(n, of, n / of, max(found.low, 0.0), min(found.high, 1.0))


def _checks(texts: Sequence[str], groups: Sequence[Hashable] | None, seed: int) -> Bool[np.ndarray, "text"]:
    """Which texts tell the achieved rate: half, near-duplicates and documents whole."""
    together = near_duplicate_groups(texts)
    if groups is not None:
        together = joined_groups(group_numbers(groups, len(texts)), together)
    return stratified_held_out(np.zeros((len(texts), 0), dtype=bool), together, 0.5, seed)


def _check_enough(rate: float, n: int, what: str, which: str) -> None:
    fewest = math.ceil(FEWEST_EXPECTED / rate - 1e-9)
    if n < fewest:
        raise ValueError(
            f"a false-positive rate of {rate:g} needs at least {fewest} calibration {what}, got {n} ({which})"
        )


def _check_sets(sets: Sequence[FeatureSet], d_sae: int) -> None:
    if not sets:
        raise ValueError("no feature sets to calibrate: the list is empty")
    names = [one.name for one in sets]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the set {repeated[0]!r} stands twice")
    for one in sets:
        if max(one.features) >= d_sae:
            raise ValueError(
                f"the SAE has no feature {max(one.features)} of the set {one.name!r} (valid: 0 to {d_sae - 1})"
            )
