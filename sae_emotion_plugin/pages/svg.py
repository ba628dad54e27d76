"""The shapes of an inline SVG as markup: places in, escaped elements out; colours come from the page's style sheet."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

Place = float | int
Scale = Callable[[Place], Place]
"""From a value to its place on the drawing."""


def linear(low: Place, high: Place, start: Place, end: Place) -> Scale:
    """The scale on which `low` lies at `start` and `high` at `end`; values beyond them are drawn at the ends."""
    width = (high - low) or 1.0
    return lambda value: start + (min(max(value, low), high) - low) / width * (end - start)


def logarithmic(low: Place, high: Place, start: Place, end: Place) -> Scale:
    """As `linear`, with equal distances for equal ratios; `low` is above 0."""
    scale = linear(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(min(max(value, low), high)))


def px(value: Place) -> str:
    """A place as text, to a tenth of a pixel."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def through(points: Sequence[tuple[Place, Place]]) -> str:
    """The path of straight lines through the points, for `path`."""
    return "M" + "L".join(f"{px(a)} {px(b)}" for a, b in points)


def text(x: Place, y: Place, words: str, style: str, anchor: str) -> Markup:
    """Words at a place; `anchor` says which end of them stands there: start, middle or end."""
    shape = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return shape.format(style, px(x), px(y), anchor, words)


def line(style: str, x1: Place, y1: Place, x2: Place, y2: Place) -> Markup:
    """A straight line."""
    shape = Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    return shape.format(style, *map(px, (x1, y1, x2, y2)))


def dot(style: str, x: Place, y: Place, radius: Place) -> Markup:
    """A circle around a place."""
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(style, *map(px, (x, y, radius)))


def box(style: str, x: Place, y: Place, width: Place, height: Place, radius: Place) -> Markup:
    """A rectangle from its upper left corner, with corners rounded by `radius`."""
    shape = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="{}"/>')
    return shape.format(style, *map(px, (x, y, width, height, radius)))


def path(style: str, steps: str) -> Markup:
    """A path; its steps are written as SVG has them."""
    return Markup('<path class="{}" d="{}"/>').format(style, steps)


def drawing(width: int, height: int, label: str, parts: Sequence[Markup], style: str) -> Markup:
    """The whole of a chart: `label` is what those hear who do not see it."""
    shape = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return shape.format(style, width, height, label, Markup("").join(parts))
