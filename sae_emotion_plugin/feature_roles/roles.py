"""What a feature does when it is added or removed, what it fires on, and a one-line label from that evidence alone."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_emotion_plugin.activations import HookedModel, TokenWindow, mean_norm
from sae_emotion_plugin.discovery.scores import FeatureScore, FeatureScores
from sae_emotion_plugin.emotion_texts import openings
from sae_emotion_plugin.feature_labels import told_apart
from sae_emotion_plugin.feature_roles.output_scores import kl_divergence, prompt_windows, read_next_tokens
from sae_emotion_plugin.generation.continuations import Request, complete
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.models import decode_token, model_identity
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import SparseCodes, checked_hook, token_settings

if TYPE_CHECKING:
    import pandas

AMOUNT = 0.1
STRONGEST = 100
"""Activations of a feature that show what it fires on."""
REMOVED_AT = 8
"""Of these, those at which it is removed."""
FEWEST_FIRINGS = 2
NAMED_TOKENS = 5
FLOOR = 1e-4
"""Added to probabilities before their ratio is taken."""
FEATURES_AT_ONCE = 16


@dataclass(frozen=True)
class TokenChange:
    """The mean probability that a token comes next, without the change to the feature and with it."""

    token: str
    before: float
    after: float


@dataclass(frozen=True)
class FiringToken:
    """A token that a feature's strongest activations stand on more often than the corpus has it."""

    token: str
    """Without surrounding space, in small letters."""
    count: int
    """Of the strongest activations."""
    share: float
    """The same as a share of them."""
    corpus_share: float


@dataclass(frozen=True)
class Example:
    """A greedy continuation without and with the feature added."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class FeatureRole:
    """What is known of one feature."""

    feature: int
    label: str
    """One line, built from the rest without a language model."""
    raises: tuple[TokenChange, ...]
    """Tokens whose mean probability rises most (log ratio) when the feature is added on neutral prompts."""
    lowers: tuple[TokenChange, ...]
    kl: float
    """Mean KL(with || without) in nats of that."""
    removal_raises: tuple[TokenChange, ...]
    """The same where the feature is removed (clamped to 0) right where it fires most; empty without codes."""
    removal_lowers: tuple[TokenChange, ...]
    removal_kl: float | None
    fires_on: tuple[FiringToken, ...]
    n_firings: int | None
    """Tokens of the codes on which the feature fires; None without codes."""
    emotion: str | None
    """The emotion that it tells best, by training AUROC; None without scores."""
    auroc: float | None
    held_out_auroc: float | None
    q: float | None
    examples: tuple[Example, ...]
    description: str | None = None
    """What the caller's `describe` made of all this."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, repr=False)
class FeatureRoles(ResultTable):
    """A role for each feature, in the order asked for; `meta` says how they were found."""

    row_type = FeatureRole
    head = ("feature", "KL", "role")

    meta: dict[str, Any]
    rows: tuple[FeatureRole, ...]

    def to_dict(self) -> dict[str, Any]:
        """`{"meta": {...}, "rows": [{...}, ...]}`, as `save` writes it."""
        return {"meta": self.meta, "rows": [row.to_dict() for row in self.rows]}

    def to_pandas(self) -> "pandas.DataFrame":
        """One line for each feature, columns named as the fields of `FeatureRole`."""
        import pandas as pd

        return pd.DataFrame([row.to_dict() for row in self.rows], columns=[one.name for one in fields(FeatureRole)])

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        caption = f"FeatureRoles: {len(self.rows)} features, {self.meta.get('amount')} of the residual norm added"
        return caption, [(str(row.feature), f"{row.kl:.3f}", row.description or row.label) for row in self.rows]


