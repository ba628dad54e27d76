"""A self-contained HTML page from the results of the main job: plain data in, one file out."""

import functools
from pathlib import Path

import jinja2
from markupsafe import Markup

from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages.charts import finite, number
from sae_emotion_plugin.pages.report_content import (
    Bounds,
    DoseResponseRow,
    Finding,
    HighlightedText,
    MethodNote,
    ReportContent,
    ScoreDistribution,
    broken_bounds,
)
from sae_emotion_plugin.pages.report_views import (
    FEATURES_OPEN,
    OPENINGS_OPEN,
    auroc_floor,
    demonstrations,
    dose_charts,
    emotion_order,
    feature_groups,
    forest_domain,
    highlight_groups,
    hues,
    language,
    openings,
)
from sae_emotion_plugin.pages.templates import label, listed, page_template, render_page

__all__ = [
    "Bounds",
    "DoseResponseRow",
    "Finding",
    "HighlightedText",
    "MethodNote",
    "ReportContent",
    "ScoreDistribution",
    "broken_bounds",
    "render",
    "write_report",
]

FVU_KEYS = ("fvu", "fvu_without_largest_dimension", "fvu_mean_over_dimensions")
CROSS_ENTROPY_KEYS = ("cross_entropy", "cross_entropy_spliced", "cross_entropy_mean_ablated")


def write_report(folder: Path, content: ReportContent) -> Path:
    """The path of the page, `folder/index.html`, written in one step: there is never half a page."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; the report needs a folder")
    page = render(content)
    folder.mkdir(parents=True, exist_ok=True)
    return write_whole(folder / "index.html", page)


def render(content: ReportContent) -> str:
    """The page as HTML; the same content always gives the same text."""
    order = emotion_order(content)
    groups = feature_groups(content, order)
    metrics = content.dictionary
    return render_page(
        _template(),
        ("report.css",),
        "report.js",
        title=content.title,
        meta=content.meta,
        content=content,
        hue=hues(order).__getitem__,
        headline=headline(content),
        features=groups,
        features_open=FEATURES_OPEN,
        auroc_low=auroc_floor(content, groups),
        forest=forest_domain(content.findings),
        doses=dose_charts(content, order),
        demos=demonstrations(content, order),
        openings=openings(content, order),
        openings_open=OPENINGS_OPEN,
        steered=[emotion for emotion in order if any(row["emotion"] == emotion for row in content.generations)],
        highlights=highlight_groups(content, order),
        fvu=[(label(key), metrics[key]) for key in FVU_KEYS if key in metrics],
        cross_entropy=[(label(key), metrics[key]) for key in CROSS_ENTROPY_KEYS if key in metrics],
        cross_entropy_top=max([0.0, *(finite(metrics.get(key)) or 0.0 for key in CROSS_ENTROPY_KEYS)]),
        sparsity=[(label(k), v) for k, v in metrics.items() if k not in FVU_KEYS + CROSS_ENTROPY_KEYS],
    )


@functools.cache
def _template() -> jinja2.Template:
    return page_template("report.html", broken_bounds=broken_bounds, language=language, prose=_prose)


def headline(content: ReportContent) -> str:
    """The one-sentence result: how many findings keep the bounds, with their effects, and which do not."""
    if not content.findings:
        return "Features were found and scored; no steering result was recorded."
    emotions = [f.emotion for f in content.findings]

    def name(finding: Finding) -> str:
        several = emotions.count(finding.emotion) > 1
        return f"{finding.emotion} ({finding.setting})" if several else finding.emotion

    good = [f for f in content.findings if not broken_bounds(f, content.bounds)]
    bad = [name(f) for f in content.findings if broken_bounds(f, content.bounds)]
    effects = [
        f"{number(f.effect, 2, True)} [{number(f.low, 2, True)}, {number(f.high, 2, True)}] for {name(f)}" for f in good
    ]
    if not good:
        return f"Steering towards {listed(bad)} did not keep the bounds."
    sentence = f"Steering moved mean valence by {listed(effects)}, at a cost within the bounds"
    return sentence + (f"; {listed(bad)} did not keep the bounds." if bad else ".")


def _prose(text: str) -> Markup:
    """Running text on one flow: a line break becomes a mark, so that loops of empty lines stay short."""
    return Markup(' <span class="ws">↵</span> ').join(text.split("\n"))
