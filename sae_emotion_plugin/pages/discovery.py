"""What a discovery found -> one self-contained HTML page, with what speaks against the features said as plainly."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from sae_emotion_plugin.discovery.absorption import Absorption
from sae_emotion_plugin.discovery.layer_scan import LayerScan
from sae_emotion_plugin.discovery.method_comparison import MethodScore, MethodTable
from sae_emotion_plugin.discovery.reference_margins import MEAN, ReferenceMargins
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.discovery.specificity import Specificity
from sae_emotion_plugin.evidence.calibration import TAIL_THRESHOLDS, Calibration, Tail
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages import charts, discovery_charts
from sae_emotion_plugin.pages.charts import finite, number, share
from sae_emotion_plugin.pages.discovery_charts import RocCurve, auroc_domain, difference_domain, layer_chart
from sae_emotion_plugin.pages.report_content import HighlightedText, ReportContent, ScoreDistribution
from sae_emotion_plugin.pages.report_views import highlight_groups, hues
from sae_emotion_plugin.pages.templates import amount, listed, page_template, render_page
from sae_emotion_plugin.text_lens import LogitLens

LATENT = "latent"
RIVALS = ("difference-of-means", "dense-probe")
"""What a label-selected latent has to be compared with before anything else is said of it."""
METHOD_NAMES = {
    LATENT: "one latent",
    "difference-of-means": "difference of means",
    "difference-of-means-raw": "difference of means, raw dimensions",
    "dense-probe": "dense probe",
    "bag-of-words": "bag of words",
    "neuron": "best neuron",
}
PARTS = {
    "scores": "ranked features",
    "methods": "baselines on the same texts",
    "rocs": "ROC curves",
    "specificity": "specificity",
    "absorption": "where features are silent",
    "activations": "activation histograms",
    "examples": "top texts",
    "layers": "the layer scan",
    "lens": "a logit lens",
    "calibration": "the calibration of the tests",
    "margins": "margins over reference dictionaries",
}
SILENT_OFTEN = 0.1
"""A feature that is silent in more of the texts than this is said to be."""
LEVEL = 0.05
"""Below this q counts as found."""


@dataclass(frozen=True)
class DiscoveryContent:
    """Everything on the page, computed before; a part that is None is named on the page as not computed."""

    title: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """How the run was made, for the foot of the page."""
    scores: FeatureScores | None = None
    methods: MethodTable | None = None
    rocs: Sequence[RocCurve] | None = None
    """Held-out curves of each emotion's best feature (method `latent`) and of some baselines."""
    specificity: Specificity | None = None
    absorption: Absorption | None = None
    activations: Sequence[ScoreDistribution] | None = None
    examples: Sequence[HighlightedText] | None = None
    layers: LayerScan | None = None
    lens: LogitLens | None = None
    calibration: Calibration | None = None
    margins: ReferenceMargins | None = None
    links: Mapping[int, str] = field(default_factory=dict)
    """A page about a feature, by the feature's index; anything but http(s) is not linked."""


@dataclass(frozen=True)
class Fact:
    """One line of the page's summary."""

    text: str
    good: bool | None = None
    """Whether it speaks for the features; None for what does neither."""


def write_discovery_page(path: str | Path, content: DiscoveryContent) -> Path:
    """The path, after the page was written there whole. FileNotFoundError when its folder does not exist."""
    return write_whole(path, render(content))


def render(content: DiscoveryContent) -> str:
    """The page as HTML, in one file that needs no network; the same content always gives the same text."""
    order = emotions_of(content)
    return render_page(
        _template(),
        ("report.css", "discovery.css"),
        title=content.title,
        meta=content.meta,
        content=content,
        hue=hues(order).get,
        headline=headline(content),
        facts=facts(content),
        absent=[name for part, name in PARTS.items() if not getattr(content, part)],
        link=functools.partial(_link, content.links),
        auroc_low=0.0 if content.scores and _any_below_half(content.scores) else 0.5,
        methods=_method_view(content.methods),
        rocs=_roc_groups(content.rocs or (), order),
        roc_methods=_roc_methods(content.rocs or ()),
        heat=_heat_rows(content.specificity),
        tails=_tail_tables(content.calibration),
        margin_domain=difference_domain(
            end for row in (content.margins.rows if content.margins else ()) for end in (row.low, row.high)
        ),
        highlights=highlight_groups(
            ReportContent(content.title, {}, (), {}, highlights=content.examples or ()), list(order)
        ),
        layer_stacks=_layer_stacks(content.layers, order),
    )


