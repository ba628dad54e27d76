"""Changes of judged texts by prompt and seed, and contrasts of them with intervals over prompts.

What the studies on top of a sweep share: a change is steered minus unsteered, paired by prompt and seed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from sae_emotion_plugin.evidence.resampling import Interval, hierarchical_interval
from sae_emotion_plugin.judges.judge import Judge
from sae_emotion_plugin.steering_studies.success import measure_of
from sae_emotion_plugin.steering_studies.sweep import SweepText
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore

Key = TypeVar("Key")
Changes = dict[tuple[str, int], float]
"""A change by prompt and seed."""
RESAMPLES = 2_000


def measures_of(judges: Sequence[Judge], emotion: str) -> list[tuple[Judge, str, int]]:
    """Each judge that can tell the emotion, with its measure and sign. ValueError where none can."""
    found = []
    for judge in judges:
        try:
            found.append((judge, *measure_of(judge, emotion)))
        except ValueError:
            continue
    if not found:
        raise ValueError(f"no judge can tell {emotion!r} ({', '.join(judge.name for judge in judges) or 'no judges'})")
    return found


def unsteered_level(judge: Judge, measure: str, texts: Sequence[SweepText]) -> float | None:
    """The judge's mean over the unsteered texts that are not empty."""
    own = [one.text for one in texts if not one.variant and one.text.strip()]
    return float(judge(own).of(measure).mean()) if own else None


def changes_of(rows: Sequence[SweepScore], dose: float, sign: int, *, masked: bool) -> Changes:
    """The changes of a variant's scores at one dose, in the wanted direction, where there are texts to judge."""
    values = {(row.prompt, row.seed): row.masked_change if masked else row.change for row in rows if row.dose == dose}
    return {place: sign * value for place, value in values.items() if value is not None}


def contrast(changes: Mapping[Key, Changes], weights: Mapping[Key, float], seed: int) -> Interval | None:
    """Returns the weighted sum of changes with its 95 % interval, paired: on the prompts and seeds that all have.

    None where fewer than two prompts are left. `seed` is the bootstrap's.
    """
    parts = [(changes[key], weight) for key, weight in weights.items()]
    shared = [place for place in parts[0][0] if all(place in part for part, _ in parts)]
    prompts, seeds = [place[0] for place in shared], [place[1] for place in shared]
    if len(set(prompts)) < 2:
        return None
    values = [math.fsum(weight * part[place] for part, weight in parts) for place in shared]
    return hierarchical_interval(values, prompts=prompts, seeds=seeds, resamples=RESAMPLES, seed=seed)


def mean_change(changes: Changes) -> float | None:
    """The mean over prompts of each prompt's mean over seeds, None where there are none."""
    of_prompt: dict[str, list[float]] = {}
    for (prompt, _), value in changes.items():
        of_prompt.setdefault(prompt, []).append(value)
    return float(np.mean([np.mean(values) for values in of_prompt.values()])) if of_prompt else None


def ratio_of(rows: Sequence[SweepScore]) -> float | None:
    """The perplexity ratio of some scores, the geometric mean over prompts; None where no text has a likelihood."""
    costs = {(row.prompt, row.seed): row.log_perplexity_ratio for row in rows if row.log_perplexity_ratio is not None}
    mean = mean_change(costs)
    return None if mean is None else math.exp(mean)


def shown_interval(interval: Interval | None) -> str:
    """The estimate and its ends, or a dash."""
    return "-" if interval is None else f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
