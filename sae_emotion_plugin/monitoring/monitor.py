"""Is a text angry, hostile, in a bad persona? Risks of feature sets on texts, and on one while it is being written."""

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from sae_emotion_plugin.activations import (
    HookedModel,
    TokenWindow,
    context_room,
    hook_capture,
    model_device,
    padded_windows,
)
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.models import decode_token
from sae_emotion_plugin.monitoring.feature_sets import FeatureSet
from sae_emotion_plugin.monitoring.thresholds import Thresholds, check_texts, pooled_risks
from sae_emotion_plugin.result_table import ResultTable
from sae_emotion_plugin.sparse_codes import SparseCodes, checked_hook, encode_texts, encode_vectors, token_settings

TEXTS_SHOWN = 50


@dataclass(frozen=True)
class TextRisk:
    """One set on one text."""

    text: int
    """Which text, from 0."""
    set: str
    risk: float
    threshold: float
    fires: bool
    """Whether the text's risk exceeds the threshold."""
    peak: int
    """Position of the token with the highest risk."""
    peak_token: str
    tokens_above: tuple[int, ...]
    """Positions of the tokens whose own risk exceeds the set's token threshold."""


@dataclass(frozen=True, repr=False)
class Monitoring(ResultTable):
    """Each set on each text, in the order of the texts, and the risks of every token.

    A notebook shows the texts in which a set fires, with the tokens above the token threshold highlighted.
    """

    row_type = TextRisk
    head = ("text", "set", "risk", "threshold", "fires", "tokens above", "highest at", "beginning")

    meta: dict[str, Any]
    rows: tuple[TextRisk, ...]
    tokens: tuple[tuple[str, ...], ...]
    """The tokens of each text, BOS not counted."""
    token_risks: tuple[Float[np.ndarray, "_ set"], ...] = field(compare=False)
    """Of each text; sets in the order of `meta["sets"]`."""

    def fired(self, text: int = 0) -> tuple[str, ...]:
        """Returns the sets that fire on a text."""
        return tuple(row.set for row in self.rows if row.text == text and row.fires)

    def to_dict(self) -> dict[str, Any]:
        """Returns meta and rows, and in `texts` the tokens of each text with their risks by set."""
        names = self.meta["sets"]
        texts = [
            {"tokens": list(tokens), "risks": dict(zip(names, risks.T.tolist(), strict=True))}
            for tokens, risks in zip(self.tokens, self.token_risks, strict=True)
        ]
        return {**super().to_dict(), "texts": texts}

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        fires = len({row.text for row in self.rows if row.fires})
        summary = (
            f"Monitoring: {len(self.tokens)} texts, {fires} with a set that fires; risk of a text: "
            f"{self.meta['pooling']} over tokens; calibrated to {self.meta['false_positive_rate']:.3g} of neutral texts"
        )
        if self.meta["n_longer"]:
            summary += f"; {self.meta['n_longer']} are longer than any calibration text"
        return summary, [
            (
                str(row.text),
                row.set,
                f"{row.risk:.3f}",
                f"{row.threshold:.3f}",
                "yes" if row.fires else "",
                str(len(row.tokens_above)),
                repr(row.peak_token),
                repr("".join(self.tokens[row.text])[:30]),
            )
            for row in self._shown()
        ]

    def _shown(self) -> list[TextRisk]:
        return [row for row in self.rows if row.text < TEXTS_SHOWN]

    def _repr_html_(self) -> str:
        paragraphs = (self._highlighted(row) for row in self._shown() if row.fires)
        return super()._repr_html_() + "".join(paragraphs)

    def _highlighted(self, row: TextRisk) -> str:
        risks = self.token_risks[row.text][:, self.meta["sets"].index(row.set)]
        above = set(row.tokens_above)
        parts = [
            f'<mark title="{risk:.2f}">{html.escape(token)}</mark>' if place in above else html.escape(token)
            for place, (token, risk) in enumerate(zip(self.tokens[row.text], risks, strict=True))
        ]
        return f"<p><b>{row.text}, {html.escape(row.set)} ({row.risk:.2f}):</b> {''.join(parts)}</p>"


