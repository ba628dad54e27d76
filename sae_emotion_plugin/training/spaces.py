"""The space that a dictionary is trained in: activations centred and divided by one number; and the way back.

Codes of the saved dictionary are in units of the residual stream, and its decoder rows are unit vectors. A dictionary
on layer-normed inputs has mean 0 and scale 1 here: it finds its space itself.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_emotion_plugin.activation_store import ActivationStore
from sae_emotion_plugin.files import write_whole, writing
from sae_emotion_plugin.recipes import TrainingRecipe

SAMPLE = 100_000
"""Tokens that the mean and the scale are measured on."""
SUMMED = 4096
"""Of them at a time."""


@dataclass(frozen=True)
class TrainingSpace:
    """activation = mean + scale * what the SAE is trained on."""

    mean: Float[Tensor, " d_in"]
    scale: float

    def enter(self, batch: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        return (batch - self.mean) / self.scale


def finite_sample(store: ActivationStore, seed: int) -> Float[Tensor, "token d_in"]:
    """Some of the stored activations, without those that hold NaN or infinity. ValueError when none is left."""
    rng = np.random.default_rng(seed)
    sample = store.rows(rng.choice(len(store), size=min(len(store), SAMPLE), replace=False))
    sample = sample[torch.isfinite(sample).all(dim=-1)]
    if not len(sample):
        raise ValueError("every activation holds NaN or infinity: the model overflows at this hook")
    return sample


def training_space(sample: Float[Tensor, "token d_in"]) -> TrainingSpace:
    """The space in which the sample has mean 0 and mean square 1."""
    # Summed in double precision by parts: the sample of a wide model is gigabytes as it is.
    parts = sample.split(SUMMED)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(sample)
    # One number for all dimensions keeps angles, and so unit decoder rows, what they are in the residual stream.
    squares = sum(float((part.double() - mean).square().sum()) for part in parts)
    if not squares:
        raise ValueError("all activations are equal: there is nothing to train on")
    return TrainingSpace(mean.float(), math.sqrt(squares / sample.numel()))


def sae_metadata(recipe: TrainingRecipe, model_name: str) -> Any:
    """The metadata by which SAELens and this package know where and how to read the recipe's activations."""
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(
        model_name=model_name,
        hook_name=recipe.hook_name,
        context_size=recipe.context_size,
        prepend_bos=True,
        model_from_pretrained_kwargs={},
    )


def save_folded(sae: Any, space: TrainingSpace, folder: Path) -> None:
    """Write the inference SAE for raw activations: unit decoder rows and float16 matrices, float32 vectors."""
    with writing(folder):
        _save_folded(sae, space, folder)


def _save_folded(sae: Any, space: TrainingSpace, folder: Path) -> None:
    sae.save_inference_model(folder)
    state = load_file(folder / "sae_weights.safetensors")
    # x = mean + scale * y: y - b = (x - (mean + scale * b)) / scale, and the reconstruction is scaled back. With the
    # scale moved into the codes, the encoder's division and multiplication cancel.
    state["b_dec"] = space.mean + space.scale * state["b_dec"]
    for name in ("b_enc", "threshold"):
        if name in state:
            state[name] = space.scale * state[name]
    for name in ("W_enc", "W_dec"):
        state[name] = state[name].to(torch.float16)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    if "rescale_acts_by_decoder_norm" in config:
        # The rows are unit vectors now: rescaling by their rounded norms would only add noise.
        config["rescale_acts_by_decoder_norm"] = False
    write_whole(folder / "cfg.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Fitted:
    """A trained SAE in its space, and the record of its training."""

    sae: Any
    space: TrainingSpace
    record: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write the inference SAE for raw activations."""
        save_folded(self.sae, self.space, folder)


def inference_sae(fitted: Fitted) -> Any:
    """What would be saved, as plain SAELens reads it."""
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder))
        return SAE.load_from_disk(folder)
