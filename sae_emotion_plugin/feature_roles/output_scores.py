"""What a feature does to the model's next token: output score, delta token confidence, causal score. No generation.

A feature that fires on angry texts need not make the model write them, so features are scored by what they do. One
forward pass per feature and prompt, many features in a batch, each row with a plan of its own.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, TokenWindow, mean_norm, model_device, tokenize
from sae_emotion_plugin.emotion_texts import openings
from sae_emotion_plugin.generation.likelihoods import LOGIT_ENTRIES, backing_off, keeps_logits
from sae_emotion_plugin.interventions.hooks import row_steering
from sae_emotion_plugin.interventions.plans import Mode, SteeringPlan
from sae_emotion_plugin.judges.judge import emotion_lexicon
from sae_emotion_plugin.models import logit_lens, model_identity
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings

if TYPE_CHECKING:
    import pandas

AMOUNT = 0.4
"""For output score and confidence: as strong as an amplification that shows which tokens a feature can bring about."""
CANDIDATES = 20
"""Of an emotion's features, those that tell its texts best are asked what they do, before one steers with them."""
CAUSAL_AMOUNT = 0.05
"""For the causal score: small, so that it is the slope at the model as it is."""
EMOTION_WORDS = {
    "admiration": "admire admirable admiring impressive brilliant respect hero inspiring",
    "amusement": "funny hilarious laugh laughing laughed joke amusing humor",
    "anger": "angry anger furious rage hate hated outraged mad",
    "annoyance": "annoying annoyed irritating irritated bothered frustrated frustrating tired",
    "approval": "agree agreed approve approved right correct good support",
    "caring": "care caring careful help protect comfort support kind",
    "confusion": "confused confusing unclear puzzled unsure strange baffled lost",
    "curiosity": "curious wonder wondering wondered interested interesting question why",
    "desire": "want wanted wish wished desire hope craving longing",
    "disappointment": "disappointed disappointing disappointment unfortunately sadly failed letdown underwhelming",
    "disapproval": "disagree wrong bad unacceptable inappropriate disapprove terrible against",
    "disgust": "disgusting disgusted gross nasty revolting vile sickening filthy",
    "embarrassment": "embarrassed embarrassing ashamed awkward shame humiliated humiliating shy",
    "excitement": "excited exciting thrilled thrilling excitement eager wow pumped",
    "fear": "afraid fear scared scary terrified frightened terrifying worried",
    "gratitude": "thank thanks thankful grateful gratitude appreciate appreciated blessed",
    "grief": "grief mourning mourn died death loss tragic funeral",
    "joy": "happy joy joyful delighted glad wonderful delightful cheerful",
    "love": "love loved loving adore adored beloved lovely dear",
    "nervousness": "nervous anxious worried anxiety tense uneasy stressed worry",
    "optimism": "hope hopeful hopefully optimistic confident better promising bright",
    "pride": "proud pride accomplished achievement honor honored triumphant success",
    "realization": "realized realize realised noticed suddenly understood discovered turns",
    "relief": "relief relieved finally glad safe phew calm thankfully",
    "remorse": "sorry regret regretted guilty apologize apologies guilt ashamed",
    "sadness": "sad sadness unhappy cry crying heartbroken depressed miserable",
    "surprise": "surprised surprise surprising shocked shocking amazed unexpected astonished",
}
"""Eight words for each label of GoEmotions but neutral, written before any feature was looked at."""


@dataclass(frozen=True)
class OutputScore:
    """What adding one feature does to the next token, as means over neutral prompts."""

    feature: int
    output_score: float
    """From 0 to 1: high when tokens that the feature's decoder direction promotes become the likeliest ones."""
    delta_confidence: float
    """In nats; above 0 the distribution has become flatter, below 0 more peaked."""
    kl: float
    """KL(steered || unsteered) in nats, at the dose of the output score."""
    causal: dict[str, float]
    """For each list of words, the change of the log-odds that the next token is one of them, at the small dose."""


