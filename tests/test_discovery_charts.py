"""The discovery page's charts: geometry against independent arithmetic, missing values, escaping."""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_charts import shapes, texts

from sae_emotion_plugin.pages.discovery_charts import (
    RocCurve,
    auroc_domain,
    difference_domain,
    interval_axis,
    interval_row,
    layer_chart,
    lens_width,
    line_key,
    logit_lens_chart,
    roc_chart,
    tenths_chart,
)


@dataclass(frozen=True)
class Score:
    layer: int
    probe: float
    low: float
    high: float
    latent: float | None = None
    pooling: str = "mean"
    emotion: str = "joy"


def lens(tokens: tuple[str, ...], top: tuple[tuple[str, ...], ...], probability: Any) -> SimpleNamespace:
    values = np.array(probability, dtype=float)
    layers = tuple(range(len(top)))
    return SimpleNamespace(prompt="", tokens=tokens, layers=layers, top=top, probability=values, entropy=values)


def test_an_interval_spans_its_ends_on_its_axis():
    chart = interval_row(0.75, 0.5, 1.0, (0.0, 1.0), "one latent")
    axis, bar = shapes(chart, "axis")[0], shapes(chart, "interval")[0]
    left, right = float(axis["x1"]), float(axis["x2"])
    assert float(bar["x"]) == pytest.approx((left + right) / 2, abs=0.1)
    assert float(bar["x"]) + float(bar["width"]) == pytest.approx(right, abs=0.1)
    tick = shapes(chart, "solid")[0]
    assert float(tick["x"]) + float(tick["width"]) / 2 == pytest.approx(left + (right - left) * 0.75, abs=0.1)
    assert "one latent: 0.75, interval 0.50 to 1.00" in chart


def test_zero_and_the_bound_are_lines_where_they_are_in_sight():
    chart = interval_row(-0.03, -0.05, -0.01, (-0.1, 0.1), "d", bound=-0.02)
    zero, bound = (float(shapes(chart, style)[0]["x1"]) for style in ("zero", "bound"))
    axis = shapes(chart, "axis")[0]
    left, right = float(axis["x1"]), float(axis["x2"])
    assert zero == pytest.approx((left + right) / 2) and bound == pytest.approx(left + (right - left) * 0.4, abs=0.1)
    away = interval_row(0.8, 0.7, 0.9, (0.5, 1.0), "d", bound=-0.02)
    assert not shapes(away, "zero") and not shapes(away, "bound")
    missing = interval_row(math.nan, None, 0.9, (0.5, 1.0), "d")
    assert not shapes(missing, "solid") and not shapes(missing, "interval")


def test_axes_hold_all_values():
    assert auroc_domain([0.7, None, math.nan, 0.9]) == pytest.approx((0.5, 0.92))
    assert auroc_domain([0.34, 0.99]) == pytest.approx((0.3, 1.0))
    assert auroc_domain([]) == (0.5, 1.0)
    low, high = difference_domain([-0.1, 0.02, math.nan])
    assert low < -0.1 and high > 0.02
    low, high = difference_domain([])
    assert low < 0 < high
    assert "0.5" in texts(interval_axis((0.5, 1.0)))


def test_a_roc_curve_runs_from_corner_to_corner_through_its_points():
    curves = [RocCurve("joy", "latent", np.array([[0, 0], [0.25, 0.5], [1, 1]]), 0.62)]
    chart = roc_chart("joy", curves, ["latent"])
    (path,) = shapes(chart, "roc-0")
    points = np.array([tuple(map(float, pair.split())) for pair in re.split("[ML]", path["d"])[1:]])
    chance = shapes(chart, "chance")[0]
    start, end = (np.array([float(chance[f"x{i}"]), float(chance[f"y{i}"])]) for i in (1, 2))
    assert points == pytest.approx(np.stack([start, start + (end - start) * (0.25, 0.5), end]), abs=0.1)
    assert "latent 0.62" in chart


def test_a_method_keeps_its_line_whichever_curves_are_there():
    line = np.array([[0.0, 0.0], [1.0, 1.0]])
    methods = ["latent", "a", "b", "c", "d", "e"]
    chart = roc_chart("joy", [RocCurve("joy", m, line) for m in ("e", "b", "latent")], methods)
    found = [re.findall(r"roc-\d", str(chart)), re.findall(r"roc-\d", str(line_key(2)))]
    assert found == [["roc-4", "roc-2", "roc-0"], ["roc-2"]]  # the first method is drawn last, on top


