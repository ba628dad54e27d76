"""What a report page shows, as plain data: the contract between the results and the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sae_emotion_plugin.pages.charts import Number, finite, number, share

SCORE_KEYS = (
    *("emotion", "feature", "auroc", "held_out_auroc", "p", "q", "rate_in", "rate_out"),
    *("promotes", "suppresses"),
)
GENERATION_KEYS = (
    *("prompt", "emotion", "features", "mode", "amount", "unit", "temperature", "seed", "part"),
    *("baseline_text", "text", "baseline_valence", "valence", "baseline_nll", "nll"),
    *("degenerate", "baseline_degenerate"),
)


@dataclass(frozen=True)
class Bounds:
    """What a steering result must keep to count as a success."""

    perplexity_ratio: float = 2.0
    degenerate_excess: float = 0.1
    """Allowed share of degenerate continuations above the baseline's."""
    effect: float | None = 0.3
    """Smallest mean valence shift in the expected direction; None: any shift whose interval excludes 0."""


@dataclass(frozen=True)
class ScoreDistribution:
    """Held-out pooled activations of an emotion's best feature, one value per text."""

    emotion: str
    feature: int
    in_class: Sequence[float | int]
    out_class: Sequence[float | int]


@dataclass(frozen=True)
class DoseResponseRow:
    """Effect and cost of one amount on one half of the prompts."""

    emotion: str
    amount: float | int
    part: Literal["choose", "report"]
    valence_shift: Number
    low: Number
    high: Number
    perplexity_ratio: Number
    degenerate_share: Number
    n: int


@dataclass(frozen=True)
class Finding:
    """The result of one emotion on the prompts that had no part in choosing its amount."""

    emotion: str
    amount: Number
    effect: Number
    low: Number
    high: Number
    perplexity_ratio: Number
    degenerate_steered: Number
    degenerate_baseline: Number
    expected: Literal["rise", "fall"] | None = None
    """Which way valence should move."""
    n: int | None = None
    setting: str = ""
    """Which prompts and which decoding, for example `10 neutral openings, sampled`."""


@dataclass(frozen=True)
class HighlightedText:
    """One text and the activation of one feature on each of its tokens."""

    emotion: str
    feature: int
    text_id: str
    tokens: Sequence[str]
    activations: Sequence[Number]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations):
            counts = f"{len(self.tokens)} tokens but {len(self.activations)} activations"
            raise ValueError(f"highlighted text {self.text_id!r} has {counts}; give one activation per token")


@dataclass(frozen=True)
class MethodNote:
    """One paragraph of the method section, beside the standard ones."""

    title: str
    text: str


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page, as plain data.

    `scores` and `generations` are the rows of scores.json and generations.json. `dictionary` holds the
    dictionary's own report (`fvu`, `fvu_without_largest_dimension`, `fvu_mean_over_dimensions`, `l0`, `dead`,
    `d_sae`, `cross_entropy`, `cross_entropy_spliced`, `cross_entropy_mean_ablated`; other keys are listed as
    they are). Raises ValueError for a row with a missing key.
    """

    title: str
    meta: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]]
    dictionary: Mapping[str, Any]
    distributions: Sequence[ScoreDistribution] = ()
    dose_response: Sequence[DoseResponseRow] = ()
    recommended: Mapping[str, Number] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    generations: Sequence[Mapping[str, Any]] = ()
    highlights: Sequence[HighlightedText] = ()
    method: Sequence[MethodNote] = ()
    """Notes shown before the standard ones, which the page always carries."""
    bounds: Bounds = Bounds()
    demo_prompt: str = "he is such a"

    def __post_init__(self) -> None:
        for name, rows, keys in (
            ("scores", self.scores, SCORE_KEYS),
            ("generations", self.generations, GENERATION_KEYS),
        ):
            for i, row in enumerate(rows):
                if missing := [key for key in keys if key not in row]:
                    raise ValueError(f"row {i} of {name} has no {missing[0]!r}; a row needs {', '.join(keys)}")


def broken_bounds(finding: Finding, bounds: Bounds) -> tuple[str, ...]:
    """The bounds that `finding` breaks, in words; empty when it keeps them all."""
    ratio, effect = finite(finding.perplexity_ratio), finite(finding.effect)
    steered, baseline = finite(finding.degenerate_steered), finite(finding.degenerate_baseline)
    low, high = finite(finding.low), finite(finding.high)
    broken = []
    if finite(finding.amount) is None:
        broken.append("no amount is recommended")
    if effect is None or low is None or high is None:
        broken.append("no effect was measured")
    elif low <= 0 <= high:
        broken.append("the interval includes 0")
    if effect is not None and finding.expected is not None:
        along = effect if finding.expected == "rise" else -effect
        if along <= 0:
            broken.append(f"valence did not {finding.expected}")
        elif bounds.effect is not None and along < bounds.effect:
            broken.append(f"the shift is below {number(bounds.effect)}")
    if ratio is None or ratio > bounds.perplexity_ratio:
        broken.append(f"perplexity ratio {number(finding.perplexity_ratio)}")
    if steered is None or baseline is None or steered - baseline > bounds.degenerate_excess + 1e-9:
        broken.append(f"degenerate share {share(steered)} against {share(baseline)}")
    return tuple(broken)
