"""Small inline SVG charts, drawn in Python; every colour comes from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from markupsafe import Markup

from sae_emotion_plugin.pages import svg
from sae_emotion_plugin.pages.svg import Place

DASH = "–"
"""Stands for a missing value everywhere on the page."""
MINUS = "−"
Number = float | int | None


def number(value: object, digits: int = 2, signed: bool = False) -> str:
    """`value` as text with a true minus sign; an en dash for None, NaN and anything that is not a number."""
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    real = finite(value)
    if real is None:
        return DASH
    rounded = round(real, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    sign = MINUS if rounded < 0 else "+" if signed and rounded > 0 else ""
    return f"{sign}{abs(rounded):,.{digits}f}"


def finite(value: object) -> float | None:
    """`value` as a float, or None when it is missing, not a number, NaN or infinite."""
    if value is None or isinstance(value, bool) or not isinstance(value, Real):
        return None
    real = float(value)
    return real if math.isfinite(real) else None


def share(value: object) -> str:
    """A share between 0 and 1 in percent."""
    real = finite(value)
    if real is None:
        return DASH
    percent = real * 100
    return number(percent, 0 if abs(percent) >= 10 or abs(percent - round(percent)) < 0.05 else 1) + "\u00a0%"


def ticks(low: Place, high: Place, at_most: int = 5) -> tuple[float, ...]:
    """Round values (steps of 1, 2 or 5 times a power of ten) that lie within `low` and `high`."""
    if not high > low:
        return (low,)
    raw = (high - low) / max(1, at_most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) + 0.0 for i in range(first, last + 1))


def histogram_shares(values: Sequence[Place], edges: Sequence[Place]) -> tuple[float, ...]:
    """Share of all `values` in each bin `(edges[i], edges[i + 1]]`; zeros are in no bin but still count."""
    counts = [0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for value in values:
        if value > edges[0]:
            position = math.ceil((value - edges[0]) / width - 1e-9) - 1
            counts[min(max(position, 0), len(counts) - 1)] += 1
    return tuple(count / max(1, len(values)) for count in counts)


def dot_plot(train: Number, held_out: Number, low: float = 0.5, high: float = 1.0) -> Markup:
    """One row of an AUROC dot plot: hollow dot for the training half, filled dot for the held-out half."""
    x = svg.linear(low, high, 8, 192)
    parts = [svg.line("grid", x(tick), 3, x(tick), 19) for tick in ticks(low, high, 6)]
    parts.append(svg.line("axis", 8, 11, 192, 11))
    seen, unseen = finite(train), finite(held_out)
    if seen is not None and unseen is not None:
        parts.append(svg.line("span", x(seen), 11, x(unseen), 11))
    if seen is not None:
        parts.append(svg.dot("hollow", x(seen), 11, 4.2))
    if unseen is not None:
        parts.append(svg.dot("solid", x(unseen), 11, 4.6))
    label = f"AUROC {number(train)} on the training half, {number(held_out)} on the held-out half"
    return svg.drawing(200, 22, label, parts, "dots")


def dot_axis(low: float = 0.5, high: float = 1.0) -> Markup:
    """The tick labels that belong below a column of `dot_plot` rows."""
    x = svg.linear(low, high, 8, 192)
    parts = [svg.text(x(tick), 11, number(tick, 1), "tick", "middle") for tick in ticks(low, high, 6)]
    return svg.drawing(200, 15, f"AUROC axis from {number(low, 1)} to {number(high, 1)}", parts, "dots")


def interval_plot(effect: Number, low: Number, high: Number, domain: tuple[Place, Place]) -> Markup:
    """One row of a forest plot: the effect as a dot, its interval as a bar, and a line at zero."""
    x = svg.linear(*domain, 8, 212)
    parts = [svg.line("axis", 8, 12, 212, 12), svg.line("zero", x(0.0), 1, x(0.0), 23)]
    left, right, middle = finite(low), finite(high), finite(effect)
    if left is not None and right is not None:
        parts.append(svg.box("interval", x(left), 9, max(1.0, x(right) - x(left)), 6, 3))
    if middle is not None:
        parts.append(svg.dot("solid", x(middle), 12, 5))
    ends = f"{number(low, 2, True)} to {number(high, 2, True)}"
    label = f"Mean valence shift {number(effect, 2, True)}, interval {ends}"
    return svg.drawing(220, 24, label, parts, "forest")


def bar(value: Number, maximum: Place) -> Markup:
    """A horizontal bar for a value between 0 and `maximum`."""
    filled = min(1.0, max(0.0, (finite(value) or 0.0) / maximum)) if maximum > 0 else 0.0
    parts = [svg.box("track", 0, 0, 200, 6, 3), svg.box("fill", 0, 0, 200 * filled, 6, 3)]
    return svg.drawing(200, 6, f"{number(value)} of {number(maximum)}", parts, "bar")


def histogram(in_class: Sequence[Number], out_class: Sequence[Number], n_bins: int = 18) -> Markup:
    """Two overlaid histograms of positive activations: filled bars in class, a stepped outline out of class.

    Heights are shares of all texts of the group, silent ones included, so a group's bars add up to the
    share of its texts on which the feature fires.
    """
    inside = [v for v in map(finite, in_class) if v is not None]
    outside = [v for v in map(finite, out_class) if v is not None]
    top = max([0.0, *inside, *outside])
    label = f"Histogram of held-out activations: {len(inside)} texts in class, {len(outside)} out of class"
    if top <= 0:
        return svg.drawing(320, 142, label, [svg.text(160, 70, "silent on every text", "tick", "middle")], "plot")
    left, right, base, ceiling = 34, 312, 112, 10
    edges = [top * i / n_bins for i in range(n_bins + 1)]
    shares_in, shares_out = histogram_shares(inside, edges), histogram_shares(outside, edges)
    y_max = max(*shares_in, *shares_out) * 1.05
    x, y = svg.linear(0, top, left, right), svg.linear(0, y_max, base, ceiling)
    parts = []
    steps = ticks(0, y_max, 4)
    for step in steps:
        parts.append(svg.line("grid", left, y(step), right, y(step)))
        shown = number(step * 100, tick_digits([v * 100 for v in steps])) + "%"
        parts.append(svg.text(left - 5, y(step) + 3.5, shown, "tick", "end"))
    for i, height in enumerate(shares_in):
        if height > 0:
            width = x(edges[i + 1]) - x(edges[i]) - 1
            parts.append(svg.box("in", x(edges[i]) + 0.5, y(height), width, base - y(height), 0))
    outline = "".join(f"V{svg.px(y(height))}H{svg.px(x(edges[i + 1]))}" for i, height in enumerate(shares_out))
    parts.append(svg.path("out", f"M{left} {base}{outline}V{base}"))
    parts.append(svg.line("axis", left, base, right, base))
    steps = ticks(0, top)
    parts += [svg.text(x(step), base + 14, number(step, tick_digits(steps)), "tick", "middle") for step in steps]
    parts.append(svg.text((left + right) / 2, base + 27, "pooled activation, where it fires", "tick", "middle"))
    return svg.drawing(320, 142, label, parts, "plot")


@dataclass(frozen=True)
class Series:
    """Points of one line; `emphasised` ones are solid, the others dashed."""

    x: Sequence[Place]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    emphasised: bool = True


@dataclass(frozen=True)
class Panel:
    """One chart of a stack that shares its horizontal axis."""

    title: str
    series: Sequence[Series]
    domain: tuple[Place, Place]
    height: int
    percent: bool = False
    """Label the vertical axis in percent."""
    logarithmic: bool = False
    reference: Number = None
    """Where a dashed bound line is drawn."""
    reference_label: str = ""
    zero_line: bool = False


def stacked_panels(
    panels: Sequence[Panel],
    x_domain: tuple[Place, Place],
    x_label: str,
    label: str,
    marked_x: Number = None,
    x_ticks: Sequence[tuple[Place, str]] | None = None,
) -> Markup:
    """Panels below one another over one horizontal axis; `marked_x` is a line through all of them.

    `x_ticks` are places on the axis and what is written there, by default round values.
    """
    left, right, top = 38.0, 310.0, 20.0
    x = svg.linear(*x_domain, left, right)
    parts: list[Markup] = []
    for panel in panels:
        parts += _panel(panel, x, left, right, top)
        top += panel.height + 32
    bottom = top - 32
    if (marked := finite(marked_x)) is not None:
        parts.insert(0, svg.line("marked", x(marked), 16, x(marked), bottom))
    steps = ticks(*x_domain, at_most=6)
    named = [(step, number(step, tick_digits(steps))) for step in steps] if x_ticks is None else x_ticks
    parts += [svg.text(x(place), bottom + 14, words, "tick", "middle") for place, words in named]
    parts.append(svg.text((left + right) / 2, bottom + 29, x_label, "tick", "middle"))
    return svg.drawing(320, int(bottom + 34), label, parts, "plot")


def _panel(panel: Panel, x: svg.Scale, left: Place, right: Place, top: Place) -> list[Markup]:
    (low, high), bottom = panel.domain, top + panel.height
    y = (svg.logarithmic if panel.logarithmic else svg.linear)(low, high, bottom, top)
    parts = [svg.text(left - 34, top - 8, panel.title, "panel", "start")]
    steps = _log_ticks(low, high) if panel.logarithmic else ticks(low, high, 5 if panel.height > 80 else 3)
    for step in steps:
        parts.append(svg.line("grid", left, y(step), right, y(step)))
        shown = number(step, 0 if step >= 1 else 1) if panel.logarithmic else number(step, tick_digits(steps))
        shown = share(step).replace("\u00a0", "") if panel.percent else shown
        parts.append(svg.text(left - 5, y(step) + 3.5, shown, "tick", "end"))
    if panel.zero_line:
        parts.append(svg.line("zero", left, y(0.0), right, y(0.0)))
    if panel.reference is not None and low <= panel.reference <= high:
        height = y(panel.reference)
        parts.append(svg.line("bound", left, height, right, height))
        parts.append(svg.text(left + 4, height - 3.5, panel.reference_label, "bound-label", "start"))
    for series in sorted(panel.series, key=lambda series: series.emphasised):
        parts += _series(series, x, y)
    return parts


def _series(series: Series, x: svg.Scale, y: svg.Scale) -> list[Markup]:
    strength = "main" if series.emphasised else "minor"
    points = [(x(a), y(b)) for a, b in zip(series.x, map(_plotted, series.y), strict=True) if b is not None]
    parts: list[Markup] = []
    if series.low is not None and series.high is not None:
        ends = zip(series.x, map(finite, series.low), map(finite, series.high), strict=True)
        band = [(x(a), y(b), y(c)) for a, b, c in ends if b is not None and c is not None]
        if len(band) == 1:
            middle, low, high = band[0]
            parts.append(svg.line(f"whisker {strength}", middle, low, middle, high))
        elif band:
            outline = [(a, c) for a, _, c in band] + [(a, b) for a, b, _ in reversed(band)]
            parts.append(svg.path(f"band {strength}", svg.through(outline) + "Z"))
    if len(points) > 1:
        parts.append(svg.path(f"line {strength}", svg.through(points)))
    parts += [
        svg.dot(f"point {strength}", a, b, 4.4 if len(points) == 1 else 3 if series.emphasised else 2.6)
        for a, b in points
    ]
    return parts


def _plotted(value: Number) -> float | None:
    """A drawable value: infinite costs stay on the chart, clamped to its edge by the scale."""
    return math.inf if isinstance(value, float) and value == math.inf else finite(value)


def _log_ticks(low: Place, high: Place) -> tuple[float, ...]:
    steps = [factor * 10.0**power for power in range(-3, 4) for factor in (1, 2, 5)]
    within = tuple(step for step in steps if low <= step <= high)
    return within if len(within) <= 5 else tuple(step for step in within if step in steps[::3])


def tick_digits(values: Sequence[Place]) -> int:
    """How many decimals the labels of an axis need, at most six."""
    return next((d for d in range(6) if all(abs(v - round(v, d)) < 1e-9 for v in values)), 6)
