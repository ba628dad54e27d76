"""A `topk` recipe by SAELens's own trainer, as the shipped dictionary was made, over activations kept on disk."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from sae_emotion_plugin.activation_store import ActivationStore, content_key, prefetched
from sae_emotion_plugin.files import write_whole
from sae_emotion_plugin.recipes import TrainingRecipe
from sae_emotion_plugin.training.logs import CurveFile
from sae_emotion_plugin.training.loop import FiniteBatches, curve_point, is_due, usual_log_steps
from sae_emotion_plugin.training.spaces import Fitted, finite_sample, inference_sae, sae_metadata, training_space
from sae_emotion_plugin.training.steps import TrainingDiverged

logger = logging.getLogger(__name__)

FROZEN_PARTS: dict[str | None, Literal["decoder", "encoder"]] = {
    "frozen-decoder": "decoder",
    "frozen-encoder": "encoder",
}


def fit_by_sae_lens(
    recipe: TrainingRecipe,
    store: ActivationStore,
    model_name: str,
    work: Path,
    *,
    measure: Callable[[Any], Mapping[str, float]] | None = None,
    measure_steps: int = 0,
    device: str | torch.device = "cpu",
    open_loggers: Callable[[Path], Sequence[Callable[[Mapping[str, Any]], None]]] = lambda folder: (),
) -> Fitted:
    """The SAE of a `topk` recipe, trained from the last complete checkpoint in `work` if there is one.

    Args:
        measure: figures of an inference SAE for raw activations; called every `measure_steps` steps.

    Raises:
        TrainingDiverged: the loss is no number; the last checkpoint stays.
    """
    from sae_lens import TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from sae_emotion_plugin.architectures import SparseStepTopKTrainingSAE

    sample = finite_sample(store, recipe.seed)
    space = training_space(sample)
    config = TopKTrainingSAEConfig(
        d_in=sample.shape[1],
        d_sae=recipe.d_sae,
        apply_b_dec_to_input=True,
        normalize_activations="none",
        # Tied, unit-norm start: the encoder begins as the decoder's transpose (arXiv 2406.04093, A.1).
        decoder_init_norm=1.0,
        rescale_acts_by_decoder_norm=True,
        **recipe.values("k", "aux_loss_coefficient"),
        metadata=sae_metadata(recipe, model_name),
    )
    # SAELens draws the first weights from torch's global generator, which is the user's afterwards as it was before.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        sae = SparseStepTopKTrainingSAE(config, frozen=FROZEN_PARTS.get(recipe.reference)).to(torch.device(device))
    checkpoints = work / f"checkpoints-{content_key(recipe.to_yaml(), store.key)}"
    steps = recipe.number_of_steps(len(store))
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * recipe.batch_size,
        train_batch_size_samples=recipe.batch_size,
        lr=recipe.lr,
        lr_warm_up_steps=min(recipe.lr_warm_up_steps, max(1, steps // 10)),
        lr_decay_steps=int(steps * recipe.lr_decay_share),
        lr_end=0.0,
        dead_feature_window=max(1, recipe.dead_token_window // recipe.batch_size),
        device=str(device),
        n_checkpoints=4,
        checkpoint_path=str(checkpoints),
    )
    log_steps = usual_log_steps(steps)

    class Watched(SAETrainer):
        """SAELens's trainer, whose steps are looked at."""

        def step(self, batch: torch.Tensor) -> Any:
            found = super().step(batch)
            number = self.n_training_steps + 1  # SAELens counts the step later
            losses = {name: float(loss.detach()) for name, loss in {"loss": found.loss, **found.losses}.items()}
            if not math.isfinite(losses["loss"]):
                raise TrainingDiverged(
                    f"training diverged at step {self.n_training_steps}: the loss is no number; look at lr "
                    f"({recipe.lr:g}): a smaller one, or more lr_warm_up_steps; checkpoints are in {checkpoints}"
                )
            measured = measure if is_due(number, measure_steps, steps) else None
            if number == 1 or is_due(number, log_steps, steps) or measured is not None:
                point = curve_point(
                    number,
                    steps,
                    log_steps,
                    losses=losses,
                    sae_in=found.sae_in,
                    sae_out=found.sae_out.detach(),
                    counts=(found.feature_acts > 0).sum(0),
                    decoder=self.sae.W_dec,
                    measure=measured and (lambda: measured(inference_sae(Fitted(self.sae, space, {})))),
                    tokens=self.n_training_samples,
                    dead=float(self.dead_neurons.float().mean()),
                    lr=float(self.optimizer.param_groups[0]["lr"]),
                )
                curve.add(point)
                for log in loggers:
                    log(point)
            return found

    trainer = Watched(
        cfg=trainer_config,
        sae=sae,
        data_provider=iter(()),
        save_checkpoint_fn=lambda checkpoint_path: _mark_complete(checkpoint_path, finite),
    )
    first_step, counts = _resume(trainer, checkpoints, recipe.batch_size)
    checkpoints.mkdir(parents=True, exist_ok=True)
    curve, loggers = CurveFile(checkpoints / "curve.jsonl", first_step), open_loggers(checkpoints)
    finite = FiniteBatches(prefetched(store.batches(recipe.batch_size, recipe.seed, first_step)), **counts)
    trainer.data_provider = (space.enter(batch) for batch in finite)
    trainer.fit()
    record = {
        "steps": steps,
        "tokens": steps * recipe.batch_size,
        "resumed_at_step": first_step,
        "dead": int(trainer.dead_neurons.sum()),
        **({"bad_tokens": finite.bad} if finite.bad else {}),
        "curve": curve.points,
    }
    return Fitted(sae, space, record)


def _mark_complete(checkpoint_path: Path | None, batches: FiniteBatches) -> None:
    if checkpoint_path is not None:
        write_whole(checkpoint_path / "complete", json.dumps({"seen": batches.seen, "bad": batches.bad}) + "\n")


def _resume(trainer: Any, checkpoints: Path, batch_size: int) -> tuple[int, dict[str, int]]:
    """Load the last complete checkpoint, if there is one: the steps behind it, and the tokens seen and left out."""
    complete = [path.parent for path in checkpoints.glob("*/complete")]
    if not complete:
        return 0, {}
    last = max(complete, key=lambda path: int(path.name))
    trainer.sae.load_state_dict(load_file(last / "sae_weights.safetensors"))
    trainer.load_trainer_state(last)
    # SAELens saves before it counts the step.
    trainer.n_training_steps = trainer.n_training_samples // batch_size
    trainer.checkpoint_thresholds = [
        threshold for threshold in trainer.checkpoint_thresholds if threshold > trainer.n_training_samples
    ]
    logger.info("resuming at step %d", trainer.n_training_steps)
    counts = (last / "complete").read_text(encoding="utf-8")  # empty in folders of former versions
    return trainer.n_training_steps, json.loads(counts or "{}")
