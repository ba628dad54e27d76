"""Texts at many doses of many steering variants, made once and kept cell by cell; and what judges say of them.

What is found in them (dose-response, methods, combinations) is the business of the studies on top.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.discovery.tokens import FeatureTokens, lens_tokens
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.plans import SteeringPlan, check_plan, dictionary_sha256, model_sha256
from sae_emotion_plugin.judges.judge import VALENCE, Judge
from sae_emotion_plugin.judges.masking import Mask, emotion_mask
from sae_emotion_plugin.judges.names import judges_for
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering_studies.kept_texts import KeptText, read_texts, save_texts
from sae_emotion_plugin.steering_studies.sweep_scores import SweepScore, SweepScores
from sae_emotion_plugin.text_costs import is_degenerate

UNSTEERED = ""
"""Stands for the variant of the texts without any steering; their dose is 0."""
BATCH_ROWS = 128
PROMOTED = 50
"""Tokens of a feature that are blanked in masked judging."""


@dataclass(frozen=True)
class Variant:
    """One way to steer, at several doses: a dictionary (or a dictionary of directions) and a plan a dose.

    A plan's `amount` is its dose: below 0 where all of the plan's amounts are, otherwise the sum of their sizes.
    ValueError for no name, no plans, a plan of dose 0 (that is the unsteered text) and two plans of one dose.
    """

    name: str
    dictionary: Any = field(repr=False, compare=False)
    plans: tuple[SteeringPlan, ...]
    emotion: str | None = None
    """What it is meant to move; None: nothing, or any emotion."""
    blanked: tuple[str, ...] | None = None
    """Tokens that masked judging blanks, besides emotion words. None: the 50 that each of a plan's features promotes
    most and, where its amount is below 0, also the 50 it suppresses most, which a negative dose promotes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", tuple(self.plans))
        if not self.name:
            raise ValueError("a variant needs a name: the empty one stands for the unsteered texts")
        if not self.plans:
            raise ValueError(f"the variant {self.name!r} has no plans")
        for dose in self.doses:
            if dose == 0:
                raise ValueError(f"the variant {self.name!r} has a plan of dose 0: the unsteered texts are made anyway")
            if self.doses.count(dose) > 1:
                raise ValueError(f"the variant {self.name!r} has two plans of dose {dose:g}; make them two variants")

    @property
    def doses(self) -> tuple[float, ...]:
        """The dose of each plan, in the plans' order."""
        return tuple(plan.amount for plan in self.plans)


@dataclass(frozen=True, slots=True)
class SweepText:
    """One continuation. Unsteered ones have the variant "" and dose 0."""

    variant: str
    dose: float
    prompt: str
    seed: int
    text: str
    nll: float | None
    """Mean negative log-likelihood, in nats a token, under the unsteered model; None for an empty continuation."""
    degenerate: bool


