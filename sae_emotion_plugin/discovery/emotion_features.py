"""A model, a dictionary and labelled texts -> the features of each emotion: encode, rank, score, name. One call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sae_emotion_plugin.activations import HookedModel
from sae_emotion_plugin.discovery.scores import FeatureScores
from sae_emotion_plugin.discovery.scoring import choose_pooling, null_runs, score_features
from sae_emotion_plugin.discovery.tokens import with_promoted_tokens
from sae_emotion_plugin.emotion_texts import LabelledTexts, without_overlap
from sae_emotion_plugin.evidence.calibration import Calibration
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.sparse_codes import Pooling, SparseCodes, encode_texts


@dataclass(frozen=True)
class Discovery:
    """The scores, and both sides' texts with their codes for whoever wants to look closer."""

    scores: FeatureScores
    train: LabelledTexts
    """Without near-duplicates of held-out texts."""
    train_codes: SparseCodes
    held_out: LabelledTexts
    held_out_codes: SparseCodes


def discover(
    model: HookedModel,
    sae: Any,
    texts: LabelledTexts,
    held_out: LabelledTexts | None = None,
    *,
    pooling: Pooling | Literal["choose"] = "max",
    emotions: Sequence[str] | None = None,
    top: int = 50,
    skip_rare: bool = False,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Discovery:
    """The features that tell each emotion from the rest, ranked on `texts` and scored on `held_out`.

    Without `held_out`, half of the texts are held out. Training texts that are near-duplicates of held-out ones are
    left out and counted. With pooling `choose`, the pooling is chosen by cross-validation inside the training texts.

    Args:
        skip_rare: leave out emotions with fewer than 20 training texts in or out of class instead of refusing them.
        cache: folder that keeps the codes, so that an interrupted run goes on (see `encode_texts`).

    Raises:
        ValueError: an SAE that does not fit the model, texts of one class, unknown or too rare emotions.
    """
    train, held_out = texts.split(0.5, seed) if held_out is None else (texts, held_out)
    train, dropped = without_overlap(train, held_out)
    codes, held_out_codes = (
        encode_texts(model, sae, part, cache=cache, progress=progress) for part in (train, held_out)
    )
    chosen = choose_pooling(codes, train, seed, emotions=emotions) if pooling == "choose" else pooling
    scores = score_features(
        codes,
        train,
        held_out=(held_out_codes, held_out),
        pooling=chosen,
        top=top,
        emotions=emotions,
        skip_rare=skip_rare,
        seed=seed,
    )
    identity = model_identity(model)
    meta = {
        **scores.meta,
        "dropped_near_duplicates": dropped,
        "pooling_chosen_on_train": pooling == "choose",
        "model": identity["name"],
        "model_weights": identity.get("weights", ""),
        "model_sha256": identity.get("gguf_sha256", ""),
        "neuronpedia_id": sae.cfg.metadata.neuronpedia_id,
        "versions": {
            name: metadata.version(name)
            for name in ("sae-emotion-plugin", "sae-lens", "transformer-lens", "transformers", "torch")
        },
    }
    scores = with_promoted_tokens(replace(scores, meta=meta), model, sae)
    return Discovery(scores, train, codes, held_out, held_out_codes)


def calibration(
    model: HookedModel,
    sae: Any,
    texts: LabelledTexts,
    *,
    pooling: Pooling = "max",
    permutations: int = 200,
    skip_rare: bool = False,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """How often the tests of `discover` find something when the labels of `texts` are permuted and mean nothing.

    Arguments as in `discover`; see `discovery.null_runs`. ValueError for labels with fewer than 20 texts.
    """
    codes = encode_texts(model, sae, texts, cache=cache, progress=progress)
    return null_runs(codes, texts, pooling=pooling, permutations=permutations, skip_rare=skip_rare, seed=seed)
