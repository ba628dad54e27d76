"""A recipe over collected activations: the SAE that its architecture names, its space and its settings, fitted."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_emotion_plugin.activation_store import ActivationStore, content_key, prefetched
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.training.loop import LoopSettings, fit
from sae_emotion_plugin.training.resampling import Resampling
from sae_emotion_plugin.training.spaces import (
    Fitted,
    TrainingSpace,
    finite_sample,
    inference_sae,
    sae_metadata,
    training_space,
)
from sae_emotion_plugin.training.steps import StepSettings

logger = logging.getLogger(__name__)

Loggers = AbstractContextManager[Sequence[Callable[[Mapping[str, Any]], None]]]
FROZEN_PARTS: dict[str | None, Literal["decoder", "encoder"]] = {
    "frozen-decoder": "decoder",
    "frozen-encoder": "encoder",
}
"""The side that keeps its random start, by the kind of reference."""


def fit_recipe(
    recipe: TrainingRecipe,
    store: ActivationStore,
    model_name: str,
    work: Path,
    *,
    measure: Callable[[Any], Mapping[str, float]] | None = None,
    measure_steps: int = 0,
    checkpoint_steps: int = 200,
    device: str | torch.device = "cpu",
    open_loggers: Callable[[Path], Loggers] = lambda folder: nullcontext(()),
    progress: bool = True,
) -> Fitted:
    """The SAE of a recipe, trained from the last checkpoint in `work` if there is one.

    Args:
        measure: figures of an inference SAE for raw activations; called every `measure_steps` steps.
    """
    sample = finite_sample(store, recipe.seed)
    layer_normed = recipe.architecture == "openai-topk"
    space = TrainingSpace(torch.zeros(sample.shape[1]), 1.0) if layer_normed else training_space(sample)
    # SAELens draws the first weights from torch's global generator, which is the user's afterwards as it was before.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        # Drawn on the CPU: one seed gives one start, wherever it is trained.
        sae = training_sae(recipe, sample.shape[1], sae_metadata(recipe, model_name)).to(torch.device(device))
    if layer_normed:
        sae.initialize_from(sample, recipe.seed)
    # Of other versions too: what is said to come from these must not go on from weights of others.
    versions = [metadata.version(name) for name in ("sae-emotion-plugin", "sae-lens", "torch")]
    folder = work / f"checkpoints-{content_key(recipe.to_yaml(), store.key, versions)}"

    def batches(first_step: int) -> Iterator[Float[Tensor, "token d_in"]]:
        raw = store.batches(recipe.batch_size, recipe.seed, first_step)
        return prefetched(space.enter(batch) for batch in raw)

    def draw(rng: np.random.Generator, n: int) -> Float[Tensor, "token d_in"]:
        return space.enter(store.rows(rng.choice(len(store), size=min(n, len(store)), replace=False)))

    settings = loop_settings(recipe, len(store), measure_steps, checkpoint_steps)
    if (tokens := settings.step.steps * recipe.batch_size) < recipe.dead_token_window:
        logger.warning(
            "the training has %d tokens, fewer than dead_token_window (%d): no feature will count as dead, nor be "
            "revived for it; a quarter of the tokens is a usual window",
            *(tokens, recipe.dead_token_window),
        )
    with open_loggers(folder) as loggers:
        training = fit(
            sae,
            batches,
            settings,
            folder,
            sample=draw,
            measure=measure and (lambda: measure(inference_sae(Fitted(sae, space, {})))),
            loggers=loggers,
            progress=progress,
        )
    if recipe.architecture == "jumprelu":
        sae.fold_W_dec_norm()  # what is saved has unit rows, whatever made it
    return Fitted(sae, space, training.to_dict())


def training_sae(recipe: TrainingRecipe, d_in: int, metadata: Any) -> Any:
    """The training SAE that a recipe's architecture names, drawn from torch's global generator."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        TopKTrainingSAEConfig,
    )

    from sae_emotion_plugin.architectures import (
        OpenAITopKTrainingSAE,
        OpenAITopKTrainingSAEConfig,
        ReluL1TrainingSAE,
        ReluL1TrainingSAEConfig,
        SparseStepTopKTrainingSAE,
    )

    common: dict[str, Any] = {"d_in": d_in, "d_sae": recipe.d_sae, "metadata": metadata}
    match recipe.architecture:
        case "topk":
            names = ("k", "aux_loss_coefficient")
            # Tied, unit-norm start: the encoder begins as the decoder's transpose (arXiv 2406.04093, A.1).
            config = TopKTrainingSAEConfig(**common, decoder_init_norm=1.0, **recipe.values(*names))
            return SparseStepTopKTrainingSAE(config, frozen=FROZEN_PARTS.get(recipe.reference))
        case "openai-topk":
            names = ("k", "aux_loss_coefficient", "k_aux", "multi_topk", "multi_topk_weight", "tied_init")
            return OpenAITopKTrainingSAE(OpenAITopKTrainingSAEConfig(**common, **recipe.values(*names)))
        case "relu-l1":
            names = ("l1_coefficient", "l1_warm_up_steps", "tied_init")
            return ReluL1TrainingSAE(ReluL1TrainingSAEConfig(**common, **recipe.values(*names)))
        case "batchtopk":
            names = ("k", "aux_loss_coefficient")
            return BatchTopKTrainingSAE(
                BatchTopKTrainingSAEConfig(**common, decoder_init_norm=1.0, **recipe.values(*names))
            )
        case "jumprelu":
            names = ("l0_coefficient", "l0_warm_up_steps", "jumprelu_bandwidth", "jumprelu_init_threshold")
            return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, **recipe.values(*names)))
    raise ValueError(f"architecture {recipe.architecture!r} has no training SAE")


def loop_settings(
    recipe: TrainingRecipe, tokens: int, measure_steps: int = 0, checkpoint_steps: int = 200
) -> LoopSettings:
    """The settings of the loop for a recipe over so many collected tokens."""
    steps = recipe.number_of_steps(tokens)
    lr = recipe.lr
    if recipe.lr_reference_width is not None:
        # The best rate falls as the inverse root of the width (arXiv 2406.04093, A.3).
        lr *= (recipe.lr_reference_width / recipe.d_sae) ** 0.5
    resampling = None
    if recipe.resampling not in (None, "none"):
        given = recipe.values("resampling", "resample_every", "resample_below")
        resampling = Resampling(given["resampling"], given["resample_every"], given["resample_below"])
    return LoopSettings(
        step=StepSettings(
            steps=steps,
            lr=lr,
            lr_warm_up_steps=min(recipe.lr_warm_up_steps, max(1, steps // 10)),
            lr_decay_steps=int(steps * recipe.lr_decay_share),
            dead_token_window=recipe.dead_token_window,
            **recipe.values("clip_norm", "adam_eps", "ema_decay"),
        ),
        resampling=resampling,
        seed=recipe.seed,
        log_steps=max(1, min(50, steps // 20)),  # at least twenty points, and one every 50 steps
        checkpoint_steps=checkpoint_steps,
        measure_steps=measure_steps,
    )
