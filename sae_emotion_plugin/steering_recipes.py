"""A study as a YAML file: one, two, three ... features on a prompt, greedy and sampled, steered and not.

These tables show what steered text looks like. A few lines of one prompt are a demonstration, not evidence.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae_emotion_plugin.activations import mean_norm
from sae_emotion_plugin.discovery.emotion_features import discover
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.emotion_texts import LabelledTexts, openings
from sae_emotion_plugin.feature_roles.output_scores import CANDIDATES, EMOTION_WORDS, steering_order
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.plans import SteeringPlan, dictionary_sha256
from sae_emotion_plugin.judges.judge import valence
from sae_emotion_plugin.messages import first_line
from sae_emotion_plugin.models import load_model, model_identity
from sae_emotion_plugin.plugin import load_dictionary
from sae_emotion_plugin.recipes import checked_fields, recipe_file
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering_studies.combinations import summed_length
from sae_emotion_plugin.text_costs import is_degenerate

UNITS = ("residual_norm", "raw")
SHARES = ("each", "sum")


@dataclass(frozen=True)
class PublishedLine:
    """One line that the study's model was published to have written."""

    features: tuple[int, ...]
    """None of them: unsteered."""
    temperature: float
    text: str
    """The continuation, or prompt and continuation."""
    prompt: str | None = None
    """The recipe's first prompt when absent."""


@dataclass(frozen=True)
class StudyRecipe:
    """Everything that decides the lines of a study."""

    name: str
    model: str
    """What `load_model` takes."""
    dictionary: str
    """What `load_dictionary` takes."""
    prompts: tuple[str, ...]
    amount: float
    """What is added along a feature's unit decoder direction; `share` says whether each feature gets it."""
    unit: str
    """`raw`, the model's own units; or `residual_norm`, a fraction of the mean norm on the neutral openings."""
    share: str = "each"
    """`each`: every feature gets the amount, so that more features add more; `sum`: the summed vector is that long."""
    features: tuple[int, ...] = ()
    """In the order in which they are added up; empty: chosen for `emotion`."""
    emotion: str | None = None
    """Its features are looked for: the best ones by AUROC, of these the ones that make its words likeliest."""
    scores: str | None = None
    """A file of feature scores, relative to the recipe; without it features are discovered on the bundled corpus."""
    features_used: int = 4
    """How many are taken where `features` is empty."""
    temperatures: tuple[float, ...] = (0.0, 0.7)
    seeds: tuple[int, ...] = (0,)
    """Of sampled lines."""
    max_new_tokens: int = 20
    published: tuple[PublishedLine, ...] = ()
    source: str = ""
    """Where the published lines stand, or what is known of them."""

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts is {list(self.prompts)!r} (valid: one or more texts that are not empty)")
        for name, value, valid in (("unit", self.unit, UNITS), ("share", self.share, SHARES)):
            if value not in valid:
                raise ValueError(f"{name} is {value!r} (valid: {', '.join(valid)})")
        if not math.isfinite(self.amount) or not self.amount:
            raise ValueError(f"amount is {self.amount} (valid: a finite number that is not 0)")
        if bool(self.features) == bool(self.emotion):
            raise ValueError("a study needs either features or an emotion whose features are looked for")
        if self.emotion and self.emotion not in EMOTION_WORDS:
            raise ValueError(f"emotion is {self.emotion!r} (valid: {', '.join(EMOTION_WORDS)})")
        if repeated := [one for one in self.features if self.features.count(one) > 1 or one < 0]:
            raise ValueError(f"features has {repeated[0]}, which is negative or stands twice")
        if not self.temperatures or not all(math.isfinite(one) and one >= 0 for one in self.temperatures):
            raise ValueError(f"temperatures is {list(self.temperatures)} (valid: finite numbers, 0 is greedy)")
        if not self.seeds or self.max_new_tokens < 1 or self.features_used < 1:
            raise ValueError("seeds, max_new_tokens and features_used must be at least 1")

    @classmethod
    def read(cls, source: str | Path) -> "StudyRecipe":
        """The recipe of a YAML file, or of the name of one that comes with the package, such as `blog-embedded`.

        Raises:
            FileNotFoundError: neither a file nor such a name.
            ValueError: no YAML, unknown or missing keys, values of the wrong kind.
        """
        path = recipe_file(source, lambda text: "\nprompts:" in text)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no readable YAML: {first_line(error)}") from error
        given = checked_fields(cls, data, str(path))
        try:
            kinds = {"prompts": str, "features": int, "temperatures": float, "seeds": int}
            lists: dict[str, Any] = {key: _listed(given[key], kind, key) for key, kind in kinds.items() if key in given}
            if given.get("scores"):
                lists["scores"] = str(path.parent / given["scores"])
            return cls(**{**given, **lists, "published": _published(given.get("published", []))})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class StudyRow:
    """One line that the model wrote, and what was published for the same cell."""

    prompt: str
    features: tuple[int, ...]
    """None of them: unsteered."""
    amounts: tuple[float, ...]
    temperature: float
    seed: int
    text: str
    published: str | None
    valence: float
    """VADER's, of the continuation."""
    degenerate: bool


