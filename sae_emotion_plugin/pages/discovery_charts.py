"""The inline SVG charts of the discovery page: intervals, ROC curves, p values, layers, a logit lens."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from sae_emotion_plugin.pages import svg
from sae_emotion_plugin.pages.charts import (
    Number,
    Panel,
    Series,
    finite,
    number,
    share,
    stacked_panels,
    tick_digits,
    ticks,
)
from sae_emotion_plugin.pages.svg import Place
from sae_emotion_plugin.pages.token_text import marked

LINE_STYLES = 5
"""Styles of ROC lines that the style sheet tells apart; further lines share the last one."""
CELL_WIDTH, CELL_HEIGHT = 74, 24
LENS_LEFT = 52
LONGEST_TOKEN = 10
"""Columns of text that fit in a cell of the logit lens; a wide character takes two."""


@dataclass(frozen=True)
class RocCurve:
    """One method's ROC curve for one emotion, as `roc_points` gives it."""

    emotion: str
    method: str
    points: Float[np.ndarray, "point 2"]
    """False positive rate, true positive rate."""
    auroc: float | None = None


def auroc_domain(values: Iterable[object]) -> tuple[float, float]:
    """Ends of an AUROC axis: from 0.5, or the tenth below the lowest of `values`, to just above the highest."""
    known = [value for value in map(finite, values) if value is not None] or [1.0]
    return max(0.0, math.floor(min(0.5, *known) * 10) / 10), min(1.0, max(0.6, *known) + 0.02)


def difference_domain(values: Iterable[object]) -> tuple[float, float]:
    """Ends of an axis that holds every one of `values` and 0, with some room on either side."""
    known = [0.0, *(value for value in map(finite, values) if value is not None)]
    room = max(0.01, (max(known) - min(known)) * 0.06)
    return min(known) - room, max(known) + room


def interval_row(
    value: Number, low: Number, high: Number, domain: tuple[Place, Place], what: str, bound: Number = None
) -> Markup:
    """One row of a forest plot: a tick, its interval as a bar, a line at zero if in sight, a dashed one at `bound`."""
    x = svg.linear(*domain, 8, 212)
    parts = [svg.line("grid", x(tick), 2, x(tick), 22) for tick in ticks(*domain, 6)]
    parts.append(svg.line("axis", 8, 12, 212, 12))
    if domain[0] < 0 < domain[1]:
        parts.append(svg.line("zero", x(0.0), 0, x(0.0), 24))
    if (end := finite(bound)) is not None and domain[0] <= end <= domain[1]:
        parts.append(svg.line("bound", x(end), 0, x(end), 24))
    left, right, middle = finite(low), finite(high), finite(value)
    if left is not None and right is not None:
        parts.append(svg.box("interval", x(left), 9, max(1.0, x(right) - x(left)), 6, 3))
    if middle is not None:
        parts.append(svg.box("solid", x(middle) - 1, 5, 2, 14, 1))
    return svg.drawing(220, 24, f"{what}: {number(value)}, interval {number(low)} to {number(high)}", parts, "forest")


def interval_axis(domain: tuple[Place, Place]) -> Markup:
    """The tick labels that belong above a column of `interval_row`."""
    x, steps = svg.linear(*domain, 8, 212), ticks(*domain, 6)
    parts = [svg.text(x(step), 11, number(step, tick_digits(steps)), "tick", "middle") for step in steps]
    return svg.drawing(220, 15, f"axis from {number(domain[0])} to {number(domain[1])}", parts, "forest")


def roc_chart(emotion: str, curves: Sequence[RocCurve], methods: Sequence[str]) -> Markup:
    """ROC curves of one emotion; a method's line style is its place in `methods`, the first one emphasised."""
    left, right, base, top = 34, 234, 210, 8
    x, y = svg.linear(0, 1, left, right), svg.linear(0, 1, base, top)
    parts = []
    for step in (0, 0.25, 0.5, 0.75, 1):
        parts += [svg.line("grid", left, y(step), right, y(step)), svg.line("grid", x(step), base, x(step), top)]
    for step in (0, 0.5, 1):
        shown = share(step).replace("\u00a0", "")
        parts.append(svg.text(left - 5, y(step) + 3.5, shown, "tick", "end"))
        parts.append(svg.text(x(step), base + 14, shown, "tick", "middle"))
    parts.append(svg.line("chance", x(0), y(0), x(1), y(1)))
    for curve in sorted(curves, key=lambda curve: -methods.index(curve.method)):  # the emphasised one on top
        points = [(x(a), y(b)) for a, b in curve.points.tolist()]
        parts.append(svg.path(_line_style(methods.index(curve.method)), svg.through(points)))
    parts.append(svg.text((left + right) / 2, base + 28, "false alarms", "tick", "middle"))
    found = ", ".join(f"{curve.method} {number(curve.auroc)}" for curve in curves)
    return svg.drawing(244, 242, f"Held-out ROC curves of {emotion}; AUROC: {found}", parts, "plot roc")


def line_key(index: int) -> Markup:
    """A short piece of the line that `roc_chart` draws for the method at `index`, for a legend."""
    shape = Markup('<svg class="line-key" viewBox="0 0 26 8" aria-hidden="true">{}</svg>')
    return shape.format(svg.line(_line_style(index), 1, 4, 25, 4))


