"""What steering costs besides its effect, for every plan: one function, one table."""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_emotion_plugin.activations import HookedModel, tokenize
from sae_emotion_plugin.emotion_texts import LabelledTexts
from sae_emotion_plugin.generation.likelihoods import mean_kl
from sae_emotion_plugin.generation.records import Generation, Part, mean_of_known, perplexity_ratio
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import SteeringPlan, check_plan
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.text_costs import distinct_2, four_gram_repetition, language_switch, words

if TYPE_CHECKING:
    pass

PlanKey = tuple[tuple[int, ...], str, float, str]


@dataclass(frozen=True)
class SteeringCost:
    """What one plan costs on some openings, decoded in one way; beside each value what the unsteered texts have.

    Repetition, distinct-2 and the language switch are means over the continuations that are not empty (and, for
    distinct-2, have two tokens, for the switch, letters); None where there are none. The shares and lengths are over
    all continuations.
    """

    emotion: str
    features: tuple[int, ...]
    mode: str
    amount: float
    unit: str
    part: Part
    temperature: float
    n_rows: int
    n_prompts: int
    perplexity_ratio: float | None
    """Of the continuations alone under the unsteered model, steered over unsteered (`generations.perplexity_ratio`)."""
    baseline_perplexity: float | None
    """Of the unsteered continuations, averaged as the ratio is."""
    mean_kl: float | None
    """Mean KL(steered || unsteered) in nats a token on fixed neutral texts; None where no model was given."""
    repetition: float | None
    """Mean share of 4-grams that repeat an earlier one."""
    baseline_repetition: float | None
    degenerate_share: float
    """Share of continuations with more than 0.3 of their 4-grams repeated, as the rows say (by generated tokens)."""
    baseline_degenerate_share: float
    distinct_2: float | None
    """Mean share of bigrams that are different ones; it falls with length."""
    baseline_distinct_2: float | None
    length: float
    """Mean number of tokens, or of words where the table counts in words."""
    baseline_length: float
    length_ratio: float | None
    """The one over the other; None where all unsteered continuations are empty."""
    words: float
    """Mean number of words."""
    baseline_words: float
    language_switch: float | None
    """Mean share of letters in a script that the prompt does not use."""
    baseline_language_switch: float | None
    empty_share: float
    """Share of continuations with nothing but white space."""
    baseline_empty_share: float


