"""A trained dictionary -> one self-contained HTML page: its report, the curves of its training, what made it."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages.charts import Panel, Series, finite, number, share, stacked_panels
from sae_emotion_plugin.pages.templates import page_template, render_page
from sae_emotion_plugin.training.dictionaries import TrainedDictionary

Points = Sequence[Mapping[str, Any]]
CHARTS: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    ("Reconstruction", (("Loss", ("loss",)), ("FVU", ("fvu", "held_out_fvu")))),
    ("Sparsity", (("L0, features a token", ("l0",)), ("Dead features", ("dead",)))),
    (
        "Directions",
        (
            ("Mean |cos|", ("cosine_mean",)),
            ("|cos| to the nearest row; dashed, 99th percentile", ("cosine_max", "cosine_p99")),
        ),
    ),
    ("Fidelity", (("Loss recovered, held out", ("loss_recovered",)), ("Shrinkage", ("shrinkage",)))),
    ("Steps", (("Learning rate", ("lr",)), ("Gradient norm", ("gradient_norm",)))),
)
"""Figures, their panels, and the columns of the curve that each shows: the first solid, others dashed."""
TABLE = (
    "step",
    "loss",
    "fvu",
    "held_out_fvu",
    "l0",
    "dead",
    "shrinkage",
    "cosine_mean",
    "cosine_p99",
    "cosine_max",
    "loss_recovered",
)
TABLE_ROWS = 25
SPREAD = 10.0
"""A loss that falls this far is shown on a logarithmic axis."""


def write_training_page(path: str | Path, trained: TrainedDictionary, title: str | None = None) -> Path:
    """The path, after the page was written there whole. FileNotFoundError when its folder does not exist."""
    return write_whole(path, render(trained, title))


def render(trained: TrainedDictionary, title: str | None = None) -> str:
    """The page as HTML, in one file that needs no network; the same dictionary always gives the same text."""
    provenance = trained.provenance()
    training = dict(provenance.get("training") or {})
    curve = [point for point in training.pop("curve", None) or () if isinstance(point, Mapping)]
    recipe = trained.recipe
    return render_page(
        _template(),
        ("report.css", "discovery.css"),
        title=title or f"{recipe.name}, {recipe.sae_id}",
        hue=lambda name: None,
        headline=headline(trained, curve),
        figures=[(name, chart) for name, panels in CHARTS if (chart := figure(name, panels, curve)) is not None],
        columns=[name for name in TABLE if any(finite(point.get(name)) is not None for point in curve)],
        rows=_thinned(curve),
        null=next((point["cosine_random"] for point in curve if "cosine_random" in point), None),
        report={**asdict(trained.report), "loss_recovered": trained.report.loss_recovered},
        recipe={key: value for key, value in asdict(recipe).items() if value is not None and key != "texts"},
        texts=provenance.get("texts") or (),
        meta={
            **{f"model_{key}": value for key, value in provenance.get("model", {}).items()},
            "training_tokens": provenance.get("training_tokens"),
            **training,
            "versions": provenance.get("versions", {}),
            "sha256": {name: digest for name, digest in trained.sha256.items() if name != "report.html"},
        },
    )


def headline(trained: TrainedDictionary, curve: Points) -> str:
    """How good the dictionary is on held-out documents and how its training went, in words."""
    report = trained.report
    text = (
        f"On {number(report.n_tokens, 0)} tokens of held-out documents it leaves {share(report.fvu)} of the variance "
        f"unexplained with {number(report.l0, 1)} features a token, and keeps {share(report.loss_recovered)} of the "
        f"cross-entropy that mean-ablation destroys; {number(report.dead, 0)} of {number(report.d_sae, 0)} features "
        "never fired there."
    )
    losses = [loss for point in curve if (loss := finite(point.get("loss"))) is not None]
    if len(losses) > 1 and losses[0]:
        text += f" Its loss went from {number(losses[0], 3)} to {number(losses[-1], 3)}."
    return text


def figure(name: str, panels: Sequence[tuple[str, tuple[str, ...]]], curve: Points) -> Markup | None:
    """The panels of a figure over the steps; None where the curve has nothing for any of them."""
    drawn = [panel for title, columns in panels if (panel := _panel(title, columns, curve)) is not None]
    if not drawn:
        return None
    last = max(point["step"] for point in curve)
    return stacked_panels(drawn, (0, last), "step", f"{name} over {last} steps")


def _panel(title: str, columns: Sequence[str], curve: Points) -> Panel | None:
    series, values = [], []
    for column in columns:
        points = [(point["step"], y) for point in curve if (y := finite(point.get(column))) is not None]
        if points:
            steps, ys = zip(*points, strict=True)
            series.append(Series(steps, ys, emphasised=column == columns[0]))
            values += ys
    if not values:
        return None
    low, high = min(values), max(values)
    null = next((point["cosine_random"] for point in curve if "cosine_random" in point), None)
    null = null if columns[0] == "cosine_mean" else None
    logarithmic = columns[0] == "loss" and low > 1e-3 and high > SPREAD * low
    if not logarithmic:
        # Room for the words above the line of random rows.
        low, high = min(0.0, low), max(high * 1.05, (null or 0.0) * 1.4) or 1.0
    return Panel(
        title,
        series,
        (low, high),
        90,
        percent=columns[0] == "dead",
        logarithmic=logarithmic,
        reference=null,
        reference_label="random rows" if null is not None else "",
    )


def _thinned(curve: Points) -> list[Mapping[str, Any]]:
    """Evenly many points for a table, the last one among them."""
    every = max(1, -(-len(curve) // TABLE_ROWS))
    return [*itertools.islice(curve, 0, max(0, len(curve) - 1), every), *curve[-1:]]


@functools.cache
def _template() -> jinja2.Template:
    return page_template("training.html")