@dataclass(frozen=True, repr=False)
class OutputScores(ResultTable):
    """A row for each feature, in the order asked for; `meta` says how they were found."""

    row_type = OutputScore
    head = ("feature", "output score", "delta confidence", "KL", "largest changes of log-odds")

    meta: dict[str, Any]
    rows: tuple[OutputScore, ...]

    def of(self, feature: int) -> OutputScore:
        """The row of a feature. ValueError for one that was not scored."""
        for row in self.rows:
            if row.feature == feature:
                return row
        raise ValueError(f"feature {feature} was not scored (valid: {_some(row.feature for row in self.rows)})")

    def to_pandas(self) -> "pandas.DataFrame":
        """One line for each feature; the causal scores are columns named `causal:` and the name of their words."""
        import pandas as pd

        plain = [field.name for field in fields(OutputScore) if field.name != "causal"]
        names = [f"causal:{name}" for name in (self.rows[0].causal if self.rows else ())]
        lines = [[*(getattr(row, name) for name in plain), *row.causal.values()] for row in self.rows]
        return pd.DataFrame(lines, columns=[*plain, *names])

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        caption = (
            f"OutputScores: {len(self.rows)} features on {self.meta.get('n_prompts')} prompts, {self.meta.get('mode')} "
            f"{self.meta.get('amount')} of the residual norm (causal score: {self.meta.get('causal_amount')})"
        )
        return caption, [_cells(row) for row in self.rows]


def output_scores(
    model: HookedModel,
    sae: Any,
    features: Sequence[int],
    *,
    prompts: Sequence[str] | None = None,
    amount: float | int = AMOUNT,
    causal_amount: float | int = CAUSAL_AMOUNT,
    mode: Mode = "add",
    residual_norm: float | None = None,
    top: int = 20,
    confidence_tokens: int = 1,
    words: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
) -> OutputScores:
    """The output score, delta token confidence and causal score of each feature.

    With p the distribution of the token after the prompt, q the same while the feature is steered, and T the `top`
    tokens that the feature's decoder direction promotes by the logit lens:

    - Output score (Arad et al., arXiv 2505.20063, and their published code): (1 - r / |vocabulary|) times the largest
      q(t) of t in T, where r is the smallest rank, from 0, that a token of T has in q.
    - Delta token confidence (Wang et al., arXiv 2510.03659, appendix D): C(q) - C(p), where C is minus the mean log
      probability of the `confidence_tokens` likeliest tokens. In spite of the name, more is less confident. They choose
      features at both ends, so its size counts as much as its sign.
    - Causal score of a list of words (ours): logit(q(W)) - logit(p(W)), where W are the tokens that are one of the
      words, whatever their case and leading space; words of several tokens are left out.

    What differs from both papers: the dose is a fraction of the mean residual norm and not 10 times an activation (the
    largest of the last token there, or the feature's own, 0 where it is silent); all positions but BOS are steered, as
    steering does, and not the last alone; scores are means over neutral prompts and not of "From my experience,"
    alone; and the SAE's error stays (2510.03659 decodes the one feature in place of the residual).

    Args:
        prompts: by default the bundled neutral openings.
        amount: dose of the output score, the confidence and the KL, as a fraction of the residual norm.
        causal_amount: dose of the causal score.
        mode: `add` the direction, or `clamp` the feature's contribution.
        residual_norm: by default measured on the prompts.
        words: lists of words by name; by default `EMOTION_WORDS`, and as "positive" and "negative" VADER's words with a
            valence of size 1 or more.

    Raises:
        ValueError: no features or prompts, a feature that the SAE lacks, an SAE that does not write the residual
            stream, or a list of words none of which is a single token of the model.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, not one string")
    hook_name = checked_hook(model, sae)
    if sae.W_dec.shape[1] != model.cfg.d_model:
        raise ValueError(f"the SAE writes {sae.W_dec.shape[1]} dimensions, the residual stream has {model.cfg.d_model}")
    vocab = int(model.cfg.d_vocab)
    for name, value in (("top", top), ("confidence_tokens", confidence_tokens)):
        if not 1 <= value <= vocab:
            raise ValueError(f"{name} is {value} (valid: 1 to {vocab})")
    if not features:
        raise ValueError("no features to score")
    texts = openings("neutral") if prompts is None else tuple(prompts)
    windows = prompt_windows(model, sae, texts)
    norm = residual_norm or mean_norm(model, texts, hook_name, **token_settings(sae))
    lists = emotion_words() if words is None else words
    tokens_of = _word_tokens(model, lists)
    empty = [name for name, found in tokens_of.items() if not len(found)]
    if empty and words is not None:
        raise ValueError(f"no word of {empty[0]!r} is a single token of the model: {', '.join(words[empty[0]])[:80]}")
    tokens_of = {name: found for name, found in tokens_of.items() if name not in empty}
    if not tokens_of:
        raise ValueError(f"none of the words of {_some(lists)} is a single token of the model: give others as words=")

    unique = list(dict.fromkeys(int(feature) for feature in features))
    plans = {
        dose: [SteeringPlan.of({feature: dose}, sae, residual_norm=norm, mode=mode) for feature in unique]
        for dose in dict.fromkeys((float(amount), float(causal_amount)))
    }
    promoted = logit_lens(model, sae.W_dec[unique].detach()).topk(top, dim=-1).indices.cpu()
    unsteered = read_next_tokens(
        model, sae, [(window, None) for window in windows], lambda _, log_p: list(log_p.cpu()), progress=False
    )

    def read_strong(places: Sequence[int], log_q: Float[Tensor, "row vocab"]) -> list[tuple[float, ...]]:
        return [
            _strong(row, unsteered[place % len(windows)], promoted[place // len(windows)], confidence_tokens)
            for place, row in zip(places, log_q, strict=True)
        ]

    def read_causal(places: Sequence[int], log_q: Float[Tensor, "row vocab"]) -> list[list[float]]:
        return [log_odds(row, list(tokens_of.values())) for row in log_q]

    def means(dose: float | int, read: Callable[..., list[Any]]) -> Float[Tensor, "feature reading"]:
        rows = [(window, plan) for plan in plans[float(dose)] for window in windows]
        found = torch.tensor(read_next_tokens(model, sae, rows, read, progress=progress), dtype=torch.float64)
        return found.view(len(unique), len(windows), -1).mean(dim=1)

    strong = means(amount, read_strong).tolist()
    before = torch.tensor(read_causal(range(len(windows)), torch.stack(unsteered)), dtype=torch.float64).mean(dim=0)
    causal = (means(causal_amount, read_causal) - before).tolist()
    rows = {
        feature: OutputScore(feature, scores[0], scores[1], scores[2], dict(zip(tokens_of, changes, strict=True)))
        for feature, scores, changes in zip(unique, strong, causal, strict=True)
    }
    meta = {
        "model": model_identity(model),
        "hook_name": hook_name,
        "mode": mode,
        "amount": float(amount),
        "causal_amount": float(causal_amount),
        "residual_norm": norm,
        "n_prompts": len(texts),
        "top": top,
        "confidence_tokens": confidence_tokens,
        "tokens_per_list": {name: len(found) for name, found in tokens_of.items()},
    }
    return OutputScores(meta, tuple(rows[int(feature)] for feature in features))


def emotion_words() -> dict[str, tuple[str, ...]]:
    """`EMOTION_WORDS`, and VADER's words with a valence of size 1 or more as "positive" and "negative"."""
    rated = emotion_lexicon()
    signed = {name: tuple(word for word, one in rated.items() if one * sign > 0) for name, sign in SIGNED.items()}
    return {**{name: tuple(some.split()) for name, some in EMOTION_WORDS.items()}, **signed}


