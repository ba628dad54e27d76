"""A sweep of trainings -> one self-contained HTML page: what a wider dictionary gives, and the laws behind it."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from sae_emotion_plugin.evidence.scaling_laws import LeftOut, ScalingLaw
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages.charts import Panel, Series, number, stacked_panels
from sae_emotion_plugin.pages.templates import page_template, render_page
from sae_emotion_plugin.training_sweeps.laws import UNSTABLE, best_rates
from sae_emotion_plugin.training_sweeps.results import SweepCell, TrainingSweep


def write_sweep_page(path: str | Path, sweep: TrainingSweep, title: str = "How wide should the dictionary be?") -> Path:
    """The path, after the page was written there whole. FileNotFoundError when its folder does not exist."""
    return write_whole(path, render(sweep, title))


def render(sweep: TrainingSweep, title: str = "How wide should the dictionary be?") -> str:
    """The page as HTML, in one file that needs no network; the same results always give the same text."""
    best = best_rates(sweep.rows)
    return render_page(
        _template(),
        ("report.css", "discovery.css"),
        title=title,
        headline=headline(sweep),
        sweep=sweep,
        stacks=[_stack(sweep, sparsity, best) for sparsity in dict.fromkeys(row.sparsity for row in best)],
        fits=[law for law in sweep.laws if law.reason is None],
        missing=[law for law in sweep.laws if law.reason is not None],
        place=_place,
        unstable=UNSTABLE,
        meta=sweep.meta,
    )


def headline(sweep: TrainingSweep) -> str:
    """What a wider dictionary gave, in words."""
    known = [row for row in best_rates(sweep.rows) if row.fvu is not None]
    if not known:
        return "Every training diverged: there is nothing to compare."
    ends = f"x{min(row.expansion for row in known):g} to x{max(row.expansion for row in known):g}"
    diverged = sum(row.fvu is None for row in sweep.rows)
    text = f"{len(sweep.rows)} trainings from {ends}" + (f", {diverged} of which diverged. " if diverged else ". ")
    if not sweep.trends:
        return text + "They are too few for a trend with the width."
    lowest = []
    for sparsity in dict.fromkeys(row.sparsity for row in known):
        best = min((row for row in known if row.sparsity == sparsity), key=lambda row: row.fvu or 0.0)
        lowest.append(f"x{best.expansion:g} with {sparsity}")
    text += f"After {number(sweep.meta['training_tokens'], 0)} tokens the FVU is lowest at {', '.join(lowest)}. "
    return text + " ".join(_trend(one.name, one.value, one.low, one.high) for one in sweep.trends)


def _trend(name: str, value: float, low: float, high: float) -> str:
    verdict = "it rises" if low > 0 else "it falls" if high < 0 else "no change is shown"
    ends = f"[{number(low, 3, True)}, {number(high, 3, True)}]"
    return f"{name[0].upper()}{name[1:]}: {number(value, 3, True)} {ends}, so {verdict}."


@functools.cache
def _template() -> jinja2.Template:
    return page_template("sweep.html")


def _stack(sweep: TrainingSweep, sparsity: str, best: Sequence[SweepCell]) -> dict[str, Any]:
    """The charts of one sparsity, one below the other over the same expansions; several seeds are averaged."""
    rows = [row for row in best if row.sparsity == sparsity]
    expansions = sorted({row.expansion for row in rows})
    logs = [math.log2(one) for one in expansions]

    def line(name: str, emphasised: bool = True) -> Series:
        means = []
        for expansion in expansions:
            known = [getattr(row, name) for row in rows if row.expansion == expansion]
            values = [value for value in known if value is not None]
            means.append(sum(values) / len(values) if values else None)
        return Series(logs, means, emphasised=emphasised)

    lines = {name: line(name) for name in ("fvu", "loss_recovered", "dead_share", "auroc")}
    predicted = _predicted(sweep.laws, sparsity, [rows[0].d_sae / rows[0].expansion * one for one in expansions])
    fvu = [lines["fvu"], Series(logs, predicted, emphasised=False)] if predicted else [lines["fvu"]]
    auroc = [lines["auroc"], line("random_auroc", False)]
    panels = (
        Panel("FVU", fvu, _domain(best, ("fvu",), 0.0), 110),
        Panel("Loss recovered", [lines["loss_recovered"]], _domain(best, ("loss_recovered",), 1.0), 70, percent=True),
        Panel("Dead features", [lines["dead_share"]], _domain(best, ("dead_share",), 0.0, 0.05), 52, percent=True),
        Panel("Emotion AUROC, best latent", auroc, _domain(best, ("auroc", "random_auroc"), 0.5), 90),
    )
    ticks = [(place, f"x{one:g}") for place, one in zip(logs, expansions, strict=True)]
    label = f"FVU, loss recovered, dead features and AUROC of {len(rows)} trainings with {sparsity} by expansion"
    chart = stacked_panels(panels, (logs[0], logs[-1]), "expansion factor", label, x_ticks=ticks)
    return {"sparsity": sparsity, "chart": chart, "rows": rows, "predicted": bool(predicted)}


def _predicted(laws: Sequence[ScalingLaw], sparsity: str, widths: Sequence[float]) -> list[float | None]:
    """What L(N) fitted without each width says of it; nothing where there is no such fit."""
    for law in laws:
        if law.name == f"L(N), {sparsity}" and law.reason is None:
            found = {round(one.at["N"]): one.predicted for one in law.left_out}
            return [found.get(round(width)) for width in widths]
    return []


def _domain(rows: Sequence[SweepCell], names: Sequence[str], bound: float, least: float = 0.0) -> tuple[float, float]:
    """From the smallest to the largest value of all stacks, which share their axes, with `bound` among them."""
    values = [value for row in rows for name in names if (value := getattr(row, name)) is not None]
    return min([bound, *values]), max([bound + least, *values])


def _place(one: LeftOut) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in one.at.items())
