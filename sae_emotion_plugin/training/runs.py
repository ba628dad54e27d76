"""`train`: a recipe -> a trained dictionary, from activations that were collected once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_emotion_plugin.activation_store import collect, content_key, store_key
from sae_emotion_plugin.activations import canonical_hook, model_device
from sae_emotion_plugin.evaluation import Evaluation
from sae_emotion_plugin.models import model_identity
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.training.checkpoints import begin_or_go_on
from sae_emotion_plugin.training.dictionaries import TrainedDictionary, write_dictionary
from sae_emotion_plugin.training.fitting import fit_recipe
from sae_emotion_plugin.training.logs import check_loggers, open_loggers
from sae_emotion_plugin.training.steps import TrainingDiverged
from sae_emotion_plugin.training.texts import recipe_documents

SHUFFLED_MARK = "weights_shuffled"
"""Attribute of a model whose weights were shuffled; recipes of such references accept no other."""
MEASURED_DOCUMENTS = 200
"""Held-out documents that the loss recovered is measured on while training."""


def train(
    recipe: TrainingRecipe,
    model: Any,
    text_root: str | Path,
    out_dir: str | Path,
    *,
    work_dir: str | Path | None = None,
    loss_tokens: int = 10_000,
    measure_steps: int = 0,
    checkpoint_steps: int = 200,
    loggers: Sequence[str] = (),
    progress: bool = True,
) -> TrainedDictionary:
    """The dictionary made by `recipe` from the texts under `text_root`, written to `out_dir`.

    Activations go to `work_dir` (by default `<out_dir>.work`) in shards, and training leaves checkpoints there: an
    interrupted or killed run goes on where it was when called again, and ends with the weights of one that was not.
    `out_dir` appears when it is complete. Two runs with one seed on one machine give equal weights. Runs that share a
    `work_dir` share the activations that they have in common. The SAE is trained on the model's device.

    The figures on the way go to `curve.jsonl` beside the checkpoints and into `provenance.json`.

    Args:
        loss_tokens: the report's cross-entropies are measured on about this many tokens (see `evaluate`).
        measure_steps: the loss recovered is measured on held-out documents every so many steps; 0 for never.
        checkpoint_steps: steps from one checkpoint to the next.
        loggers: `tensorboard` or `wandb`, for the figures.

    Raises:
        ValueError, FileNotFoundError: `out_dir` exists, a text file is missing, or the model lacks the hook; the run
            was begun with another recipe; training diverged, or too many activations hold NaN or infinity.
        ImportError: a logger's package is missing.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise ValueError(f"{out_dir} exists already: choose a folder that does not")
    if recipe.reference == "random-directions":
        raise ValueError(f"{recipe.name} is of random directions, which are not trained: train_references makes it")
    if recipe.reference == "shuffled-weights" and not getattr(model, SHUFFLED_MARK, False):
        raise ValueError(f"{recipe.name} reads a model with shuffled weights: train_references makes it")
    if checkpoint_steps < 1 or measure_steps < 0:
        raise ValueError(f"checkpoint_steps {checkpoint_steps} is below 1, or measure_steps {measure_steps} below 0")
    check_loggers(loggers)
    canonical_hook(model, recipe.hook_name)
    training, held_out, sources = recipe_documents(recipe, model, Path(text_root))
    work = Path(work_dir) if work_dir else out_dir.with_name(out_dir.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    begun = work / f"{out_dir.name}-{content_key(str(out_dir.resolve()))}.begun.json"
    settings = {
        **asdict(recipe),
        **{f"SHA-256 of {source['path']}": source["sha256"] for source in sources},
        "activations (model, texts, windows)": store_key(recipe, model, training),
    }
    if begun.is_file():  # refused now rather than after the activations, which can take an hour, were read
        begin_or_go_on(begun, settings)
    store = collect(recipe, model, training, work, progress)
    if len(store) < recipe.batch_size:
        raise ValueError(f"{len(store)} tokens are fewer than one batch of {recipe.batch_size}: more texts are needed")
    begin_or_go_on(begun, settings)
    name = model_identity(model)["name"]
    try:
        fitted = fit_recipe(
            recipe,
            store,
            name,
            work,
            measure=_loss_recovered(model, held_out, loss_tokens) if measure_steps else None,
            measure_steps=measure_steps,
            checkpoint_steps=checkpoint_steps,
            device=model_device(model),
            open_loggers=lambda folder: open_loggers(loggers, folder, recipe.name, asdict(recipe)),
            progress=progress,
        )
    except TrainingDiverged:
        begun.unlink(missing_ok=True)  # the way on is another recipe
        raise
    trained = write_dictionary(
        out_dir,
        recipe,
        model,
        Evaluation(model, held_out, loss_tokens=loss_tokens, progress=progress).report,
        fitted.save,
        {"texts": sources, "training_tokens": len(store), "training": fitted.record},
    )
    begun.unlink(missing_ok=True)
    return trained


def _loss_recovered(model: Any, held_out: list[str], loss_tokens: int) -> Callable[[Any], Mapping[str, float]]:
    texts = held_out[:: max(1, len(held_out) // MEASURED_DOCUMENTS)]
    evaluation = Evaluation(model, texts, loss_tokens=loss_tokens, progress=False)

    def measure(sae: Any) -> Mapping[str, float]:
        report = evaluation.report(sae)
        return {"held_out_fvu": report.fvu, "loss_recovered": report.loss_recovered}

    return measure
