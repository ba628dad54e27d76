"""What each dose of a sweep does to its emotion and to all others, and what it costs, on each half of the openings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from sae_emotion_plugin.evidence.resampling import Resampling
from sae_emotion_plugin.judges.judge import VALENCE
from sae_emotion_plugin.steering_studies.success import SIGNS, basic_emotion
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScores

Half = Literal["choose", "report"]
PANEL = "mean of judges"
"""Stands for a judge: the mean change over all judges that know the emotion."""


@dataclass(frozen=True)
class OtherChange:
    """What steering did to something that it was not meant to move."""

    measure: str
    change: float | None
    masked: float | None


@dataclass(frozen=True)
class DoseEffect:
    """One dose on one half of the openings, by one judge. Prompts weigh equally; None where no text can be judged."""

    emotion: str
    variant: str
    dose: float
    part: Half
    judge: str
    measure: str
    """The emotion, its basic emotion (`success.basic_emotion`), or "valence", then in the emotion's direction."""
    n_texts: int
    n_judged: int
    """Pairs of which neither text is empty."""
    change: float | None
    """Mean change towards the emotion, of the texts as they are."""
    low: float | None
    """Ends of the interval of this dose alone, over prompts and then seeds."""
    high: float | None
    masked: float | None
    """The same with the promoted tokens and all emotion words blanked out."""
    masked_low: float | None
    masked_high: float | None
    wrong_share: float | None
    """Share of prompts whose masked change goes the other way than the sign of the dose."""
    perplexity_ratio: float | None
    """Steered over unsteered, the geometric mean over prompts."""
    degenerate_excess: float
    """Share of continuations that loop, less the unsteered ones'."""
    others: tuple[OtherChange, ...]
    """What happened to every other measure that the judge knows."""


def halves(prompts: Sequence[str], seed: int) -> dict[Half, tuple[str, ...]]:
    """The prompts to choose a dose on, and those to report it on. ValueError for fewer than 4."""
    if len(prompts) < 4:
        raise ValueError(f"{len(prompts)} prompts are too few: 2 to choose a dose on and 2 to report it on are needed")
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    middle = len(prompts) // 2
    parts: dict[Half, list[int]] = {"choose": order[:middle], "report": order[middle:]}
    return {part: tuple(prompts[place] for place in sorted(places)) for part, places in parts.items()}


Changes = Float[np.ndarray, "dose prompt seed"]


@dataclass(frozen=True)
class VariantDoses:
    """A variant's scores as arrays: changes towards its emotion by judge, of all else by judge and measure, costs."""

    emotion: str
    variant: str
    chooser: str
    measures: dict[str, str]
    """By judge."""
    doses: tuple[float, ...]
    prompts: tuple[str, ...]
    changes: dict[tuple[str, str], tuple[Changes, Changes]]
    """By judge and measure: as it is, and masked. An unjudged text is NaN."""
    cost: Changes
    loops: Float[np.ndarray, "steered dose prompt seed"]
    """Whether the unsteered (0) and the steered (1) text is degenerate; NaN where there is no text."""

    @classmethod
    def of(cls, scores: SweepScores, variant: str, emotion: str, judge: str | None) -> "VariantDoses":
        """The scores of a variant; `judge` chooses. ValueError where it, or no judge, can tell the emotion."""
        groups = {key[1:]: rows for key, rows in scores.groups.items() if key[0] == variant}
        if not groups:
            raise ValueError(f"the variant {variant!r} has no scores")
        known: dict[str, list[str]] = {}
        for name, measure in groups:
            known.setdefault(name, []).append(measure)
        if judge is not None and judge not in known:
            raise ValueError(f"no judge {judge!r} (there are {', '.join(known)})")
        measures = measures_of(known, emotion)
        if not measures or (judge is not None and judge not in measures):
            raise ValueError(f"{'no judge' if judge is None else f'the judge {judge!r}'} cannot tell {emotion!r}")
        every = [row for rows in groups.values() for row in rows]
        doses, prompts, seeds = (sorted({getattr(row, name) for row in every}) for name in ("dose", "prompt", "seed"))
        place = [{value: index for index, value in enumerate(values)} for values in (doses, prompts, seeds)]
        shape = (len(doses), len(prompts), len(seeds))
        cost, loops = np.full(shape, np.nan), np.full((2, *shape), np.nan)
        changes = {}
        for key, rows in groups.items():
            plain, masked = np.full(shape, np.nan), np.full(shape, np.nan)
            for row in rows:
                at = tuple(where[value] for where, value in zip(place, (row.dose, row.prompt, row.seed), strict=True))
                plain[at], masked[at] = _number(row.change), _number(row.masked_change)
                cost[at] = _number(row.log_perplexity_ratio)
                loops[(0, *at)], loops[(1, *at)] = row.baseline_degenerate, row.degenerate
            # Valence is turned so that a rise is one of the emotion.
            sign = _sign(emotion) if measures.get(key[0]) == key[1] == VALENCE else 1
            changes[key] = (sign * plain, sign * masked)
        chooser = judge or (PANEL if len(measures) > 1 else next(iter(measures)))
        if chooser == PANEL:
            own = [changes[one] for one in measures.items()]
            changes[PANEL, emotion] = _averaged(own)
            for measure in dict.fromkeys(measure for _, measure in groups):
                if measure not in measures.values():
                    changes[PANEL, measure] = _averaged([changes[one] for one in groups if one[1] == measure])
            measures = {PANEL: emotion, **measures}
        return cls(emotion, variant, chooser, measures, tuple(doses), tuple(prompts), changes, cost, loops)

    def places(self, half: Sequence[str]) -> list[int]:
        """Where the prompts of a half stand."""
        wanted = set(half)
        return [index for index, prompt in enumerate(self.prompts) if prompt in wanted]

    def costs(self, places: list[int]) -> tuple[Float[np.ndarray, " dose"], Float[np.ndarray, " dose"]]:
        """The mean log perplexity ratio over prompts (NaN where no text has one) and the excess of loops."""
        unsteered, steered = np.nanmean(self.loops[:, :, places], axis=(2, 3))
        return known_mean(known_mean(self.cost[:, places])), steered - unsteered


