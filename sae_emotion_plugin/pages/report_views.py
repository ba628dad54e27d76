"""How a report's content is arranged on the page: what is grouped, ordered, shown and charted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from sae_emotion_plugin.pages.charts import Number, Panel, Series, finite, number, share, stacked_panels
from sae_emotion_plugin.pages.report_content import (
    Bounds,
    DoseResponseRow,
    Finding,
    HighlightedText,
    ReportContent,
)

FEATURES_SHOWN = 5
FEATURES_OPEN = 3
"""How many features, and below how many openings, stand on the page without a click."""
OPENINGS_OPEN = 3
HUES = {
    "anger": "red",
    "disgust": "green",
    "fear": "violet",
    "joy": "amber",
    "love": "pink",
    "neutral": "slate",
    "sadness": "blue",
    "surprise": "teal",
}
OTHER_HUES = ("indigo", "orange", "teal", "pink", "green", "violet", "blue", "amber", "red")


def emotion_order(content: ReportContent) -> tuple[str, ...]:
    """Every emotion on the page in order of first mention, findings first."""
    mentioned = [f.emotion for f in content.findings] + list(content.recommended)
    mentioned += [str(row["emotion"]) for row in (*content.scores, *content.generations)]
    mentioned += [row.emotion for row in (*content.distributions, *content.dose_response, *content.highlights)]
    return tuple(dict.fromkeys(mentioned))


def hues(emotions: Sequence[str]) -> dict[str, str]:
    """The colour name of each emotion: fixed for well-known labels, in turn for the others."""
    taken = {HUES.get(emotion) for emotion in emotions}
    free = [hue for hue in OTHER_HUES if hue not in taken] or list(OTHER_HUES)
    others = [emotion for emotion in emotions if emotion not in HUES]
    return {emotion: HUES.get(emotion) or free[others.index(emotion) % len(free)] for emotion in emotions}


def language(text: str) -> str:
    """The language that decides which shapes Han characters take."""
    if any("\uac00" <= c <= "\ud7a3" or "\u1100" <= c <= "\u11ff" for c in text):
        return "ko"
    return "ja" if any("\u3040" <= c <= "\u30ff" for c in text) else "en"


def feature_groups(content: ReportContent, order: Sequence[str]) -> list[dict[str, Any]]:
    """Per emotion, the features with the best AUROC on the training half, and how many were scored."""
    groups = []
    for emotion in order:
        rows = [row for row in content.scores if row["emotion"] == emotion]
        ranked = sorted(rows, key=lambda row: -_or_zero(row["auroc"]))
        groups.append({"emotion": emotion, "rows": ranked[:FEATURES_SHOWN], "n": len(rows)})
    return [group for group in groups if group["rows"]]


def auroc_floor(content: ReportContent, groups: Sequence[Mapping[str, Any]]) -> float:
    """Where the AUROC axis begins: at 0.5, or at 0 when a feature on the page is below it."""
    shown = [row[key] for group in groups for row in group["rows"] for key in ("auroc", "held_out_auroc")]
    return 0.0 if any(value is not None and value < 0.5 for value in map(finite, shown)) else 0.5


def forest_domain(findings: Sequence[Finding]) -> tuple[float, float]:
    """Ends of an axis symmetric about 0 that holds every effect and interval."""
    ends = [abs(_or_zero(value)) for f in findings for value in (f.effect, f.low, f.high)]
    reach = max([0.5, *ends])
    return (-reach, reach)


@dataclass(frozen=True)
class _Axes:
    amount: tuple[float, float]
    effect: tuple[float, float]
    cost: tuple[float, float]
    degenerate: tuple[float, float]


def dose_charts(content: ReportContent, order: Sequence[str]) -> list[dict[str, Any]]:
    """One stack of charts per emotion; all stacks share their axes, so that emotions compare."""
    if not content.dose_response:
        return []
    limits = {emotion: _degenerate_bound(content, emotion) for emotion in order}
    axes = _dose_axes(content.dose_response, content.bounds, [v for v in limits.values() if v is not None])
    stacks = []
    for emotion in order:
        rows = [row for row in content.dose_response if row.emotion == emotion]
        rows.sort(key=lambda row: (row.part, row.amount))
        if rows:
            chosen = content.recommended.get(emotion)
            chart = _dose_chart(rows, axes, content.bounds, limits[emotion], chosen)
            stacks.append({"emotion": emotion, "chart": chart, "rows": rows, "recommended": chosen})
    return stacks


def _degenerate_bound(content: ReportContent, emotion: str) -> float | None:
    baselines = [finite(f.degenerate_baseline) for f in content.findings if f.emotion == emotion]
    known = [value for value in baselines if value is not None]
    return known[0] + content.bounds.degenerate_excess if known else None


def _dose_axes(rows: Sequence[DoseResponseRow], bounds: Bounds, limits: Sequence[float]) -> _Axes:
    effects = [_or_zero(value) for row in rows for value in (row.valence_shift, row.low, row.high)]
    costs = [cost for row in rows if (cost := finite(row.perplexity_ratio)) is not None and cost > 0]
    degenerate = max([0.25, *limits, *(_or_zero(row.degenerate_share) for row in rows)])
    return _Axes(
        amount=(min(0.0, *(row.amount for row in rows)), max(row.amount for row in rows)),
        effect=(min([-0.25, *effects]) - 0.05, max([0.25, *effects]) + 0.05),
        cost=(max(0.1, min([0.5, *costs])), min(10.0, max([1.5, *costs]) * 1.1) * bounds.perplexity_ratio),
        degenerate=(0.0, min(1.0, degenerate * 1.1)),
    )


def _dose_chart(
    rows: Sequence[DoseResponseRow], axes: _Axes, bounds: Bounds, limit: float | None, chosen: Number
) -> Markup:
    def lines(column: Literal["valence_shift", "perplexity_ratio", "degenerate_share"]) -> list[Series]:
        series = []
        for part in ("choose", "report"):
            if members := [row for row in rows if row.part == part]:
                interval = column == "valence_shift"
                series.append(
                    Series(
                        x=[row.amount for row in members],
                        y=[getattr(row, column) for row in members],
                        low=[row.low for row in members] if interval else None,
                        high=[row.high for row in members] if interval else None,
                        emphasised=part == "report",
                    )
                )
        return series

    ratio = bounds.perplexity_ratio
    effect = Panel("Valence shift", lines("valence_shift"), axes.effect, 120, zero_line=True)
    cost = Panel(
        "Perplexity ratio",
        lines("perplexity_ratio"),
        axes.cost,
        70,
        logarithmic=True,
        reference=ratio,
        reference_label=f"bound {number(ratio, 1)}",
    )
    degenerate = Panel(
        "Degenerate share",
        lines("degenerate_share"),
        axes.degenerate,
        52,
        percent=True,
        reference=limit,
        reference_label=f"bound {share(limit)}",
    )
    label = f"Effect and cost of steering towards {rows[0].emotion} at {len({r.amount for r in rows})} amounts"
    axis = "amount, fraction of the mean residual norm"
    return stacked_panels((effect, cost, degenerate), axes.amount, axis, label, chosen)


def pairs(content: ReportContent, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Before/after pairs: one per prompt, decoding and baseline, with every amount that was tried.

    Of several amounts the recommended one is shown first; without one, the middle one of those tried.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        names = ("emotion", "prompt", "temperature", "seed", "baseline_text", "mode")
        groups.setdefault((*(row[name] for name in names), str(row["features"])), []).append(row)
    made = []
    for members in groups.values():
        members = sorted(members, key=lambda row: _or_zero(row["amount"]))
        chosen = content.recommended.get(members[0]["emotion"])
        recommended = next((row for row in members if same_amount(row["amount"], chosen)), None)
        first = recommended or members[len(members) // 2]
        made.append(
            {
                "emotion": first["emotion"],
                "shown": first,
                "others": [row for row in members if row is not first],
                "recommended": recommended is not None,
                "greedy": _or_zero(first["temperature"]) == 0,
            }
        )
    return made


def demonstrations(content: ReportContent, order: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of each demonstration prompt, the best-known prompt first, greedy before sampled."""
    rows = [row for row in content.generations if _is_demonstration(content, row)]
    prompts = sorted(dict.fromkeys(row["prompt"] for row in rows), key=lambda p: p != content.demo_prompt)
    groups = []
    for prompt in prompts:
        made = pairs(content, [row for row in rows if row["prompt"] == prompt])
        made.sort(key=lambda pair: (order.index(pair["emotion"]), not pair["greedy"]))
        groups.append({"prompt": prompt, "pairs": made})
    return groups