def feature_roles(
    model: HookedModel,
    sae: Any,
    features: Sequence[int],
    *,
    codes: SparseCodes | None = None,
    scores: FeatureScores | None = None,
    prompts: Sequence[str] | None = None,
    amount: float | int = AMOUNT,
    residual_norm: float | None = None,
    top: int = 10,
    examples: int = 2,
    max_new_tokens: int = 16,
    describe: Callable[[FeatureRole], str] | None = None,
    progress: bool = True,
) -> FeatureRoles:
    """The role of each feature: what it makes likelier and less likely, what it fires on, which emotion it tells.

    Added, a feature acts on all tokens of neutral prompts but BOS, and the token after the prompt is looked at. Rising
    and falling tokens are ordered by log((after + 1e-4) / (before + 1e-4)) of the mean probabilities: by the difference
    the commonest words lead every list, by the plain ratio words that hardly ever come.
    Removed, it is clamped to 0 in the very contexts in which it fires most, and the token after its firing is looked
    at: on neutral prompts most features are silent, so that removing them does nothing. What it fires on are the tokens
    that its 100 strongest activations stand on more often than the corpus has them, the most surprising first
    (Dunning's log-likelihood ratio, 1993); a token must be there twice.

    Args:
        codes: of a corpus, for what the feature fires on and for its removal.
        scores: for the emotion; the feature's row with the largest training AUROC counts.
        prompts: by default the bundled neutral openings.
        amount: what is added, as a fraction of the mean residual norm.
        residual_norm: by default measured on the prompts.
        examples: how many of the prompts are continued, greedily.
        describe: makes a description of a role, with a language model for example.

    Raises:
        ValueError: no features or prompts, a feature that the SAE lacks, or codes of another SAE or hook.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    if not features:
        raise ValueError("no features to describe")
    if top < 1 or examples < 0:
        raise ValueError(f"top ({top}) must be at least 1 and examples ({examples}) at least 0")
    hook_name = checked_hook(model, sae)
    if codes is not None and (codes.d_sae, codes.hook_name) != (sae.cfg.d_sae, hook_name):
        raise ValueError(
            f"the codes have {codes.d_sae} features at {codes.hook_name}, the SAE {sae.cfg.d_sae} at {hook_name}"
        )
    texts = openings("neutral") if prompts is None else tuple(prompts)
    windows = prompt_windows(model, sae, texts)
    norm = residual_norm or mean_norm(model, texts, hook_name, **token_settings(sae))
    unique = list(dict.fromkeys(int(feature) for feature in features))
    added = {one: SteeringPlan.of({one: amount}, sae, residual_norm=norm) for one in unique}
    removed = {one: SteeringPlan.of({one: 0.0}, sae, residual_norm=norm, mode="clamp") for one in unique}
    entries = codes.matrix().tocsc() if codes is not None else None
    corpus = _token_counts(model, codes.token_ids) if codes is not None else Counter()
    changes = _changes(model, sae, {one: (windows, added[one]) for one in unique}, top, progress)
    written = _examples(model, sae, added, texts[:examples], max_new_tokens) if examples else {}

    firing: dict[int, tuple[TokenWindow, ...]] = {}
    fires_on: dict[int, tuple[FiringToken, ...]] = {}
    n_firings: dict[int, int] = {}
    if codes is not None and entries is not None:
        for one in unique:
            column = slice(entries.indptr[one], entries.indptr[one + 1])
            strengths = np.asarray(entries.data, dtype=np.float32)[column]
            places = entries.indices[column][np.argsort(-strengths, kind="stable")]
            n_firings[one] = len(places)
            fires_on[one] = firing_tokens(_token_counts(model, codes.token_ids[places[:STRONGEST]]), corpus)[:top]
            firing[one] = tuple(_context(model, sae, codes, int(place)) for place in places[:REMOVED_AT])
    removals = _changes(
        model, sae, {one: (firing[one], removed[one]) for one in unique if firing.get(one)}, top, progress
    )
    best = _best_scores(scores)
    rows = {}
    for one in unique:
        row, (raises, lowers, kl) = best.get(one), changes[one]
        removal_raises, removal_lowers, removal_kl = removals.get(one, ((), (), None))
        role = FeatureRole(
            feature=one,
            label="",
            raises=raises,
            lowers=lowers,
            kl=kl,
            removal_raises=removal_raises,
            removal_lowers=removal_lowers,
            removal_kl=removal_kl,
            fires_on=fires_on.get(one, ()),
            n_firings=n_firings.get(one),
            emotion=row.emotion if row else None,
            auroc=row.auroc if row else None,
            held_out_auroc=row.held_out_auroc if row else None,
            q=row.q if row else None,
            examples=written.get(one, ()),
        )
        role = replace(role, label=evidence_label(role))
        rows[one] = replace(role, description=describe(role)) if describe else role
    meta = {
        "model": model_identity(model),
        "hook_name": hook_name,
        "amount": float(amount),
        "residual_norm": norm,
        "n_prompts": len(texts),
        "n_tokens": codes.n_tokens if codes is not None else None,
        "strongest": STRONGEST,
        "removed_at": REMOVED_AT,
    }
    return FeatureRoles(meta, tuple(rows[int(feature)] for feature in features))


def evidence_label(role: FeatureRole) -> str:
    """One line from a role's evidence: `promotes: ...; fires on: ...; AUROC anger 0.86, held out 0.83, q < 0.001`."""
    parts = []
    if named := _named(change.token for change in role.raises if change.after > change.before):
        parts.append(f"promotes: {named}")
    if role.n_firings == 0:
        parts.append("fires on nothing in the corpus")
    elif named := _named(one.token for one in role.fires_on):
        parts.append(f"fires on: {named}")
    if role.emotion is not None and role.auroc is not None and role.q is not None:
        parts.append(told_apart(role.emotion, role.auroc, role.held_out_auroc, role.q))
    return "; ".join(parts) or "no evidence"


def firing_tokens(strongest: Mapping[str, int], corpus: Mapping[str, int]) -> tuple[FiringToken, ...]:
    """The tokens that are over-represented among the strongest activations, the most surprising first.

    Both arguments count tokens, the first within the second. Ordered by Dunning's log-likelihood ratio (1993) of the
    two by two table; a token has to be there at least twice, and more often than in the corpus.
    """
    n, total = sum(strongest.values()), sum(corpus.values())
    found = []
    for token, count in strongest.items():
        share, corpus_share = count / n, corpus[token] / total
        if count >= FEWEST_FIRINGS and share > corpus_share:
            table = np.array([[count, corpus[token] - count], [n - count, total - n - (corpus[token] - count)]], float)
            expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / total
            ratio = 2 * float(np.sum(table * np.log(np.where(table > 0, table / np.where(expected, expected, 1), 1))))
            found.append((ratio, FiringToken(token, count, share, corpus_share)))
    return tuple(one for _, one in sorted(found, key=lambda pair: (-pair[0], pair[1].token)))