def emotions_of(content: DiscoveryContent) -> tuple[str, ...]:
    """Every emotion on the page in order of first mention; the mean over emotions is none."""
    named = list(content.scores.emotions) if content.scores else []
    for part in (content.specificity, content.absorption, content.methods, content.layers, content.margins):
        named += [row.emotion for row in (getattr(part, "rows", None) or getattr(part, "scores", None) or ())]
    for rows in (content.rocs, content.activations, content.examples):
        named += [row.emotion for row in rows or ()]
    return tuple(name for name in dict.fromkeys(named) if name != MEAN)


def method_name(method: str) -> str:
    """A method's name in words; a name that is not known stays as it is."""
    kind, _, size = method.partition("-")
    return f"probe on {size} latents" if kind == "latents" and size else METHOD_NAMES.get(method, method)


def difference_between(
    methods: MethodTable, first: str, second: str, emotion: str = MEAN
) -> tuple[float, float, float] | None:
    """By how much `first` is above `second`, and the ends of the interval; None where the two were not compared."""
    for row in methods.differences:
        if row.emotion == emotion and (row.first, row.second) == (first, second):
            return row.difference, row.low, row.high
        if row.emotion == emotion and (row.first, row.second) == (second, first):
            return -row.difference, -row.high, -row.low
    return None


def verdict(low: object, high: object) -> str:
    """`better` or `worse` when the interval of a difference excludes 0, else `unclear`."""
    left, right = finite(low), finite(high)
    return "better" if left is not None and left > 0 else "worse" if right is not None and right < 0 else "unclear"


def headline(content: DiscoveryContent) -> str:
    """Whether the label-selected latent beats or loses to what is simpler, in words and with the intervals."""
    methods = content.methods
    if not methods:
        if content.layers and not content.scores:
            return _layer_sentence(content.layers)
        return "No baselines were computed: nothing on this page says whether the features beat a simple probe."
    aurocs = {row.method: row for row in methods.scores if row.emotion == MEAN}
    if LATENT not in aurocs:
        return "No single latent was scored beside the baselines: whether one beats a simple probe is not known."
    n = len({row.emotion for row in methods.scores if row.method == LATENT and row.emotion != MEAN})
    own = aurocs[LATENT]
    opening = (
        f"One latent, chosen with labels, reads emotion in held-out texts at AUROC {number(own.auroc)} "
        f"[{number(own.low)},\u00a0{number(own.high)}], the mean of {n} {'emotion' if n == 1 else 'emotions'}"
    )
    clauses = [_against(methods, rival, aurocs.get(rival)) for rival in RIVALS]
    return f"{opening}. It {listed(clauses)}."


def _against(methods: MethodTable, rival: str, score: MethodScore | None) -> str:
    found = difference_between(methods, LATENT, rival)
    name = ("the " if rival == "dense-probe" else "") + method_name(rival)
    if found is None:
        return f"was not compared with {name}"
    difference, low, high = found
    at = number(score.auroc) if score else charts.DASH
    verb = {"better": "beats", "worse": "loses to", "unclear": "cannot be told apart from"}[verdict(low, high)]
    return f"{verb} {name} ({at}; difference {_signed(difference, low, high)})"


def _signed(value: object, low: object, high: object) -> str:
    """A difference with its interval, which no line break divides."""
    return f"{number(value, 3, True)} [{number(low, 3, True)},\u00a0{number(high, 3, True)}]"


