"""Labels and dashboards -> one self-contained HTML page in which the labelled features of a dictionary can be read."""

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sae_emotion_plugin.dashboards.types import (
    ActivatingSequence,
    Correlation,
    FeatureDashboard,
    Histogram,
    SequenceGroup,
    TokenEffect,
)
from sae_emotion_plugin.feature_labels import FeatureLabel
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages.charts import DASH, number, share, tick_digits, ticks
from sae_emotion_plugin.pages.report_views import hues, language
from sae_emotion_plugin.pages.templates import amount, label, listed, page_template, probability, render_page
from sae_emotion_plugin.pages.token_text import in_a_row, marked, printable

TOKENS_BEFORE, TOKENS_AFTER = 48, 24
"""How much of a text is shown around the token on which the feature fires most."""
RELATED_SHOWN = 5
STATISTICS = {
    "auroc": "AUROC, training",
    "held_out_auroc": "AUROC, held out",
    "q": "q",
    "rate_in": "Fires in class",
    "rate_out": "Fires out of class",
}
"""Names of a label's figures; others are shown by the names that they have."""


def write_browser(
    path: str | Path,
    labels: Sequence[FeatureLabel],
    dashboards: Iterable[FeatureDashboard] = (),
    *,
    title: str,
    meta: Mapping[str, Any] | None = None,
    links: Mapping[int, str] | None = None,
) -> Path:
    """The path, after the page was written there whole.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: there is no label.
    """
    return write_whole(path, render(labels, dashboards, title=title, meta=meta, links=links))


def render(
    labels: Sequence[FeatureLabel],
    dashboards: Iterable[FeatureDashboard] = (),
    *,
    title: str,
    meta: Mapping[str, Any] | None = None,
    links: Mapping[int, str] | None = None,
) -> str:
    """The page as HTML, in one file that needs no network; the same content always gives the same text.

    Args:
        labels: of any number of authors; a feature without one is not on the page.
        dashboards: of the labelled features, further ones are passed over; a feature without one has its labels only.
        meta: how all this was made, for the foot of the page.
        links: a page about a feature, by its number; anything but https is not linked.
    """
    if not labels:
        raise ValueError("there are no labels, and the page shows labelled features only; valid: at least one label")
    by_feature: dict[int, list[FeatureLabel]] = {}
    for one in labels:
        by_feature.setdefault(one.feature, []).append(one)
    known = {one.feature: one for one in dashboards if one.feature in by_feature}
    features = [
        feature_view(by_feature[feature], known.get(feature), (links or {}).get(feature))
        for feature in sorted(by_feature)
    ]
    counts = Counter(emotion for feature in features for emotion in feature["emotions"])
    emotions = sorted(counts, key=lambda emotion: (-counts[emotion], emotion))
    return render_page(
        _template(),
        ("report.css", "browser.css"),
        "browser.js",
        title=title,
        meta=meta or {},
        headline=headline(features, len(known)),
        hue=hues(emotions).get,
        features=features,
        counts={emotion: counts[emotion] for emotion in emotions},
        data=_json_in_html({"features": features, "hues": hues(emotions)}),
    )


def headline(features: Sequence[Mapping[str, Any]], n_known: int) -> str:
    """How many features are labelled, for how many emotions, and how many of them were looked at."""
    n, emotions = len(features), {emotion for feature in features for emotion in feature["emotions"]}
    text = f"{n} labelled {'feature' if n == 1 else 'features'}"
    if emotions:
        text += f" for {listed(sorted(emotions)) if len(emotions) < 9 else f'{len(emotions)} emotions'}"
    return text + (f"; {n - n_known} of them without a dashboard." if n_known < n else ".")


def feature_view(
    labels: Sequence[FeatureLabel], dashboard: FeatureDashboard | None, link: str | None = None
) -> dict[str, Any]:
    """All that the page shows of one feature as JSON values, numbers already in words, text already printable."""
    emotions = dict.fromkeys(emotion for one in labels for emotion in one.emotions)
    shown: dict[str, Any] = {
        "id": labels[0].feature,
        "emotions": list(emotions),
        "url": link if link and link.startswith("https://") else None,
        "labels": [
            {
                "text": one.text,
                "by": " · ".join(filter(None, (one.author, f"{one.method} {one.version}".strip()))) or DASH,
                "statistics": [[*_statistic(name, one.statistics[name])] for name in sorted(one.statistics, key=_rank)],
            }
            for one in labels
        ],
        "facts": [],
        "charts": [],
        "texts": [],
        "promotes": [],
        "suppresses": [],
        "related": [],
    }
    return _printable(shown | (_dashboard_view(dashboard) if dashboard else {}))


