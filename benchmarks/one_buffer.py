"""What the training benchmarks share: one buffer of activations, runs that are done once, held-out figures."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sae_lens import SAE

from sae_emotion_plugin.activation_store import ActivationStore, collect, content_key
from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.models import load_model, model_identity
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.training import recipe_documents
from sae_emotion_plugin.training.fitting import fit_recipe
from sae_emotion_plugin.training.spaces import Fitted
from sae_emotion_plugin.training.texts import first_tokens


@dataclass(frozen=True)
class Buffer:
    """Activations of a recipe's texts, collected once, and documents that had no part in them."""

    recipe: TrainingRecipe
    """Its `steps` are one pass over the tokens that were asked for."""
    model: Any
    store: ActivationStore
    held_out: list[str]
    work: Path

    @property
    def model_name(self) -> str:
        return model_identity(self.model)["name"]

    def fit(self, recipe: TrainingRecipe, **options: Any) -> Fitted:
        """A recipe's SAE, trained on the buffer; it goes on after a kill."""
        return fit_recipe(recipe, self.store, self.model_name, self.work, **options)

    def folder(self, name: str, *decides: Any) -> Path:
        """Where `once` keeps what it made."""
        return self.work / f"{name}-{content_key(self.store.key, *decides)}"

    def once(self, name: str, *decides: Any, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` gave for an empty folder, in this or an earlier run.

        Args:
            decides: all that the result depends on beside the activations, as JSON can hold it.
        """
        folder = self.folder(name, *decides)
        done = folder / "result.json"
        if not done.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(done, json.dumps(make(folder), indent=1) + "\n")
        return json.loads(done.read_text(encoding="utf-8"))

    def dead_share(self, fitted: Fitted) -> float | None:
        """Share of the features that were dead at the training's end; None where it was shorter than their window."""
        dead = fitted.record["dead"]
        return None if dead is None else dead / fitted.sae.cfg.d_sae

    def report(self, folder: Path, evaluation: Evaluation) -> dict[str, Any]:
        """The figures of the SAE saved in a folder."""
        found = evaluation.report(SAE.load_from_disk(folder))
        return {**asdict(found), "loss_recovered": found.loss_recovered}


def open_buffer(
    recipe: TrainingRecipe, texts: Path, work: Path, *, tokens: int | None, held_out: int, model: Any = None
) -> Buffer:
    """The buffer of the first `tokens` tokens (all when None) of a recipe's shuffled texts.

    Args:
        held_out: documents at most that are kept of those held out, drawn evenly.
    """
    model = load_model(recipe.model) if model is None else model
    training, others, _ = recipe_documents(recipe, model, texts)
    if tokens is not None:
        training = first_tokens(model, training, tokens)
    work.mkdir(parents=True, exist_ok=True)
    store = collect(recipe, model, training, work)
    if tokens is not None and len(store) < tokens:
        raise ValueError(f"the texts have {len(store)} tokens, fewer than {tokens}")
    if recipe.steps is None:
        passes = (tokens or len(store)) / recipe.batch_size * (recipe.epochs or 1.0)
        recipe = replace(recipe, epochs=None, steps=max(1, int(passes)))
    chosen = np.linspace(0, len(others) - 1, min(held_out, len(others))).round().astype(int)
    return Buffer(recipe, model, store, [others[i] for i in chosen], work)