def write_texts(
    model: HookedModel,
    variants: Sequence[Variant],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    temperature: float | int = 0.7,
    max_new_tokens: int = 20,
    folder: str | Path | None = None,
    progress: bool = True,
) -> tuple[SweepText, ...]:
    """The unsteered continuation of each prompt and seed, then those of every variant at each of its doses.

    Steered and unsteered texts of a prompt and seed draw the same random numbers. Rows of different plans share
    batches; a plan that stands in several variants is carried out once. At temperature 0 the first seed alone is used.

    Args:
        folder: keeps each cell (a plan of a dictionary, on all prompts and seeds) in a file of its own as soon as it is
            done, under a hash of all that its texts depend on: model, dictionary, plan, prompts, seeds, decoding. An
            interrupted run goes on with the first cell that is missing, and gives what an uninterrupted one would.
            A file that is damaged is made anew.

    Raises:
        ValueError: no variants or prompts, one twice, dictionaries that disagree about BOS, a plan that does not fit,
            a prompt that is empty or too long, or a dose that makes logits which are no numbers (the plan is named).
    """
    _check_lists(variants, prompts, seeds)
    if not temperature:
        seeds = seeds[:1]
    for variant in variants:
        checked_hook(model, variant.dictionary)
        for plan in variant.plans:
            check_plan(plan, variant.dictionary, model)
    bos = {bool(token_settings(variant.dictionary)["prepend_bos"]) for variant in variants}
    if len(bos) > 1:
        raise ValueError("some dictionaries begin texts with BOS and some do not: no unsteered text fits both")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    settings = {
        "model": model_sha256(model),
        "prepend_bos": bos.pop(),
        "prompts": list(prompts),
        "seeds": list(seeds),
        "temperature": float(temperature),
        "max_new_tokens": max_new_tokens,
    }
    unsteered = _Cell(variants[0].dictionary, None)
    cells = [[unsteered], *_calls(variants, max(1, BATCH_ROWS // (len(prompts) * len(seeds))))]
    written: dict[_Cell, list[KeptText]] = {}
    with tqdm(total=sum(map(len, cells)), desc="sweep", unit="cell", disable=not progress) as bar:
        for some in cells:
            for cell in some:
                if (kept := cell.read(folder, settings)) is not None:
                    written[cell] = kept
            missing = [cell for cell in some if cell not in written]
            for cell, rows in zip(missing, _written(model, missing, settings), strict=True):
                written[cell] = rows
                cell.save(folder, settings, rows)
            bar.update(len(some))
    named = [(UNSTEERED, unsteered)]
    named += [(variant.name, _Cell(variant.dictionary, plan)) for variant in variants for plan in variant.plans]
    places = [(prompt, seed) for prompt in prompts for seed in seeds]
    return tuple(
        SweepText(name, cell.plan.amount if cell.plan else 0.0, *place, *row)
        for name, cell in named
        for place, row in zip(places, written[cell], strict=True)
    )


def score_texts(
    model: HookedModel,
    variants: Sequence[Variant],
    texts: Sequence[SweepText],
    *,
    judges: Sequence[Judge] | None = None,
    emotions: Sequence[str] | None = None,
    language: str = "en",
) -> SweepScores:
    """What each judge says of each steered text, plain and masked, less what it says of the unsteered one beside it.

    Every judge is asked for each of the emotions that it knows, whichever the variant is meant to move, and for
    valence. Each different text is judged once. A masked judgement blanks the same words in both texts
    (`Variant.blanked`, and emotion words; `judges.masking`).

    Args:
        texts: as `write_texts` makes them: each steered one has an unsteered one of its prompt and seed.
        judges: by default those that come with the package for the language.
        emotions: by default all that the judges know.

    Raises:
        ValueError: no steered texts, one without an unsteered one or of an unknown variant or dose, no judges, or an
            emotion that no judge knows.
    """
    judges = judges_for(language) if judges is None else tuple(judges)
    measures = {judge.name: _measures(judge, emotions) for judge in judges}
    if len(measures) < len(judges) or not any(measures.values()):
        raise ValueError(f"{len(judges)} judges, with {len(measures)} names and nothing to ask them for")
    if unknown := [one for one in emotions or () if not any(one in judge.emotions for judge in judges)]:
        raise ValueError(f"no judge knows {unknown[0]!r} ({', '.join(map(repr, judges))})")
    pairs = _pairs(variants, texts)
    masks = _masks(model, variants)
    masked = {
        (mask, text): mask(text)
        for mask, text in {
            (masks[one.variant, one.dose], text)
            for one, base in pairs
            if _judged(one, base)
            for text in (one.text, base.text)
        }
    }
    plain = [text for one, base in pairs if _judged(one, base) for text in (one.text, base.text)]
    different = list(dict.fromkeys([*plain, *sorted(set(masked.values()))]))
    place = {text: index for index, text in enumerate(different)}
    rows = []
    for judge in judges:
        judgements = judge(different) if different else None
        for measure in measures[judge.name]:
            scores = np.zeros(0) if judgements is None else judgements.of(measure)
            for one, base in pairs:
                change = masked_change = None
                if _judged(one, base):
                    mask = masks[one.variant, one.dose]
                    change = float(scores[place[one.text]] - scores[place[base.text]])
                    steered, unsteered = (place[masked[mask, text]] for text in (one.text, base.text))
                    masked_change = float(scores[steered] - scores[unsteered])
                cost = None if one.nll is None or base.nll is None else one.nll - base.nll
                where = (one.variant, one.dose, one.prompt, one.seed)
                loops = (one.degenerate, base.degenerate)
                rows.append(SweepScore(*where, judge.name, measure, change, masked_change, cost, *loops))
    meta = {
        "model": model_identity(model),
        "judges": [judge.name for judge in judges],
        "variants": {one.name: {"emotion": one.emotion, "doses": list(one.doses)} for one in variants},
        "prompts": len({one.prompt for one, _ in pairs}),
        "seeds": len({one.seed for one, _ in pairs}),
    }
    return SweepScores(meta, tuple(rows))


@dataclass(frozen=True, eq=False)
class _Cell:
    """All texts of one plan of a dictionary, or the unsteered ones: what is kept in one file."""

    dictionary: Any
    plan: SteeringPlan | None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        if self.plan is None:
            return {"dictionary": None, "plan": None}
        return {"dictionary": dictionary_sha256(self.dictionary), "plan": self.plan.to_dict()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Cell) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self.plan)

    def _path(self, folder: str | Path, settings: Mapping[str, Any]) -> Path:
        key = json.dumps({**settings, **self._identity}, sort_keys=True)
        return Path(folder) / f"cell-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def read(self, folder: str | Path | None, settings: Mapping[str, Any]) -> list[KeptText] | None:
        """The texts kept in the folder; None where there are none, or the file holds something else."""
        if folder is None:
            return None
        n = len(settings["prompts"]) * len(settings["seeds"])
        return read_texts(self._path(folder, settings), {**settings, **self._identity}, n)

    def save(self, folder: str | Path | None, settings: Mapping[str, Any], rows: Sequence[KeptText]) -> None:
        if folder is not None:
            save_texts(self._path(folder, settings), {**settings, **self._identity}, rows)


def _calls(variants: Sequence[Variant], together: int) -> Iterator[list[_Cell]]:
    """The different cells, several of one dictionary at a time.

    What goes together does not depend on what is kept already: a matrix product of other rows may round otherwise, and
    a resumed run would then differ from an uninterrupted one.
    """
    of_dictionary: dict[tuple[str, str], list[_Cell]] = {}
    for variant in variants:
        for plan in variant.plans:
            cell = _Cell(variant.dictionary, plan)
            # Dictionaries with the same weights may read other hooks.
            own = of_dictionary.setdefault((dictionary_sha256(variant.dictionary), plan.hook_name), [])
            if cell not in own:
                own.append(cell)
    for cells in of_dictionary.values():
        yield from (cells[first : first + together] for first in range(0, len(cells), together))


def _written(model: HookedModel, cells: Sequence[_Cell], settings: Mapping[str, Any]) -> list[list[KeptText]]:
    """The texts of each cell; all cells have one dictionary."""
    if not cells:
        return []
    requests = [
        Request(prompt, cell.plan, settings["temperature"], seed)
        for cell in cells
        for prompt in settings["prompts"]
        for seed in settings["seeds"]
    ]
    batches = math.ceil(len(requests) / BATCH_ROWS)
    made = complete(
        model,
        cells[0].dictionary,
        requests,
        max_new_tokens=settings["max_new_tokens"],
        batch_rows=math.ceil(len(requests) / batches),  # batches of one size: a small last one costs as much a step
        progress=False,
    )
    rows = [(one.text, one.nll, is_degenerate(one.token_ids)) for one in made]
    each = len(rows) // len(cells)
    return [rows[first : first + each] for first in range(0, len(rows), each)]


def _check_lists(variants: Sequence[Variant], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    named: tuple[tuple[str, list[Any]], ...] = (
        ("variant", [variant.name for variant in variants]),
        ("prompt", list(prompts)),
        ("seed", list(seeds)),
    )
    for what, names in named:
        if not names:
            raise ValueError(f"no {what}s: the list is empty")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the {what} {twice[0]!r} stands twice in the list")


def _measures(judge: Judge, emotions: Sequence[str] | None) -> list[str]:
    return [one for one in judge.measures if emotions is None or one == VALENCE or one in emotions]


def _pairs(variants: Sequence[Variant], texts: Sequence[SweepText]) -> list[tuple[SweepText, SweepText]]:
    """Each steered text with its unsteered one."""
    known = {(variant.name, dose) for variant in variants for dose in variant.doses}
    baselines = {(one.prompt, one.seed): one for one in texts if one.variant == UNSTEERED}
    pairs = []
    for one in texts:
        if one.variant == UNSTEERED:
            continue
        if (one.variant, one.dose) not in known:
            raise ValueError(f"no variant {one.variant!r} with the dose {one.dose:g} was given")
        if (one.prompt, one.seed) not in baselines:
            raise ValueError(f"no unsteered text of {one.prompt!r} with seed {one.seed}")
        pairs.append((one, baselines[one.prompt, one.seed]))
    if not pairs:
        raise ValueError(f"no steered texts among {len(texts)}")
    return pairs


def _judged(one: SweepText, base: SweepText) -> bool:
    return bool(one.text.strip() and base.text.strip())


def _masks(model: HookedModel, variants: Sequence[Variant]) -> dict[tuple[str, float], Mask]:
    """The mask of each variant and dose; equal ones are one object."""
    made: dict[tuple[str, ...], Mask] = {}
    masks = {}
    for variant in variants:
        known: dict[int, FeatureTokens] = {}
        if variant.blanked is None:
            features = sorted({feature for plan in variant.plans for feature in plan.features})
            known = lens_tokens(model, variant.dictionary, features, PROMOTED)
        for plan in variant.plans:
            tokens = variant.blanked
            if tokens is None:
                found = [known[one.feature].promotes for one in plan.interventions]
                found += [known[one.feature].suppresses for one in plan.interventions if one.amount < 0]
                tokens = tuple(dict.fromkeys(token for row in found for token in row))
            if tokens not in made:
                made[tokens] = emotion_mask(tokens)
            masks[variant.name, plan.amount] = made[tokens]
    return masks