Changes = tuple[tuple[TokenChange, ...], tuple[TokenChange, ...], float]


def _changes(
    model: HookedModel,
    sae: Any,
    wanted: Mapping[int, tuple[Sequence[TokenWindow], SteeringPlan]],
    top: int,
    progress: bool,
) -> dict[int, Changes]:
    """For each feature the tokens that its plan raises and lowers most on its windows, and the mean KL."""
    contexts = list(dict.fromkeys(window for windows, _ in wanted.values() for window in windows))
    kept = read_next_tokens(
        model, sae, [(one, None) for one in contexts], lambda _, log_p: list(log_p.cpu()), progress=False
    )
    unsteered = dict(zip(contexts, kept, strict=True))
    found = {}
    features = list(wanted)
    for first in range(0, len(features), FEATURES_AT_ONCE):
        some = features[first : first + FEATURES_AT_ONCE]
        rows = [(feature, window) for feature in some for window in wanted[feature][0]]
        sums = {feature: torch.zeros(int(model.cfg.d_vocab), dtype=torch.float64) for feature in some}
        divergences = dict.fromkeys(some, 0.0)

        def read(places: Sequence[int], log_q: Float[Tensor, "row vocab"]) -> list[None]:
            for place, row in zip(places, log_q.cpu(), strict=True):
                feature, window = rows[place]  # noqa: B023
                sums[feature] += row.double().exp()  # noqa: B023
                divergences[feature] += kl_divergence(row, unsteered[window])  # noqa: B023
            return [None] * len(places)

        steered = [(window, wanted[feature][1]) for feature, window in rows]
        read_next_tokens(model, sae, steered, read, progress=progress)
        for feature in some:
            windows = wanted[feature][0]
            before = torch.stack([unsteered[window] for window in windows]).double().exp().mean(dim=0)
            after = sums[feature] / len(windows)
            rise = ((after + FLOOR) / (before + FLOOR)).log()
            found[feature] = (
                _token_changes(model, rise.topk(min(top, len(before))).indices, before, after),
                _token_changes(model, (-rise).topk(min(top, len(before))).indices, before, after),
                divergences[feature] / len(windows),
            )
    return found


def _token_changes(
    model: HookedModel, tokens: Int[Tensor, " top"], before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"]
) -> tuple[TokenChange, ...]:
    return tuple(
        TokenChange(decode_token(model, one), float(before[one]), float(after[one])) for one in tokens.tolist()
    )


def _examples(
    model: HookedModel, sae: Any, plans: Mapping[int, SteeringPlan], prompts: Sequence[str], max_new_tokens: int
) -> dict[int, tuple[Example, ...]]:
    requests = [Request(prompt, plan) for plan in (None, *plans.values()) for prompt in prompts]
    done = complete(model, sae, requests, max_new_tokens=max_new_tokens, with_nll=False, progress=False)
    before = {one.request.prompt: one.text for one in done[: len(prompts)]}
    found = {}
    for place, feature in enumerate(plans, start=1):
        own = done[place * len(prompts) : (place + 1) * len(prompts)]
        found[feature] = tuple(Example(one.request.prompt, before[one.request.prompt], one.text) for one in own)
    return found


def _context(model: HookedModel, sae: Any, codes: SparseCodes, place: int) -> TokenWindow:
    """A token of the codes with what stands before it in its text, as far as the SAE's context reaches."""
    settings = token_settings(sae)
    text = int(codes.text_index[place])
    start = int(np.searchsorted(codes.text_index, text))
    bos = model.tokenizer.bos_token_id if settings["prepend_bos"] else None
    room = settings["context_size"] - (bos is not None)
    tokens = codes.token_ids[max(start, place + 1 - room) : place + 1].tolist()
    return TokenWindow(text, 0, (*([] if bos is None else [bos]), *tokens), bos is not None)


def _token_counts(model: HookedModel, token_ids: Int[np.ndarray, " token"]) -> Counter[str]:
    """How often each token stands there, without surrounding space and case; white space as it is."""
    counts: Counter[str] = Counter()
    for token, count in zip(*np.unique(token_ids, return_counts=True), strict=True):
        text = decode_token(model, int(token))
        counts[text.strip().lower() or text] += int(count)
    return counts


def _best_scores(scores: FeatureScores | None) -> dict[int, FeatureScore]:
    best: dict[int, FeatureScore] = {}
    for row in scores.rows if scores else ():
        if row.feature not in best or row.auroc > best[row.feature].auroc:
            best[row.feature] = row
    return best


def _named(tokens: Any) -> str:
    """Some different tokens with something to show, separated by commas."""
    shown = [token.strip() for token in tokens]
    return ", ".join(list(dict.fromkeys(token for token in shown if token and token.isprintable()))[:NAMED_TOKENS])