def facts(content: DiscoveryContent) -> list[Fact]:
    """The page in a few lines, each marked by whether it speaks for the features."""
    found = _method_facts(content.methods) if content.methods else []
    if content.scores:
        best = [content.scores.top(emotion, 1)[0] for emotion in content.scores.emotions]
        above = [row for row in best if row.q_above is not None and row.q_above < LEVEL]
        text = f"For {len(above)} of {len(best)} emotions the best feature's AUROC is above 0.60 (q < {LEVEL:g})."
        found.append(Fact(text, len(above) == len(best)))
    if content.specificity:
        rows = content.specificity.rows
        own = [row for row in rows if verdict(row.low, row.high) == "better"]
        text = f"{len(own)} of {len(rows)} best features read their own emotion better than every other emotion."
        found.append(Fact(text, len(own) == len(rows)))
    if content.absorption:
        silent = [row for row in content.absorption.rows if row.true_rate is not None]
        often = [row.emotion for row in silent if (row.true_rate or 0) > SILENT_OFTEN]
        if silent:
            text = (
                f"Where a dense probe is rightly sure, {len(often)} of {len(silent)} best features are silent in more "
                f"than {share(SILENT_OFTEN)} of the texts{': ' + listed(often) if often else ''}."
            )
            found.append(Fact(text, not often))
    if content.margins:
        for reference in content.margins.references:
            row = content.margins.of(reference)
            interval = _signed(row.margin, row.low, row.high)
            text = f"Mean margin of the best features over the reference {reference}: {interval}."
            found.append(Fact(text, verdict(row.low, row.high) == "better"))
    if content.calibration:
        one = content.calibration
        text = (
            f"In permuted labels {share(one.share)} of the runs found something [{share(one.low)}, {share(one.high)}], "
            f"{share(one.level)} were allowed: the tests {'keep' if one.holds else 'DO NOT keep'} their promise."
        )
        found.append(Fact(text, one.holds))
    if content.layers and (content.scores or content.methods):
        found.append(Fact(_layer_sentence(content.layers)))
    return found


def _method_facts(methods: MethodTable) -> list[Fact]:
    found = []
    for row in methods.differences:
        if row.emotion != MEAN or not row.first.startswith(LATENT):
            continue
        same = [r for r in methods.differences if (r.first, r.second) == (row.first, row.second) and r is not row]
        verdicts = [verdict(each.low, each.high) for each in same if each.emotion != MEAN]
        counts = ", ".join(f"{word} for {verdicts.count(word)}" for word in ("better", "worse", "unclear"))
        names = f"{method_name(row.first)} against {method_name(row.second)}"
        text = (
            f"{names[0].upper()}{names[1:]}: {_signed(row.difference, row.low, row.high)}; "
            f"not worse by more than {amount(row.margin)}: {'shown' if row.not_worse else 'NOT shown'}"
            f"{'; by emotion: ' + counts if verdicts else ''}."
        )
        found.append(Fact(text, row.not_worse))
    return found


def _layer_sentence(layers: LayerScan) -> str:
    rows = [row for row in layers.rows if row.emotion == MEAN] or layers.rows
    best = max(rows, key=lambda row: finite(row.probe) or 0.0, default=None)
    if best is None:
        return "The layer scan has no layers."
    interval = f"{number(best.probe)} [{number(best.low)}, {number(best.high)}]"
    return f"A linear probe reads emotion best at layer {best.layer} ({best.pooling}), at AUROC {interval}."


def _any_below_half(scores: FeatureScores) -> bool:
    shown = [value for row in scores.rows for value in (row.auroc, row.held_out_auroc)]
    return any(value is not None and value < 0.5 for value in map(finite, shown))


def _link(links: Mapping[int, str], feature: int | None) -> str | None:
    target = "" if feature is None else links.get(feature, "")
    return target if target.startswith(("https://", "http://")) else None


