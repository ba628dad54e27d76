"""Features and tokens: which features fire on a prompt, and which tokens a feature promotes and suppresses."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.models import decode_token, logit_lens
from sae_emotion_plugin.sparse_codes import encode_texts

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

FEATURES_PER_LOGIT_CHUNK = 64


@dataclass(frozen=True)
class FiringFeature:
    """One feature on one token of a prompt."""

    position: int
    """Position of the token, BOS not counted."""
    token: str
    feature: int
    activation: float
    promotes: tuple[str, ...]
    """Tokens that the feature's decoder direction makes likelier, by the logit lens."""


@dataclass(frozen=True)
class PromptFeatures:
    """The strongest features of a prompt's tokens, strongest first within a token."""

    prompt: str
    rows: tuple[FiringFeature, ...]

    def to_pandas(self) -> "pandas.DataFrame":
        import pandas as pd

        columns = [field.name for field in fields(FiringFeature)]
        return pd.DataFrame([vars(row) for row in self.rows], columns=columns)

    def __repr__(self) -> str:
        lines = [f"PromptFeatures({self.prompt!r})"]
        for row in self.rows:
            promoted = " ".join(repr(token) for token in row.promotes)
            lines.append(
                f"  {row.position:>4} {row.token!r:<14} feature {row.feature:>6} {row.activation:>9.2f}  {promoted}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(escape=True, index=False, float_format="{:.2f}".format)


def prompt_features(
    model: HookedModel, sae: Any, prompt: str, *, top: int = 10, every_token: bool = False, promoted: int = 6
) -> PromptFeatures:
    """The `top` features of the prompt's last token, or of each token.

    Raises:
        ValueError: an empty prompt, or an SAE that does not fit the model.
    """
    if not prompt.strip():
        raise ValueError(f"the prompt {prompt!r} is empty")
    if top < 1:
        raise ValueError(f"top is {top}; at least 1 feature can be shown")
    codes = encode_texts(model, sae, [prompt], progress=False)
    positions = range(codes.n_tokens) if every_token else [codes.n_tokens - 1]
    found: list[tuple[int, int, float]] = []
    for position in positions:
        entries = slice(codes.row_starts[position], codes.row_starts[position + 1])
        order = np.argsort(-codes.values[entries], kind="stable")[:top]
        features, values = codes.features[entries][order], codes.values[entries][order]
        found += [(position, int(feature), float(value)) for feature, value in zip(features, values, strict=True)]
    lens = promoted_tokens(model, sae, sorted({feature for _, feature, _ in found}), promoted)
    rows = (
        FiringFeature(position, decode_token(model, int(codes.token_ids[position])), feature, value, lens[feature])
        for position, feature, value in found
    )
    return PromptFeatures(prompt, tuple(rows))


@dataclass(frozen=True)
class FeatureTokens:
    """The tokens at both ends of what a feature's decoder direction does to the vocabulary, the most extreme first."""

    promotes: tuple[str, ...] = ()
    suppresses: tuple[str, ...] = ()


def promoted_tokens(model: HookedModel, sae: Any, features: Sequence[int], top: int) -> dict[int, tuple[str, ...]]:
    """The `top` tokens that each feature's decoder direction promotes most."""
    return {feature: tokens.promotes for feature, tokens in lens_tokens(model, sae, features, top).items()}


def with_promoted_tokens(scores: FeatureScores, model: HookedModel, sae: Any, top: int = 10) -> FeatureScores:
    """The scores with the tokens of their features (`lens_tokens`)."""
    features = list(dict.fromkeys(row.feature for row in scores.rows))
    tokens = lens_tokens(model, sae, features, top)
    return replace(scores, rows=tuple(replace(row, **asdict(tokens[row.feature])) for row in scores.rows))


def lens_tokens(model: HookedModel, sae: Any, features: Sequence[int], top: int) -> dict[int, FeatureTokens]:
    """The `top` tokens that each feature's decoder direction promotes and suppresses, by the logit lens.

    Directions that are no residual directions, as those of an SAE on attention heads, have none, with a warning.
    """
    if sae.W_dec.shape[1] != model.cfg.d_model:
        logger.warning("no promoted tokens: the SAE writes %d dimensions, not the residual stream", sae.W_dec.shape[1])
        return {feature: FeatureTokens() for feature in features}

    def logits_of(features: list[int]) -> np.ndarray:
        return logit_lens(model, sae.W_dec[features].detach()).cpu().numpy()

    return extreme_tokens(features, logits_of, lambda token: decode_token(model, token), top)


def extreme_tokens(
    features: Sequence[int],
    logits_of: Callable[[list[int]], Float[np.ndarray, "feature vocab"]],
    decode_token: Callable[[int], str],
    top: int,
) -> dict[int, FeatureTokens]:
    """The `top` tokens with the largest and with the smallest logits of each feature, the earlier one first on a tie.

    Args:
        logits_of: the logits of at most 64 features.
        decode_token: the text of a vocabulary id.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    tokens = {}
    for first in range(0, len(features), FEATURES_PER_LOGIT_CHUNK):
        asked = list(features[first : first + FEATURES_PER_LOGIT_CHUNK])
        logits = logits_of(asked)
        if top > logits.shape[1]:
            raise ValueError(f"top is {top}, the vocabulary has {logits.shape[1]} tokens")
        for feature, row in zip(asked, logits, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(f"the logits of feature {feature} are not finite")
            ends = (tuple(decode_token(token) for token in _largest(values, top)) for values in (row, -row))
            tokens[feature] = FeatureTokens(*ends)
    return tokens


def _largest(values: Float[np.ndarray, " value"], n: int) -> list[int]:
    threshold = np.partition(values, len(values) - n)[len(values) - n]
    candidates = np.flatnonzero(values >= threshold)
    return candidates[np.argsort(-values[candidates], kind="stable")[:n]].tolist()
