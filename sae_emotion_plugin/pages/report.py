"""A self-contained HTML page from the results of the main job: plain data in, one file out."""

import base64
import functools
import hashlib
import importlib.resources
import math
import unicodedata
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.pages import charts
from sae_emotion_plugin.pages.charts import DASH, finite, number, share
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
    silent_share,
)

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

META_LABELS = {
    "model_sha256": "Model SHA-256",
    "hook_name": "Hook",
    "wall_time_s": "Wall time",
    "fvu": "Whole",
    "fvu_without_largest_dimension": "Without the largest dimension",
    "fvu_mean_over_dimensions": "Mean over dimensions",
    "cross_entropy": "Model alone",
    "cross_entropy_spliced": "Reconstruction spliced in",
    "cross_entropy_mean_ablated": "Mean-ablated",
    "l0": "L0, active features per token",
    "dead": "Dead features",
    "d_sae": "Features in all",
    "n_documents": "Held-out documents",
    "n_tokens": "Held-out tokens",
    "mean_norm": "Mean activation norm",
    "largest_dimension": "Index of the largest dimension",
    "largest_dimension_share": "Its share of the variance",
}
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
    css, script = (page_data(name) for name in ("report.css", "report.js"))
    order = emotion_order(content)
    groups = feature_groups(content, order)
    metrics = content.dictionary
    page = _template().render(
        content=content,
        css=Markup(css),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
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
        fvu=[(_label(key), metrics[key]) for key in FVU_KEYS if key in metrics],
        cross_entropy=[(_label(key), metrics[key]) for key in CROSS_ENTROPY_KEYS if key in metrics],
        cross_entropy_top=max([0.0, *(finite(metrics.get(key)) or 0.0 for key in CROSS_ENTROPY_KEYS)]),
        sparsity=[(_label(k), v) for k, v in metrics.items() if k not in FVU_KEYS + CROSS_ENTROPY_KEYS],
    )
    return printable(page.rstrip()) + "\n"


@functools.cache
def _template() -> jinja2.Template:
    return page_template("report.html", broken_bounds=broken_bounds, language=language, prose=_prose)


def page_template(name: str, **functions: Any) -> jinja2.Template:
    """The template `data/name` with everything escaped, and with our formats of values beside `functions`."""
    environment = jinja2.Environment(autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.globals |= functions | {
        "amount": amount,
        "charts": charts,
        "dash": DASH,
        "duration": _duration,
        "label": _label,
        "number": number,
        "plain": _plain,
        "probability": _probability,
        "reading": _reading,
        "share": share,
        "silent_share": silent_share,
        "token": marked_token,
        "valence_class": _valence_class,
    }
    return environment.from_string(page_data(name))


def page_data(name: str) -> str:
    """The text of a file in `data/`."""
    return (importlib.resources.files("sae_emotion_plugin") / "data" / name).read_text(encoding="utf-8").strip()


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


def marked_token(token: str) -> Markup:
    """`token` with its spaces, line breaks and invisible characters shown as marks."""
    marks = {" ": "␣", "▁": "␣", "\u00a0": "⍽", "\n": "↵", "\r": "␍", "\t": "⇥"}
    if not token:
        return Markup('<span class="ws">empty</span>')
    lonely = all(unicodedata.category(c) in ("Cf", "Mn") for c in token)
    parts = []
    for character in token:
        invisible = unicodedata.category(character) == "Cf" and (lonely or character not in "\u200c\u200d")
        mark = f"U+{ord(character):04X}" if invisible else marks.get(character)
        parts.append(Markup('<span class="ws">{}</span>').format(mark) if mark else Markup.escape(character))
    return Markup("").join(parts)


def printable(text: str) -> str:
    """`text` with control characters, lone surrogates and direction overrides replaced by visible signs."""
    return text.translate(_UNPRINTABLE)


_UNPRINTABLE = (
    {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    | {code: 0xFFFD for code in (*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}
    | {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    | {0x7F: 0x2421}
)


def _shown(value: object) -> object:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return DASH if missing else value


def _prose(text: str) -> Markup:
    """Running text on one flow: a line break becomes a mark, so that loops of empty lines stay short."""
    return Markup(' <span class="ws">↵</span> ').join(text.split("\n"))


def amount(value: object) -> str:
    """A number to four significant digits, a dash for what is none."""
    real = finite(value)
    return DASH if real is None else f"{real:.4g}".replace("-", charts.MINUS)


def _duration(value: object) -> str:
    seconds = finite(value)
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _plain(value: object) -> object:
    """A value of unknown kind, readable: numbers without noise, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Real):
        real = finite(value)
        if real is not None and real == round(real):
            return number(real, 0) if abs(real) >= 10_000 else amount(real)
        return number(value) if real is None or abs(real) >= 1 else amount(real)
    return ", ".join(str(_plain(item)) for item in value) if isinstance(value, list | tuple) else value


def _reading(token: str) -> Markup:
    """`token` as it reads in running text; a line break, or a token of nothing but space, gets its mark."""
    if not token.strip(" ▁"):
        return marked_token(token)
    parts = [Markup.escape(part) for part in token.replace("▁", " ").split("\n")]
    return Markup('<span class="ws">↵</span>\n').join(parts)


def _probability(value: object) -> str:
    real = finite(value)
    return DASH if real is None else "< 0.001" if real < 0.001 else number(real, 3)


def _valence_class(value: object) -> str:
    real = finite(value)
    return "none" if real is None else "negative" if real < -0.05 else "positive" if real > 0.05 else "even"


def _label(key: str) -> str:
    return META_LABELS.get(key, key.replace("_", " ").capitalize())


def listed(items: Sequence[str]) -> str:
    """The items as words: `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
