"""The inline SVG charts: geometry against independent arithmetic, and missing values."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from sae_emotion_plugin.pages.charts import (
    Panel,
    Series,
    bar,
    dot_axis,
    dot_plot,
    finite,
    histogram,
    histogram_shares,
    interval_plot,
    number,
    share,
    stacked_panels,
    ticks,
)


def shapes(chart: Markup, style: str) -> list[dict[str, str]]:
    """Attributes of the shapes whose class list holds `style`; parsing as XML also proves the SVG well-formed."""
    return [dict(e.attrib) for e in ET.fromstring(str(chart)).iter() if style in e.get("class", "").split()]


def texts(chart: Markup) -> list[str]:
    return [e.text or "" for e in ET.fromstring(str(chart)).iter("text")]


def panel(series: list[Series], **options: object) -> Markup:
    settings = {"title": "t", "series": series, "domain": (-1.0, 1.0), "height": 100} | options
    return stacked_panels([Panel(**settings)], (0.0, 1.0), "x", "label")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.234, "1.23"),
        (-0.5, "−0.50"),
        (-0.001, "0.00"),
        (12345.678, "12,345.68"),
        (None, "–"),
        (math.nan, "–"),
        ("12", "–"),
        (True, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (3, "3.00"),
    ],
)
def test_numbers_have_a_true_minus_and_missing_ones_a_dash(value: object, shown: str):
    assert number(value) == shown


def test_a_signed_number_shows_its_sign_except_at_zero():
    assert [number(v, 1, signed=True) for v in (0.25, -0.25, 0.0, 0.01)] == ["+0.2", "−0.2", "0.0", "0.0"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (1, "100"), (0.05, "5"), (0.054, "5.4"), (0.126, "13"), (0.004, "0.4")]
)
def test_shares_are_percentages_with_a_digit_only_where_it_matters(value: float, shown: str):
    assert share(value) == f"{shown}\u00a0%"
    assert share(None) == share(math.nan) == "–"


@given(st.floats(-1e3, 1e3), st.floats(1e-2, 1e5), st.integers(2, 8))
def test_ticks_are_round_inside_and_no_more_than_asked(low: float, width: float, at_most: int):
    high = low + width
    found = ticks(low, high, at_most)
    slack = 1e-6 * width
    assert len(found) <= at_most
    assert all(low - slack <= tick <= high + slack for tick in found)
    steps = {round((b - a) / width, 6) for a, b in pairwise(found)}
    assert len(steps) <= 1


def test_ticks_of_an_empty_range_are_its_only_value():
    assert ticks(0.5, 0.5) == (0.5,)


@given(st.lists(st.floats(0, 50), max_size=60), st.integers(1, 20))
def test_histogram_shares_equal_a_slow_count(values: list[float], n_bins: int):
    edges = [50 * i / n_bins for i in range(n_bins + 1)]
    clear = [v for v in values if all(abs(v - edge) > 1e-6 for edge in edges) or v == 0]
    expected = [sum(a < v <= b for v in clear) / max(1, len(clear)) for a, b in pairwise(edges)]
    assert histogram_shares(clear, edges) == pytest.approx(expected)


def test_the_bars_of_a_histogram_add_up_to_the_share_of_texts_that_fire():
    in_class = [0.0, 0.0, 1.0, 2.0, 3.0, 3.1, 4.0, 5.0, 6.0, 7.0]
    chart = histogram(in_class, [0.0] * 9 + [7.0], n_bins=7)
    axis = float(shapes(chart, "axis")[0]["y1"])
    zero, tallest = axis, min(float(box["y"]) for box in shapes(chart, "in"))
    heights = [float(box["height"]) for box in shapes(chart, "in")]
    per_text = (zero - tallest) / 2  # the fullest bin, from 3 to 4, holds two texts
    assert sum(heights) / per_text == pytest.approx(8, abs=0.1)


def test_a_histogram_puts_a_known_value_into_its_bin():
    chart = histogram([10.0, 2.4], [5.0], n_bins=10)
    centres = [float(box["x"]) + float(box["width"]) / 2 for box in shapes(chart, "in")]
    left, right = (float(shapes(chart, "axis")[0][key]) for key in ("x1", "x2"))
    assert centres == pytest.approx([left + (right - left) * s for s in (0.25, 0.95)], abs=0.2)


def test_a_histogram_of_silence_or_of_nothing_says_so():
    for chart in (histogram([0.0, 0.0], [0.0]), histogram([], [])):
        assert texts(chart) == ["silent on every text"]


def test_missing_activations_are_left_out_of_the_histogram():
    assert histogram([1.0, None, math.nan], [0.5]) == histogram([1.0], [0.5])


def test_dots_stand_where_their_auroc_is():
    chart = dot_plot(0.75, 0.9)
    axis = shapes(chart, "axis")[0]
    left, right = float(axis["x1"]), float(axis["x2"])
    assert float(shapes(chart, "hollow")[0]["cx"]) == pytest.approx(left + (right - left) * 0.5, abs=0.1)
    assert float(shapes(chart, "solid")[0]["cx"]) == pytest.approx(left + (right - left) * 0.8, abs=0.1)
    assert "0.75" in chart and "0.90" in chart


def test_a_missing_auroc_has_no_dot_and_one_beyond_the_axis_stays_on_it():
    chart = dot_plot(None, 0.3)
    assert not shapes(chart, "hollow") and not shapes(chart, "span")
    assert shapes(chart, "solid")[0]["cx"] == shapes(chart, "axis")[0]["x1"]
    assert not shapes(dot_plot(math.nan, None), "solid")


def test_the_axis_of_a_dot_plot_names_its_ends():
    assert texts(dot_axis())[0] == "0.5" and texts(dot_axis())[-1] == "1.0"
    assert texts(dot_axis(0.0))[0] == "0.0"


def test_an_interval_spans_its_ends_and_zero_is_in_the_middle_of_a_symmetric_axis():
    chart = interval_plot(-0.25, -0.5, 0.0, (-1.0, 1.0))
    axis = shapes(chart, "axis")[0]
    left, right = float(axis["x1"]), float(axis["x2"])
    box = shapes(chart, "interval")[0]
    assert float(shapes(chart, "zero")[0]["x1"]) == (left + right) / 2
    assert float(box["x"]) == pytest.approx(left + (right - left) / 4, abs=0.1)
    assert float(box["x"]) + float(box["width"]) == pytest.approx((left + right) / 2, abs=0.1)
    assert not shapes(interval_plot(0.1, None, 0.2, (-1.0, 1.0)), "interval")
    assert not shapes(interval_plot(None, None, None, (-1.0, 1.0)), "solid")


@pytest.mark.parametrize(
    ("value", "maximum", "filled"),
    [(0.5, 1.0, 0.5), (3.0, 1.0, 1.0), (-1.0, 1.0, 0.0), (None, 1.0, 0.0), (1.0, 0.0, 0.0)],
)
def test_a_bar_is_filled_by_its_share(value: float | None, maximum: float, filled: float):
    chart = bar(value, maximum)
    full = float(shapes(chart, "track")[0]["width"])
    assert float(shapes(chart, "fill")[0]["width"]) == pytest.approx(full * filled)


def test_points_without_a_value_are_left_out_and_the_line_goes_on():
    chart = panel([Series([0.0, 0.5, 1.0], [0.0, None, math.nan]), Series([0.0, 1.0], [0.1, 0.2], emphasised=False)])
    assert len(shapes(chart, "point")) == 3
    assert len(shapes(chart, "line")) == 1
    assert len(shapes(chart, "minor")) == 3


def test_one_point_with_an_interval_has_a_whisker_and_several_have_a_band():
    single = panel([Series([0.5], [0.2], [0.1], [0.4])])
    several = panel([Series([0.0, 1.0], [0.2, 0.3], [0.1, 0.2], [0.4, 0.5])])
    assert len(shapes(single, "whisker")) == 1 and not shapes(single, "band")
    assert len(shapes(several, "band")) == 1 and not shapes(several, "whisker")


def test_equal_ratios_are_equal_distances_on_a_logarithmic_panel():
    series = Series([0.0, 0.3, 0.6], [1.0, 2.0, 4.0])
    chart = panel([series], domain=(0.5, 8.0), logarithmic=True, reference=2.0, reference_label="bound")
    first, second, third = (float(dot["cy"]) for dot in shapes(chart, "point"))
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert float(shapes(chart, "bound")[0]["y1"]) == second
    assert "bound" in texts(chart)


def test_costs_beyond_the_end_are_drawn_at_the_end():
    chart = panel([Series([0.0, 0.5, 1.0], [1.0, 1e9, math.inf])], domain=(0.5, 10.0), logarithmic=True)
    heights = [float(dot["cy"]) for dot in shapes(chart, "point")]
    assert heights[1] == heights[2] < heights[0]


def test_a_bound_outside_the_axis_is_not_drawn():
    assert not shapes(panel([], reference=5.0), "bound")
    assert not shapes(panel([]), "bound")


def test_the_marked_amount_runs_through_every_panel():
    panels = [Panel("a", [], (0.0, 1.0), 50), Panel("b", [], (0.0, 1.0), 50, percent=True)]
    chart = stacked_panels(panels, (0.0, 0.2), "x", "label", marked_x=0.1)
    grid = [float(line["y1"]) for line in shapes(chart, "grid")]
    mark = shapes(chart, "marked")[0]
    assert float(mark["y1"]) <= min(grid) and float(mark["y2"]) >= max(grid)
    assert "100%" in texts(chart)
    assert not shapes(stacked_panels(panels, (0.0, 0.2), "x", "label", marked_x=math.nan), "marked")


def test_labels_are_escaped_wherever_they_stand():
    hostile = '"><script>x</script>'
    panels = [Panel(hostile, [], (0.0, 1.0), 50, reference=0.5, reference_label=hostile)]
    chart = stacked_panels(panels, (0.0, 1.0), hostile, hostile)
    assert "<script" not in chart
    assert texts(chart).count(hostile) == 3
    assert ET.fromstring(str(chart)).get("aria-label") == hostile


def test_no_coordinate_is_ever_not_a_number():
    odd = [None, math.nan, math.inf, -math.inf, 0.0]
    chart = panel([Series([0.0] * 5, odd, odd, odd)], zero_line=True)
    for drawn in (chart, dot_plot(math.inf, -math.inf), interval_plot(math.inf, -math.inf, math.nan, (-1.0, 1.0))):
        assert not re.search(r'="[^"]*(nan|inf)[^"]*"', re.sub(r'aria-label="[^"]*"', "", str(drawn)))


def test_only_real_numbers_are_finite():
    assert finite(2) == 2.0
    assert [finite(v) for v in (None, "2", True, math.nan, math.inf)] == [None] * 5