def _dashboard_view(dashboard: FeatureDashboard) -> dict[str, Any]:
    related = [
        ("Features, by correlation", "feature", dashboard.correlated_features),
        ("Dimensions, by correlation", "dimension", dashboard.correlated_neurons),
    ]
    charts = [
        _histogram("Activations, where it fires", dashboard.activations, "tokens"),
        _histogram("Effects on the logits of all tokens", dashboard.logits, "tokens of the vocabulary"),
    ]
    return {
        "facts": [
            ["Fires on", f"{amount(100 * dashboard.fraction_active)} % of tokens"],
            ["Tokens", f"{number(dashboard.n_active, 0)} of {number(dashboard.n_tokens, 0)}"],
            ["Largest activation", amount(dashboard.maximum)],
        ],
        "charts": [chart for chart in charts if chart],
        "texts": [_group(group, dashboard.maximum) for group in dashboard.groups if group.sequences],
        "promotes": [_effect(one) for one in dashboard.promoted],
        "suppresses": [_effect(one) for one in dashboard.suppressed],
        "related": [
            {"title": title, "rows": [_related(one, kind) for one in rows[:RELATED_SHOWN]]}
            for title, kind, rows in related
            if rows
        ],
    }


def _histogram(title: str, found: Histogram, what: str) -> dict[str, Any] | None:
    if not found.counts:
        return None
    steps = ticks(found.lowest, found.highest, 6)
    total = sum(found.counts)
    return {
        "title": title,
        "low": found.lowest,
        "high": found.highest,
        "top": max(found.counts),
        "label": f"{title}: {number(total, 0)} {what} from {amount(found.lowest)} to {amount(found.highest)}, "
        f"at most {number(max(found.counts), 0)} in one of {len(found.counts)} bars",
        "bars": [[float(f"{centre:.4g}"), count] for centre, count in zip(found.centres, found.counts, strict=True)],
        "ticks": [[step, number(step, tick_digits(steps))] for step in steps],
    }


def _group(group: SequenceGroup, maximum: float) -> dict[str, Any]:
    n = len(group.sequences)
    if group.lowest is None:
        title = f"The strongest {n}" if n > 1 else "The strongest"
    else:
        noun = "sample" if n == 1 else "samples"
        ends = f"{amount(group.lowest)} to {amount(group.highest)}"
        title = f"{n} {noun} from {ends} ({amount(100 * (group.share or 0.0))} % of all tokens)"
    rows = [_text(one, maximum) for one in group.sequences]
    return {"title": title, "open": group.lowest is None, "rows": rows}


def _text(sequence: ActivatingSequence, maximum: float) -> dict[str, Any]:
    """The text around its strongest token: what fires as word, strength and value, the rest in one piece."""
    start, end = max(0, sequence.strongest - TOKENS_BEFORE), sequence.strongest + TOKENS_AFTER + 1
    pieces: list[Any] = ["… " if start else ""]
    for token, value in zip(sequence.tokens[start:end], sequence.values[start:end], strict=True):
        if value > 0:
            strength = round(min(1.0, value / maximum), 3) if maximum > 0 else 0.0
            pieces += [[in_a_row(token), max(strength, 0.001), f"{marked(token)}: {amount(value)}"], ""]
        else:
            pieces[-1] += in_a_row(token)
    pieces[-1] += " …" if end < len(sequence.tokens) else ""
    note = f"{amount(sequence.maximum)} at {marked(sequence.tokens[sequence.strongest])}"
    return {
        "tokens": [piece for piece in pieces if piece],
        "note": note,
        "language": language("".join(sequence.tokens)),
    }


def _effect(one: TokenEffect) -> list[str]:
    return [marked(one.token), number(one.effect, 2, True)]


def _related(one: Correlation, kind: str) -> list[Any]:
    """What it is called, how strongly it correlates, and its number where it is a feature."""
    return [f"{kind} {one.index}", number(one.pearson, 2, True), one.index if kind == "feature" else None]


def _rank(name: str) -> tuple[int, str]:
    """Well-known figures first, in the order of `STATISTICS`."""
    known, plain = [*STATISTICS], name.partition(":")[0]
    return (known.index(plain) if plain in known else len(known), name)


def _statistic(name: str, value: float | int | str | None) -> tuple[str, str]:
    plain, _, of = name.partition(":")
    title = STATISTICS.get(plain, label(plain)) + (f", {of}" if of else "")
    if isinstance(value, str):
        return title, value
    if plain in ("q", "p"):
        return title, probability(value)
    if plain in ("auroc", "held_out_auroc"):
        return title, number(value, 3)
    if plain in ("rate_in", "rate_out"):
        return title, share(value)
    return title, amount(value)


def _printable(value: Any) -> Any:
    """The value with every text in it printable: JSON would carry a control character past the page's own check."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(one) for key, one in value.items()}
    return [_printable(one) for one in value] if isinstance(value, list) else value


def _json_in_html(value: Mapping[str, Any]) -> Markup:
    """The value as JSON that no parser of HTML takes for the end of its element, or for anything but text."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@functools.cache
def _template() -> jinja2.Template:
    return page_template("browser.html")
