"""Dose-response: what each dose of steering does to its emotion and to all others, what it costs, and which to take.

A dose is chosen on one half of the openings and reported on the other. Beside it stands what an oracle would have got,
which chooses on the reported half itself, so that the price of not knowing the best dose can be seen.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_emotion_plugin.evidence.resampling import Resampling
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.steering_studies.amounts import DoseBounds
from sae_emotion_plugin.steering_studies.dose_effects import (
    DoseEffect,
    Half,
    VariantDoses,
    effects,
    halves,
    known_mean,
    ratio_of,
    value_of,
    wrong_share,
)
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScores

Direction = Literal["towards", "away"]
WANTED: dict[Direction, int] = {"towards": 1, "away": -1}
BOUNDS = DoseBounds(perplexity_ratio=1.5, degenerate_excess=0.05)
RESAMPLES_OF_CHOSEN = 10_000
"""At least: corrected intervals lie far in the tails."""
_ROUNDING = 1e-12


@dataclass(frozen=True)
class ChosenDose:
    """The dose chosen on one half, by one judge on the other half, and what knowing better would have given."""

    emotion: str
    variant: str
    direction: Direction
    """Whether the emotion is wanted more or less."""
    judge: str
    dose: float | None
    reason: str | None
    """Why there is no dose."""
    masked: float | None = None
    """Mean masked change towards the emotion; below 0 is wanted where the direction is away."""
    low: float | None = None
    """Ends of its interval at `level`, corrected over the emotions (Holm)."""
    high: float | None = None
    level: float | None = None
    found: bool = False
    """Whether the interval excludes 0 on the wanted side, and so do those of all clearer emotions."""
    change: float | None = None
    """The mean change of the texts as they are."""
    perplexity_ratio: float | None = None
    degenerate_excess: float | None = None
    keeps_bounds: bool | None = None
    """Whether the reported half keeps the bounds too, within which the dose was chosen on the other."""
    wrong_share: float | None = None
    """Share of prompts that move the other way than wanted."""
    prompt_changes: tuple[float | None, ...] = ()
    """The masked change by prompt of the reported half."""
    oracle_dose: float | None = None
    """The best dose within the bounds, chosen on the reported half itself."""
    oracle: float | None = None
    """Its masked change; what it is better by than `masked` is the price of not knowing it."""
    prompt_oracle: float | None = None
    """Masked change when each prompt gets its own best dose or none: too good, since luck is chosen with it."""
    prompt_oracle_held_out: float | None = None
    """The same with a prompt's dose chosen on its other seeds; None with one seed."""