@dataclass(frozen=True, repr=False)
class StudyTables(ResultTable):
    """Unsteered lines and those with one, two, three ... features at every temperature, beside the published ones."""

    row_type = StudyRow
    head = ("features", "T", "seed", "valence", "line", "published")

    meta: dict[str, Any]
    rows: tuple[StudyRow, ...]

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        what = f"{self.meta.get('amount'):g} {self.meta.get('unit')}" if self.rows else "nothing"
        each = "for each feature" if self.meta.get("share") == "each" else "for the summed vector"
        published = "" if any(row.published for row in self.rows) else "; the recipe holds no published lines"
        caption = (
            f"{self.meta.get('name')}: a demonstration, not evidence. {self.meta.get('model', {}).get('name')}, {what} "
            f"{each}, {self.meta.get('hook_name')}{published}"
        )
        return caption, [_cells(row) for row in self.rows]


def run_study(
    recipe: StudyRecipe,
    *,
    model: Any = None,
    sae: Any = None,
    scores: FeatureScores | None = None,
    progress: bool = True,
) -> StudyTables:
    """The lines of a study: each prompt unsteered, and with the first, the first two, three ... features.

    Args:
        model, sae: in the place of those that the recipe names.
        scores: in the place of the recipe's file.

    Raises:
        ValueError: the model or the dictionary cannot be had (offline, say), features that the SAE lacks or whose
            directions cancel out, an emotion without scores.
    """
    model, sae = _loaded(recipe, model, sae)
    hook_name = checked_hook(model, sae)
    features = recipe.features or _discovered(recipe, model, sae, scores, progress)
    if wrong := [one for one in features if one >= sae.cfg.d_sae]:
        raise ValueError(f"the SAE has no feature {wrong[0]} (valid: 0 to {sae.cfg.d_sae - 1})")
    norm = None
    if recipe.unit == "residual_norm":
        norm = mean_norm(model, openings("neutral"), hook_name, **token_settings(sae))
    plans = [None, *(_plan(recipe, sae, features[:n], norm) for n in range(1, len(features) + 1))]
    requests = [
        Request(prompt, plan, temperature, seed)
        for prompt, temperature in itertools.product(recipe.prompts, recipe.temperatures)
        for plan in plans
        for seed in (recipe.seeds if temperature else recipe.seeds[:1])
    ]
    done = complete(*(model, sae, requests), max_new_tokens=recipe.max_new_tokens, with_nll=False, progress=progress)
    lines = {
        (line.prompt or recipe.prompts[0], line.features, line.temperature): line.text for line in recipe.published
    }
    rows = []
    for one in done:
        request, plan = one.request, one.request.plan
        used = plan.features if plan else ()
        rows.append(
            StudyRow(
                prompt=request.prompt,
                features=used,
                amounts=tuple(step.amount for step in plan.interventions) if plan else (),
                temperature=request.temperature,
                seed=request.seed,
                text=one.text,
                published=lines.get((request.prompt, used, request.temperature)),
                valence=valence(one.text),
                degenerate=is_degenerate(one.token_ids),
            )
        )
    meta = {
        "label": "a demonstration, not evidence",
        "name": recipe.name,
        "model": model_identity(model),
        "dictionary": recipe.dictionary,
        "dictionary_sha256": dictionary_sha256(sae),
        "hook_name": hook_name,
        "features": list(features),
        "features_from": "the recipe" if recipe.features else f"scores for {recipe.emotion}",
        "amount": recipe.amount,
        "unit": recipe.unit,
        "share": recipe.share,
        "residual_norm": norm,
        "max_new_tokens": recipe.max_new_tokens,
        "published_lines": len(recipe.published),
        "source": recipe.source,
    }
    return StudyTables(meta, tuple(rows))


