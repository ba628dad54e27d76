"""What every page shares: the templates in `data/`, the formats of values in them, and the whole page from one."""

import base64
import hashlib
import importlib.resources
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jinja2
from markupsafe import Markup

from sae_emotion_plugin.pages import charts
from sae_emotion_plugin.pages.charts import DASH, finite, number, share
from sae_emotion_plugin.pages.report_views import silent_share
from sae_emotion_plugin.pages.token_text import marked_token, printable, reading

META_LABELS = {
    "model_sha256": "Model SHA-256",
    "hook_name": "Hook",
    "wall_time_s": "Wall time",
    "fvu": "FVU, whole",
    "fvu_without_largest_dimension": "FVU without the largest dimension",
    "fvu_mean_over_dimensions": "FVU, mean over dimensions",
    "cross_entropy": "Cross-entropy of the model alone",
    "cross_entropy_spliced": "Cross-entropy, reconstruction spliced in",
    "cross_entropy_mean_ablated": "Cross-entropy, mean-ablated",
    "l0": "L0, active features per token",
    "dead": "Dead features",
    "d_sae": "Features in all",
    "n_documents": "Held-out documents",
    "n_tokens": "Held-out tokens",
    "mean_norm": "Mean activation norm",
    "largest_dimension": "Index of the largest dimension",
    "largest_dimension_share": "Its share of the variance",
}


def page_template(name: str, **functions: Any) -> jinja2.Template:
    """The template `data/name` with everything escaped, and with our formats of values beside `functions`."""
    loader = jinja2.FunctionLoader(page_data)
    environment = jinja2.Environment(loader=loader, autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.globals |= functions | {
        "amount": amount,
        "charts": charts,
        "dash": DASH,
        "duration": _duration,
        "label": label,
        "number": number,
        "plain": _plain,
        "probability": probability,
        "reading": reading,
        "share": share,
        "silent_share": silent_share,
        "token": marked_token,
        "valence_class": _valence_class,
    }
    return environment.get_template(name)


def render_page(template: jinja2.Template, styles: Sequence[str], script: str = "", **values: Any) -> str:
    """The page as HTML, in one file that needs no network; the same values always give the same text.

    Args:
        styles: files in `data/` whose rules the page has, in their order.
        script: the file in `data/` that alone may run on the page; none by default.
    """
    code = page_data(script) if script else ""
    page = template.render(
        values,
        css=Markup("\n".join(map(page_data, styles))),
        script=Markup(code),
        script_hash=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    )
    return printable(page.rstrip()) + "\n"


def page_data(name: str) -> str:
    """The text of a file in `data/`."""
    return (importlib.resources.files("sae_emotion_plugin") / "data" / name).read_text(encoding="utf-8").strip()


def _shown(value: object) -> object:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return DASH if missing else value


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


def probability(value: object) -> str:
    """A probability to three decimals; a small one only as such."""
    real = finite(value)
    return DASH if real is None else "< 0.001" if real < 0.001 else number(real, 3)


def _valence_class(value: object) -> str:
    real = finite(value)
    return "none" if real is None else "negative" if real < -0.05 else "positive" if real > 0.05 else "even"


def label(key: str) -> str:
    """The name of a fact, as it is shown."""
    return META_LABELS.get(key, key.replace("_", " ").capitalize())


def listed(items: Sequence[str]) -> str:
    """The items as words: `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
