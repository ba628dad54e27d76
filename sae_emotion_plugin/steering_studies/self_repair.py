"""What later layers put back of what was taken away from the residual stream: along its direction, and on logits.

Everything is read on given texts with the same tokens for every plan: nothing is generated here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_emotion_plugin.activations import HookedModel, hook_captures, hook_layer, tokenize
from sae_emotion_plugin.evidence.resampling import Interval
from sae_emotion_plugin.interventions.hooks import row_steering
from sae_emotion_plugin.interventions.plans import SteeringPlan
from sae_emotion_plugin.sparse_codes import checked_hook, token_settings
from sae_emotion_plugin.steering_studies.paired_changes import contrast

logger = logging.getLogger(__name__)

UNEMBEDDED_AT_ONCE = 64


@dataclass(frozen=True)
class Repair:
    """How much of what was taken away is missing at a later hook: 1 is all of it.

    Below 1 later layers put some of it back; above 1 they took more of the same away, as layers do that amplify it.

    With d the change at the dictionary's hook and D the change at the later one, sum of D.d over sum of d.d, over the
    tokens of a prompt's unsteered texts; the mean over prompts. Earlier tokens' changes count in D too.
    """

    hook_name: str
    features: Interval | None
    controls: Interval | None
    """The mean over control sets."""


@dataclass(frozen=True)
class LogitEffect:
    """How the logits of the emotion's words, less the mean logit of all tokens, change where something was taken away.

    `direct` lets what was taken away miss at the last layer alone, before the final norm; `total` lets all layers
    react; `put_back` = total - direct is their self-repair (after McGrath et al. 2023, arXiv 2307.15771).
    """

    what: str
    direct: Interval | None
    total: Interval | None
    put_back: Interval | None


def propagation(
    model: HookedModel,
    sae: Any,
    plans: Sequence[SteeringPlan],
    texts: Mapping[str, Sequence[str]],
    words: Sequence[str] = (),
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[tuple[Repair, ...], tuple[LogitEffect, ...]]:
    """What is still missing at each later residual hook, and the direct and total effect on the words' logits.

    Prompts where a plan changes nothing say nothing of it and are left out.

    Args:
        plans: the features' first, then the controls'.
        texts: by prompt; the intervals are over prompts.
        seed: of the intervals.

    Returns:
        Both empty, with a warning, for a dictionary of another width than the residual stream; no logits without words.

    Raises:
        ValueError: words of which the model has none as a token.
    """
    hook_name, n_layers = checked_hook(model, sae), int(model.cfg.n_layers)
    if sae.cfg.d_in != model.cfg.d_model:
        logger.warning("no self-repair: the SAE writes %d dimensions, not the residual stream", sae.cfg.d_in)
        return (), ()
    later = [f"blocks.{layer}.hook_resid_post" for layer in range(hook_layer(hook_name) or 0, n_layers)]
    capture = hook_captures(model, [hook_name, *later])
    column = word_direction(model, words) if words else None
    missing_shares: dict[tuple[str, int], list[float]] = {}
    effects: dict[tuple[str, int], list[float]] = {}
    for prompt, own in tqdm(texts.items(), desc="self-repair", unit="prompt", disable=not progress):
        sums, moved = np.zeros((len(plans), len(later) + 1)), np.zeros((len(plans), 3))
        for window in tokenize(model, own, **token_settings(sae)):
            tokens = torch.tensor([window.token_ids]).expand(len(plans) + 1, -1)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[:, : int(window.bos)] = False
            with torch.inference_mode(), row_steering(model, sae, [None, *plans], mask):
                seen = [tensor.float() for tensor in capture(tokens)]
            missing, *changes = (tensor[1:] - tensor[:1] for tensor in seen)
            # In float64: what is taken away may be a thousandth of what is there.
            parts = [(missing.double() * change.double()).sum(dim=(1, 2)) for change in (missing, *changes)]
            sums += torch.stack(parts, dim=1).cpu().numpy()
            if column is not None:
                moved += _logit_changes(model, missing, seen[-1], column)
        for row in np.flatnonzero(sums[:, 0] > 0).tolist():
            missing_shares[prompt, row] = (sums[row, 1:] / sums[row, 0]).tolist()
            direct, total = (moved[row, :2] / max(1.0, moved[row, 2])).tolist()
            effects[prompt, row] = [direct, total, total - direct]
    repair = tuple(Repair(name, *_of_both(missing_shares, place, seed)) for place, name in enumerate(later))
    if column is None:
        return repair, ()
    columns = [_of_both(effects, place, seed) for place in range(3)]
    return repair, tuple(LogitEffect(*one) for one in zip(("features", "controls"), *columns, strict=True))


@torch.inference_mode()
def word_direction(model: Any, words: Sequence[str]) -> Float[Tensor, " d_model"]:
    """The direction, behind the final norm, whose product is the words' mean logit less the mean logit of all tokens.

    Every token that is one of the words counts, whatever its case and leading space. ValueError where there is none.
    """
    wanted = {word.strip().lower() for word in words}
    pieces = model.tokenizer.convert_ids_to_tokens(range(int(model.cfg.d_vocab)))
    tokens = [token for token, piece in enumerate(pieces) if (piece or "").lstrip("▁Ġ").lower() in wanted]
    if not tokens:
        raise ValueError(f"none of the words {', '.join(sorted(wanted))} is a token of the model")
    weight = next(iter(model.unembed.parameters()))
    parts = []
    # Read off the unembedding's own outputs: models keep its weights in either orientation, with a bias or without.
    for basis in torch.eye(int(model.cfg.d_model), device=weight.device, dtype=weight.dtype).split(UNEMBEDDED_AT_ONCE):
        logits = (model.unembed(basis[None])[0] - model.unembed(torch.zeros_like(basis[None]))[0]).float()
        parts.append(logits[:, tokens].mean(dim=1) - logits.mean(dim=1))
    return torch.cat(parts)


@torch.inference_mode()
def _logit_changes(
    model: Any,
    missing: Float[Tensor, "row position d_model"],
    last: Float[Tensor, "row_and_unsteered position d_model"],
    column: Float[Tensor, " d_model"],
) -> Float[np.ndarray, "row 3"]:
    """Sums over the tokens that a plan changes: the direct and the total change of the words' logits, and their number.

    `last` is the residual stream before the final norm, unsteered in its first row.
    """
    norm = getattr(model, "ln_final", torch.nn.Identity())
    dtype = next(iter(model.unembed.parameters())).dtype

    def read(vectors: Tensor) -> Tensor:
        return norm(vectors.to(dtype)).float() @ column.to(vectors.device)

    before, changed = read(last[:1]), (missing != 0).any(dim=-1)
    direct, total = ((read(one) - before) * changed for one in (last[:1] + missing, last[1:]))
    return torch.stack([direct.sum(dim=1), total.sum(dim=1), changed.sum(dim=1)], dim=1).double().cpu().numpy()


def _of_both(
    values: Mapping[tuple[str, int], Sequence[float]], place: int, seed: int
) -> tuple[Interval | None, Interval | None]:
    """The mean over prompts of the first plan's value, and of the other plans' mean."""
    own = {(prompt, 0): value[place] for (prompt, row), value in values.items() if row == 0}
    others: dict[str, list[float]] = {}
    for (prompt, row), value in values.items():
        if row:
            others.setdefault(prompt, []).append(value[place])
    controls = {(prompt, 0): float(np.mean(some)) for prompt, some in others.items()}
    return contrast({0: own}, {0: 1.0}, seed), contrast({0: controls}, {0: 1.0}, seed)