def effects(
    measured: VariantDoses, parts: Mapping[Half, Sequence[str]], resampling: Resampling
) -> Iterator[DoseEffect]:
    """The effect and cost of every dose on each half, by every judge."""
    for part, half in parts.items():
        places = measured.places(half)
        logs, excess = measured.costs(places)
        for judge, measure in measured.measures.items():
            plain, masked = (one[:, places] for one in measured.changes[judge, measure])
            own = {key[1]: both for key, both in measured.changes.items() if key[0] == judge and key[1] != measure}
            for index, dose in enumerate(measured.doses):
                others = (
                    OtherChange(name, *(value_of(known_mean(known_mean(one[index, places]))) for one in both))
                    for name, both in own.items()
                )
                by_prompt = known_mean(masked[index])
                low, high = resampling.ends(plain[index])
                masked_low, masked_high = resampling.ends(masked[index])
                yield DoseEffect(
                    emotion=measured.emotion,
                    variant=measured.variant,
                    dose=dose,
                    part=part,
                    judge=judge,
                    measure=measure,
                    n_texts=int((~np.isnan(measured.loops[1, index, places])).sum()),
                    n_judged=int((~np.isnan(plain[index])).sum()),
                    change=value_of(known_mean(known_mean(plain[index]))),
                    low=low,
                    high=high,
                    masked=value_of(known_mean(by_prompt)),
                    masked_low=masked_low,
                    masked_high=masked_high,
                    wrong_share=wrong_share(by_prompt, 1 if dose > 0 else -1),
                    perplexity_ratio=ratio_of(logs[index]),
                    degenerate_excess=float(excess[index]),
                    others=tuple(others),
                )


def measures_of(known: Mapping[str, Sequence[str]], emotion: str) -> dict[str, str]:
    """For each judge that can tell the emotion, by what: the emotion, else its basic one, else valence.

    Valence is asked only where no judge knows the emotion or its basic one.
    """
    basic = basic_emotion(emotion)
    found = {judge: next((one for one in (emotion, basic) if one in own), "") for judge, own in known.items()}
    found = {judge: measure for judge, measure in found.items() if measure}
    if found or not (basic in SIGNS or emotion == VALENCE):
        return found
    return {judge: VALENCE for judge, own in known.items() if VALENCE in own}


def known_mean(values: Float[np.ndarray, "*shape last"]) -> Float[np.ndarray, "*shape"]:
    """The mean over the last axis of what is no NaN; NaN where all is."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    sums = np.where(known, values, 0.0).sum(axis=-1)
    return np.divide(sums, count, out=np.full(sums.shape, np.nan), where=count > 0)


def value_of(value: object) -> float | None:
    """A number as JSON can hold it: None for NaN."""
    number = float(value)  # type: ignore[arg-type]
    return None if math.isnan(number) else number


def ratio_of(log: object) -> float | None:
    """exp of a log, None for NaN."""
    number = value_of(log)
    return None if number is None else math.exp(number)


def wrong_share(by_prompt: Float[np.ndarray, " prompt"], wanted: int) -> float | None:
    """The share of prompts whose change has the other sign than wanted; None without any."""
    known = by_prompt[~np.isnan(by_prompt)]
    return float((known * wanted < 0).mean()) if len(known) else None


def _sign(emotion: str) -> int:
    return SIGNS.get(basic_emotion(emotion), 1)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _averaged(pairs: Sequence[tuple[Changes, Changes]]) -> tuple[Changes, Changes]:
    """Both kinds of change, each averaged over the judges."""
    plain, masked = (known_mean(np.stack(kind, axis=-1)) for kind in zip(*pairs, strict=True))
    return plain, masked