def monitor(
    model: HookedModel,
    sae: Any,
    text: str | Sequence[str],
    features: Sequence[FeatureSet | str] | None,
    thresholds: Thresholds,
    *,
    progress: bool = False,
) -> Monitoring:
    """Returns the risk of each set on each text (one string, or several at once) and on each of its tokens.

    The model is run as it is: within `steering` its steered activations are read, which show what was put there.

    Args:
        features: the sets, or their names; None: all that were calibrated.

    Raises:
        ValueError: an empty text, a set without thresholds or with other features than calibrated, thresholds of
            another dictionary or model.
    """
    texts = [text] if isinstance(text, str) else list(text)
    check_texts(texts)
    chosen = thresholds.select(features)
    chosen.check(model, sae)
    return monitored(model, encode_texts(model, sae, texts, progress=progress), chosen)


def monitored(model: HookedModel, codes: SparseCodes, thresholds: Thresholds) -> Monitoring:
    """Returns what `monitor` does for texts that are encoded already; `model` only spells the tokens."""
    risks = thresholds.token_risks(codes)
    lengths = codes.text_lengths
    of_texts = pooled_risks(risks, lengths, thresholds.pooling)
    spelled = {int(token): decode_token(model, int(token)) for token in np.unique(codes.token_ids)}
    ends = np.cumsum(lengths)[:-1]
    by_text = np.split(risks, ends)
    tokens = tuple(tuple(spelled[int(token)] for token in part) for part in np.split(codes.token_ids, ends))
    rows = []
    for place, (own, words) in enumerate(zip(by_text, tokens, strict=True)):
        for column, one in enumerate(thresholds.rows):
            risk, peak = float(of_texts[place, column]), int(own[:, column].argmax())
            above = tuple(np.flatnonzero(own[:, column] > one.token_threshold).tolist())
            fires = risk > one.text_threshold
            rows.append(TextRisk(place, one.name, risk, one.text_threshold, fires, peak, words[peak], above))
    n_longer = int((lengths > thresholds.meta["longest_text"]).sum())
    own_meta = {"sets": list(thresholds.names), "n_monitored": codes.n_texts, "n_longer": n_longer}
    return Monitoring({**thresholds.meta, **own_meta}, tuple(rows), tokens, tuple(by_text))


@contextmanager
def _unhooked(model: HookedModel) -> Iterator[None]:
    """A context in which no hook of the model acts: a generator may call from within its own steering."""
    points = [(point, list(point.fwd_hooks)) for point in model.hook_dict.values() if point.fwd_hooks]
    acting = [(point, kept, dict(point._forward_hooks)) for point, kept in points]
    for point, _, _ in acting:
        point.fwd_hooks = []
        point._forward_hooks.clear()
    try:
        yield
    finally:
        # In place: torch's handles, by which whoever added the hooks removes them, refer to this very dictionary.
        for point, kept, hooks in acting:
            point.fwd_hooks = kept
            point._forward_hooks.update(hooks)


@dataclass(frozen=True)
class LiveMonitor:
    """The risks of a text of which only the tokens are known; made by `live_monitor`."""

    model: HookedModel
    sae: Any
    thresholds: Thresholds

    def __call__(self, token_ids: Sequence[int], *, context: int = 0) -> dict[str, float]:
        """Returns each set's risk of the text so far, as `monitor` would of the same tokens, BOS left out.

        The first `context` tokens (a prompt) are read but have no risk of their own. ValueError without any token
        behind them, and for a token that the model lacks.
        """
        ids = [int(token) for token in token_ids]
        if not 0 <= context < len(ids):
            raise ValueError(f"no tokens to watch: {len(ids)} tokens, of which the first {context} are context")
        size = int(self.model.cfg.d_vocab)
        if strange := [token for token in ids if not 0 <= token < size]:
            raise ValueError(f"the model has no token {strange[0]} (valid: 0 to {size - 1})")
        risks = self.thresholds.token_risks(self._codes(ids))[context:]
        (pooled,) = pooled_risks(risks, np.array([len(risks)]), self.thresholds.pooling)
        return dict(zip(self.thresholds.names, pooled.tolist(), strict=True))

    def above(self, risks: dict[str, float]) -> tuple[str, ...]:
        """Returns the sets whose risk exceeds their text threshold."""
        return tuple(row.name for row in self.thresholds.rows if risks[row.name] > row.text_threshold)

    def _codes(self, ids: list[int]) -> SparseCodes:
        settings, hook_name = token_settings(self.sae), self.sae.cfg.metadata.hook_name
        room, bos = context_room(self.model, **settings), self.model.tokenizer.bos_token_id
        before = (bos,) if settings["prepend_bos"] and bos is not None else ()
        starts = range(0, len(ids), room)
        windows = [TokenWindow(0, start, (*before, *ids[start : start + room]), bool(before)) for start in starts]
        tokens, wanted = padded_windows(windows)
        with _unhooked(self.model):
            vectors = hook_capture(self.model, hook_name)(torch.from_numpy(tokens))
        kept = vectors[torch.from_numpy(wanted).to(model_device(self.model))]
        values, features, counts = encode_vectors(self.sae, kept)
        return SparseCodes(
            values, features, np.r_[0, np.cumsum(counts)], np.zeros(len(ids), np.int32), np.array(ids, np.int32), 1,
            int(self.sae.cfg.d_sae), hook_name,
        )  # fmt: skip