def steering_order(
    model: HookedModel,
    sae: Any,
    emotion: str,
    features: Sequence[int],
    *,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
) -> tuple[int, ...]:
    """The features by their causal score for the emotion, the best to steer with first.

    Of AUROC, output score, delta confidence, KL and this score, it alone predicted the success of steering beyond doubt
    (`benchmarks/steering_prediction.py`), and weakly: try what comes first, and look. ValueError for an emotion without
    words in `EMOTION_WORDS`, and what `output_scores` refuses.
    """
    if emotion not in EMOTION_WORDS:
        valid = f"one of {', '.join(EMOTION_WORDS)}; rank any other by AUROC, `--rank auroc`"
        raise ValueError(f"no causal score for {emotion} (valid: {valid})")
    words = {emotion: EMOTION_WORDS[emotion].split()}
    found = output_scores(model, sae, features, prompts=prompts, amount=CAUSAL_AMOUNT, words=words, progress=progress)
    causal = {row.feature: row.causal[emotion] for row in found.rows}
    return tuple(sorted(features, key=lambda feature: -causal[feature]))


SIGNED = {"positive": 1, "negative": -1}


def prompt_windows(model: HookedModel, sae: Any, prompts: Sequence[str]) -> list[TokenWindow]:
    """The prompts' tokens, BOS first where the SAE wants it. ValueError for no prompt, an empty or too long one."""
    if not prompts:
        raise ValueError("no prompts: the list is empty")
    windows = []
    for prompt in prompts:
        found = tokenize(model, [prompt], **token_settings(sae))
        if len(found) != 1 or len(found[0].token_ids) <= found[0].bos:
            kind = "has no tokens" if len(found) < 2 else f"is longer than {token_settings(sae)['context_size']} tokens"
            raise ValueError(f"the prompt {prompt[:40]!r} {kind}")
        windows += found
    return windows


