"""A dose-response -> one self-contained HTML page: effect and cost by dose, the dose to take, and who else is moved."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages import svg
from sae_emotion_plugin.pages.charts import Panel, Series, finite, number, share, stacked_panels
from sae_emotion_plugin.pages.report_views import hues
from sae_emotion_plugin.pages.templates import amount, page_template, render_page
from sae_emotion_plugin.steering_studies.dose_effects import PANEL, DoseEffect
from sae_emotion_plugin.steering_studies.dose_response import WANTED, ChosenDose, Direction, DoseResponse

SMALLEST_REACH = 0.05
"""Of the axis of effects: noise alone does not fill a chart."""
LARGEST_RATIO = 10.0
WAYS: dict[Direction, str] = {"towards": "raise", "away": "lower"}


@dataclass(frozen=True)
class _Axes:
    """Ends that the charts of all variants share."""

    dose: tuple[float, float]
    effect: tuple[float, float]
    ratio: tuple[float, float]
    excess: tuple[float, float]


def write_dose_page(path: str | Path, response: DoseResponse, title: str = "Dose and response") -> Path:
    """The path, after the page was written there whole. FileNotFoundError when its folder does not exist."""
    return write_whole(path, render(response, title))


def render(response: DoseResponse, title: str = "Dose and response") -> str:
    """The page as HTML, in one file that needs no network; the same results always give the same text."""
    variants = list(response.meta["variants"])
    emotions = list(dict.fromkeys(response.meta["variants"][name]["emotion"] for name in variants))
    axes = _axes([row for name in variants for row in response.main(name)], response.meta["bounds"])
    reach = max([SMALLEST_REACH, *(abs(v) for one in response.chosen for v in one.prompt_changes if v is not None)])
    return render_page(
        _template(),
        ("report.css", "discovery.css"),
        title=title,
        hue=hues(emotions).get,
        headline=headline(response),
        response=response,
        bounds=response.meta["bounds"],
        stacks=[_stack(response, name, axes) for name in variants],
        choices=[(way, [_choice(response, name, way, reach) for name in variants]) for way in WANTED],
        ways=WAYS,
        panel=PANEL,
        others=_other_table(response, variants),
        sentence=sentence,
        meta={key: value for key, value in response.meta.items() if key not in ("variants", "choose", "report")},
    )


def headline(response: DoseResponse) -> str:
    """For how many emotions a dose was found that moves the judges with words blanked, in words."""
    chosen = [response.recommended(name) for name in response.meta["variants"]]
    n = len(chosen)
    found = [one for one in chosen if one.found]
    named = f" ({', '.join(f'{one.variant} at {amount(one.dose)}' for one in found)})" if found else ""
    missing = [one.variant for one in chosen if one.dose is None]
    text = (
        f"For {len(found)} of {n} {'emotion' if n == 1 else 'emotions'}{named} steering at the recommended dose moves "
        "the judges towards the emotion, with promoted tokens and emotion words blanked out, on openings that had no "
        "part in choosing the dose."
    )
    return text + (f" No dose is recommended for {', '.join(missing)}." if missing else "")


def sentence(one: ChosenDose) -> str:
    """What was chosen and what came of it, in one or two sentences."""
    goal = f"To {WAYS[one.direction]} {one.emotion}"
    if one.dose is None:
        return f"{goal}: no dose is recommended, because {one.reason} on the choosing half."
    text = f"{goal}: dose {amount(one.dose)}, masked change {number(one.masked, 3, True)}"
    if one.low is not None and one.high is not None:
        verdict = "excludes" if one.found else "does not exclude"
        text += f" [{number(one.low, 3, True)}, {number(one.high, 3, True)}], which {verdict} 0 after correction"
    text += f", at perplexity ratio {number(one.perplexity_ratio)}."
    return text if one.keeps_bounds else text + " On the reported half it breaks the bounds."


@functools.cache
def _template() -> jinja2.Template:
    return page_template("dose.html")


def _axes(rows: Sequence[DoseEffect], bounds: Mapping[str, float]) -> _Axes:
    ends = [finite(v) for row in rows for v in (row.change, row.masked, row.masked_low, row.masked_high)]
    effects = [v for v in ends if v is not None]
    step = 0.1 if max(map(abs, effects), default=0.0) > 0.2 else SMALLEST_REACH
    ratios = [row.perplexity_ratio for row in rows if row.perplexity_ratio is not None]
    excess = [row.degenerate_excess for row in rows]
    doses = [row.dose for row in rows]
    return _Axes(
        dose=(min(0.0, *doses), max(0.0, *doses)),
        # Whole steps, so that the ends have ticks.
        effect=(
            math.floor(min([-SMALLEST_REACH, *effects]) / step) * step,
            math.ceil(max([SMALLEST_REACH, *effects]) / step) * step,
        ),
        ratio=(
            max(0.1, min([0.8, *ratios])),
            min(LARGEST_RATIO, max([1.25 * bounds["perplexity_ratio"], *ratios]) * 1.1),
        ),
        excess=(min([-0.05, *excess]), max([0.2, 1.5 * bounds["degenerate_excess"], *excess])),
    )


def _stack(response: DoseResponse, variant: str, axes: _Axes) -> dict[str, Any]:
    """One variant's charts, one below the other over the same doses, and its numbers."""
    rows = response.main(variant)
    chosen = response.recommended(variant)
    emotion, bounds = response.meta["variants"][variant]["emotion"], response.meta["bounds"]
    # Dose 0 is known without a text: no change, ratio 1.
    below, above = [row for row in rows if row.dose < 0], [row for row in rows if row.dose > 0]
    doses = [*(row.dose for row in below), 0.0, *(row.dose for row in above)]

    def line(name: str, at_zero: float, band: bool = False, emphasised: bool = True) -> Series:
        def along(column: str, middle: float) -> list[float | None]:
            return [*(getattr(row, column) for row in below), middle, *(getattr(row, column) for row in above)]

        ends = (along("masked_low", 0.0), along("masked_high", 0.0)) if band else (None, None)
        return Series(doses, along(name, at_zero), *ends, emphasised=emphasised)

    ratio, excess = bounds["perplexity_ratio"], bounds["degenerate_excess"]
    panels = (
        Panel(
            "Change of the emotion",
            [line("masked", 0.0, band=True), line("change", 0.0, emphasised=False)],
            axes.effect,
            120,
            zero_line=True,
        ),
        Panel(
            "Perplexity ratio",
            [line("perplexity_ratio", 1.0)],
            axes.ratio,
            70,
            logarithmic=True,
            reference=ratio,
            reference_label=f"bound {number(ratio, 1)}",
        ),
        Panel(
            "Degenerate, above unsteered",
            [line("degenerate_excess", 0.0)],
            axes.excess,
            52,
            percent=True,
            zero_line=True,
            reference=excess,
            reference_label=f"bound {share(excess)}",
        ),
    )
    label = f"Effect and cost of steering towards {emotion} at {len(rows)} doses"
    chart = stacked_panels(panels, axes.dose, "dose, in the unit of the plans", label, chosen.dose)
    return {"variant": variant, "emotion": emotion, "chart": chart, "chosen": chosen, "rows": rows}


