"""Does the model need an emotion's features? They are taken away where the emotion is due, beside matched features.

Amplifying a feature shows that it can bring an emotion about; taking it away shows whether the model's own emotion runs
through it. The controls are random features that fire as often, and contribute as much where they do: taking away
anything costs something.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_emotion_plugin.activations import HookedModel, mean_norm, tokenize
from sae_emotion_plugin.discovery.tokens import promoted_tokens
from sae_emotion_plugin.emotion_texts import OPENING_KINDS, openings
from sae_emotion_plugin.evidence.resampling import Interval
from sae_emotion_plugin.feature_roles.output_scores import EMOTION_WORDS
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.generation.likelihoods import mean_kl
from sae_emotion_plugin.interventions.contributions import unit_lengths
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.judges.judge import Judge
from sae_emotion_plugin.judges.names import judges_for
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import SparseCodes, checked_hook, encode_texts, token_settings
from sae_emotion_plugin.steering_studies.paired_changes import (
    RESAMPLES,
    Changes,
    changes_of,
    contrast,
    mean_change,
    ratio_of,
    shown_interval,
)
from sae_emotion_plugin.steering_studies.self_repair import LogitEffect, Repair, propagation
from sae_emotion_plugin.steering_studies.success import PROMOTED, basic_emotion
from sae_emotion_plugin.steering_studies.sweep import Variant, score_texts, write_texts
from sae_emotion_plugin.tables import text_table

logger = logging.getLogger(__name__)

FEATURES = "features"


@dataclass(frozen=True)
class NecessityRow:
    """What taking the features away does to one measure of one judge; changes are without them less with them."""

    judge: str
    measure: str
    """Any that the judge knows: the emotion's own, and what else changes."""
    plain: Interval | None
    """Change when the features are taken away, below 0 where the texts carry less; None below two prompts."""
    masked: Interval | None
    """The same with the features' promoted tokens and emotion words blanked."""
    controls: float | None
    """Mean masked change when a matched control set is taken away."""
    beyond: Interval | None
    """Masked change of the features less the controls' mean, paired by prompt and seed."""
    p: float
    """Share of control sets with a masked change of at least this size in either direction; the features count too."""


@dataclass(frozen=True, repr=False)
class Necessity(ResultTable):
    """What taking features away did, a row a measure; what later layers put back; and the costs."""

    row_type = NecessityRow
    head = ("judge", "measure", "change", "masked", "controls", "beyond controls", "p")

    meta: dict[str, Any]
    rows: tuple[NecessityRow, ...]
    repair: tuple[Repair, ...] = ()
    logits: tuple[LogitEffect, ...] = ()
    kl: float = 0.0
    """Mean KL(without || with) on neutral texts, in nats a token."""
    controls_kl: tuple[float, ...] = ()
    perplexity_ratio: float | None = None
    """Of the continuations, without the features over with them."""
    controls_perplexity_ratio: float | None = None
    """Geometric mean over the control sets."""

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        more = {"repair": [asdict(row) for row in self.repair], "logits": [asdict(row) for row in self.logits]}
        costs = {"kl": self.kl, "controls_kl": list(self.controls_kl), "perplexity_ratio": self.perplexity_ratio}
        ratio = {"controls_perplexity_ratio": self.controls_perplexity_ratio}
        return {**super().to_dict(), **more, **costs, **ratio}

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        features, sets = self.meta.get("features", ()), self.meta.get("controls", ())
        kl = f"{self.kl:.3g} (controls {np.mean(self.controls_kl):.3g})" if self.controls_kl else f"{self.kl:.3g}"
        caption = (
            f"Necessity of {', '.join(map(str, features))} for {self.meta.get('emotion')}: {self.meta.get('removal')} "
            f"on {self.meta.get('n_prompts')} prompts, {len(sets)} matched control sets; KL on neutral texts {kl}"
        )
        return caption, [_cells(row) for row in self.rows]

    def __repr__(self) -> str:
        kept = [(row.hook_name, *map(shown_interval, (row.features, row.controls))) for row in self.repair]
        logits = [(row.what, *map(shown_interval, (row.direct, row.total, row.put_back))) for row in self.logits]
        parts = [
            super().__repr__(),
            text_table(("still missing at", "of the features", "of the controls"), kept),
            text_table(("logits of its words", "direct", "total", "put back"), logits),
        ]
        return "\n\n".join(parts)