def tenths_chart(shares: Sequence[Number], label: str) -> Markup:
    """Bars of the share of p values in each tenth from 0 to 1, and the line on which uniform ones lie."""
    left, right, base, top = 34, 312, 128, 10
    known = [finite(value) or 0.0 for value in shares]
    highest = max([0.12, *known]) * 1.08
    x, y = svg.linear(0, max(1, len(known)), left, right), svg.linear(0, highest, base, top)
    parts = []
    for step in ticks(0, highest, 4):
        parts.append(svg.line("grid", left, y(step), right, y(step)))
        parts.append(svg.text(left - 5, y(step) + 3.5, share(step).replace("\u00a0", ""), "tick", "end"))
    for i, value in enumerate(known):
        parts.append(svg.box("in", x(i) + 1, y(value), x(i + 1) - x(i) - 2, base - y(value), 0))
    parts += [svg.line("uniform", left, y(0.1), right, y(0.1)), svg.line("axis", left, base, right, base)]
    for i in (0, 5, 10):
        parts.append(svg.text(x(i), base + 14, number(i / 10, 1), "tick", "middle"))
    parts.append(svg.text((left + right) / 2, base + 28, "p value in permuted labels", "tick", "middle"))
    heights = ", ".join(share(value).replace("\u00a0", " ") for value in shares)
    return svg.drawing(320, 160, f"{label}: {heights}; uniform ones: 10 % each", parts, "plot")


def layer_chart(rows: Sequence[Any], domain: tuple[Place, Place], x_domain: tuple[Place, Place]) -> Markup:
    """AUROC by layer of one emotion's `LayerScore` rows, a panel for each pooling.

    The probe is the solid line with its interval; the best single feature, where a layer has a dictionary, is hollow.
    """
    panels = []
    for pooling in dict.fromkeys(row.pooling for row in rows):
        members = sorted((row for row in rows if row.pooling == pooling), key=lambda row: row.layer)
        layers = [row.layer for row in members]
        ends = [row.low for row in members], [row.high for row in members]
        probe = Series(layers, [row.probe for row in members], *ends)
        latent = Series(layers, [row.latent for row in members], emphasised=False)
        panels.append(
            Panel(f"{pooling} token" if pooling == "last" else f"{pooling} pooling", [probe, latent], domain, 96)
        )
    best = max(rows, key=lambda row: _or_low(row.probe))
    label = (
        f"AUROC by layer, {rows[0].emotion}: the linear probe is best at layer {best.layer}, {best.pooling} pooling, "
        f"with {number(best.probe)}"
    )
    return stacked_panels(panels, x_domain, "layer", label)


def lens_width(lens: Any) -> int:
    """The width at which the letters of `logit_lens_chart` have their natural size, in pixels."""
    return LENS_LEFT + CELL_WIDTH * len(lens.tokens) + 2


def logit_lens_chart(lens: Any) -> Markup:
    """The likeliest token at each layer (rows, the last one below) and position of a `LogitLens`.

    A cell is the stronger coloured the likelier its token; what does not fit in it, and the figures, are its tooltip.
    """
    left, top = LENS_LEFT, 44
    last = len(lens.layers) - 1
    parts = [svg.text(left - 8, 14, "prompt", "tick", "end")]
    for column, token in enumerate(lens.tokens):
        middle = left + (column + 0.5) * CELL_WIDTH
        parts.append(svg.text(middle, 14, _fitted(token), "panel", "middle"))
        parts.append(svg.text(middle, 32, "↓", "tick", "middle"))
    for row, layer in enumerate(lens.layers):
        upper = top + row * CELL_HEIGHT + (6 if row == last else 0)
        name = "output" if row == last else str(layer)
        parts.append(svg.text(left - 8, upper + 16, name, "tick", "end"))
        for column, token in enumerate(lens.top[row]):
            strength = finite(lens.probability[row, column]) or 0.0
            cell = Markup('<g><title>{}</title><rect class="cell" style="--a:{}" {}/>{}</g>')
            place = Markup('x="{}" y="{}" width="{}" height="{}" rx="3"').format(
                svg.px(left + column * CELL_WIDTH + 1), svg.px(upper + 1), CELL_WIDTH - 2, CELL_HEIGHT - 2
            )
            tip = (
                f"layer {name}, after {marked(lens.tokens[column])}: {marked(token)}, probability "
                f"{number(strength, 3)}, entropy {number(lens.entropy[row, column])} nats"
            )
            word = svg.text(left + (column + 0.5) * CELL_WIDTH, upper + 16, _fitted(token), "token", "middle")
            parts.append(cell.format(tip, f"{strength:.2f}", place, word))
    height = top + CELL_HEIGHT * len(lens.layers) + 8
    outputs = ", ".join(
        f"{marked(token)} ({number(finite(p), 2)})"
        for token, p in zip(lens.top[last], lens.probability[last], strict=True)
    )
    label = f"Likeliest next token at {len(lens.layers)} layers for {len(lens.tokens)} tokens; output: {outputs}"
    return svg.drawing(lens_width(lens), height, label, parts, "plot")


def _line_style(index: int) -> str:
    return f"roc-{min(index, LINE_STYLES - 1)}"


def _fitted(token: str) -> str:
    """The token with visible spaces, cut to the width of a cell."""
    shown, taken = marked(token), 0
    for i, character in enumerate(shown):
        taken += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if taken > LONGEST_TOKEN:
            return shown[: max(1, i - 1)] + "…"
    return shown


def _or_low(value: object) -> float:
    found = finite(value)
    return -math.inf if found is None else found
