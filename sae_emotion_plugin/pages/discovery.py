"""What a discovery found -> one self-contained HTML page, with what speaks against the features said as plainly."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sae_emotion_plugin.discovery.layer_scan import LayerScan
from sae_emotion_plugin.discovery.method_table import MethodTable
from sae_emotion_plugin.discovery.rating_correlations import RatingCorrelations
from sae_emotion_plugin.discovery.reference_margins import MEAN
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.discovery.specificity import Specificity
from sae_emotion_plugin.evidence.calibration import TAIL_THRESHOLDS, Calibration, Tail
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages import discovery_charts
from sae_emotion_plugin.pages.charts import finite
from sae_emotion_plugin.pages.discovery_charts import RocCurve, auroc_domain, difference_domain, layer_chart
from sae_emotion_plugin.pages.discovery_content import PARTS, DiscoveryContent
from sae_emotion_plugin.pages.discovery_summary import LATENT, facts, headline, method_name, verdict
from sae_emotion_plugin.pages.report_content import ReportContent
from sae_emotion_plugin.pages.report_views import highlight_groups, hues
from sae_emotion_plugin.pages.templates import page_template, render_page


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
        ranks=_by_emotion(content.ranks.rows if content.ranks else ()),
        ratings=_rating_rows(content.ratings),
        transfers=[(name, table.meta, _by_emotion(table.rows)) for name, table in content.transfers.items()],
    )


def emotions_of(content: DiscoveryContent) -> tuple[str, ...]:
    """Every emotion on the page in order of first mention; the mean over emotions is none."""
    named = list(content.scores.emotions) if content.scores else []
    parts = (content.specificity, content.absorption, content.methods, content.layers, content.margins)
    parts += (content.probes, content.ranks, content.ratings, *content.transfers.values())
    for part in parts:
        named += [row.emotion for row in (getattr(part, "rows", None) or getattr(part, "scores", None) or ())]
    for rows in (content.rocs, content.activations, content.examples):
        named += [row.emotion for row in rows or ()]
    return tuple(name for name in dict.fromkeys(named) if name != MEAN)


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


def _by_emotion(rows: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """The rows of each emotion, in their order."""
    return [
        (emotion, [row for row in rows if row.emotion == emotion]) for emotion in dict.fromkeys(r.emotion for r in rows)
    ]


def _rating_rows(ratings: RatingCorrelations | None) -> tuple[list[str], list[tuple[Any, list[Any]]]] | None:
    """The ratings' names, and for each feature its first row and the rows of all ratings in the order of the names."""
    if ratings is None:
        return None
    names = list(dict.fromkeys(row.rating for row in ratings.rows))
    cells = {(row.emotion, row.rating): row for row in ratings.rows}
    return names, [
        (rows[0], [cells.get((emotion, name)) for name in names]) for emotion, rows in _by_emotion(ratings.rows)
    ]


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