def read_next_tokens(
    model: HookedModel,
    sae: Any,
    rows: Sequence[tuple[TokenWindow, SteeringPlan | None]],
    read: Callable[[Sequence[int], Float[Tensor, "row vocab"]], Sequence[Any]],
    *,
    progress: bool = True,
) -> list[Any]:
    """What `read` makes of the log-probabilities of the token after each row, in the order of the rows.

    Rows of one length share batches whatever their plans; logits exist for one batch at a time (64 MiB and a copy).

    Args:
        read: called with the places of some rows and their log-probabilities; returns as many readings.

    Raises:
        ValueError: a plan that does not fit the SAE, or logits that are no numbers (the plan is named).
    """
    found: list[Any] = [None] * len(rows)
    last = {"logits_to_keep": 1, "use_cache": False} if keeps_logits(model) else {}
    size = max(1, LOGIT_ENTRIES // 4 // int(model.cfg.d_vocab))
    order = sorted(range(len(rows)), key=lambda place: (len(rows[place][0].token_ids), rows[place][0].bos))
    with tqdm(total=len(rows), unit="row", desc="next tokens", disable=not progress) as bar:

        def run(places: Sequence[int]) -> Sequence[Any]:
            windows, plans = [rows[place][0] for place in places], [rows[place][1] for place in places]
            tokens = torch.tensor([window.token_ids for window in windows])
            steered = torch.ones_like(tokens, dtype=torch.bool)
            steered[:, : int(windows[0].bos)] = False
            with torch.inference_mode(), row_steering(model, sae, plans, steered):
                logits = model(tokens.to(model_device(model)), **last)[:, -1].float()
            if broken := (~logits.amax(dim=-1).isfinite()).nonzero().tolist():
                raise ValueError(f"the logits are not finite; steered by {plans[broken[0][0]]}")
            readings = read(places, logits.log_softmax(dim=-1))
            bar.update(len(places))
            return readings

        def alike(place: int) -> tuple[int, bool]:
            return len(rows[place][0].token_ids), rows[place][0].bos

        for _, group in itertools.groupby(order, key=alike):
            places = list(group)
            for place, reading in zip(places, backing_off(run, places, size), strict=True):
                found[place] = reading
    return found


def log_odds(log_p: Float[Tensor, " vocab"], lists: Sequence[Int[Tensor, "_"]]) -> list[float]:
    """For each list of tokens, the log-odds that the next token is one of them."""
    p = log_p.double().exp()
    inside = torch.stack([p[tokens.to(p.device)].sum() for tokens in lists])
    return (inside.log() - (p.sum() - inside).log()).tolist()


def _strong(
    log_q: Float[Tensor, " vocab"], log_p: Float[Tensor, " vocab"], promoted: Int[Tensor, " top"], k: int
) -> tuple[float, float, float]:
    """Output score, delta confidence and KL of one row."""
    best = log_q[promoted.to(log_q.device)].max()
    rank = int((log_q > best).sum())
    score = (1 - rank / len(log_q)) * math.exp(float(best))
    log_p = log_p.to(log_q.device)
    delta = float(log_p.topk(k).values.mean() - log_q.topk(k).values.mean())
    return score, delta, kl_divergence(log_q, log_p)


def kl_divergence(log_q: Float[Tensor, " vocab"], log_p: Float[Tensor, " vocab"]) -> float:
    """KL(q || p) in nats; rounding errors below 0 count as 0."""
    terms = (log_q.exp() * (log_q - log_p)).masked_fill(log_q.isneginf(), 0.0)
    return max(0.0, float(terms.double().sum()))


def _word_tokens(model: HookedModel, lists: Mapping[str, Sequence[str]]) -> dict[str, Int[Tensor, "_"]]:
    """For each list the tokens that are one of its words, whatever their case and leading space."""
    of_word: dict[str, list[int]] = {}
    for token, piece in enumerate(model.tokenizer.convert_ids_to_tokens(range(int(model.cfg.d_vocab)))):
        of_word.setdefault((piece or "").lstrip("▁Ġ").lower(), []).append(token)
    found = {}
    for name, words in lists.items():
        if isinstance(words, str):
            raise ValueError(f"the words of {name!r} must be a list of strings, not one string")
        wanted = dict.fromkeys(word.strip().lower() for word in words)
        found[name] = torch.tensor([token for word in wanted for token in of_word.get(word, [])], dtype=torch.int64)
    return found


def _some(values: Any) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")


def _cells(row: OutputScore) -> tuple[str, ...]:
    largest = sorted(row.causal.items(), key=lambda item: -abs(item[1]))[:3]
    changes = ", ".join(f"{name} {change:+.2f}" for name, change in largest)
    return str(row.feature), f"{row.output_score:.4f}", f"{row.delta_confidence:+.3f}", f"{row.kl:.3f}", changes
