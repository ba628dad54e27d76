"""What judges say of texts at many doses of many steering variants: rows, and the curves read off them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sae_emotion_plugin.evidence.dose_curves import DoseCurve, DosePoint
from sae_emotion_plugin.generation.records import mean_of_known
from sae_emotion_plugin.result_table import ResultTable

LINES_SHOWN = 40


@dataclass(frozen=True, slots=True)
class SweepScore:
    """What one judge says of one steered continuation on one measure, less what it says of the unsteered one."""

    variant: str
    dose: float
    prompt: str
    seed: int
    judge: str
    measure: str
    """An emotion, or "valence"."""
    change: float | None
    """Steered minus unsteered; None where either text is empty."""
    masked_change: float | None
    """The same with promoted tokens and emotion words blanked in both texts."""
    log_perplexity_ratio: float | None
    """Steered minus unsteered, nats a token under the unsteered model; None where either has no token."""
    degenerate: bool
    baseline_degenerate: bool


@dataclass(frozen=True, repr=False)
class SweepScores(ResultTable):
    """Scores of steered texts against their unsteered ones; `meta` names the model, judges and variants."""

    row_type = SweepScore
    head = ("variant", "dose", "judge", "measure", "texts", "change", "masked", "perplexity", "degenerate")

    meta: dict[str, Any]
    rows: tuple[SweepScore, ...]

    def of(self, variant: str, judge: str, measure: str) -> tuple[SweepScore, ...]:
        """The rows of a variant by one judge on one measure. ValueError, with the valid names, where there are none."""
        found = self.groups.get((variant, judge, measure))
        if found is None:
            known = [sorted(set(names)) for names in zip(*self.groups, strict=True)] or [[], [], []]
            for what, name, names in zip(
                ("variant", "judge", "measure"), (variant, judge, measure), known, strict=True
            ):
                if name not in names:
                    raise ValueError(f"no scores of the {what} {name!r} (there are {', '.join(names) or 'none'})")
            raise ValueError(f"the judge {judge!r} was not asked for {measure!r} of {variant!r}")
        return found

    def curve(
        self,
        variant: str,
        judge: str,
        measure: str,
        *,
        masked: bool = True,
        sign: int = 1,
        negative: bool = False,
        prompts: Sequence[str] | None = None,
    ) -> DoseCurve:
        """The variant's effect on a measure, and its perplexity ratio, by dose, for `evidence.equal_cost`.

        A curve begins at dose 0 and is of one sign: the doses below 0 are a curve of their own, with their sizes as
        doses, and never share one with those above 0, since costs rise in both directions. Continuations that are
        empty, steered or not, are points without a likelihood, which curves leave out and count.

        Args:
            sign: -1 where the measure is wanted to fall (valence under anger; any emotion at doses below 0).
            negative: the curve of the doses below 0.
            prompts: only these; by default all.

        Raises:
            ValueError: nothing was scored so, or the variant has no dose of that side.
        """
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign}")
        wanted = None if prompts is None else set(prompts)
        points = []
        for row in self.of(variant, judge, measure):
            if (row.dose < 0) != negative or (wanted is not None and row.prompt not in wanted):
                continue
            change, cost = (row.masked_change if masked else row.change), row.log_perplexity_ratio
            if change is None or cost is None:
                change, ratio = 0.0, None
            else:
                ratio = math.exp(cost)
            points.append(DosePoint(abs(row.dose), sign * change, ratio, row.prompt, row.seed))
        side = "below" if negative else "above"
        if not points:
            raise ValueError(f"the variant {variant!r} has no scored texts at a dose {side} 0 on these prompts")
        return DoseCurve(variant, tuple(points))

    @cached_property
    def groups(self) -> dict[tuple[str, str, str], tuple[SweepScore, ...]]:
        """The rows by variant, judge and measure."""
        groups: dict[tuple[str, str, str], list[SweepScore]] = {}
        for row in self.rows:
            groups.setdefault((row.variant, row.judge, row.measure), []).append(row)
        return {key: tuple(rows) for key, rows in groups.items()}

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        cells: dict[tuple[str, float, str, str], list[SweepScore]] = {}
        for row in self.rows:
            cells.setdefault((row.variant, row.dose, row.judge, row.measure), []).append(row)
        lines = []
        for (variant, dose, judge, measure), rows in list(cells.items())[:LINES_SHOWN]:
            cost = mean_of_known(row.log_perplexity_ratio for row in rows)
            before, after = (sum(values) / len(rows) for values in zip(*map(_loops, rows), strict=True))
            changes = (mean_of_known(row.change for row in rows), mean_of_known(row.masked_change for row in rows))
            shown = ("-" if one is None else f"{one:+.3f}" for one in changes)
            ratio = "-" if cost is None else f"x{math.exp(cost):.2f}"
            lines.append(
                (variant, f"{dose:+g}", judge, measure, str(len(rows)), *shown, ratio, f"{after:.1%} ({before:.1%})")
            )
        return f"SweepScores: {len(self.rows)} rows, {len(lines)} of {len(cells)} cells shown", lines


def _loops(row: SweepScore) -> tuple[bool, bool]:
    return row.baseline_degenerate, row.degenerate