@dataclass(frozen=True, repr=False)
class DoseResponse(ResultTable):
    """Effects by dose, and the chosen doses.

    `meta` has what the scores' meta has, the two halves of the openings, the bounds, and for each variant its emotion,
    its measure by judge, and the judge that chose ("chosen_by").
    """

    row_type = DoseEffect
    head = ("variant", "dose", "masked change", "as it is", "perplexity", "degenerate", "wrong way")

    meta: dict[str, Any]
    rows: tuple[DoseEffect, ...]
    chosen: tuple[ChosenDose, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: `meta`, `rows` and `chosen`."""
        return {**super().to_dict(), "chosen": [asdict(one) for one in self.chosen]}

    def main(self, variant: str, part: Half = "report") -> tuple[DoseEffect, ...]:
        """The rows of a variant by the judge that chose, by dose. ValueError for an unknown variant."""
        judge = self._chooser(variant)
        rows = [row for row in self.rows if (row.variant, row.judge, row.part) == (variant, judge, part)]
        return tuple(sorted(rows, key=lambda row: row.dose))

    def recommended(self, variant: str, direction: Direction = "towards") -> ChosenDose:
        """The chosen dose by the judge that chose it. ValueError for an unknown variant."""
        key = (variant, self._chooser(variant), direction)
        return next(one for one in self.chosen if (one.variant, one.judge, one.direction) == key)

    def _chooser(self, variant: str) -> str:
        known = self.meta["variants"]
        if variant not in known:
            raise ValueError(f"no variant {variant!r} (there are {', '.join(known)})")
        return known[variant]["chosen_by"]

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        lines = []
        for variant in self.meta["variants"]:
            chosen = self.recommended(variant).dose
            for row in self.main(variant):
                mark = " *" if row.dose == chosen else ""
                ratio = "-" if row.perplexity_ratio is None else f"x{row.perplexity_ratio:.2f}"
                wrong = "-" if row.wrong_share is None else f"{row.wrong_share:.0%}"
                effects = (
                    _shown(row.masked, row.masked_low, row.masked_high),
                    _shown(row.change, row.low, row.high),
                )
                lines.append((variant, f"{row.dose:+g}{mark}", *effects, ratio, f"{row.degenerate_excess:+.1%}", wrong))
        halves = f"{len(self.meta['choose'])} openings to choose on, {len(self.meta['report'])} reported"
        return f"DoseResponse: {halves}; * recommended", lines


def dose_response(
    scores: SweepScores,
    emotions: Sequence[str] | None = None,
    *,
    judge: str | None = None,
    bounds: DoseBounds = BOUNDS,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> DoseResponse:
    """Effect and cost of every dose on both halves of the openings, and the dose to take, chosen on one half alone.

    The recommended dose has the largest masked change within the bounds, of all doses of either sign; one is chosen to
    raise the emotion ("towards") and one to lower it ("away"). Equal ones: the smaller. The reported half has no say.
    Intervals of doses are pointwise; those of the chosen doses are corrected over the emotions (Holm, step by step from
    the clearest emotion on), for each direction and judge.

    Args:
        emotions: by default those of the variants.
        judge: the name of the judge that chooses; by default the mean over all that know the emotion. Judges that
            know only valence count where none knows the emotion or its basic emotion.
        bounds: what a dose may cost on the choosing half.
        seed: of the split and of the resampling.

    Raises:
        ValueError: no variant is meant for an emotion, no judge can tell it, an unknown judge, or fewer than 4 prompts.
    """
    told = scores.meta["variants"]
    asked = tuple(dict.fromkeys(one["emotion"] for one in told.values() if one["emotion"] is not None))
    emotions = asked if emotions is None else tuple(emotions)
    if not emotions or not set(emotions) <= set(asked):
        name = next((one for one in emotions if one not in asked), None)
        raise ValueError(f"no variant is meant for {name!r} (there are some for {', '.join(asked) or 'no emotion'})")
    parts = halves(sorted({row.prompt for row in scores.rows}), seed)
    resampling = Resampling(level, resamples, seed)
    rows: list[DoseEffect] = []
    families: dict[tuple[str, str], list[_Chosen]] = {}
    variants = {}
    for variant, facts in told.items():
        if facts["emotion"] not in emotions:
            continue
        measured = VariantDoses.of(scores, variant, facts["emotion"], judge)
        variants[variant] = {**facts, "measures": measured.measures, "chosen_by": measured.chooser}
        rows += effects(measured, parts, resampling)
        for direction in WANTED:
            for found in _chosen(measured, direction, parts, bounds):
                families.setdefault((direction, found[0].judge), []).append(found)
    meta = {
        **scores.meta,
        "variants": variants,
        "choose": list(parts["choose"]),
        "report": list(parts["report"]),
        "bounds": asdict(bounds),
        "level": level,
        "resamples": resamples,
        "seed": seed,
    }
    chosen = [one for family in families.values() for one in _corrected(family, resampling)]
    return DoseResponse(meta, tuple(rows), tuple(chosen))


_Chosen = tuple[ChosenDose, Float[np.ndarray, "_ _"]]
"""With the masked changes of the reported half; none of them where there is no dose."""


def _chosen(
    measured: VariantDoses, direction: Direction, parts: Mapping[Half, Sequence[str]], bounds: DoseBounds
) -> Iterator[_Chosen]:
    """The dose chosen for a direction, by every judge, without intervals yet."""
    wanted = WANTED[direction]
    choosing, places = (measured.places(parts[part]) for part in ("choose", "report"))
    deciding = measured.changes[measured.chooser, measured.measures[measured.chooser]][1]
    affordable = _kept(*measured.costs(choosing), bounds)
    index = _best(known_mean(known_mean(deciding[:, choosing])) * wanted, affordable, measured.doses)
    logs, excess = measured.costs(places)
    kept = _kept(logs, excess, bounds)
    reason = None
    if index is None:
        way = "raises" if wanted > 0 else "lowers"
        reason = f"no dose within the bounds {way} the emotion" if affordable.any() else "no dose keeps the bounds"
    for judge, measure in measured.measures.items():
        plain, masked = (one[:, places] for one in measured.changes[judge, measure])
        means = known_mean(known_mean(masked))
        own = ChosenDose(measured.emotion, measured.variant, direction, judge, None, reason)
        if (best := _best(means * wanted, kept, measured.doses)) is not None:
            own = replace(own, oracle_dose=measured.doses[best], oracle=float(means[best]))
        cost, loops = measured.cost[:, places], measured.loops[:, :, places]
        together, held_out = _prompt_oracles(wanted * masked, cost, loops, bounds)
        own = replace(own, prompt_oracle=_signed(together, wanted), prompt_oracle_held_out=_signed(held_out, wanted))
        changes = np.zeros((0, 0))
        if index is not None:
            changes = masked[index]
            by_prompt = known_mean(changes)
            own = replace(
                own,
                dose=measured.doses[index],
                masked=value_of(means[index]),
                change=value_of(known_mean(known_mean(plain[index]))),
                perplexity_ratio=ratio_of(logs[index]),
                degenerate_excess=float(excess[index]),
                keeps_bounds=bool(kept[index]),
                wrong_share=wrong_share(by_prompt, wanted),
                prompt_changes=tuple(value_of(one) for one in by_prompt),
            )
        yield own, changes


def _best(gains: Float[np.ndarray, " dose"], kept: Bool[np.ndarray, " dose"], doses: Sequence[float]) -> int | None:
    """Where the gain is largest, of those kept and above 0; of equal ones the smaller dose."""
    good = [index for index in range(len(doses)) if kept[index] and gains[index] > 0]
    return min(good, key=lambda index: (-gains[index], abs(doses[index]), doses[index]), default=None)


def _kept(
    logs: Float[np.ndarray, "*shape"], excess: Float[np.ndarray, "*shape"], bounds: DoseBounds
) -> Bool[np.ndarray, "*shape"]:
    """Whether the bounds are kept; not where there is no likelihood."""
    affordable = logs <= math.log(bounds.perplexity_ratio) + _ROUNDING
    return affordable & (excess <= bounds.degenerate_excess + _ROUNDING)


def _prompt_oracles(
    gains: Float[np.ndarray, "dose prompt seed"],
    cost: Float[np.ndarray, "dose prompt seed"],
    loops: Float[np.ndarray, "steered dose prompt seed"],
    bounds: DoseBounds,
) -> tuple[float | None, float | None]:
    """The mean gain when each prompt has its own best dose: chosen on all its seeds, and on all but the one it gets."""
    seeds = list(range(gains.shape[-1]))
    together = _gained(gains, _own_doses(gains, cost, loops, bounds))
    if len(seeds) == 1:
        return value_of(known_mean(known_mean(together))), None
    held_out = np.full(together.shape, np.nan)
    for seed in seeds:
        others = [one for one in seeds if one != seed]
        chosen = _own_doses(gains[..., others], cost[..., others], loops[..., others], bounds)
        held_out[:, seed] = _gained(gains[..., [seed]], chosen)[:, 0]
    return value_of(known_mean(known_mean(together))), value_of(known_mean(known_mean(held_out)))


def _own_doses(
    gains: Float[np.ndarray, "dose prompt seed"],
    cost: Float[np.ndarray, "dose prompt seed"],
    loops: Float[np.ndarray, "steered dose prompt seed"],
    bounds: DoseBounds,
) -> Int[np.ndarray, " prompt"]:
    """Each prompt's best dose within the bounds, as its place; -1 where none gains anything."""
    unsteered, steered = known_mean(loops)
    means = known_mean(gains)
    good = _kept(known_mean(cost), steered - unsteered, bounds) & (means > 0)
    return np.where(good.any(axis=0), np.where(good, means, -np.inf).argmax(axis=0), -1)


def _gained(
    gains: Float[np.ndarray, "dose prompt seed"], chosen: Int[np.ndarray, " prompt"]
) -> Float[np.ndarray, "prompt seed"]:
    """The gain of each prompt at its dose; 0 where it has none."""
    return np.where(chosen[:, None] < 0, 0.0, gains[chosen, np.arange(len(chosen))])


def _corrected(family: Sequence[_Chosen], resampling: Resampling) -> list[ChosenDose]:
    """The chosen doses with intervals, the clearest with the widest level: Holm's procedure by intervals.

    The k-th clearest of m (from 1) has the level 1 - alpha / (m - k + 1), and is found if all clearer ones are.
    """
    order = sorted(
        (index for index, (one, _) in enumerate(family) if one.dose is not None),
        key=lambda index: -_clearness(family[index][1]),
    )
    done = [one for one, _ in family]
    all_found = True
    for rank, index in enumerate(order):
        level = 1 - (1 - resampling.level) / (len(order) - rank)
        many = max(resampling.resamples, RESAMPLES_OF_CHOSEN)
        low, high = replace(resampling, level=level, resamples=many).ends(family[index][1])
        end = low if WANTED[done[index].direction] > 0 else high
        all_found = all_found and end is not None and end * WANTED[done[index].direction] > 0
        done[index] = replace(done[index], low=low, high=high, level=level, found=all_found)
    return done


def _clearness(changes: Float[np.ndarray, "prompt seed"]) -> float:
    """The size of the mean over prompts in standard errors."""
    known = known_mean(changes)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return 0.0
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    mean = abs(float(known.mean()))
    return mean / error if error else math.inf if mean else 0.0


def _signed(value: float | None, wanted: int) -> float | None:
    return None if value is None else wanted * value


def _shown(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.3f}" + ("" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]")