def live_monitor(
    model: HookedModel, sae: Any, sets: Sequence[FeatureSet | str] | None, thresholds: Thresholds
) -> LiveMonitor:
    """Returns a function from the tokens written so far to the risk of each set.

    What is read is the unsteered model's activations on the text, in a forward pass of its own, and not those of the
    pass that writes: a steered feature would be read there as active because it was put there, whatever the text
    says. So one can watch for the very set that one steers, and hooks of the caller's do not act on that pass. Each
    call encodes the text so far, up to the hook's block and no further; a text of n tokens, watched at each, costs
    n (n + 1) / 2 tokens of that.

    With pooling `max` a risk never falls while a text grows, so that stopping at the first token above a threshold
    raises a false alarm on just those neutral texts on which the whole text would: the calibrated rate, on texts no
    longer than those of the calibration. With `mean` more do.

    ValueError as `monitor`.
    """
    chosen = thresholds.select(sets)
    chosen.check(model, sae)
    checked_hook(model, sae)
    return LiveMonitor(model, sae, chosen)


@runtime_checkable
class WrittenToken(Protocol):
    """What is needed of a token that a generator hands over."""

    @property
    def token_id(self) -> int: ...


@dataclass
class Guard:
    """A callback for a generator: what to do about each new token, and what it has seen of one text."""

    watch: LiveMonitor
    action: SteeringPlan | Literal["stop"]
    prompt_ids: tuple[int, ...] = ()
    every: int = 1
    """How many tokens are written between two looks."""
    risks: list[dict[str, float]] = field(default_factory=list)
    """The risks at each look."""
    fired: tuple[str, ...] = ()
    """The sets that made it act; empty as long as none did."""
    _written: list[int] = field(default_factory=list)

    def __call__(self, token: WrittenToken) -> SteeringPlan | Literal["stop"] | None:
        """Returns the action the first time that a set is seen to fire, else None (go on as before)."""
        self._written.append(int(token.token_id))
        if len(self._written) % self.every:
            return None
        self.risks.append(self.watch((*self.prompt_ids, *self._written), context=len(self.prompt_ids)))
        above = self.watch.above(self.risks[-1])
        if self.fired or not above:
            return None
        self.fired = above
        return self.action


def on_token(watch: LiveMonitor, action: SteeringPlan | Literal["stop"], *, prompt: str = "", every: int = 1) -> Guard:
    """Returns the callback of one generation: `"stop"` it, or go on with another plan, once a set of `watch` fires.

    The tokens of `prompt` are the context in which the new ones are read, but do not fire themselves. Looking only at
    `every` so many tokens costs that much less and stops that much later. ValueError for any other action, and for
    `every` below 1.
    """
    if every < 1:
        raise ValueError(f"every is {every}; it must be at least 1 token")
    if isinstance(action, str) and action != "stop":
        raise ValueError(f"unknown action {action!r} (valid: 'stop', or a SteeringPlan)")
    ids = watch.model.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    return Guard(watch, action, tuple(ids), every)