def _choice(response: DoseResponse, variant: str, way: Direction, reach: float) -> dict[str, Any]:
    """The chosen dose of a variant by every judge, the one that chose first, with its prompts as a strip."""
    main = response.recommended(variant, way)
    key = (variant, way)
    others = [one for one in response.chosen if (one.variant, one.direction) == key and one.judge != main.judge]
    return {
        "main": main,
        "judges": others if main.dose is not None else [],
        "strip": _strip(main, reach) if main.prompt_changes else "",
    }


def _strip(one: ChosenDose, reach: float) -> Markup:
    """Every prompt's masked change as a dot; those that go the wrong way are hollow."""
    x = svg.linear(-reach, reach, 8, 192)
    parts = [svg.line("axis", 8, 12, 192, 12), svg.line("zero", x(0.0), 2, x(0.0), 22)]
    known = [value for value in one.prompt_changes if value is not None]
    wanted = WANTED[one.direction]
    parts += [svg.dot("solid" if value * wanted >= 0 else "hollow", x(value), 12, 2.6) for value in sorted(known)]
    parts += [
        svg.text(x(end), 33, number(end, 2, True), "tick", anchor)
        for end, anchor in ((-reach, "start"), (reach, "end"))
    ]
    wrong = sum(value * wanted < 0 for value in known)
    return svg.drawing(
        200, 36, f"Masked change of {len(known)} openings, {wrong} of them the wrong way", parts, "forest"
    )


def _other_table(response: DoseResponse, variants: Sequence[str]) -> dict[str, Any]:
    """What each recommended dose does to every measure."""
    rows = []
    for variant in variants:
        chosen = response.recommended(variant)
        row = next((row for row in response.main(variant) if row.dose == chosen.dose), None)
        if row is not None:
            changes = {row.emotion: row.masked, **{one.measure: one.masked for one in row.others}}
            rows.append({"variant": variant, "emotion": row.emotion, "dose": row.dose, "changes": changes})
    measures = list(dict.fromkeys(measure for row in rows for measure in row["changes"]))
    largest = max([SMALLEST_REACH, *(abs(v) for row in rows for v in row["changes"].values() if v is not None)])
    return {"measures": measures, "rows": rows, "largest": largest}