@dataclass(frozen=True, repr=False)
class SteeringCosts(ResultTable):
    """The costs of plans, a row each; `meta` says how they were counted.

    `meta` has "counted_in" ("tokens" or "words"), "model", and the number of neutral texts and tokens of the KL,
    "kl_texts" and "kl_tokens"; the latter three are None where no model was given.
    """

    row_type = SteeringCost
    head = (
        *("emotion", "amount", "openings", "perplexity", "KL", "repetition", "degenerate", "distinct-2", "length"),
        *("switch", "empty"),
    )

    meta: dict[str, Any]
    rows: tuple[SteeringCost, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SteeringCosts":
        """The costs of a dictionary as `to_dict` makes it. ValueError for missing and unknown keys."""
        names = {field.name for field in fields(SteeringCost)}
        if set(data) != {"meta", "rows"}:
            raise ValueError(f"steering costs have the keys meta and rows, not {', '.join(sorted(data)) or 'none'}")
        for row in data["rows"]:
            if set(row) != names:
                raise ValueError(f"a row lacks or adds {', '.join(sorted(set(row) ^ names))}")
        return cls(
            data["meta"], tuple(SteeringCost(**{**row, "features": tuple(row["features"])}) for row in data["rows"])
        )

    @classmethod
    def load(cls, path: str | Path) -> "SteeringCosts":
        """The costs written by `save`. ValueError for a file that holds something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError(f"it is a JSON {type(data).__name__}, not an object")
            return cls.from_dict(data)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no steering costs: {error}") from error

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        texts, tokens = self.meta.get("kl_texts"), self.meta.get("kl_tokens")
        kl = f"KL in nats a token on {texts} neutral texts ({tokens} tokens)" if texts else "no KL"
        counted = self.meta.get("counted_in")
        caption = f"SteeringCosts: {len(self.rows)} rows, counted in {counted}, {kl}; unsteered in parentheses"
        return caption, [_cells(row) for row in self.rows]


def steering_costs(
    model: HookedModel,
    sae: Any,
    rows: Sequence[Generation],
    plans: Iterable[SteeringPlan],
    *,
    neutral_texts: Sequence[str] | None = None,
    progress: bool = True,
) -> SteeringCosts:
    """The costs of every plan in the rows: of its continuations, and its mean KL on fixed neutral texts.

    A row of the table is one emotion, plan, part and temperature; doses stand one below the other. Continuations are
    tokenised anew from their text, which need not give the very tokens that were generated.

    Args:
        plans: the plans that made the rows, in any order; more than needed do no harm.
        neutral_texts: what the KL is measured on; by default the neutral sentences of the bundled English corpus.

    Raises:
        ValueError: no rows, a row whose plan is not among `plans`, two plans that a row cannot tell apart, a plan that
            does not fit the SAE, or neutral texts without tokens.
    """
    if isinstance(neutral_texts, str):
        raise ValueError("neutral_texts must be a list of strings, not one string")
    of_key = _plans_by_key(rows, plans)
    checked_hook(model, sae)
    for plan in of_key.values():
        check_plan(plan, sae)
    if neutral_texts is None:
        neutral_texts = LabelledTexts.bundled("en").only_labels(["neutral"]).texts
    windows = tokenize(model, neutral_texts, **token_settings(sae))
    contexts = [partial(steering, model, sae, plan) for plan in of_key.values()]
    kl = dict(zip(of_key, mean_kl(model, windows, contexts, progress=progress), strict=True))
    meta = {
        "counted_in": "tokens",
        "model": model_identity(model),
        "kl_texts": len(neutral_texts),
        "kl_tokens": sum(len(window.token_ids) - window.bos for window in windows),
    }
    return SteeringCosts(meta, _cost_rows(rows, _tokens_by(model.tokenizer), kl))


def continuation_costs(rows: Sequence[Generation], tokenizer: Any = None) -> SteeringCosts:
    """The costs that the rows alone show, without a model: all but the KL.

    Lengths, 4-grams and bigrams are counted in the tokenizer's tokens, or in words (`text_costs.words`) without one.
    ValueError for no rows.
    """
    meta = {"counted_in": "tokens" if tokenizer else "words", "model": None, "kl_texts": None, "kl_tokens": None}
    return SteeringCosts(meta, _cost_rows(rows, _tokens_by(tokenizer) if tokenizer else words, {}))


def _tokens_by(tokenizer: Any) -> Callable[[str], Sequence[Hashable]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _key(one: Generation | SteeringPlan) -> PlanKey:
    return tuple(one.features), one.mode, one.amount, one.unit


def _plans_by_key(rows: Sequence[Generation], plans: Iterable[SteeringPlan]) -> dict[PlanKey, SteeringPlan]:
    """The plan of every row."""
    given: dict[PlanKey, SteeringPlan] = {}
    for plan in plans:
        if given.setdefault(_key(plan), plan) != plan:
            raise ValueError(f"the rows cannot tell {plan} from {given[_key(plan)]}; take their costs one by one")
    wanted = dict.fromkeys(_key(row) for row in rows)
    for features, mode, amount, unit in wanted:
        if (features, mode, amount, unit) not in given:
            known = "; ".join(map(repr, given.values())) or "none"
            raise ValueError(f"no plan for {mode} {amount:+g} x features {features} in {unit} (given: {known})")
    return {key: given[key] for key in wanted}


def _cost_rows(
    rows: Sequence[Generation], tokens_of: Callable[[str], Sequence[Hashable]], kl: Mapping[PlanKey, float]
) -> tuple[SteeringCost, ...]:
    if not rows:
        raise ValueError("no generations to take the costs of")
    # Many rows share a baseline.
    tokens = {text: tokens_of(text) for row in rows for text in (row.text, row.baseline_text)}
    groups: dict[tuple[Any, ...], list[Generation]] = {}
    for row in rows:
        key = (row.emotion, row.features, row.mode, row.unit, row.part, row.temperature, row.amount)
        groups.setdefault(key, []).append(row)
    return tuple(_cost(groups[key], tokens, kl.get(_key(groups[key][0]))) for key in sorted(groups))


def _cost(group: Sequence[Generation], tokens: Mapping[str, Sequence[Hashable]], kl: float | None) -> SteeringCost:
    first = group[0]
    steered = _described([(row.prompt, row.text) for row in group], tokens)
    baseline = _described([(row.prompt, row.baseline_text) for row in group], tokens)
    return SteeringCost(
        emotion=first.emotion,
        features=first.features,
        mode=first.mode,
        amount=first.amount,
        unit=first.unit,
        part=first.part,
        temperature=first.temperature,
        n_rows=len(group),
        n_prompts=len({row.prompt for row in group}),
        perplexity_ratio=perplexity_ratio(group),
        baseline_perplexity=_baseline_perplexity(group),
        mean_kl=kl,
        degenerate_share=sum(row.degenerate for row in group) / len(group),
        baseline_degenerate_share=sum(row.baseline_degenerate for row in group) / len(group),
        length_ratio=steered["length"] / baseline["length"] if baseline["length"] else None,
        **steered,
        **{f"baseline_{name}": value for name, value in baseline.items()},
    )


def _described(texts: Sequence[tuple[str, str]], tokens: Mapping[str, Sequence[Hashable]]) -> dict[str, Any]:
    """The measures of (prompt, continuation) pairs that need no model."""
    written = [(prompt, text) for prompt, text in texts if text.strip()]
    return {
        "repetition": mean_of_known(four_gram_repetition(tokens[text]) for _, text in written),
        "distinct_2": mean_of_known(distinct_2(tokens[text]) for _, text in written),
        "language_switch": mean_of_known(language_switch(prompt, text) for prompt, text in written),
        "length": sum(len(tokens[text]) for _, text in texts) / len(texts),
        "words": sum(len(words(text)) for _, text in texts) / len(texts),
        "empty_share": (len(texts) - len(written)) / len(texts),
    }


def _baseline_perplexity(rows: Sequence[Generation]) -> float | None:
    """The geometric mean over prompts, of the rows that `perplexity_ratio` takes."""
    of_prompt: dict[str, list[float]] = {}
    for row in rows:
        if row.nll is not None and row.baseline_nll is not None:
            of_prompt.setdefault(row.prompt, []).append(row.baseline_nll)
    mean = mean_of_known(math.fsum(values) / len(values) for values in of_prompt.values())
    return None if mean is None else math.exp(mean)


def _cells(row: SteeringCost) -> tuple[str, ...]:
    how = "greedy" if row.temperature == 0 else f"T {row.temperature:g}"

    def beside(value: float | None, baseline: float | None, style: str) -> str:
        steered, unsteered = ("-" if one is None else format(one, style) for one in (value, baseline))
        return f"{steered} ({unsteered})"

    return (
        row.emotion or "/".join(map(str, row.features)),
        f"{row.mode} {row.amount:+g}{' raw' if row.unit == 'raw' else ''}",
        f"{row.n_prompts} x {row.n_rows / row.n_prompts:g} {row.part}, {how}",
        "-" if row.perplexity_ratio is None else f"x{row.perplexity_ratio:.2f} ({row.baseline_perplexity:.3g})",
        "-" if row.mean_kl is None else f"{row.mean_kl:.3g}",
        beside(row.repetition, row.baseline_repetition, ".3f"),
        beside(row.degenerate_share, row.baseline_degenerate_share, ".1%"),
        beside(row.distinct_2, row.baseline_distinct_2, ".3f"),
        "-" if row.length_ratio is None else f"x{row.length_ratio:.2f} ({row.baseline_length:.1f})",
        beside(row.language_switch, row.baseline_language_switch, ".1%"),
        beside(row.empty_share, row.baseline_empty_share, ".1%"),
    )