def openings(content: ReportContent, order: Sequence[str]) -> list[dict[str, Any]]:
    """Per emotion, the pairs of the reported half at the recommended amount, or at the middle one tried."""
    groups = []
    for emotion in order:
        rows = [row for row in content.generations if row["emotion"] == emotion and row["part"] == "report"]
        rows = [row for row in rows if not _is_demonstration(content, row)]
        amounts = sorted({row["amount"] for row in rows})
        if amounts:
            chosen = content.recommended.get(emotion)
            at = next((a for a in amounts if same_amount(a, chosen)), amounts[len(amounts) // 2])
            made = pairs(content, [row for row in rows if row["amount"] == at])
            recommended = same_amount(at, chosen)
            groups.append({"emotion": emotion, "amount": at, "recommended": recommended, "pairs": made})
    return groups


def _is_demonstration(content: ReportContent, row: Mapping[str, Any]) -> bool:
    return row["part"] == "demo" or row["prompt"] == content.demo_prompt


def same_amount(amount: object, chosen: object) -> bool:
    """Whether two amounts are one number, up to a rounding in the last places."""
    left, right = finite(amount), finite(chosen)
    return left is not None and right is not None and math.isclose(left, right, rel_tol=1e-6)


def highlight_groups(content: ReportContent, order: Sequence[str]) -> list[dict[str, Any]]:
    """Highlighted texts per feature; a strength is a fraction of the largest activation shown for it."""
    groups: dict[tuple[str, int], list[HighlightedText]] = {}
    for text in sorted(content.highlights, key=lambda text: order.index(text.emotion)):
        groups.setdefault((text.emotion, text.feature), []).append(text)
    shown = []
    for (emotion, feature), texts in groups.items():
        largest = max([0.0, *(_or_zero(value) for text in texts for value in text.activations)])
        views = []
        for text in texts:
            strengths = [max(0.0, _or_zero(v)) / largest if largest else 0.0 for v in text.activations]
            tokens = list(zip(text.tokens, text.activations, strengths, strict=True))
            views.append({"id": text.text_id, "tokens": tokens, "language": language("".join(text.tokens))})
        shown.append({"emotion": emotion, "feature": feature, "largest": largest, "texts": views})
    return shown


def silent_share(activations: Sequence[Number]) -> float | None:
    """The share of texts on which a feature does not fire."""
    known = [value for value in map(finite, activations) if value is not None]
    return sum(value <= 0 for value in known) / len(known) if known else None


def _or_zero(value: object) -> float:
    return finite(value) or 0.0