def _loaded(recipe: StudyRecipe, model: Any, sae: Any) -> tuple[Any, Any]:
    needs = f"the study {recipe.name!r} needs the model {recipe.model!r} and the dictionary {recipe.dictionary!r}"
    try:
        model = load_model(recipe.model) if model is None else model
        return model, load_dictionary(recipe.dictionary) if sae is None else sae
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{needs}: {first_line(error)}") from error


def _discovered(
    recipe: StudyRecipe, model: Any, sae: Any, scores: FeatureScores | None, progress: bool
) -> tuple[int, ...]:
    """The features to steer the recipe's emotion with, as `sae-emotion steer --emotion` takes them."""
    emotion = str(recipe.emotion)
    if scores is None and recipe.scores:
        scores = FeatureScores.load(recipe.scores)
    if scores is None:
        scores = discover(model, sae, LabelledTexts.bundled("en"), top=CANDIDATES, progress=progress).scores
    candidates = [row.feature for row in scores.top(emotion, CANDIDATES)]
    return steering_order(model, sae, emotion, candidates, progress=progress)[: recipe.features_used]


def _plan(recipe: StudyRecipe, sae: Any, features: Sequence[int], norm: float | None) -> SteeringPlan:
    alike = dict.fromkeys(features, 1.0)
    each = recipe.amount / (summed_length(sae, alike) if recipe.share == "sum" else 1.0)
    unit = "raw" if recipe.unit == "raw" else "residual_norm"
    return SteeringPlan.of(dict.fromkeys(features, each), sae, unit=unit, residual_norm=norm)


def _listed(value: Any, kind: type, where: str) -> tuple[Any, ...]:
    """The entries of a YAML list, if all are of their kind."""
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r} (valid: a list)")
    for one in value:
        number = isinstance(one, int | float) and not isinstance(one, bool)
        good = isinstance(one, str) if kind is str else number and (kind is float or isinstance(one, int))
        if not good:
            valid = {str: "texts", int: "whole numbers", float: "numbers"}[kind]
            raise ValueError(f"{where} has {one!r} (valid: {valid})")
    return tuple(map(kind, value))


def _published(lines: Any) -> tuple[PublishedLine, ...]:
    if not isinstance(lines, list):
        raise ValueError(f"published is {lines!r} (valid: a list of lines)")
    found = []
    for number, line in enumerate(lines, start=1):
        given = checked_fields(PublishedLine, line, f"published, line {number}")
        found.append(PublishedLine(**{**given, "features": _listed(given["features"], int, "published: features")}))
    return tuple(found)


def _cells(row: StudyRow) -> tuple[str, ...]:
    line, published = (" ".join(text.split()) for text in (row.text, row.published or "-"))
    seed = str(row.seed) if row.temperature else "-"
    shown = f"{row.prompt} {line}" + (" (loops)" if row.degenerate else "")
    return (
        "+".join(map(str, row.features)) or "unsteered",
        f"{row.temperature:g}",
        seed,
        f"{row.valence:+.2f}",
        shown,
        published,
    )
