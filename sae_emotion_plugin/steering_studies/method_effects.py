"""What steering methods do at the same cost, read off judged texts: `MethodEffects`. No model, no torch.

A method is one variant, or several of a kind (random directions) that each have a dose of their own and whose effects
are averaged. Prompts are resampled, the same ones for all methods; intervals as in `evidence.equal_cost`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from sae_emotion_plugin.result_table import ResultTable


@dataclass(frozen=True)
class MethodEffect:
    """One method for one emotion by one judge, at one perplexity ratio.

    Effects are changes of the judge's measure with promoted tokens and emotion words blanked, in the emotion's
    direction. Of several variants (random directions) they are means. None where the curve does not reach the cost.
    """

    emotion: str
    judge: str
    measure: str
    """Of the judge: the emotion, its basic emotion, or "valence"."""
    method: str
    perplexity_ratio: float
    n_variants: int
    n_reached: int
    """How many of the variants reach the cost; the others have no part in the effect."""
    n_prompts: int
    n_seeds: int
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    """Two-sided, of the effect against 0."""
    p_holm: float | None
    """Corrected over the emotions of the same method, judge and ratio."""
    difference: float | None
    """This method minus the reference, on the prompts and seeds that both have."""
    difference_low: float | None
    difference_high: float | None
    difference_p: float | None
    difference_p_holm: float | None
    area: float | None
    """Best effect attainable at cost <= c, averaged over log c up to the ratio (`equal_cost.frontier_area`)."""
    area_low: float | None
    area_high: float | None
    area_difference: float | None
    """Minus the reference's; known where the cost is not reached, too."""
    area_difference_low: float | None
    area_difference_high: float | None
    plain: float | None
    """The effect on the texts as they are, nothing blanked."""
    wrong_way: float | None
    """Share of prompts (of prompts and variants) whose mean effect at the cost is below 0."""
    quantiles: tuple[float, ...] | None
    """Of the prompts' mean effects at the cost: 5, 25, 50, 75 and 95 %."""
    degenerate_excess: float | None
    """Share of degenerate continuations at the cost, less that of the unsteered ones."""
    dose: float | None
    """Where the cost is reached: a fraction of the residual norm, or a number of examples."""
    reach: float
    """The largest perplexity ratio of the curve."""
    left_out: int
    """Texts without a likelihood."""


@dataclass(frozen=True)
class NullComparison:
    """One method against every single direction of a random kind, each at its own dose of the same cost.

    All on the prompts and seeds that both have; masked effects, in the emotion's direction.
    """

    emotion: str
    judge: str
    method: str
    null: str
    perplexity_ratio: float
    n: int
    """How many random directions reach the cost."""
    n_prompts: int
    effect: float | None
    """The method's, on these prompts."""
    null_mean: float | None
    null_sd: float | None
    null_quantile: float | None
    """The 95 % quantile of the random directions' effects."""
    null_best: float | None
    better: int | None
    """How many random directions do at least as well as the method."""
    share_better: float | None
    p: float | None
    """(1 + better) / (1 + n): how often the best of n + 1 alike would be this one. Never below 1 / (1 + n)."""
    difference: float | None
    """The method minus the mean of the random directions."""
    low: float | None
    high: float | None
    difference_p: float | None
    difference_p_holm: float | None
    """Corrected over the emotions of the same method, null, judge and ratio."""
    over_best: float | None
    """The method minus the best of the random directions, which was chosen for being so: a strict comparison."""
    over_best_low: float | None
    over_best_high: float | None


@dataclass(frozen=True, repr=False)
class MethodEffects(ResultTable):
    """Methods at equal cost (`rows`), each against the random directions (`nulls`), and in `meta` how it was found."""

    row_type = MethodEffect
    head = (
        *("emotion", "judge", "cost", "method", "effect", "Holm p", "minus the reference", "Holm p"),
        *("unmasked", "wrong way", "degenerate", "area"),
    )

    meta: dict[str, Any]
    rows: tuple[MethodEffect, ...]
    nulls: tuple[NullComparison, ...]

    def of(self, emotion: str, method: str, judge: str, perplexity_ratio: float | None = None) -> MethodEffect:
        """The row of an emotion, method and judge, by default at the first ratio. ValueError where there is none."""
        ratio = self.meta["perplexity_ratios"][0] if perplexity_ratio is None else perplexity_ratio
        wanted = (emotion, method, judge, ratio)
        for row in self.rows:
            if (row.emotion, row.method, row.judge, row.perplexity_ratio) == wanted:
                return row
        known = [sorted({str(getattr(row, name)) for row in self.rows}) for name in ("emotion", "method", "judge")]
        raise ValueError(f"no row of {wanted} (there are {'; '.join(', '.join(names) for names in known)})")

    def to_dict(self) -> dict[str, Any]:
        """`meta`, and the rows of both tables as objects."""
        return {"meta": self.meta, **{name: [asdict(one) for one in getattr(self, name)] for name in ("rows", "nulls")}}

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        caption = (
            f"Steering methods at equal cost: masked effects with {self.meta['level']:.0%} intervals; the reference is "
            f"{self.meta['reference']}; degenerate: in excess of the unsteered texts"
        )
        return caption, [_cells(row) for row in self.rows]

    def null_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The head and the cells of the comparisons with random directions, for `tables.text_table`."""
        head = ("emotion", "judge", "cost", "method", "null", "effect", "null mean", "best", "better", "p")
        lines = []
        for row in self.nulls:
            where = (row.emotion, row.judge, f"x{row.perplexity_ratio:g}", row.method, row.null)
            better = "-" if row.better is None else f"{row.better} of {row.n}"
            values = (_signed(row.effect), _signed(row.null_mean), _signed(row.null_best), better, _plain(row.p))
            ours = (_interval(row.difference, row.low, row.high), _plain(row.difference_p_holm))
            lines.append((*where, *values, *ours, _interval(row.over_best, row.over_best_low, row.over_best_high)))
        return (*head, "minus the mean", "Holm p", "minus the best"), lines


def _cells(row: MethodEffect) -> tuple[str, ...]:
    method = row.method if row.n_variants == 1 else f"{row.method} ({row.n_reached} of {row.n_variants})"
    return (
        *(row.emotion, row.judge, f"x{row.perplexity_ratio:g}", method),
        f"reaches x{row.reach:.2f} only" if row.effect is None else _interval(row.effect, row.low, row.high),
        _plain(row.p_holm),
        _interval(row.difference, row.difference_low, row.difference_high),
        _plain(row.difference_p_holm),
        _signed(row.plain),
        "-" if row.wrong_way is None else f"{row.wrong_way:.0%}",
        "-" if row.degenerate_excess is None else f"{row.degenerate_excess:+.1%}",
        _interval(row.area, row.area_low, row.area_high),
    )


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
    return _signed(value) + ends


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