def necessity(
    model: HookedModel,
    sae: Any,
    features: Sequence[int],
    emotion: str,
    *,
    prompts: Sequence[str] | None = None,
    clamp: float | int | None = None,
    sets: int = 20,
    exclude: Sequence[int] = (),
    words: Sequence[str] | None = None,
    neutral_texts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    temperature: float | int = 0.7,
    max_new_tokens: int = 20,
    judges: Sequence[Judge] | None = None,
    residual_norm: float | int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Necessity:
    """How much less of an emotion the model writes without some features than without matched ones; see the types.

    Args:
        emotion: names the openings (its basic emotion's) and the words, where these are not given.
        prompts: where the emotion is due; by default the bundled openings of its kind.
        clamp: None takes the contributions away (ablation); a number clamps them to that fraction of the residual norm,
            below 0 to the opposite. The controls get the same.
        sets: number of control sets, each as large as `features` (`matched_sets`).
        exclude: features that must not be controls, the emotion's others above all.
        words: whose logits are looked at; by default `EMOTION_WORDS`, none for an emotion that is not there.
        neutral_texts: what the KL is measured on; by default the bundled neutral openings.
        judges: by default those of English; each is asked for all that it knows.
        folder: keeps the texts (`steering_sweep.write_texts`).
        seed: of the draw of controls and of the intervals.

    Raises:
        ValueError: no features, one that the SAE lacks, all silent on the texts, too few features that could be
            controls, fewer than two prompts, or an emotion without openings.
    """
    texts = _openings_of(emotion) if prompts is None else tuple(prompts)
    if isinstance(prompts, str) or len(texts) < 2:
        raise ValueError(f"necessity needs a list of at least 2 prompts, got {prompts!r:.60}")
    hook_name = checked_hook(model, sae)
    norm = float(residual_norm or mean_norm(model, texts, hook_name, **token_settings(sae)))
    own = removal_plan(sae, features, clamp, norm)
    requests = [Request(prompt, None, temperature, one) for prompt in texts for one in seeds]
    unsteered = complete(model, sae, requests, max_new_tokens=max_new_tokens, with_nll=False, progress=progress)
    whole = {
        prompt: [one.request.prompt + one.text for one in unsteered if one.request.prompt == prompt] for prompt in texts
    }
    codes = encode_texts(model, sae, [text for some in whole.values() for text in some], progress=False)
    controls = matched_sets(codes, sae, features, sets, exclude=exclude, seed=seed)
    plans = {FEATURES: own, **{f"control {n}": removal_plan(sae, one, clamp, norm) for n, one in enumerate(controls)}}
    chosen = EMOTION_WORDS.get(emotion, "").split() if words is None else list(words)
    repair, logits = propagation(model, sae, list(plans.values()), whole, chosen, seed=seed, progress=progress)
    blanked = promoted_tokens(model, sae, sorted(features), PROMOTED)
    tokens = tuple(dict.fromkeys(token for some in blanked.values() for token in some))
    variants = [Variant(name, sae, (plan,), emotion, tokens) for name, plan in plans.items()]
    judges = judges_for("en") if judges is None else judges
    written = write_texts(
        *(model, variants, texts),
        seeds=seeds,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        folder=folder,
        progress=progress,
    )
    scores = score_texts(model, variants, written, judges=judges)
    asked = [(judge.name, measure) for judge in judges for measure in judge.measures]
    ratios = [ratio_of(scores.of(name, *asked[0])) for name in plans]
    logs = [math.log(ratio) for ratio in ratios[1:] if ratio is not None]
    neutral = tokenize(model, neutral_texts or openings("neutral"), **token_settings(sae))
    contexts = [partial(steering, model, sae, plan) for plan in plans.values()]
    kl = mean_kl(model, neutral, contexts, progress=progress)
    rates, norms = contribution_sizes(codes, sae)
    meta = {
        "model": model_identity(model),
        "hook_name": hook_name,
        "emotion": emotion,
        "features": list(features),
        "removal": "ablated" if not clamp else f"clamped to {clamp:g} of the residual norm",
        "firing_rates": {str(one): float(rates[one]) for one in features},
        "contribution_norms": {str(one): float(norms[one]) for one in features},
        "controls": [list(one) for one in controls],
        "controls_firing_rates": [[float(rates[one]) for one in some] for some in controls],
        "controls_contribution_norms": [[float(norms[one]) for one in some] for some in controls],
        "words": chosen,
        "residual_norm": norm,
        "n_prompts": len(texts),
        "seeds": list(seeds),
        "temperature": float(temperature),
        "max_new_tokens": max_new_tokens,
        "resamples": RESAMPLES,
        "seed": seed,
    }
    rows = []
    for judge, measure in asked:
        found = {name: scores.of(name, judge, measure) for name in plans}
        masked = {name: changes_of(some, plans[name].amount, 1, masked=True) for name, some in found.items()}
        plain = changes_of(found[FEATURES], own.amount, 1, masked=False)
        rows.append(_row(judge, measure, plain, masked, seed))
    return Necessity(
        *(meta, tuple(rows), repair, logits),
        kl=kl[0],
        controls_kl=tuple(kl[1:]),
        perplexity_ratio=ratios[0],
        controls_perplexity_ratio=math.exp(np.mean(logs)) if logs else None,
    )


def removal_plan(
    sae: Any, features: Sequence[int], clamp: float | int | None, residual_norm: float | int
) -> SteeringPlan:
    """The plan that ablates the features, or clamps their contributions. ValueError as `SteeringPlan.of`."""
    if repeated := [one for one in features if list(features).count(one) > 1]:
        raise ValueError(f"feature {repeated[0]} stands twice in the list")
    norm = float(residual_norm)
    if not clamp:  # clamped to 0 is ablated
        return SteeringPlan.of(dict.fromkeys(features, 1.0), sae, residual_norm=norm, mode="ablate")
    return SteeringPlan.of(dict.fromkeys(features, float(clamp)), sae, residual_norm=norm, mode="clamp")


def contribution_sizes(codes: SparseCodes, sae: Any) -> tuple[Float[np.ndarray, " d_sae"], Float[np.ndarray, " d_sae"]]:
    """Each feature's firing rate, and the mean norm of its contribution where it fires (0 for a silent one).

    The norm is the activation's mean times the decoder row's norm, in the SAE's own space.
    """
    fired = np.bincount(codes.features, weights=codes.values > 0, minlength=codes.d_sae)
    sums = np.bincount(codes.features, weights=codes.values, minlength=codes.d_sae)
    lengths = unit_lengths(sae, range(codes.d_sae)).cpu().numpy().astype(np.float64)
    return fired / max(1, codes.n_tokens), lengths * np.divide(sums, fired, out=np.zeros_like(sums), where=fired > 0)


def matched_sets(
    codes: SparseCodes,
    sae: Any,
    features: Sequence[int],
    sets: int = 20,
    *,
    exclude: Sequence[int] = (),
    nearest: int = 20,
    seed: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """Random sets of other features, each feature's stand-in about as frequent and contributing about as much.

    A stand-in is drawn from the `nearest` features by the ratios of firing rate and of contribution norm on the codes'
    texts (Euclidean distance of logarithms). No feature stands twice in a set; sets may share some. A feature that is
    silent there contributes nothing, and has no stand-in.

    Raises:
        ValueError: features that are all silent, or too few others that fire.
    """
    rates, norms = contribution_sizes(codes, sae)
    if wrong := [one for one in (*features, *exclude) if not 0 <= one < codes.d_sae]:
        raise ValueError(f"the SAE has no feature {wrong[0]} (valid: 0 to {codes.d_sae - 1})")
    if not (active := [one for one in features if norms[one] > 0]):
        raise ValueError(
            f"none of the features {', '.join(map(str, features))} fires on the texts: nothing to take away"
        )
    if len(active) < len(features):
        logger.warning("%d of %d features are silent on the texts", len(features) - len(active), len(features))
    free = norms > 0
    free[[*features, *exclude]] = False
    candidates = np.flatnonzero(free)
    if len(candidates) < len(active):
        raise ValueError(f"{len(candidates)} other features fire on the texts; {len(active)} are needed as controls")
    places = np.stack([np.log(rates[candidates]), np.log(norms[candidates])], axis=1)
    order = {
        one: candidates[np.argsort(((places - np.log([rates[one], norms[one]])) ** 2).sum(axis=1), kind="stable")]
        for one in active
    }
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(sets):
        chosen: list[int] = []
        for one in active:
            left = [int(other) for other in order[one][: nearest + len(active)] if other not in chosen][:nearest]
            chosen.append(left[int(rng.integers(len(left)))])
        found.append(tuple(chosen))
    return tuple(found)


def _openings_of(emotion: str) -> tuple[str, ...]:
    basic = basic_emotion(emotion)
    if basic not in OPENING_KINDS:
        raise ValueError(f"no openings for {emotion!r} (there are some for {', '.join(OPENING_KINDS)}); give prompts=")
    return openings(basic)


def _row(judge: str, measure: str, plain: Changes, masked: dict[str, Changes], seed: int) -> NecessityRow:
    names = [name for name in masked if name != FEATURES]
    means = {name: mean_change(changes) for name, changes in masked.items()}
    own, others = means[FEATURES], [mean for name in names if (mean := means[name]) is not None]
    as_large = sum(abs(mean) >= abs(own) for mean in others) if own is not None else len(others)
    return NecessityRow(
        judge=judge,
        measure=measure,
        plain=contrast({FEATURES: plain}, {FEATURES: 1.0}, seed),
        masked=contrast(masked, {FEATURES: 1.0}, seed),
        controls=math.fsum(others) / len(others) if others else None,
        beyond=contrast(masked, {FEATURES: 1.0, **dict.fromkeys(names, -1 / max(1, len(names)))}, seed),
        p=(1 + as_large) / (1 + len(others)),
    )


def _cells(row: NecessityRow) -> tuple[str, ...]:
    controls = "-" if row.controls is None else f"{row.controls:+.3f}"
    changes = (*map(shown_interval, (row.plain, row.masked)), controls, shown_interval(row.beyond))
    return row.judge, row.measure, *changes, f"{row.p:.3f}"