def test_bars_of_tenths_are_as_high_as_their_shares_and_the_line_is_at_a_tenth():
    chart = tenths_chart([0.2, 0.05, *[0.75 / 8] * 8], "p")
    bars = [float(box["height"]) for box in shapes(chart, "in")]
    base, uniform = float(shapes(chart, "axis")[0]["y1"]), float(shapes(chart, "uniform")[0]["y1"])
    assert len(bars) == 10 and bars[0] == pytest.approx(4 * bars[1], abs=0.2)
    assert base - uniform == pytest.approx(bars[0] / 2, abs=0.2)
    assert "p: 20 %, 5 %, 9.4 %" in chart
    assert len(shapes(tenths_chart([], "p"), "in")) == 0


def test_layers_are_drawn_in_order_whatever_the_order_of_the_rows():
    rows = [Score(2, 0.9, 0.85, 0.95, 0.8), Score(0, 0.6, 0.55, 0.65), Score(1, 0.7, 0.65, 0.75, 0.6)]
    last = [Score(row.layer, row.probe - 0.05, row.low, row.high, pooling="last") for row in rows]
    chart = layer_chart([*rows, *last], (0.5, 1.0), (0, 2))
    assert chart == layer_chart([*rows[::-1], *last], (0.5, 1.0), (0, 2))
    assert len(shapes(chart, "band")) == 2 and len(shapes(chart, "line")) == 3
    mains = [dot for dot in shapes(chart, "point") if "main" in dot["class"]]
    assert len(mains) == 6 and len(shapes(chart, "point")) == 8
    xs = [float(dot["cx"]) for dot in mains[:3]]
    assert xs == sorted(xs) and xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert "best at layer 2, mean pooling, with 0.90" in chart
    assert {"mean pooling", "last token"} <= set(texts(chart))


def test_a_layer_without_a_value_leaves_a_gap_and_no_broken_number():
    chart = layer_chart([Score(0, math.nan, math.nan, math.nan), Score(1, 0.7, 0.6, 0.8)], (0.5, 1.0), (0, 1))
    assert len(shapes(chart, "point")) == 1
    assert "best at layer 1" in chart and not re.search(r'="[^"]*nan', re.sub('aria-label="[^"]*"', "", str(chart)))


def test_every_cell_of_the_logit_lens_has_its_token_and_its_strength():
    shown = lens(("he", " is"), ((" nice", "a"), ("b", "화났다")), [[0.25, 0.0], [1.0, math.nan]])
    chart = logit_lens_chart(shown)
    assert [cell["style"] for cell in shapes(chart, "cell")] == ["--a:0.25", "--a:0.00", "--a:1.00", "--a:0.00"]
    assert texts(chart) == ["prompt", "he", "↓", "␣is", "↓", "0", "␣nice", "a", "output", "b", "화났다"]
    assert "layer 0, after he: ␣nice, probability 0.250" in chart
    assert "output: b (1.00), 화났다 (–)" in chart
    assert re.search(r'viewBox="0 0 (\d+)', str(chart))[1] == str(lens_width(shown))  # type: ignore[index]


@pytest.mark.parametrize(
    ("token", "fitted"),
    [("a" * 10, "a" * 10), ("a" * 11, "a" * 9 + "…"), ("한국어를배운", "한국어를…"), ("", "∅"), (" \n", "␣↵")],
)
def test_tokens_are_cut_to_their_cell_and_whole_in_its_tooltip(token: str, fitted: str):
    chart = logit_lens_chart(lens((token,), ((token,),), [[0.5]]))
    assert texts(chart).count(fitted) == 2
    assert (token.replace(" ", "␣").replace("\n", "↵") or "∅") in str(chart)


def test_hostile_names_and_tokens_are_escaped():
    bad = "</script></svg><img src=x onerror=alert(1)>\"'&"
    line = np.array([[0.0, 0.0], [1.0, 1.0]])
    row = Score(0, 0.7, 0.6, 0.8, pooling=bad, emotion=bad)
    charts = (
        interval_row(0.1, 0.0, 0.2, (0.0, 1.0), bad),
        roc_chart(bad, [RocCurve(bad, bad, line)], [bad]),
        tenths_chart([0.1] * 10, bad),
        layer_chart([row], (0.5, 1.0), (0, 1)),
        logit_lens_chart(lens((bad,), ((bad,),), [[0.5]])),
    )
    for chart in charts:
        assert "<img" not in chart and "</script" not in chart
        assert shapes(chart, "grid") or texts(chart)  # parses as XML
        label = re.search(r'aria-label="([^"]*)"', str(chart))
        assert label and "onerror" in label[1]


def test_lines_are_told_apart_without_colour():
    assert len({str(line_key(i)) for i in range(5)}) == 5