def _method_view(methods: MethodTable | None) -> dict[str, Any] | None:
    """Methods of the mean from best to worst, the axes of their charts, and the table of emotions by methods."""
    if not methods:
        return None
    mean = sorted((r for r in methods.scores if r.emotion == MEAN), key=lambda r: finite(r.auroc) or 0.0, reverse=True)
    names = list(dict.fromkeys(row.method for row in (*mean, *methods.scores)))
    cells = {(row.emotion, row.method): row for row in methods.scores}
    pairs = list(dict.fromkeys((row.first, row.second) for row in methods.differences))
    by_pair = {(row.emotion, row.first, row.second): row for row in methods.differences}
    emotions = list(dict.fromkeys(row.emotion for row in methods.scores if row.emotion != MEAN))
    differences = [row for row in methods.differences if row.emotion == MEAN]
    ends = [end for row in differences for end in (row.low, row.high, -row.margin)]
    return {
        "mean": mean,
        "domain": auroc_domain(end for row in mean for end in (row.low, row.high)),
        "names": names,
        "emotions": emotions,
        "cells": [(emotion, _row_of_cells([cells.get((emotion, name)) for name in names])) for emotion in emotions],
        "differences": differences,
        "difference_domain": difference_domain(ends),
        "pairs": pairs,
        "pair_cells": [(emotion, [by_pair.get((emotion, *pair)) for pair in pairs]) for emotion in emotions],
    }


def _row_of_cells(cells: Sequence[Any]) -> list[tuple[Any, bool]]:
    """Each cell, and whether it holds the row's best AUROC."""
    best = max((finite(cell.auroc) or 0.0 for cell in cells if cell), default=0.0)
    return [(cell, bool(cell) and finite(cell.auroc) == best) for cell in cells]


def _roc_methods(rocs: Sequence[RocCurve]) -> list[str]:
    return sorted(dict.fromkeys(curve.method for curve in rocs), key=lambda method: method != LATENT)


def _roc_groups(rocs: Sequence[RocCurve], order: Sequence[str]) -> list[dict[str, Any]]:
    methods = _roc_methods(rocs)
    groups = []
    for emotion in order:
        curves = sorted((c for c in rocs if c.emotion == emotion), key=lambda curve: methods.index(curve.method))
        if curves:
            chart = discovery_charts.roc_chart(emotion, curves, methods)
            groups.append(
                {"emotion": emotion, "chart": chart, "curves": [(methods.index(c.method), c) for c in curves]}
            )
    return groups


def _heat_rows(specificity: Specificity | None) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Each row of the matrix with its cells: value, colour and its strength, and whether it is own or the rival."""
    if not specificity:
        return []
    rows, found = specificity.rows, []
    for i, row in enumerate(rows):
        cells = []
        for j, other in enumerate(rows):
            value = finite(specificity.matrix[i, j])
            cells.append(
                {
                    "value": value,
                    "side": "up" if value is None or value >= 0.5 else "down",
                    "strength": 0.0 if value is None else min(1.0, abs(value - 0.5) * 2),
                    "kind": "own" if i == j else "rival" if other.emotion == row.rival else "",
                }
            )
        found.append((row, cells))
    return found


def _tail_tables(calibration: Calibration | None) -> list[tuple[str, list[tuple[str, list[Tail | None]]]]]:
    """Per table its title and, per group of tests, the tail at each threshold."""
    if calibration is None:
        return []
    tables = []
    for title, tails in (("firing texts", calibration.by_firing), ("label (texts)", calibration.by_label)):
        by_place = {(tail.group, tail.threshold): tail for tail in tails}
        groups = dict.fromkeys(tail.group for tail in tails)
        tables.append((title, [(group, [by_place.get((group, t)) for t in TAIL_THRESHOLDS]) for group in groups]))
    return tables


def _layer_stacks(layers: LayerScan | None, order: Sequence[str]) -> list[dict[str, Any]]:
    """One stack of charts for the mean and each emotion; all share their axes, so that emotions compare."""
    if not layers or not layers.rows:
        return []
    domain = auroc_domain(value for row in layers.rows for value in (row.low, row.high, row.latent))
    numbers = [row.layer for row in layers.rows]
    stacks = []
    for emotion in (MEAN, *order):
        rows = [row for row in layers.rows if row.emotion == emotion]
        if rows:
            chart = layer_chart(rows, domain, (float(min(numbers)), float(max(numbers))))
            stacks.append({"emotion": emotion, "chart": chart, "rows": rows})
    return stacks


@functools.cache
def _template() -> jinja2.Template:
    return page_template(
        "discovery.html",
        draw=discovery_charts,
        mean=MEAN,
        method_name=method_name,
        thresholds=TAIL_THRESHOLDS,
        verdict=verdict,
    )
